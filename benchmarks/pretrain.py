"""Images per second of pretraining through Ray Data and Ray Train, beside the same step in a bare process.

The bare process holds the frames as one tensor in memory, uses all cores, leaves OpenMP as it is and knows nothing of
Ray. Both take the same model, batch and optimizer. Machines drift by a quarter within a minute, so the two alternate
every few seconds: while one trains, every process of the other is stopped (SIGSTOP), Ray's own included. The rate of
each is its frames over its own running time. The time to start Ray and its workers is no part of the rates and is
reported on its own. Required: at least 90% (exit code 1 below).

    python benchmarks/pretrain.py [--data DIR] [--updates 1500] [--json]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import ray
import torch

from jobs.recipes import PRETRAIN_RECIPES, PretrainRecipe
from pipeline import models
from pipeline.atari import preprocess_for
from pipeline.collect import collect
from pipeline.loop import learning_rate
from pipeline.machine import cores, ray_cpus
from pipeline.order import ReadingOrder
from pipeline.policies import random_policy
from pipeline.store import FramesDataset
from pipeline.stream import sample_frames
from pipeline.train import PretrainConfig, PretrainResult, pretrain

REQUIRED_RATIO = 0.9
FRAMES_IN_MEMORY = 8192
COLLECTED_FRAMES = 30_000
TURN_S = 4.0
UPDATES_AFTER_TURNS = 400


def bare_steps(uri: str, recipe: PretrainRecipe, threads: int, count: Any, is_ready: Any) -> None:
    """Training steps on frames in memory, counted, until the process is ended."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    dataset = FramesDataset.open(uri)
    frames = sample_frames(dataset, ReadingOrder.whole(dataset, "train", 1, 1), FRAMES_IN_MEMORY)
    model = models.build(recipe.model.for_frames(dataset.preprocess.height, dataset.preprocess.width))
    model.initialise(frames[: recipe.train.monitor_frames])
    optimizer = torch.optim.Adam(model.parameters(), recipe.train.lr, fused=True)
    is_ready.set()
    while True:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe.train, count.value, 1_000_000)
        loss = model(frames[torch.randint(0, len(frames), (recipe.train.batch_size,))]).loss()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.train.grad_clip * frames[0].numel())
        optimizer.step()
        float(loss.detach())
        count.value += 1


class Bare:
    """The bare process, stopped except for its turns."""

    def __init__(self, uri: str, recipe: PretrainRecipe, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._count, is_ready = context.Value("q", 0), context.Event()
        arguments = (uri, recipe, threads, self._count, is_ready)
        self._process = context.Process(target=bare_steps, args=arguments, daemon=True)
        self._process.start()
        is_ready.wait()
        self.turn(TURN_S)

    def turn(self, seconds: float) -> float:
        """Runs for a while; steps a second."""
        before, began = self._count.value, time.perf_counter()
        self._signal(signal.SIGCONT)
        time.sleep(seconds)
        self._signal(signal.SIGSTOP)
        return (self._count.value - before) / (time.perf_counter() - began)

    def end(self) -> None:
        """Ends the process."""
        self._process.kill()

    def _signal(self, number: int) -> None:
        os.kill(self._process.pid or 0, number)


def signal_ray(number: int) -> None:
    """Stops or continues every process that Ray has here."""
    for root in psutil.Process().children():
        if "/ray/" in " ".join(root.cmdline()):
            for process in (root, *root.children(recursive=True)):
                process.send_signal(number)


def streamed_run(
    dataset: FramesDataset, recipe: PretrainRecipe, updates: int, threads: int, on_step: Callable[[int], None]
) -> PretrainResult:
    """The same step through Ray Data and Ray Train."""
    batch = recipe.train.batch_size
    config = PretrainConfig(
        epochs=1, frames_per_epoch=updates * batch, batch_size=batch, lr=recipe.train.lr, num_threads=threads
    )
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        return pretrain(
            recipe.model, config, dataset, folder, "bench", bundle, on_metrics=lambda _, step: on_step(step)
        )


def measure(uri: str, recipe: PretrainRecipe, updates: int) -> dict[str, Any]:
    """Alternates bare and streamed training and summarises."""
    threads, dataset, batch = cores(), FramesDataset.open(uri), recipe.train.batch_size
    bare = Bare(uri, recipe, threads)
    step, turns, stopped_s = 0, list[float](), 0.0

    def on_step(number: int) -> None:
        nonlocal step
        step = number

    began = time.perf_counter()
    with ThreadPoolExecutor(1) as pool:
        streamed = pool.submit(streamed_run, dataset, recipe, updates, threads, on_step)
        while step < updates - UPDATES_AFTER_TURNS and not streamed.done():
            time.sleep(TURN_S if step else 0.1)
            if step:
                before = time.perf_counter()
                signal_ray(signal.SIGSTOP)
                try:
                    turns.append(batch * bare.turn(TURN_S))
                finally:
                    signal_ray(signal.SIGCONT)
                stopped_s += time.perf_counter() - before
        result = streamed.result()
    total_s = time.perf_counter() - began
    bare.end()
    rate = updates * batch / (updates * batch / result.images_per_s - stopped_s)
    return {
        "recipe": recipe.name,
        "updates": updates,
        "batch_size": batch,
        "threads": threads,
        "bare_images_per_s": round(statistics.mean(turns), 1),
        "streamed_images_per_s": round(rate, 1),
        "ratio": round(rate / statistics.mean(turns), 4),
        "bare_per_turn": [round(turn) for turn in turns],
        "startup_s": round(total_s - result.seconds + result.startup_s, 1),
        "required_ratio": REQUIRED_RATIO,
    }


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="frames dataset; by default 30,000 random Pong frames are collected")
    parser.add_argument("--recipe", default="vae", choices=sorted(PRETRAIN_RECIPES))
    parser.add_argument("--updates", type=int, default=1500, help="training steps through Ray (1500)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if options.updates <= 2 * UPDATES_AFTER_TURNS:
        parser.error(f"--updates is {options.updates}; ask for more than {2 * UPDATES_AFTER_TURNS}")
    cpus = ray_cpus()
    ray.init("local", num_cpus=cpus, object_store_memory=1 << 30, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        uri = options.data or _collected(folder)
        result = measure(uri, PRETRAIN_RECIPES[options.recipe], options.updates)
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
    collect(uri, preprocess_for("pong"), frames=COLLECTED_FRAMES, behaviour=behaviour, played_by={"policy": "random"})
    return uri


if __name__ == "__main__":
    sys.exit(main())
