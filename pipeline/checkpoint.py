"""The state of a training between two updates, as a sealed folder of plain files: safetensors and JSON, no pickle.

The random state is not among them because it needs no saving: every update seeds its generators anew from the seed, its
number and the worker's rank.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow.fs as pafs
import ray.train
from safetensors.torch import load_file, save_file
from torch import nn, optim

from pipeline import bundle
from pipeline.errors import UserError

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
PROGRESS_FILE = "progress.json"
_PREFIX = "step-"

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a training has come.

    Attributes:
        epoch: The epoch that is being run, or the next one to run.
        step: Updates done.
        frames: Frames trained on, by all workers.
        train_s: Seconds spent in training steps, waiting for data included; start-up and evaluation not.
        total_s: Seconds since training started, without those that were lost when it was killed.
        planned_epochs: Epochs after which training ends; fewer than configured where time is limited.
        batch: Batches of `epoch` that have been trained on.
    """

    epoch: int
    step: int
    frames: int
    train_s: float
    total_s: float
    planned_epochs: int
    batch: int = 0


def folder_name(progress: Progress) -> str:
    """What the folder of a checkpoint is called."""
    return f"{_PREFIX}{progress.step:09d}"


def save_checkpoint(folder: Path, model: nn.Module, optimizer: optim.Optimizer, progress: Progress) -> None:
    """Writes model, optimizer and progress into a new folder, and seals it."""
    with bundle.writing(folder) as draft:
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, draft / MODEL_FILE)
        states = optimizer.state_dict()["state"]
        flat = {f"{index}/{key}": value for index, state in states.items() for key, value in state.items()}
        save_file({name: tensor.contiguous() for name, tensor in flat.items()}, draft / OPTIMIZER_FILE)
        (draft / PROGRESS_FILE).write_text(json.dumps(asdict(progress)))


def load_checkpoint(folder: Path, model: nn.Module, optimizer: optim.Optimizer) -> Progress:
    """Puts a saved state into a model and an optimizer of the same configuration.

    Raises:
        UserError: The folder is not whole.
    """
    bundle.verify(folder)
    model.load_state_dict(load_file(folder / MODEL_FILE))
    record = optimizer.state_dict()
    for name, tensor in load_file(folder / OPTIMIZER_FILE).items():
        index, _, key = name.partition("/")
        record["state"].setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict(record)
    return Progress(**json.loads((folder / PROGRESS_FILE).read_text()))


def newest_sound(filesystem: pafs.FileSystem, training: str) -> ray.train.Checkpoint | None:
    """The last checkpoint of a training whose bytes are all there.

    A damaged or half-written one is named in a warning, and the one before it is taken. Ray Train's own record is not
    asked: it lags behind what is stored by seconds, is not written atomically, and knows nothing of bytes.

    Args:
        filesystem: Where the training is.
        training: Its folder, with the checkpoints in it.
    """
    found = (path for path in _newest_first(filesystem, training) if _is_sound(filesystem, path))
    return next((ray.train.Checkpoint(path, filesystem) for path in found), None)


def step_of(checkpoint: ray.train.Checkpoint) -> int:
    """The updates after which a checkpoint was written."""
    return int(str(checkpoint.path).rpartition(_PREFIX)[2])


def keep_only(filesystem: pafs.FileSystem, training: str, kept: ray.train.Checkpoint | None) -> None:
    """Removes all checkpoints of a training but one."""
    for path in _newest_first(filesystem, training):
        if kept is None or path != kept.path:
            filesystem.delete_dir(path)


def _newest_first(filesystem: pafs.FileSystem, training: str) -> list[str]:
    entries = filesystem.get_file_info(pafs.FileSelector(training, allow_not_found=True))
    return sorted((entry.path for entry in entries if entry.base_name.startswith(_PREFIX)), reverse=True)


def _is_sound(filesystem: pafs.FileSystem, path: str) -> bool:
    with ray.train.Checkpoint(path, filesystem).as_directory() as folder:
        try:
            bundle.verify(Path(folder))
        except UserError as error:
            log.warning("a checkpoint is not used: %s", error)
            return False
    return True
