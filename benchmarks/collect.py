"""Collection beside the bare C++ vector environment, side by side in turn, with the same threads.

    python benchmarks/collect.py [--games pong breakout] [--frames 20000] [--repeats 3] [--json]

Bars: at least 0.8 of the bare rate, at most 150 bytes a frame of random play.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import ray

from pipeline.atari import make_vector, preprocess_for
from pipeline.collect import collect
from pipeline.machine import cores
from pipeline.policies import random_policy

BARE_ENVS = 16


def bare_rate(game: str, frames: int, threads: int) -> float:
    """Frames a second of the vector environment under random actions, and nothing else."""
    env = make_vector(preprocess_for(game), BARE_ENVS, threads)
    env.reset(np.arange(BARE_ENVS))
    actions = np.random.default_rng(0).integers(0, env.num_actions, (frames // BARE_ENVS, BARE_ENVS))
    start = time.perf_counter()
    for row in actions:
        env.step(row)
    seconds = time.perf_counter() - start
    env.close()
    return actions.size / seconds


def collected_rate(game: str, frames: int, workers: int) -> tuple[float, float]:
    """Frames a second of a whole collection (files, checksums, manifest), and its bytes a frame."""
    folder = Path(tempfile.mkdtemp())
    try:
        done = collect(
            str(folder / "data"),
            preprocess_for(game),
            frames=frames,
            behaviour=random_policy("random"),
            played_by={"policy": "random"},
            num_workers=workers,
        )
        return frames / done.seconds, done.dataset.num_bytes / frames
    finally:
        shutil.rmtree(folder)


def measure(game: str, frames: int, repeats: int, threads: int) -> dict[str, object]:
    """Medians over repeats of both, measured in turn."""
    bare, collected, size = [], [], 0.0
    for _ in range(repeats):
        bare.append(bare_rate(game, frames, threads))
        rate, size = collected_rate(game, frames, threads)
        collected.append(rate)
    ratio = statistics.median(c / b for c, b in zip(collected, bare, strict=True))
    return {
        "game": game,
        "bare_frames_per_s": round(statistics.median(bare)),
        "collect_frames_per_s": round(statistics.median(collected)),
        "collect_over_bare": round(ratio, 3),
        "bytes_per_frame": round(size, 1),
    }


def main() -> None:
    """Prints one line a game and, with --json, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--games", nargs="+", default=["pong", "breakout", "seaquest", "ms_pacman"])
    parser.add_argument("--frames", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    ray.init("local", num_cpus=options.threads, include_dashboard=False, log_to_driver=False)
    rows = []
    for game in options.games:
        rows.append(measure(game, options.frames, options.repeats, options.threads))
        print(rows[-1], flush=True)
    ray.shutdown()
    if options.json:
        print(json.dumps({"threads": options.threads, "games": rows}))


if __name__ == "__main__":
    main()
