"""The two parts that bound every loop, alone: the C++ environment, and the encoder."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from jobs.recipes import PRETRAIN_RECIPES
from peers.measuring import Counts
from pipeline import artifact
from pipeline.atari import make_vector, preprocess_for
from pipeline.machine import cores

NUM_ENVS = 32


def bare_environment() -> Iterator[Counts]:
    """The vector environment under random actions, on all cores."""
    env = make_vector(preprocess_for("pong"), NUM_ENVS, cores())
    env.reset(np.arange(NUM_ENVS))
    rng, steps = np.random.default_rng(0), 0
    while True:
        env.step(rng.integers(0, env.num_actions, NUM_ENVS))
        steps += NUM_ENVS
        yield Counts(steps)


def bare_encoder() -> Iterator[Counts]:
    """The shipped encoder on batches of frames, on all cores; a frame counts as an agent step."""
    torch.set_num_threads(cores())
    preprocess = preprocess_for("pong")
    encoder = artifact.from_scratch(PRETRAIN_RECIPES["vae"].model, preprocess).eval()
    frames = torch.randint(0, 256, (NUM_ENVS, preprocess.height, preprocess.width), dtype=torch.uint8)
    steps = 0
    while True:
        encoder.encode(frames)
        steps += NUM_ENVS
        yield Counts(steps)
