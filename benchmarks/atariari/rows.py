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
from pipeline.origin import load_origin, require_unseen
from pipeline.probe import ProbeResult, majority, probe_features, scored, standardised
from pipeline.store import FramesDataset
from pipeline.stream import sample_frames

VERSION = 1  # of the ruler: what was measured by another is measured again
PUBLISHED = {"majority": "maj-clf", "random": "random-cnn", "vae": "vae", "supervised": "supervised"}
STANDARDISED = "+std"
PIXELS = (21, 16)
SAMPLED_FRAMES, PCA_SIZE = 4_096, 256
MARKS_S = {"vae": [120, 300, 600, 1200, 1800, 2700, 3600], "supervised": [300, 900, 1800, 3600]}


@dataclass(frozen=True)
class Cell:
    """A row of the table for one game.

    Attributes:
        row: majority, random, pixels, pca, vae, supervised, or the folder of an encoder bundle; with STANDARDISED
            behind it, features are scaled to variance 1 each.
        game: The benchmark's name.
        probe: Digest of the dataset that is probed.
        pretrain: Digest of the dataset that is learned from, or of the bundle; "" where there is neither.
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
    features = features_of(probe, _encoding(cell, probe, pretrain))
    if cell.row.endswith(STANDARDISED):
        features = standardised(features, labels)
    return {**facts, **_said(probe_features(features, labels, seed=cell.seed))}


def _said(result: ProbeResult) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(result).items()}


def _encoding(cell: Cell, probe: FramesDataset, pretrain: FramesDataset | None) -> Callable[[Tensor], Tensor]:
    kind = cell.row.removesuffix(STANDARDISED)
    if kind == "random":
        torch.manual_seed(cell.seed)
        return PublishedEncoder().eval()
    if kind == "pixels":
        return lambda frames: F.adaptive_avg_pool2d(frames[:, None].float() / 255, PIXELS).flatten(1)
    if kind == "pca":
        assert pretrain is not None
        frames = sample_frames(pretrain, ReadingOrder.whole(pretrain, "train", 1, 1), SAMPLED_FRAMES)
        return _principal_components(frames)
    encoder = load_encoder(kind, preprocess=probe.preprocess)
    require_unseen(probe, load_origin(kind))
    return lambda frames: encoder.encode(frames) * encoder.scale + encoder.mean


def _principal_components(frames: Tensor) -> Callable[[Tensor], Tensor]:
    """Frames to their scores on the first components of a sample of the pretraining part."""
    x = frames.flatten(1).float() / 255
    mean = x.mean(0)
    torch.manual_seed(0)
    _, _, components = torch.svd_lowrank(x.sub_(mean), PCA_SIZE, niter=2)
    return lambda batch: (batch.flatten(1).float() / 255 - mean) @ components
