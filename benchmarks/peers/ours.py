"""latentrl's own rows: `LatentDQN` with one rollout worker, as `latentrl train` builds it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from jobs.recipes import PRETRAIN_RECIPES, train_recipe
from peers.measuring import Counts, ray_here
from pipeline import artifact, models
from pipeline.atari import preprocess_for
from pipeline.schema import Preprocess
from rllib_ext.config import LatentDQNConfig
from rllib_ext.settings import replace_known

GAME = "pong"


def latentrl(
    mode: str, train: dict[str, Any], q: dict[str, Any], num_workers: int = 1, num_gpus: int = 0
) -> Iterator[Counts]:
    """Trains for ever; yields after every training step.

    Args:
        mode: "frozen", "finetune" or "pixels".
        train: Changes to the shipped recipe's Q-learning.
        q: Changes to its Q network.
        num_workers: Remote rollout workers.
        num_gpus: 1 learns on a GPU.
    """
    with tempfile.TemporaryDirectory() as folder, ray_here():
        config = config_of(Path(folder), mode, train, q, num_workers=num_workers)
        yield from run(config.learners(num_gpus_per_learner=num_gpus))


def config_of(
    folder: Path, mode: str, train: dict[str, Any], q: dict[str, Any], name: str = "dqn", num_workers: int = 1
) -> LatentDQNConfig:
    """The configuration of a run.

    Args:
        folder: For an untrained encoder's bundle.
        mode, train, q: As above.
        name: Of the recipe.
        num_workers: Remote rollout workers; 0 samples in this process.
    """
    recipe, preprocess = train_recipe(name), preprocess_for(GAME)
    is_pixels = mode == "pixels"
    config = LatentDQNConfig().latent(
        preprocess=preprocess,
        mode=mode,
        encoder=None if is_pixels else untrained_encoder(folder / "encoder", preprocess),
        encoder_config=recipe.model if is_pixels else None,
        q=replace_known(recipe.q, q),
    )
    config = config.training(recipe.train.replace(**train)).debugging(seed=0)
    built: LatentDQNConfig = config.env_runners(num_env_runners=num_workers)
    return built


def run(config: LatentDQNConfig) -> Iterator[Counts]:
    """Builds the algorithm and trains for ever."""
    algorithm = config.build_algo()
    try:
        while True:
            algorithm.train()
            yield Counts(algorithm.agent_steps, algorithm.updates)
    finally:
        algorithm.stop()


def untrained_encoder(path: Path, preprocess: Preprocess, model: Any = PRETRAIN_RECIPES["vae"].model) -> Path:
    """A bundle of an encoder with random weights: what it computes costs the same."""
    torch.manual_seed(0)
    config = model.for_frames(preprocess.height, preprocess.width)
    stats = artifact.LatentStats.identity(config.z_dim)
    artifact.save_encoder(path, models.build(config), stats, preprocess, {})
    return path
