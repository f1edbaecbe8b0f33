"""A run of Q-learning keeps its encoder as it was, while the encoder goes on learning; where: kept_encoders.py."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from jobs.improving import encoder_card, measured, newest_model
from jobs.kept_encoders import (
    EARLY_FILE,
    ENCODERS_FOLDER,
    LATE_FILE,
    Frames,
    evenly,
    kept_encoders,
    leftovers,
    place_of,
)
from jobs.training import Training
from pipeline import bundle
from pipeline.artifact import save_encoder
from pipeline.models.distributions import bits_per_dim
from pipeline.origin import load_origin
from pipeline.registry import Resolved, Run
from pipeline.schema import Preprocess
from rllib_ext.algorithm import LatentDQN
from rllib_ext.replay import ColumnarReplay

NUM_FRAMES = 2_048  # of the replay, for the statistics
NUM_COMPARED = 256  # early ones, and as many late ones
_LATE_SHARE = 0.1  # of the rows held


class KeptEncoders:
    """Those of one run, written while it trains; it draws no number of the run's own generators."""

    def __init__(self, run: Run, plan: Training, preprocess: Preprocess, resolved: Resolved | None) -> None:
        """Takes what a bundle says of its maker."""
        self._run, self._plan, self._preprocess, self._resolved = run, plan, preprocess, resolved
        self._folder = run.folder / ENCODERS_FOLDER

    def keep(self, algorithm: LatentDQN) -> None:
        """Writes the newest encoder, if it has begun to learn on its bound and is not there yet, and thins out."""
        path = place_of(self._run.folder, algorithm.agent_steps)
        if not algorithm.encoder_learning.has_started or path.exists():
            return
        self._folder.mkdir(exist_ok=True)
        rng = np.random.default_rng([algorithm.seed, algorithm.agent_steps])
        if not kept_encoders(self._run.folder):
            _write_frames(self._folder / EARLY_FILE, _some(algorithm.replay, rng, NUM_COMPARED))
        _write_frames(self._folder / LATE_FILE, _latest(algorithm.replay, rng))
        frames = _some(algorithm.replay, rng, NUM_FRAMES)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(algorithm.agent_steps)
            model = newest_model(algorithm, self._preprocess)
            stats, bound = measured(model, frames)
        bits = bits_per_dim(bound, self._preprocess.height * self._preprocess.width)
        card = encoder_card(self._run, algorithm, self._resolved, bits)
        origin = load_origin(self._resolved.path) if self._resolved else None
        save_encoder(path, model, stats, self._preprocess, card, origin)
        self._thin_out()

    def end_with(self, made: Path, agent_steps: int) -> None:
        """Lets the last one be the very bundle that the run has made, so that one sha256 names both."""
        path = place_of(self._run.folder, agent_steps)
        if path.exists():  # else nothing has been learned
            self._remove(path)
            bundle.unpack(bundle.pack(made), path, bundle.sha256_of(made))

    def forget_after(self, agent_steps: int) -> None:
        """Drops what a killed sitting kept after its last checkpoint, and what it left half-written."""
        for steps, path in kept_encoders(self._run.folder):
            if steps > agent_steps:
                self._remove(path)
        for leftover in leftovers(self._run.folder):
            _discard(leftover)

    def _thin_out(self) -> None:
        by_steps = dict(kept_encoders(self._run.folder))
        staying = evenly(by_steps, self._plan.train.checkpoint_agent_steps)
        for steps in by_steps.keys() - set(staying):
            self._remove(by_steps[steps])

    def _remove(self, path: Path) -> None:
        """By way of a name that passes for no bundle, should the run be killed meanwhile."""
        if path.exists():
            aside = path.with_name(f".{path.name}-gone")
            shutil.rmtree(aside, ignore_errors=True)
            _discard(path.rename(aside))


def _some(replay: ColumnarReplay, rng: np.random.Generator, count: int) -> Frames:
    return replay.rows_at("obs", replay.held_places(rng.permutation(len(replay))[:count]))


def _latest(replay: ColumnarReplay, rng: np.random.Generator) -> Frames:
    """Of the newest tenth of what is held."""
    lanes = replay.spec.num_lanes
    rows = max(-(-NUM_COMPARED // lanes), int(_LATE_SHARE * len(replay)) // lanes)
    newest, _ = replay.ends(rows)
    return replay.rows_at("obs", rng.permutation(newest)[:NUM_COMPARED])


def _write_frames(path: Path, frames: Frames) -> None:
    """(N, H, W) one above the other; replaced as a whole."""
    draft = path.with_name(f".{path.name}")
    Image.fromarray(np.concatenate(list(frames))).save(draft, format="PNG")
    os.replace(draft, path)


def _discard(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
