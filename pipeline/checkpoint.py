"""The state of a training at the start of an epoch, as plain files: safetensors and JSON, no pickle.

The random state is not among them because it needs no saving: every epoch seeds its generators anew from the seed, the
epoch and the worker's rank.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import nn, optim

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
PROGRESS_FILE = "progress.json"


@dataclass
class Progress:
    """How far a training has come.

    Attributes:
        epoch: The next epoch to run.
        step: Updates done.
        frames: Frames trained on, by all workers.
        train_s: Seconds spent in training steps, waiting for data included; start-up and evaluation not.
        total_s: Seconds since training started, without those that were lost when it was killed.
        planned_epochs: Epochs after which training ends; fewer than configured where time is limited.
    """

    epoch: int
    step: int
    frames: int
    train_s: float
    total_s: float
    planned_epochs: int


def save_checkpoint(folder: Path, model: nn.Module, optimizer: optim.Optimizer, progress: Progress) -> None:
    """Writes model, optimizer and progress into an existing folder."""
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / MODEL_FILE)
    states = optimizer.state_dict()["state"]
    flat = {f"{index}/{key}": value for index, state in states.items() for key, value in state.items()}
    save_file({name: tensor.contiguous() for name, tensor in flat.items()}, folder / OPTIMIZER_FILE)
    (folder / PROGRESS_FILE).write_text(json.dumps(asdict(progress)))


def load_checkpoint(folder: Path, model: nn.Module, optimizer: optim.Optimizer) -> Progress:
    """Puts a saved state into a model and an optimizer of the same configuration."""
    model.load_state_dict(load_file(folder / MODEL_FILE))
    record = optimizer.state_dict()
    for name, tensor in load_file(folder / OPTIMIZER_FILE).items():
        index, _, key = name.partition("/")
        record["state"].setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict(record)
    return Progress(**json.loads((folder / PROGRESS_FILE).read_text()))
