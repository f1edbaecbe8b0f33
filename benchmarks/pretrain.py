"""Images per second of pretraining through Ray Data and Ray Train, beside the same step in a bare process.

The bare process holds the frames as one tensor in memory, uses all cores, leaves OpenMP as it is and knows nothing of
Ray. Both take the same model, batch, optimizer and number of updates, in turn, several rounds, medians compared. The
time to start Ray and its workers is no part of the rates and is reported on its own. Required: at least 90% (exit code
1 below).

    python benchmarks/pretrain.py [--data DIR] [--updates 300] [--rounds 3] [--json]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import torch

from jobs.recipes import PRETRAIN_RECIPES, PretrainRecipe
from pipeline import models
from pipeline.atari import preprocess_for
from pipeline.collect import collect
from pipeline.loop import learning_rate
from pipeline.order import ReadingOrder
from pipeline.policies import random_policy
from pipeline.store import FramesDataset
from pipeline.stream import sample_frames
from pipeline.train import PretrainConfig, pretrain

REQUIRED_RATIO = 0.9
FRAMES_IN_MEMORY = 8192
COLLECTED_FRAMES = 30_000


def bare_rate(uri: str, recipe: PretrainRecipe, updates: int, threads: int) -> float:
    """Images/s of `updates` training steps on frames in memory; runs in a process of its own."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    dataset = FramesDataset.open(uri)
    frames = sample_frames(dataset, ReadingOrder.whole(dataset, "train", 1, 1), FRAMES_IN_MEMORY)
    model = models.build(recipe.model.for_frames(dataset.preprocess.height, dataset.preprocess.width))
    model.initialise(frames[: recipe.train.monitor_frames])
    optimizer = torch.optim.Adam(model.parameters(), recipe.train.lr, fused=True)
    began = time.perf_counter()
    for step in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe.train, step, updates)
        loss = model(frames[torch.randint(0, len(frames), (recipe.train.batch_size,))]).loss()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.train.grad_clip * frames[0].numel())
        optimizer.step()
        float(loss.detach())
    return updates * recipe.train.batch_size / (time.perf_counter() - began)


def streamed_rate(dataset: FramesDataset, recipe: PretrainRecipe, updates: int, threads: int) -> tuple[float, float]:
    """Images/s of the same number of steps through Ray, and the seconds that starting took."""
    batch = recipe.train.batch_size
    config = PretrainConfig(
        epochs=1, frames_per_epoch=updates * batch, batch_size=batch, lr=recipe.train.lr, num_threads=threads
    )
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        result = pretrain(recipe.model, config, dataset, folder, "bench", Path(folder) / "bundle")
        total_s = time.perf_counter() - began
    return result.images_per_s, total_s - result.seconds + result.startup_s


def measure(uri: str, recipe: PretrainRecipe, updates: int, rounds: int) -> dict[str, Any]:
    """Alternates bare and streamed training and summarises."""
    threads, dataset = len(os.sched_getaffinity(0)), FramesDataset.open(uri)
    bare: list[float] = []
    streamed: list[float] = []
    starts: list[float] = []
    loads: list[float] = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for _ in range(rounds):
            loads.append(os.getloadavg()[0])
            bare.append(pool.apply(bare_rate, (uri, recipe, updates, threads)))
            rate, start = streamed_rate(dataset, recipe, updates, threads)
            streamed.append(rate)
            starts.append(start)
    ratio = statistics.median(streamed) / statistics.median(bare)
    return {
        "recipe": recipe.name,
        "updates": updates,
        "batch_size": recipe.train.batch_size,
        "threads": threads,
        "bare_images_per_s": round(statistics.median(bare), 1),
        "streamed_images_per_s": round(statistics.median(streamed), 1),
        "ratio": round(ratio, 4),
        "ratio_per_round": [round(s / b, 4) for s, b in zip(streamed, bare, strict=True)],
        "bare_all": [round(rate, 1) for rate in bare],
        "streamed_all": [round(rate, 1) for rate in streamed],
        "startup_s": round(statistics.median(starts), 1),
        "load_before_rounds": [round(load, 1) for load in loads],
        "required_ratio": REQUIRED_RATIO,
    }


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="frames dataset; by default 30,000 random Pong frames are collected")
    parser.add_argument("--recipe", default="vae", choices=sorted(PRETRAIN_RECIPES))
    parser.add_argument("--updates", type=int, default=300, help="training steps of each measurement (300)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each kind (3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    os.environ["GOMP_SPINCOUNT"] = "1000"  # for Ray's workers, as the command line does
    ray.init(
        num_cpus=max(2, os.cpu_count() or 2), object_store_memory=1 << 30, include_dashboard=False, log_to_driver=False
    )
    del os.environ["GOMP_SPINCOUNT"]
    with tempfile.TemporaryDirectory() as folder:
        uri = options.data or _collected(folder)
        result = measure(uri, PRETRAIN_RECIPES[options.recipe], options.updates, options.rounds)
    ray.shutdown()
    if options.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:24} {value}")
    return 0 if result["ratio"] >= REQUIRED_RATIO else 1


def _collected(folder: str) -> str:
    uri = f"{folder}/frames"
    behaviour = random_policy("random")
    collect(uri, preprocess_for("pong"), frames=COLLECTED_FRAMES, behaviour=behaviour, policy_name="random")
    return uri


if __name__ == "__main__":
    sys.exit(main())
