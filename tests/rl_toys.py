"""Toy bundles and configurations for the tests of rllib_ext."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import catch
import numpy as np
import ray
import torch
from catch import VectorCatch, catch_factory, catch_preprocess

from pipeline import artifact
from pipeline.models.vae import VAE, VAESettings
from rllib_ext.algorithm import RESULTS_KEY, LatentDQN
from rllib_ext.config import LatentDQNConfig
from rllib_ext.settings import DQNSettings, QConfig

TOY_VAE = VAESettings(z_dim=16, patch=3, widths=(8,), num_blocks=0)
TOY_TRAINING = DQNSettings(
    lr=1e-3,
    encoder_lr=1e-3,
    batch_size=16,
    stack=2,
    n_step=2,
    updates_per_agent_step=0.25,
    replay_capacity=2_000,
    warmup_agent_steps=64,
    epsilon_decay_agent_steps=500,
    target_update_updates=20,
    envs_per_runner=4,
    fragment_length=8,
    precision="float32",
)


def make_encoder(path: Path, preprocess=None, settings: VAESettings = TOY_VAE, *, standardise: bool = True) -> Path:
    """An untrained encoder's bundle, its latents standardised over random frames of catch."""
    preprocess = preprocess or catch_preprocess()
    torch.manual_seed(0)
    model = VAE(settings.for_frames(preprocess.height, preprocess.width))
    stats = latent_stats(model) if standardise else artifact.LatentStats.identity(settings.z_dim)
    artifact.save_encoder(path, model, stats, preprocess, {})
    return path


@torch.no_grad()
def latent_stats(model: VAE) -> artifact.LatentStats:
    """Mean and spread of the latents of random frames of catch."""
    env, rng = VectorCatch(32), np.random.default_rng(0)
    env.reset(np.arange(32))
    frames = np.concatenate([env.step(rng.integers(0, 3, 32)).frames for _ in range(24)])
    mean = model.features(torch.from_numpy(frames))
    scale = mean.std(0).clamp(min=1e-3)
    ones = (1.0,) * len(scale)
    return artifact.LatentStats(tuple(mean.mean(0).tolist()), tuple(scale.tolist()), (True,) * len(scale), ones)


def toy_config(mode: str, encoder: Path | None, **training) -> LatentDQNConfig:
    """Catch, tiny networks, everything in-process."""
    is_pixels = mode == "pixels"
    return (
        LatentDQNConfig()
        .latent(
            preprocess=catch_preprocess(),
            mode=mode,
            encoder=None if is_pixels else encoder,
            encoder_config=TOY_VAE if is_pixels else None,
            env_factory=catch_factory,
            q=QConfig(hidden=(32,)),
        )
        .training(TOY_TRAINING.replace(**training))
        .debugging(seed=0)
    )


@contextlib.contextmanager
def toy_ray(num_cpus: int) -> Iterator[None]:
    """A Ray of the test file's own, whose workers can play catch."""
    torch.set_num_threads(1)
    ray.cloudpickle.register_pickle_by_value(catch)  # workers do not see this folder
    ray.init("local", num_cpus=num_cpus, object_store_memory=200 * 2**20, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(catch)


def train(algorithm: LatentDQN, agent_steps: int) -> dict[str, float]:
    """Trains up to so many agent steps; the last step's figures."""
    figures = {}
    while algorithm.agent_steps < agent_steps:
        figures = algorithm.train()[RESULTS_KEY]
    return figures
