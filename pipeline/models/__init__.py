"""Latent-variable models: torch and numpy only, one interface (`latent.py`), built by name from a plain record."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from pipeline.models.latent import LatentModel, ModelConfig
from pipeline.models.pca import PCA, PCAConfig
from pipeline.models.vae import VAE, VAEConfig

# By model: settings that records from before them lack, and what held then.
_ADDED: dict[str, dict[str, Any]] = {"VAE": {"is_axial": False, "rarity": 0.0}}
_MODELS: dict[str, tuple[type[LatentModel], type[ModelConfig]]] = {"VAE": (VAE, VAEConfig), "PCA": (PCA, PCAConfig)}


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


def known_record(record: Mapping[str, Any]) -> tuple[type[ModelConfig], dict[str, Any]]:
    """What `to_record` gave, now or before a setting was added, as the class of the configuration and its fields.

    Raises:
        ValueError: There is no such model.
    """
    fields = dict(record)
    name = fields.pop("class", None)
    if not isinstance(name, str) or name not in _MODELS:
        raise ValueError(f"there is no model class {str(name)[:80]!r}; known are {', '.join(_MODELS)}")
    return _MODELS[name][1], _ADDED.get(name, {}) | fields
