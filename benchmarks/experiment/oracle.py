"""The oracle: the emulator's RAM in place of the screen, read by an encoder that does nothing but scale its bytes.

So an agent that is given the game's variables runs through the same code, with the same Q head, as one that must find
them. Shapes: E games, N frames, D bytes of a frame.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch

from pipeline import models
from pipeline.artifact import LatentStats, save_encoder
from pipeline.atari import Step, VectorAtari, make_vector, preprocess_for
from pipeline.models.distributions import DEQUANTISATION_VARIANCE
from pipeline.models.latent import ACTIVE_VARIANCE
from pipeline.models.pca import PCA, PCASettings
from pipeline.schema import RAM_BYTES, Preprocess

RAM_HEIGHT = 8
RAM_WIDTH = RAM_BYTES // RAM_HEIGHT
LEAST_SPREAD = 8.0  # levels: a byte that hardly moves in random play is not blown up by more than one that spreads so


def ram_preprocess(game: str) -> Preprocess:
    """What identifies RAM as frames."""
    return dataclasses.replace(preprocess_for(game), height=RAM_HEIGHT, width=RAM_WIDTH, resize="ram")


def ram_factory(preprocess: Preprocess, num_envs: int, num_threads: int) -> VectorAtari:
    """An Atari game whose frames (E, 8, 16) are its RAM; for `LatentDQNConfig.latent(env_factory=...)`."""
    return VectorRam(make_vector(preprocess_for(preprocess.game, preprocess.protocol), num_envs, with_ram=True))


class VectorRam:
    """Games with RAM behind `pipeline.atari.VectorAtari`."""

    def __init__(self, games: VectorAtari) -> None:
        """Takes games that give their RAM over."""
        self._games = games
        self.num_envs, self.num_actions = games.num_envs, games.num_actions

    def reset(self, seeds: np.ndarray | None = None, mask: np.ndarray | None = None) -> Step:
        """See VectorAtari."""
        return _shown(self._games.reset(seeds, mask))

    def step(self, actions: np.ndarray) -> Step:
        """See VectorAtari."""
        return _shown(self._games.step(actions))

    def close(self) -> None:
        """See VectorAtari."""
        self._games.close()


def _shown(step: Step) -> Step:
    assert step.ram is not None
    return step._replace(frames=np.asarray(step.ram).reshape(-1, RAM_HEIGHT, RAM_WIDTH))


def save_scaling_encoder(path: Path, preprocess: Preprocess, frames: np.ndarray) -> str:
    """Writes a bundle whose latents are the bytes themselves, each less its mean and over its spread in `frames`.

    It is a probabilistic PCA along the axes. Its latents are bytes over 80 levels; the bundle's statistics, which take
    every spread below 0.1 for 0.1, make them standard. Nothing is lost: any byte can be read off its latent.

    Args:
        path: The folder to make.
        preprocess: Of the frames.
        frames: (N, H, W) uint8, of random play.

    Returns:
        The bundle's sha256.
    """
    size = preprocess.height * preprocess.width
    model = models.build(PCASettings(z_dim=size).for_frames(preprocess.height, preprocess.width))
    assert isinstance(model, PCA)
    bytes_ND = torch.from_numpy(frames.reshape(len(frames), size))
    levels = LEAST_SPREAD / ACTIVE_VARIANCE**0.5
    model.set_components(
        bytes_ND.float().mean(0), torch.eye(size), torch.full((size,), levels**2), DEQUANTISATION_VARIANCE
    )
    with torch.no_grad():
        mean_NZ = model.features(torch.from_numpy(frames)).double()
    stats = LatentStats.from_moments(mean_NZ.mean(0), mean_NZ.var(0, unbiased=False), torch.zeros(size))
    return save_encoder(path, model.eval(), stats, preprocess, {"Latents": "the bytes of a frame, scaled"})
