"""Encoders that cells start from: made of random play once, with the minutes that it took.

A game's frames and each recipe's encoder are made once a seed, and shared by the arms that use them.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from curves.arms import plain

from experiment.arms import ORACLE, Cell
from experiment.oracle import save_scaling_encoder
from experiment.worlds import random_frames, write_random_play
from jobs import collect, pretrain
from jobs.workspace import Workspace
from pipeline import disk
from pipeline.errors import reading
from pipeline.machine import cores


@dataclass(frozen=True)
class Prior:
    """What an encoder was made from.

    Attributes:
        bundle: Folder of the encoder.
        frames: Random-play frames.
        collect_s: Seconds of collecting them, Ray's start included.
        pretrain_s: Seconds of the encoder's training, Ray's start included.
    """

    bundle: str
    frames: int
    collect_s: float
    pretrain_s: float


def prior_of(cell: Cell, home: Path) -> Prior | None:
    """The encoder that a cell starts from, made where there is none yet; None where it starts from nothing.

    Args:
        cell: Which game, recipe and seed.
        home: Folder of frames and encoders.

    Raises:
        UserError: It cannot be made.
    """
    if cell.settings["encoder"] is None:
        return None
    home = home / f"{cores()}-cores"  # seconds are of so many
    data = f"{cell.game}-{cell.settings['encoder']}-{cell.settings['prior_frames']}-{cell.seed}"
    digest = hashlib.sha256(json.dumps(plain(cell.encoder), sort_keys=True).encode()).hexdigest()[:8]
    record = home / "prior" / f"{data}-{digest}.json"
    record.parent.mkdir(parents=True, exist_ok=True)
    with _alone(home / "prior" / f"{cell.game}-{cell.seed}.lock"):
        if not record.is_file():
            prior = (
                _scaling(cell, record.with_suffix("")) if cell.settings["encoder"] == ORACLE else _learned(cell, home)
            )
            disk.write_text(record, json.dumps(asdict(prior)) + "\n")
        return Prior(**_read(record))


def _read(path: Path) -> Any:
    with reading(str(path), "remove it and what lies beside it, to have it made again"):
        return json.loads(path.read_text())


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Lets other processes wait, so that nothing is made twice."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _scaling(cell: Cell, bundle: Path) -> Prior:
    known = cell.world
    assert known is not None
    started = time.monotonic()
    frames = random_frames(known, min(cell.settings["prior_frames"], 16_384), cell.seed)
    shutil.rmtree(bundle, ignore_errors=True)  # of a call that was cut off
    save_scaling_encoder(bundle, known.preprocess, frames)
    return Prior(str(bundle), len(frames), round(time.monotonic() - started, 1), 0.0)


def _learned(cell: Cell, home: Path) -> Prior:
    workspace, recipe, num_frames = Workspace.at(str(home)), cell.encoder, cell.settings["prior_frames"]
    assert recipe is not None
    name = f"{cell.game}-{num_frames}-{cell.seed}"
    frames = home / "frames" / name
    seconds = frames.with_suffix(".json")
    if not seconds.is_file():
        started = time.monotonic()
        if cell.world is None:
            collect.run(
                workspace,
                game=cell.game,
                frames=num_frames,
                out=str(frames),
                seed=cell.seed,
                num_workers=2,
                overwrite=True,
            )
        else:
            shutil.rmtree(frames, ignore_errors=True)  # of a call that was cut off
            write_random_play(cell.world, frames, num_frames, cell.seed)
        disk.write_text(seconds, json.dumps(round(time.monotonic() - started, 1)) + "\n")
    started = time.monotonic()
    made = pretrain.run(workspace, recipe, str(frames), f"{name}-{recipe.name}")
    return Prior(made["bundle"], num_frames, _read(seconds), round(time.monotonic() - started, 1))
