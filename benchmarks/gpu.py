"""What a GPU is worth to Q-learning and to pretraining, and how busy it is: whole runs, then their parts.

    python benchmarks/gpu.py --out docs/results/gpu.json [--parts rows updates bare pretrain] [--seconds 8] [--data DIR]

    rows      agent steps per second of whole runs, each in a process of its own, learner on the GPU or the CPU
    updates   the learner alone, on random minibatches: seconds of an update, its kernels and how long they compute
    bare      a pretraining step without Ray: precision, torch.compile, batch size, and how frames get to the GPU
    pretrain  frames per second of `latentrl pretrain`'s own stage

Needs a GPU. What has been measured is written after each part.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import results
from peers.measuring import gpu_busy, ray_here
from peers.ours import config_of
from peers.rows import AS_SB3, NATURE, Cell
from peers.running import Bench, CellFailed, versions
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from jobs.recipes import PRETRAIN_RECIPES
from pipeline import models
from pipeline.atari import preprocess_for
from pipeline.collect import collect
from pipeline.machine import cores
from pipeline.models.vae import VAE
from pipeline.policies import random_policy
from pipeline.precision import autocast
from pipeline.store import FramesDataset
from pipeline.train import pretrain
from rllib_ext.algorithm import LatentDQN
from rllib_ext.replay import Transitions

PARTS = ("updates", "bare", "pretrain", "rows")
WARMUP = 2_000
UPDATES = 32  # of one call, as a run makes them at most
FRAMES = 60_000
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx", "cudaMemcpyAsync", "cudaMemsetAsync")


def rows(options: argparse.Namespace) -> dict[str, Any]:
    """Whole runs."""
    bench = Bench(Path(tempfile.mkdtemp()), is_fresh=True)
    measured = options.kept("rows")
    for name, (loop, arguments) in _cells().items():
        if name in measured:
            continue
        try:
            measured[name] = bench.figures(Cell(loop, arguments, options.seconds, 2.0, 0))
        except CellFailed as failure:
            measured[name] = {"failed": str(failure)[-2000:]}
        print(name, json.dumps(measured[name]), flush=True)
        options.keep("rows", measured)
    return measured


def _cells() -> dict[str, tuple[str, dict[str, Any]]]:
    plain = {**AS_SB3["q"], **NATURE}
    sb3 = {"num_envs": 8, "warmup": WARMUP, "device": "cuda"}
    stock = {"num_env_runners": 1, "num_envs": 8, "warmup": WARMUP, "is_nature": True, "num_gpus": 1}
    peers = {
        "Stable-Baselines3, GPU, 8 environments": ("sb3", sb3),
        "stock RLlib, GPU, 1 worker of 8": ("rllib", stock),
    }
    cells: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, mode, q, train, workers, gpus in (
        ("pixels, GPU, 4 workers", "pixels", {}, {}, 4, 1),
        ("frozen, GPU, 4 workers", "frozen", {}, {}, 4, 1),
        ("finetune, GPU, 4 workers", "finetune", {}, {}, 4, 1),
        ("plain pixels of the DQN paper, GPU, 4 workers", "pixels", plain, AS_SB3["train"], 4, 1),
        ("frozen, CPU, 4 workers", "frozen", {}, {}, 4, 0),
        ("pixels, CPU, 4 workers", "pixels", {}, {}, 4, 0),
        ("frozen, GPU, 1 worker", "frozen", {}, {}, 1, 1),
        ("pixels, GPU, 8 workers", "pixels", {}, {}, 8, 1),
        ("frozen, GPU, 8 workers", "frozen", {}, {}, 8, 1),
        ("plain pixels of the DQN paper, CPU, 4 workers", "pixels", plain, AS_SB3["train"], 4, 0),
        ("finetune, CPU, 4 workers", "finetune", {}, {}, 4, 0),
    ):
        arguments = {"mode": mode, "q": q, "train": {**train, "warmup_agent_steps": WARMUP}}
        cells[f"latentrl {name}"] = ("latentrl", {**arguments, "num_workers": workers, "num_gpus": gpus})
        if len(cells) == 3:
            cells |= peers
    return cells


def updates(options: argparse.Namespace) -> dict[str, Any]:
    """The learner alone."""
    measured = options.kept("updates")
    for mode in ("frozen", "pixels", "finetune"):
        for device, precision in product(("GPU", "GPU without graph", "CPU"), ("float32", "bf16")):
            name = f"{mode}, {device}, {precision}"
            if name in measured:
                continue
            with tempfile.TemporaryDirectory() as folder:
                config = config_of(Path(folder), mode, {"precision": precision}, {}, num_workers=0)
                algorithm = config.learners(num_gpus_per_learner=device != "CPU").build_algo()
                if device == "GPU without graph":
                    learner = algorithm.learner_group._learner
                    learner._graphed = learner._update_once
                measured[name] = _learner_figures(algorithm, is_gpu=device != "CPU")
                algorithm.stop()
            print(name, json.dumps(measured[name]), flush=True)
            options.keep("updates", measured)
    return measured


def _learner_figures(algorithm: LatentDQN, *, is_gpu: bool) -> dict[str, Any]:
    drawn = _random_draw(algorithm)

    def call() -> None:
        algorithm.learners.update(drawn, 0)

    figures = _timed(call, UPDATES)
    if is_gpu:
        figures |= _kernels(call, UPDATES)
    return figures


def _random_draw(algorithm: LatentDQN) -> Transitions:
    spec, settings, rng = algorithm.config.replay_spec(), algorithm.settings, np.random.default_rng(0)
    count = UPDATES * settings.batch_size
    shape = (2, count, settings.stack, *spec.obs_shape)
    is_frames = spec.obs_dtype == "uint8"
    obs = rng.integers(0, 255, shape, np.uint8) if is_frames else rng.normal(size=shape).astype(np.float16)
    returns = rng.normal(size=count).astype(np.float32)
    ones, actions = np.ones(count, np.float32), rng.integers(0, 6, count)
    return Transitions(obs[0], actions, returns, obs[1], 0.97 * ones, np.arange(count), ones)


def _timed(call: Callable[[], Any], per_call: int, least_s: float = 1.5) -> dict[str, float]:
    """Seconds of one of a call's `per_call` repetitions, and how busy the GPU was."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with gpu_busy() as busy:
        count, began = 0, time.perf_counter()
        while time.perf_counter() - began < least_s:
            call()
            count += per_call
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    return {"ms": 1e3 * seconds / count, **busy}


