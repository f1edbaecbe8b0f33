"""Env-to-module connectors on columns: frames in, the stacked observation that Q reads out.

Shapes: E environments, K stacked observations, Z latent units, H x W frame.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.core.columns import Columns

from pipeline.artifact import Encoder
from pipeline.schema import Preprocess
from rllib_ext.shared_bundle import SharedBundle
from rllib_ext.stacking import RollingStack

IS_FIRST = "is_first"


class EncodeObservations(ConnectorV2):
    """Turns the newest frames of all environments into standardised latents, once per environment step.

    Runs on the rollout worker, which loads the frozen encoder when the first frames arrive. Latents are rounded to
    float16 here, so that acting sees exactly the numbers that the replay holds. Keeps no state that RLlib would merge.
    """

    def __init__(self, *, bundle: SharedBundle, preprocess: Preprocess, z_dim: int, **kwargs: Any) -> None:
        """Takes the encoder by reference; `z_dim` is the length of its latents."""
        self._bundle = bundle
        self._preprocess = preprocess
        self._z_dim = z_dim
        self._encoder: Encoder | None = None
        super().__init__(**kwargs)

    @property
    def encoder(self) -> Encoder:
        """The frozen encoder, loaded on first use."""
        if self._encoder is None:
            self._encoder = self._bundle.load(self._preprocess).requires_grad_(False).eval()
        return self._encoder

    def recompute_output_observation_space(
        self, input_observation_space: gym.Space[Any], input_action_space: gym.Space[Any]
    ) -> gym.Space[Any]:
        """(H, W) uint8 becomes (Z,) float16."""
        return gym.spaces.Box(-np.inf, np.inf, (self._z_dim,), np.float16)

    def __call__(self, *, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Encodes `obs` (E, H, W) uint8 to (E, Z) float16."""
        with torch.inference_mode():
            z_EZ = self.encoder.encode(torch.from_numpy(batch[Columns.OBS]))
        batch[Columns.OBS] = z_EZ.to(torch.float16).numpy()
        return batch


class StackObservations(ConnectorV2):
    """Keeps the last K observations of every environment; `is_first` (E,) bool starts a stack anew."""

    def __init__(self, *, stack: int, **kwargs: Any) -> None:
        """`stack` is K."""
        self._rolling = RollingStack(stack)
        self._num_stacked = stack
        super().__init__(**kwargs)

    def recompute_output_observation_space(
        self, input_observation_space: gym.Space[Any], input_action_space: gym.Space[Any]
    ) -> gym.Space[Any]:
        """(...) becomes (K, ...)."""
        box = input_observation_space
        assert isinstance(box, gym.spaces.Box)
        low, high = (np.repeat(bound[None], self._num_stacked, 0) for bound in (box.low, box.high))
        return gym.spaces.Box(low, high, dtype=box.dtype)

    def __call__(self, *, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Replaces `obs` (E, ...) by (E, K, ...)."""
        batch[Columns.OBS] = self._rolling.push(batch[Columns.OBS], batch[IS_FIRST])
        return batch
