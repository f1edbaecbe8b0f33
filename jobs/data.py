"""`latentrl data info` and `latentrl data check`: what a frames dataset holds, and whether it is sound."""

from __future__ import annotations

from typing import Any

from pipeline.store import FramesDataset


def info(data: str) -> dict[str, Any]:
    """Describes a dataset from its manifest and table of episodes; the frames are not read."""
    dataset = FramesDataset.open(data)
    preprocess, episodes = dataset.preprocess, dataset.episodes
    splits = episodes["split"].to_pylist()
    return {
        "frames": dataset.num_frames,
        "episodes": dataset.num_episodes,
        "games": [preprocess.game],
        "digest": dataset.digest,
        "errors": [],
        "protocol": preprocess.protocol,
        "resolution": f"{preprocess.height}x{preprocess.width}",
        "policy": dataset.collection.get("policy"),
        "seed": dataset.collection.get("seed"),
        "has_ram": dataset.has_ram,
        "files": len(dataset.files),
        "bytes_per_frame": round(dataset.num_bytes / dataset.num_frames, 2),
        "train_episodes": splits.count("train"),
        "validation_episodes": splits.count("val"),
        "mean_return": sum(episodes["return"].to_pylist()) / dataset.num_episodes,
    }


def check(data: str) -> dict[str, Any]:
    """Verifies a dataset byte by byte; `errors` names every bad file and is empty when it is sound."""
    dataset = FramesDataset.open(data)
    return {
        "frames": dataset.num_frames,
        "episodes": dataset.num_episodes,
        "games": [dataset.preprocess.game],
        "digest": dataset.digest,
        "errors": dataset.verify(),
    }