def _kernels(call: Callable[[], Any], per_call: int) -> dict[str, float]:
    """Of one repetition: kernels and copies, milliseconds that the GPU computes, and the greatest of the processor."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    on_gpu = [event for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    launches = sum(event.name in LAUNCHES for event in found.events())
    syncs = sum("Synchronize" in event.name for event in found.events())
    compute_ms = sum(event.device_time for event in on_gpu) / 1e3
    return {
        "kernels": len(on_gpu) / per_call,
        "launches": launches / per_call,
        "syncs": syncs / per_call,
        "computing_ms": compute_ms / per_call,
    }


def bare(options: argparse.Namespace) -> dict[str, Any]:
    """A pretraining step alone; frames are random, since nothing depends on them."""
    measured: dict[str, Any] = {}
    host = torch.randint(0, 255, (16_384, 84, 84), dtype=torch.uint8)
    plan = [(batch, dtype, False, "resident") for batch in (64, 1024) for dtype in (None, torch.bfloat16)]
    plan += [(64, None, False, way) for way in ("pageable", "pinned")]
    plan += [(1024, None, False, way) for way in ("pageable", "pinned")]
    plan += [
        (batch, dtype, True, "resident") for batch, dtype in ((1024, torch.bfloat16), (64, torch.bfloat16), (64, None))
    ]
    for batch, dtype, is_compiled, way in plan:
        name = f"batch {batch}, {'bf16' if dtype else 'float32'}{', compiled' if is_compiled else ''}, frames {way}"
        try:
            step = _pretraining_step(host, batch, dtype, is_compiled, way)
            figures = _timed(step, 1) | _kernels(step, 1)
            figures["images_per_s"] = 1e3 * batch / figures["ms"]
        except Exception as error:
            figures = {"failed": f"{type(error).__name__}: {error}"[:500]}
        measured[name] = figures
        print(name, json.dumps(figures), flush=True)
        options.keep("bare", measured)
    return measured


def _pretraining_step(
    host: Tensor, batch: int, dtype: torch.dtype | None, is_compiled: bool, way: str
) -> Callable[[], None]:
    torch.manual_seed(0)
    model = models.build(PRETRAIN_RECIPES["vae"].model.for_frames(84, 84))
    assert isinstance(model, VAE)
    model.initialise(host[:1024])
    model.to("cuda")
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    forward: Any = torch.compile(model) if is_compiled else model
    frames = host.to("cuda") if way == "resident" else host.pin_memory() if way == "pinned" else host

    def step() -> None:
        first = int(np.random.randint(0, len(frames) - batch))
        x = frames[first : first + batch].to("cuda", non_blocking=way == "pinned")
        with autocast("cuda", dtype):
            terms = forward(x)
        loss = terms.loss()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 15.0 * 84 * 84)
        optimizer.step()

    return step


def pretraining(options: argparse.Namespace) -> dict[str, Any]:
    """The stage itself, through Ray Data and Ray Train."""
    measured = options.kept("pretrain")
    recipe = PRETRAIN_RECIPES["vae"]
    with tempfile.TemporaryDirectory() as folder:
        uri = options.data or f"{folder}/frames"
        if not options.data:
            behaviour = random_policy("random")
            began = time.perf_counter()
            collect(uri, preprocess_for("pong"), frames=FRAMES, behaviour=behaviour, played_by={"policy": "random"})
            measured["collect"] = {"frames": FRAMES, "frames_per_s": FRAMES / (time.perf_counter() - began)}
            print("collect", measured["collect"], flush=True)
        dataset = FramesDataset.open(uri)
        for gpus, batch, precision, updates in (
            (1, 64, "float32", 1500),
            (1, 1024, "float32", 400),
            (0, 64, "float32", 500),
            (1, 1024, "bf16", 400),
            (0, 64, "bf16", 500),
            (1, 64, "bf16", 1500),
        ):
            config = replace(
                recipe.train, epochs=1, frames_per_epoch=updates * batch, batch_size=batch, precision=precision,
                num_gpus_per_worker=gpus, stats_frames=2048,
            )  # fmt: skip
            name = f"{'GPU' if gpus else 'CPU'}, batch {batch}, {precision}"
            if name in measured:
                continue
            watch = _Watch()
            began = time.perf_counter()
            storage = tempfile.mkdtemp(dir=folder)
            done = pretrain(recipe.model, config, dataset, storage, "bench", Path(storage) / "bundle", on_metrics=watch)
            measured[name] = {
                "images_per_s": done.images_per_s,
                "steady_images_per_s": watch.rate(batch),
                "bits_per_dim": done.bits_per_dim,
                "startup_s": done.startup_s,
                "seconds": time.perf_counter() - began,
                **watch.end(),
            }
            print(name, json.dumps(measured[name]), flush=True)
            options.keep("pretrain", measured)
    return measured


class _Watch:
    """Hears of a training's steps: their rate and the GPU's busy share, from the first figures on."""

    def __init__(self) -> None:
        self._stack, self._busy = ExitStack(), dict[str, float]()
        self._seen: list[tuple[float, int]] = []

    def __call__(self, values: dict[str, float], step: int) -> None:
        if "loss" not in values:
            return
        if not self._seen:
            self._busy = self._stack.enter_context(gpu_busy())
        self._seen.append((time.perf_counter(), step))

    def rate(self, batch: int) -> float:
        """Frames per second between the first and the last figures; those before the first are left out."""
        self._stack.close()
        (first_s, first), (last_s, last) = self._seen[0], self._seen[-1]
        return batch * (last - first) / max(last_s - first_s, 1e-9)

    def end(self) -> dict[str, float]:
        """The busy share."""
        return self._busy


def main() -> None:
    """Measures part after part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file; parts that it has already are kept")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seconds", type=float, default=8.0, help="measured window of a row")
    parser.add_argument("--data", help="frames dataset; by default Pong is collected")
    options = parser.parse_args()
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    properties = torch.cuda.get_device_properties(0)
    found["gpu"] = {"name": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
    found |= {"machine": results.machine(), "cpus": cores(), "versions": versions()}

    def keep(part: str, measured: dict[str, Any]) -> None:
        found[part] = measured
        options.out.write_text(json.dumps(found, indent=1) + "\n")

    options.keep, options.kept = keep, lambda part: dict(found.get(part, {}))
    for part in options.parts:
        began = time.perf_counter()
        if part == "rows":
            rows(options)
        elif part == "bare":
            bare(options)
        else:
            with ray_here():
                (updates if part == "updates" else pretraining)(options)
        print(f"{part}: {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
