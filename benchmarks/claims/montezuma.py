"""Montezuma's Revenge: what a linear map reads off the latents of an encoder that a recipe makes, and off PCA's."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from claims.cells import Cell, Claim, Figures, Judged, Results, Scope
from claims.fixed import bars
from claims.fixed import montezuma as rules
from jobs import pretrain
from jobs.cluster import ray_session
from jobs.recipes import PretrainRecipe, pretrain_recipe
from jobs.workspace import Workspace
from pipeline.artifact import load_encoder
from pipeline.atari import preprocess_for
from pipeline.collect import collect
from pipeline.machine import cores
from pipeline.store import FramesDataset
from pipeline.train import resources_needed

SEED = bars.SEEDS[0]  # it is run once
PROBE_SEED = 1_000
PCA_FRAMES = 8_192
BATCH = 256


@dataclass(frozen=True)
class Plan:
    """How it is run.

    Attributes:
        recipe: Of `latentrl pretrain`; as it is.
        num_frames: To pretrain on.
        num_probe_frames: Of other games, for the linear map; a fifth of their episodes is held out.
        protocol, resolution: Of the frames; RAM labels are exact at full size.
    """

    recipe: PretrainRecipe
    num_frames: int = 100_000
    num_probe_frames: int = 50_000
    protocol: str = "atariari"
    resolution: tuple[int, int] = (210, 160)


def measure(plan: Plan, seed: int, home: Path) -> Figures:
    """Plays, pretrains, and fits; everything large goes below `home`."""
    workspace = Workspace.at(str(home))
    with ray_session(workspace, needs=resources_needed(plan.recipe.train), what="collecting and training workers"):
        pretraining = _play(home, plan, plan.num_frames, seed)
        probing = _play(home, plan, plan.num_probe_frames, PROBE_SEED + seed)
        made = pretrain.run(workspace, plan.recipe, pretraining.uri, "montezuma")
    encoder = load_encoder(made["bundle"])
    codes, labels, episodes = read_codes(probing, encoder.encode)
    figures = {"z_dim": codes.shape[1], "encoder": _r2(codes, labels, episodes, seed)}
    codes, labels, episodes = read_codes(probing, _principal(pretraining, seed))
    figures |= {"pca": _r2(codes, labels, episodes, seed), "frames": len(codes), "episodes": len(np.unique(episodes))}
    return {**figures, "label_std": labels.std(0).tolist(), "bits_per_dim": made["bits_per_dim"]}


def _play(home: Path, plan: Plan, num_frames: int, seed: int) -> FramesDataset:
    collected = collect(
        str(home / f"frames-{seed}"),
        preprocess_for(rules.GAME, plan.protocol, plan.resolution),
        frames=num_frames,
        behaviour=rules.ScriptsFactory(),
        played_by={"policy": "scripts of benchmarks/claims"},
        seed=seed,
        with_ram=True,
        num_workers=cores(),
    )
    return collected.dataset


def read_codes(dataset: FramesDataset, encode: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes (N, Z), labels (N, 3) and episodes (N,) of the frames in the room with the skull."""
    codes, labels, episodes = [], [], []
    for frames, ram, episode_ids in _read(dataset):
        is_there = ram[:, rules.ROOM_BYTE] == rules.FIRST_ROOM
        batches = torch.from_numpy(frames[is_there]).split(BATCH)
        with torch.no_grad():
            codes += [encode(batch).numpy() for batch in batches if len(batch)]
        labels.append(ram[is_there][:, list(rules.LABELS.values())])
        episodes.append(episode_ids[is_there])
    return np.concatenate(codes), np.concatenate(labels), np.concatenate(episodes)


def _read(dataset: FramesDataset) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Frames (n, H, W), RAM (n, 128) and episodes (n,), a file at a time."""
    shape = (dataset.preprocess.height, dataset.preprocess.width)
    for file in dataset.files:
        table = pq.read_table(dataset.path(file), columns=["obs", "ram", "episode_id"], filesystem=dataset.filesystem)
        frames, ram = (np.frombuffer(b"".join(table[name].to_pylist()), np.uint8) for name in ("obs", "ram"))
        yield frames.reshape(-1, *shape), ram.reshape(len(table), -1), table["episode_id"].to_numpy()


def _principal(dataset: FramesDataset, seed: int) -> Any:
    """Projection on the principal directions of frames of the dataset, evenly taken."""
    stride = max(1, dataset.num_frames // PCA_FRAMES)
    parts = [torch.from_numpy(frames[::stride].copy()) for frames, _, _ in _read(dataset)]
    levels = torch.cat(parts).flatten(1).float()
    mean = levels.mean(0)
    torch.manual_seed(seed)
    most = min(rules.PCA_DIMENSIONS, len(levels) - 1)
    _, _, basis = torch.svd_lowrank(levels - mean, most, niter=4)

    def project(frames: Tensor) -> Tensor:
        return (frames.flatten(1).float() - mean) @ basis

    return project


def _r2(codes: np.ndarray, labels: np.ndarray, episodes: np.ndarray, seed: int) -> dict[str, float]:
    values = rules.linear_r2(codes, labels, rules.held_out(episodes, seed), episodes)
    return dict(zip(rules.LABELS, values.tolist()))


def _measure(cell: Cell) -> Figures:
    with tempfile.TemporaryDirectory(prefix="montezuma-") as folder:
        return measure(cell.plan, cell.seed, Path(folder))


def _cells(scope: Scope) -> list[Cell]:
    if scope.is_short:
        return []
    return [Cell("montezuma", scope.montezuma_recipe, SEED, Plan(pretrain_recipe(scope.montezuma_recipe)))]


def _judge(results: Results) -> list[Judged]:
    judged = []
    for arm, seeds in results.items():
        for figures in seeds.values():
            for label in rules.LABELS:
                r2, pca = figures["encoder"][label], figures["pca"][label]
                least, most = bars.MONTEZUMA_R2_LEAST, bars.MONTEZUMA_RESIDUAL_OVER_PCA_MOST
                judged.append(Judged(f"recipe {arm}: R2 of {label}", f"{r2:.3f}", f"≥ {least}", r2 >= least))
                share = (1 - r2) / max(1 - pca, 1e-9)
                what = f"recipe {arm}: (1 - R2) of {label} over that of PCA (R2 {pca:.3f})"
                judged.append(Judged(what, f"{share:.2f}", f"≤ {most}", share <= most))
    return judged


CLAIM = Claim(
    "Montezuma's Revenge",
    "Scripts go left and right, climb and jump; a linear map from the latents of single 210 x 160 frames to RAM bytes.",
    _cells,
    _measure,
    _judge,
)
