"""How fast do encoders learn and encode? Side by side: slices of a second of each in turn, medians over the rounds.

Training: updates of 64 frames of 210x160, this project's recipe `probe` (in bf16 where the processor computes in it)
against the published VAE of AtariARI in plain torch and float32. Encoding: frames of 84x84 in batches of 256, the
recipe's encoder against the Nature CNN. Frames are random bytes: what they show does not change the time.

    python benchmarks/encoder_speed.py [--rounds 15] [--threads 2] [--json] [--write docs/results]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from atariari.networks import PublishedVAE, pixels
from torch import Tensor, nn

from jobs.recipes import pretrain_recipe
from pipeline import models
from pipeline.precision import autocast, resolve_precision

SLICE_S = 1.0
TRAINING_BATCH, ENCODING_BATCH = 64, 256

Step = Callable[[], int]


class NatureCNN(nn.Module):
    """The DQN paper's convolutions on one frame, with a linear layer to 256 (Mnih et al. 2015)."""

    def __init__(self) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(1, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU()]
        last = [nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3136, 256)]
        self.layers = nn.Sequential(*convolutions, *last)

    def forward(self, frames: Tensor) -> Tensor:
        """Frames (B, 84, 84) uint8 to (B, 256)."""
        features: Tensor = self.layers(pixels(frames))
        return features


def ours(height: int, width: int) -> models.LatentModel:
    """The recipe's model, as a training starts with it."""
    model = models.build(pretrain_recipe("probe").model.for_frames(height, width))
    model.initialise(_frames(512, height, width))
    return model


def training_steps() -> dict[str, Step]:
    """An update of each, which says how many frames it took."""
    frames, model, published = _frames(TRAINING_BATCH, 210, 160), ours(210, 160).train(), PublishedVAE()
    dtype = resolve_precision("auto")
    optimizers = [torch.optim.Adam(net.parameters(), 1e-4, fused=True) for net in (model, published)]

    def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> int:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return TRAINING_BATCH

    def ours_once() -> int:
        with autocast("cpu", dtype):
            terms = model(frames)
        return update(optimizers[0], terms.loss())

    return {"ours": ours_once, "published": lambda: update(optimizers[1], published.loss(frames))}


def encoding_steps() -> dict[str, Step]:
    """A batch of each, without gradient."""
    frames, encoder, nature = _frames(ENCODING_BATCH, 84, 84), ours(84, 84).eval().encoder, NatureCNN().eval()
    native = resolve_precision("auto")

    def step(net: nn.Module, dtype: torch.dtype | None) -> Step:
        def once() -> int:
            with torch.inference_mode(), autocast("cpu", dtype):
                net(frames)
            return ENCODING_BATCH

        return once

    steps = {"ours float32": step(encoder, None), "Nature CNN float32": step(nature, None)}
    return steps | ({"ours bf16": step(encoder, native), "Nature CNN bf16": step(nature, native)} if native else {})


def rates(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Median frames a second of each."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            began, frames = time.perf_counter(), 0
            while time.perf_counter() - began < SLICE_S:
                frames += step()
            found[name].append(frames / (time.perf_counter() - began))
    return {name: round(statistics.median(values), 1) for name, values in found.items()}


def page(found: dict[str, dict[str, float]], threads: int) -> str:
    """As Markdown."""
    training, encoding = found["training"], found["encoding"]
    ratio = training["ours"] / training["published"]
    how = f"`python benchmarks/encoder_speed.py`, {threads} threads, {_processor()}; medians of slices of a second."
    lines = ["# How fast encoders learn and encode", "", how]
    rows = ["", "| | frames/s |", "|---|---|", f"| training at 210x160, recipe `probe` | {training['ours']:,.0f} |"]
    rows += [f"| the published VAE, float32 | {training['published']:,.0f} |", f"| ratio | {ratio:.2f} |"]
    rows += [f"| encoding at 84x84, {name} | {rate:,.0f} |" for name, rate in encoding.items()]
    return "\n".join([*lines, *rows]) + "\n"


def _frames(count: int, height: int, width: int) -> Tensor:
    return torch.randint(0, 256, (count, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _processor() -> str:
    return str(torch.cpu.get_capabilities().get("cpu_name", "an unknown processor"))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="ends with one JSON object")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="page of the figures")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measures and says."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    found = {name: rates(steps(), options.rounds) for name, steps in STEPS.items()}
    print(page(found, options.threads), file=sys.stderr)
    if options.write:
        (options.write / "encoder_speed.md").write_text(page(found, options.threads))
    if options.json:
        print(json.dumps(found))
    return 0


STEPS = {"training": training_steps, "encoding": encoding_steps}

if __name__ == "__main__":
    sys.exit(main())
