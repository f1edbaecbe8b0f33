"""Long trainings of the published rows: at most so many seconds, resumable, measured on the way."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from atariari.networks import PublishedVAE, SupervisedProbe
from pipeline.labels import TEST, TRAIN, VALIDATION, Labels, features_of
from pipeline.probe import MAX_EPOCHS, EpisodeSampler, Plateau, probe_features, scored
from pipeline.schema import Preprocess
from pipeline.store import FramesDataset

VAE_LR, PROBE_LR, ADAM_EPS = 3e-4, 5e-4, 1e-5
VAE_TRAIN_SHARE = 0.8
KEEP_EVERY_S = 60.0

Point = dict[str, Any]


def frames_of(dataset: FramesDataset) -> Tensor:
    """All frames (N, H, W) uint8, in memory."""
    held: Preprocess = dataset.preprocess
    found = torch.empty(dataset.num_frames, held.height, held.width, dtype=torch.uint8)
    place = 0

    def take(batch: Tensor) -> Tensor:
        nonlocal place
        found[place : place + len(batch)] = batch
        place += len(batch)
        return torch.empty(len(batch), 0)

    features_of(dataset, take)
    return found


class Clocked:
    """A training that is kept: its state in one file, what was measured on the way in another.

    Args:
        folder: Of this training.
        modules: Whatever has a state: network, optimizer, by name.
        update: One update.
        measure: What is known after so many seconds.
    """

    def __init__(
        self, folder: Path, modules: dict[str, Any], update: Callable[[], None], measure: Callable[[], Point]
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._state, self._points = folder / "state.pt", folder / "curve.json"
        self._modules, self._update, self._measure = modules, update, measure
        self.keep_every_s = KEEP_EVERY_S
        self.seconds, self.updates = 0.0, 0
        self.curve: list[Point] = json.loads(self._points.read_text()) if self._points.is_file() else []
        if self._state.is_file():
            kept = torch.load(self._state)
            self.seconds, self.updates = kept.pop("seconds"), kept.pop("updates")
            for name, state in kept.items():
                modules[name].load_state_dict(state)

    def run(self, marks_s: list[float], is_done: Callable[[], bool] = lambda: False) -> list[Point]:
        """Trains to each mark in turn and measures there; seconds are those of training alone.

        A training that was cut off goes on from what was kept last, at most KEEP_EVERY_S before.
        """
        for mark in marks_s:
            if any(point["mark_s"] == mark for point in self.curve):
                continue
            self._train_to(mark, is_done)
            point = {"mark_s": mark, "seconds": round(self.seconds, 1), "updates": self.updates, **self._measure()}
            self.curve.append(point)
            self._points.write_text(json.dumps(self.curve))
            print(json.dumps(point), flush=True)
        return self.curve

    def _train_to(self, mark: float, is_done: Callable[[], bool]) -> None:
        kept = self.seconds
        while self.seconds < mark and not is_done():
            began = time.perf_counter()
            self._update()
            self.seconds += time.perf_counter() - began
            self.updates += 1
            if self.seconds - kept > self.keep_every_s:
                self._keep()
                kept = self.seconds
        self._keep()

    def _keep(self) -> None:
        draft = self._state.with_suffix(".tmp")
        states = {name: module.state_dict() for name, module in self._modules.items()}
        torch.save({**states, "seconds": self.seconds, "updates": self.updates}, draft)
        draft.replace(self._state)


def published_vae(
    folder: Path, pretrain: FramesDataset, probe: FramesDataset, labels: Labels, marks_s: list[float], seed: int
) -> list[Point]:
    """The published VAE on the pretraining part; at each mark its posterior means are probed."""
    torch.manual_seed(seed)
    vae = PublishedVAE()
    optimizer = torch.optim.Adam(vae.parameters(), VAE_LR, eps=ADAM_EPS)
    frames, batches = frames_of(pretrain), _Batches(_training_episodes(pretrain))
    losses: deque[float] = deque(maxlen=500)

    def update() -> None:
        loss = vae.loss(frames[batches.next()])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    def measure() -> Point:
        found = probe_features(features_of(probe, vae.encoder), labels)
        return {"f1": found.f1, "f1_by_variable": found.f1_by_variable, "loss": float(np.mean(losses or [np.nan]))}

    return Clocked(folder, {"vae": vae, "optimizer": optimizer}, update, measure).run(marks_s)


def supervised(folder: Path, probe: FramesDataset, labels: Labels, marks_s: list[float], seed: int) -> list[Point]:
    """The published encoder trained end to end on the probes' training part, one copy a variable."""
    torch.manual_seed(seed)
    learner = _Supervised(frames_of(probe), labels)
    modules = {"network": learner.network, "optimizer": learner.optimizer, "schedule": learner}
    return Clocked(folder, modules, learner.update, learner.measure).run(marks_s, lambda: learner.is_done)


