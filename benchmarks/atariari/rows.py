"""One cell of the ruler's table: features, or answers, of one kind for one game."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from atariari import training
from atariari.networks import PublishedEncoder
from pipeline.artifact import load_encoder
from pipeline.labels import features_of, read_labels
from pipeline.order import ReadingOrder
from pipeline.probe import ProbeResult, majority, probe_features, scored
from pipeline.store import FramesDataset
from pipeline.stream import sample_frames

VERSION = 1  # of the ruler: what was measured by another is measured again
PUBLISHED = {"majority": "maj-clf", "random": "random-cnn", "vae": "vae", "supervised": "supervised"}
PIXELS = (21, 16)
PCA_FRAMES, PCA_SIZE = 4_096, 256
MARKS_S = {"vae": [120, 300, 600, 1200, 1800, 2700, 3600], "supervised": [300, 900, 1800, 3600]}


@dataclass(frozen=True)
class Cell:
    """A row of the table for one game.

    Attributes:
        row: majority, random, pixels, pca, pca-whitened, vae, supervised, or the folder of an encoder bundle.
        game: The benchmark's name.
        probe: Digest of the dataset that is probed.
        pretrain: Digest of the dataset that is learned from; "" where nothing is.
        seed: Of weights and batches.
        version: Of the ruler.
    """

    row: str
    game: str
    probe: str
    pretrain: str
    seed: int
    version: int = VERSION

    @property
    def digest(self) -> str:
        """Short name of this configuration."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


def measure(cell: Cell, probe: FramesDataset, pretrain: FramesDataset | None, work: Path) -> dict[str, Any]:
    """Runs a cell; `work` keeps what long trainings need to go on."""
    labels = read_labels(probe)
    facts: dict[str, Any] = {
        "variables": list(labels.variables),
        "dropped": list(labels.dropped),
        "duplicates": labels.num_duplicates,
    }
    if cell.row in MARKS_S:
        folder, marks = work / cell.digest, [float(mark) for mark in MARKS_S[cell.row]]
        if cell.row == "vae":
            assert pretrain is not None
            curve = training.published_vae(folder, pretrain, probe, labels, marks, cell.seed)
        else:
            curve = training.supervised(folder, probe, labels, marks, cell.seed)
        last = curve[-1]
        return {**facts, "f1": last["f1"], "f1_by_variable": last["f1_by_variable"], "curve": curve}
    if cell.row == "majority":
        return {**facts, **_said(scored(labels, majority(labels)))}
    features = features_of(probe, _encoding(cell, pretrain))
    return {**facts, **_said(probe_features(features, labels, seed=cell.seed))}


def _said(result: ProbeResult) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(result).items()}


def _encoding(cell: Cell, pretrain: FramesDataset | None) -> Callable[[Tensor], Tensor]:
    if cell.row == "random":
        torch.manual_seed(cell.seed)
        return PublishedEncoder().eval()
    if cell.row == "pixels":
        return lambda frames: F.adaptive_avg_pool2d(frames[:, None].float() / 255, PIXELS).flatten(1)
    if cell.row.startswith("pca"):
        assert pretrain is not None
        return _principal_components(pretrain, is_whitened=cell.row == "pca-whitened")
    return load_encoder(cell.row).encode


def _principal_components(dataset: FramesDataset, *, is_whitened: bool) -> Callable[[Tensor], Tensor]:
    """Frames to their scores on the first components of a sample of the pretraining part."""
    frames = sample_frames(dataset, ReadingOrder.whole(dataset, "train", 1, 1), PCA_FRAMES)
    x = frames.flatten(1).float() / 255
    mean = x.mean(0)
    x -= mean
    torch.manual_seed(0)
    _, sizes, components = torch.svd_lowrank(x, PCA_SIZE, niter=2)
    scale = sizes / len(x) ** 0.5 if is_whitened else torch.ones_like(sizes)
    components = components / scale.clamp(min=1e-4 * float(sizes[0]))
    return lambda frames: (frames.flatten(1).float() / 255 - mean) @ components
