"""Recipes: named, complete, typed configurations. `--set key=value` and `--config FILE` change them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from jobs.settings import resolve, to_dict
from pipeline.errors import UserError
from pipeline.models.latent import ModelSettings
from pipeline.models.pca import PCASettings
from pipeline.models.vae import VAESettings
from pipeline.names import suggestion
from pipeline.pretrain_config import PretrainConfig
from rllib_ext.settings import DQNSettings, ElboSettings, QConfig


@dataclass(frozen=True)
class PretrainRecipe:
    """How an encoder is made.

    Attributes:
        name: The recipe's.
        model: The latent-variable model.
        train: Its training.
    """

    name: str
    model: ModelSettings
    train: PretrainConfig


@dataclass(frozen=True)
class TrainRecipe:
    """How an agent learns.

    Attributes:
        name: The recipe's.
        q: The Q network on the stacked latents.
        train: The Q-learning.
        model: The architecture of an encoder that starts from nothing (modes pixels and online without an encoder).
        elbo: How an encoder goes on learning on its bound (mode online, and finetune where `elbo.in_finetune` is set).
    """

    name: str
    q: QConfig
    train: DQNSettings
    model: ModelSettings
    elbo: ElboSettings = field(default_factory=ElboSettings)


# Latents on a 7 x 7 grid find Pong's ball within a minute of training; a flat z had not after four (docs/log.md).
_GRID = VAESettings(latent_channels=8, widths=(32, 32))
_FLAT = VAESettings(z_dim=256, widths=(64, 64))
# What moves is read off rows and columns, from their principal components on, and what is rare counts.
_AXIAL = VAESettings(z_dim=256, patch=5, widths=(32,), num_blocks=1, is_axial=True, rarity=0.5, variance="pixel")
_VAE = PretrainRecipe("vae", _GRID, PretrainConfig(epochs=5))
# Linear probes read more off it; Q-learning learns no more from it than from the grid (docs/results/learning.md).
_ROWS_AND_COLUMNS = PretrainRecipe("axial", _AXIAL, PretrainConfig(epochs=5, precision="auto", encoder_lr_scale=0.3))
_DQN = TrainRecipe("dqn", QConfig(), DQNSettings(), _GRID)
# Distributions of long returns learn more of an agent step.
_DEMO = TrainRecipe(
    "demo",
    QConfig(dueling=True, num_atoms=51),
    DQNSettings(
        updates_per_agent_step=0.5,
        n_step=10,
        double=True,
        envs_per_runner=8,
        fragment_length=16,
        epsilon_decay_agent_steps=10_000,
    ),
    _GRID,
)
# An update on latents is cheap: one for every agent step, and a convolution, where agent steps are what is dear.
_EFFICIENT = replace(
    _DEMO,
    name="efficient",
    q=replace(_DEMO.q, grid_channels=32),
    train=replace(_DEMO.train, updates_per_agent_step=1.0, target_update_updates=2_000),
)

PRETRAIN_RECIPES = {
    recipe.name: recipe
    for recipe in (
        _VAE,
        _ROWS_AND_COLUMNS,
        PretrainRecipe("flat", _FLAT, PretrainConfig(epochs=20)),
        PretrainRecipe("beta-vae", replace(_FLAT, beta=4.0), PretrainConfig(epochs=20)),
        replace(_VAE, name="demo"),
        # What a VAE is measured against: no updates, and principal components as many as the grid's latents at 84x84.
        PretrainRecipe("random", _GRID, PretrainConfig(epochs=0)),
        PretrainRecipe(
            "pca", PCASettings(z_dim=_GRID.for_frames(84, 84).z_dim), PretrainConfig(epochs=0, monitor_frames=8192)
        ),
        # For AtariARI's ruler (`latentrl probe`): any game at 210x160, at most 256 latents, 8 minutes on 2 cores.
        PretrainRecipe(
            "probe",
            _AXIAL,
            replace(_ROWS_AND_COLUMNS.train, epochs=100, frames_per_epoch=25_600, max_seconds=430, monitor_frames=4096),
        ),
    )
}
TRAIN_RECIPES = {recipe.name: recipe for recipe in (_DQN, replace(_DQN, name="online"), _EFFICIENT, _DEMO)}

Recipe = TypeVar("Recipe", PretrainRecipe, TrainRecipe)


def pretrain_recipe(name: str, *, config: str | None = None, overrides: Sequence[str] = ()) -> PretrainRecipe:
    """A pretraining recipe by name, with a file's settings and then overrides put in.

    Raises:
        UserError: Unknown name or key (those like it are named), or a value of the wrong type.
    """
    return resolve(_named(PRETRAIN_RECIPES, name), config=config, overrides=overrides)


def train_recipe(name: str, *, config: str | None = None, overrides: Sequence[str] = ()) -> TrainRecipe:
    """A Q-learning recipe by name, with a file's settings and then overrides put in; errors as above."""
    return resolve(_named(TRAIN_RECIPES, name), config=config, overrides=overrides)


def described() -> dict[str, Any]:
    """Every recipe with all its settings."""
    return {
        "pretrain": {name: to_dict(recipe) for name, recipe in PRETRAIN_RECIPES.items()},
        "train": {name: to_dict(recipe) for name, recipe in TRAIN_RECIPES.items()},
    }


def _named(group: dict[str, Recipe], name: str) -> Recipe:
    if name not in group:
        raise UserError(f"unknown recipe {name!r}; {suggestion(name, group)}")
    return group[name]