class _Batches:
    """Batches of rows, epoch after epoch. A training that goes on draws others: they are independent anyway."""

    def __init__(self, sampler: EpisodeSampler) -> None:
        self._sampler, self._rng = sampler, np.random.default_rng()
        self._waiting: list[Tensor] = []

    @property
    def is_epoch_over(self) -> bool:
        return not self._waiting

    def next(self) -> Tensor:
        if not self._waiting:
            self._waiting = list(torch.from_numpy(self._sampler.epoch(self._rng)))
        return self._waiting.pop()


def _training_episodes(dataset: FramesDataset) -> EpisodeSampler:
    """The first 80% of the episodes that are long enough."""
    episodes = dataset.episodes.to_pylist()
    first_of_file = dict(zip([f.name for f in dataset.files], np.cumsum([0, *(f.rows for f in dataset.files)])))
    spans = [(first_of_file[e["file"]] + e["first_row"], e["length"]) for e in episodes if e["length"] > 64]
    spans = spans[: max(1, int(VAE_TRAIN_SHARE * len(spans)))]
    episode = np.full(dataset.num_frames, -1)
    for number, (first, length) in enumerate(spans):
        episode[first : first + length] = number
    return EpisodeSampler(np.flatnonzero(episode >= 0), episode)


class _Supervised:
    """One network a variable, each with its own learning rate and stop."""

    def __init__(self, frames: Tensor, labels: Labels) -> None:
        self._frames, self._labels = frames, labels
        self._values = torch.from_numpy(labels.values.astype(np.int64))
        count = len(labels.variables)
        self.network = SupervisedProbe(count)
        groups = [
            {"params": [*self.network.encoders[at].parameters(), *self.network.layers[at].parameters()]}
            for at in range(count)
        ]
        self.optimizer = torch.optim.Adam(groups, PROBE_LR, eps=ADAM_EPS)
        self._train = _Batches(EpisodeSampler(labels.rows(TRAIN), labels.episode))
        self._validation = EpisodeSampler(labels.rows(VALIDATION), labels.episode)
        self._plateau = Plateau(count)
        self._epochs = 0

    @property
    def is_done(self) -> bool:
        return bool(self._plateau.is_stopped.all()) or self._epochs >= MAX_EPOCHS

    def update(self) -> None:
        """One update of every network that has not stopped; after an epoch, a look at the validation part."""
        rows = self._train.next()
        self.optimizer.zero_grad()
        for at in np.flatnonzero(~self._plateau.is_stopped):
            F.cross_entropy(self.network.logits(self._frames[rows], at), self._values[rows, at]).backward()
        self.optimizer.step()  # Adam leaves alone what has no gradient
        if self._train.is_epoch_over:
            self._end_epoch()

    def _end_epoch(self) -> None:
        self._epochs += 1
        rows = self._validation.epoch(np.random.default_rng()).reshape(-1)
        self._plateau.step((self._predicted(rows) == self._labels.values[rows]).mean(0))
        for group, lr in zip(self.optimizer.param_groups, self._plateau.lr):
            group["lr"] = float(lr)

    def measure(self) -> Point:
        """Scores on the test part."""
        found = scored(self._labels, self._predicted(self._labels.rows(TEST)))
        return {"f1": found.f1, "f1_by_variable": found.f1_by_variable, "epochs": self._epochs}

    @torch.inference_mode()
    def _predicted(self, rows: np.ndarray) -> np.ndarray:
        parts = [
            torch.stack(
                [self.network.logits(self._frames[some], at).argmax(1) for at in range(self._values.shape[1])], 1
            )
            for some in torch.split(torch.from_numpy(rows), 256)
        ]
        return torch.cat(parts).numpy().astype(np.uint8)

    def state_dict(self) -> dict[str, Any]:
        """Of the schedule."""
        plateau = {name: value.tolist() for name, value in vars(self._plateau).items()}
        return {"epochs": self._epochs, "plateau": plateau}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the schedule."""
        self._epochs = state["epochs"]
        vars(self._plateau).update({name: np.array(value) for name, value in state["plateau"].items()})
