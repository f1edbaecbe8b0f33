"""Latent-variable models: torch and numpy only, one interface (`latent.py`), built by name from a plain record."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from pipeline.models.latent import LatentModel, ModelConfig
from pipeline.models.vae import VAE, VAEConfig

# Settings that records from before them lack, and what held then.
ADDED: dict[str, Any] = {"is_axial": False, "rarity": 0.0}
_MODELS: dict[str, tuple[type[LatentModel], type[ModelConfig]]] = {"VAE": (VAE, VAEConfig)}


def build(config: ModelConfig) -> LatentModel:
    """A freshly initialised model of this configuration, in float32 on the CPU."""
    model, _ = _MODELS[config.model]
    return model(config)


def num_parameters(config: ModelConfig) -> int:
    """How many numbers the weights of such a model are; takes no memory for them."""
    with torch.device("meta"):
        return sum(value.numel() for value in build(config).state_dict().values())


def to_record(config: ModelConfig) -> dict[str, Any]:
    """A configuration as plain JSON values, with the name of its model under "class"."""
    return {"class": config.model, **dataclasses.asdict(config)}


def config_class(name: Any) -> type[ModelConfig]:
    """The class of configurations of the model of that name.

    Raises:
        ValueError: There is none.
    """
    if not isinstance(name, str) or name not in _MODELS:
        raise ValueError(f"there is no model class {str(name)[:80]!r}; known are {', '.join(_MODELS)}")
    return _MODELS[name][1]
