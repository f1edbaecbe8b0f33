"""The state of a training between two updates, as a sealed folder of plain files: safetensors and JSON, no pickle.

The random state is not among them because it needs no saving: every update seeds its generators anew from the seed, its
number and the worker's rank.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow.fs as pafs
import ray.train
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn, optim

from pipeline import bundle
from pipeline.errors import UserError, reading
from pipeline.untrusted import from_record, read_json, short
from pipeline.weights import require_same_form

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
PROGRESS_FILE = "progress.json"
_PREFIX = "step-"
_NAME = re.compile(rf"{_PREFIX}\d{{9}}")

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
        UserError: The folder is not whole, or what it holds does not fit.
    """
    bundle.verify(folder)
    with reading(f"the checkpoint {folder}", "remove that folder to go on from an earlier one, or start anew"):
        weights, moments = load_file(folder / MODEL_FILE), load_file(folder / OPTIMIZER_FILE)
        require_same_form(weights, model.state_dict())
        held = read_json(folder / PROGRESS_FILE, PROGRESS_FILE)
        progress = from_record(Progress, held, PROGRESS_FILE, may_lack="batch")
        record = optimizer.state_dict()
        for name, tensor in moments.items():
            index, _, key = name.partition("/")
            record["state"].setdefault(int(index), {})[key] = tensor
        if progress.step:  # Adam has none before its first update
            _require_moments(record["state"], optimizer)
        model.load_state_dict(weights)
        optimizer.load_state_dict(record)
        return progress


def _require_moments(state: dict[int, dict[str, Tensor]], optimizer: optim.Optimizer) -> None:
    """Adam's fused update reads them by the parameters' sizes, without a look at their own."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if state.keys() != set(range(len(parameters))):
        raise ValueError(f"there are moments of {len(state)} parameters, and {len(parameters)} parameters")
    for index, parameter in enumerate(parameters):
        forms = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in state[index].items()}
        moment = (torch.float32, tuple(parameter.shape))
        if forms != {"step": (torch.float32, ()), "exp_avg": moment, "exp_avg_sq": moment}:
            raise ValueError(f"the moments of parameter {index} are {short(forms)}, not two of {moment}")


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
    folders = (entry for entry in entries if entry.type == pafs.FileType.Directory)
    return sorted((entry.path for entry in folders if _NAME.fullmatch(entry.base_name)), reverse=True)


def _is_sound(filesystem: pafs.FileSystem, path: str) -> bool:
    with ray.train.Checkpoint(path, filesystem).as_directory() as folder:
        try:
            bundle.verify(Path(folder))
        except UserError as error:
            log.warning("a checkpoint is not used: %s", error)
            return False
    return True
