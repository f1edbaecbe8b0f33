"""Latent-variable models: torch and numpy only, one interface (`latent.py`), built by name from a plain record."""

from __future__ import annotations

import dataclasses
from typing import Any

from pipeline.models.latent import LatentModel, ModelConfig
from pipeline.models.vae import VAE, VAEConfig

_MODELS: dict[str, tuple[type[LatentModel], type[ModelConfig]]] = {"VAE": (VAE, VAEConfig)}


def build(config: ModelConfig) -> LatentModel:
    """A freshly initialised model of this configuration, in float32 on the CPU."""
    model, _ = _MODELS[config.model]
    return model(config)


def to_record(config: ModelConfig) -> dict[str, Any]:
    """A configuration as plain JSON values, with the name of its model under "class"."""
    return {"class": config.model, **dataclasses.asdict(config)}


def from_record(record: dict[str, Any]) -> ModelConfig:
    """Reads what `to_record` wrote.

    Raises:
        ValueError: An unknown class, or unknown or missing keys.
    """
    fields = dict(record)
    name = fields.pop("class", None)
    if name not in _MODELS:
        raise ValueError(f"there is no model class {name!r}; known are {', '.join(_MODELS)}")
    _, config = _MODELS[name]
    names = {f.name for f in dataclasses.fields(config)}
    if set(fields) != names:
        raise ValueError(f"the configuration of a {name} has unknown or missing keys {sorted(set(fields) ^ names)}")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    return config(**values)
