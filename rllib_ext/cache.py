"""Latents of a replay's frames that follow an encoder which goes on learning, some of them a few versions behind.

Frames are encoded once when they arrive, and anew in turn, a few for every update of Q, while the learner learns. Exact
re-encoding would take two passes over 8 frames a transition for every update.

Shapes: N rows, Z latent units, H x W frame.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.artifact import Encoder
from rllib_ext.replay import ColumnarReplay

_BATCH = 256

EncoderStates = tuple[Mapping[str, NDArray[Any]], Mapping[str, NDArray[Any]]]


class LatentCache:
    """The columns `z`, `z_target` and `version` of a replay, and the encoders that make them.

    Attributes:
        version: Of the encoders; 0 before the first, and nothing is encoded before that.
    """

    def __init__(self, replay: ColumnarReplay, encoder: Encoder, target: Encoder) -> None:
        """Takes two encoders of the right sizes; their weights come with each version."""
        self._replay, self._encoders = replay, (encoder.eval(), target.eval())
        self.version = self._next = 0

    def take_over(self, states: EncoderStates) -> None:
        """The next version; the first encodes all that is held."""
        self._load(states)
        self.version += 1
        if self.version == 1:
            self._encode(self._replay.held_places(np.arange(len(self._replay))))

    def add(self, first_lane: int, num_rows: int, num_lanes: int) -> None:
        """Encodes the newest rows of some lanes."""
        if self.version:
            self._encode(self._replay.newest_places(first_lane, num_lanes, num_rows).reshape(-1))

    def refresh(self, num_rows: int) -> float:
        """Encodes the next rows in turn anew; how far their latents have moved, root mean square in units of z."""
        places, self._next = self._replay.places_in_turn(self._next, num_rows)
        before = self._replay.rows_at("z", places).astype(np.float32)
        self._encode(places)
        moved = self._replay.rows_at("z", places) - before
        return float(np.sqrt(np.square(moved).mean())) if len(places) else 0.0

    def stale_share(self) -> float:
        """Of the rows held, how many have latents of an earlier version than Q's encoder."""
        if not self.version:
            return 0.0
        versions = self._replay.columns["version"]  # rows that were never written are of version 0
        num_empty = versions.size - len(self._replay)
        return (int((versions < self.version).sum()) - num_empty) / max(1, len(self._replay))

    def state(self) -> dict[str, int]:
        """What the replay's own columns do not say."""
        return {"version": self.version, "next": self._next}

    def set_state(self, state: Mapping[str, int], states: EncoderStates) -> None:
        """Goes on where `state` was taken, with the encoders that Q read with there."""
        self.version, self._next = state["version"], state["next"]
        self._load(states)

    def _load(self, states: EncoderStates) -> None:
        for encoder, state in zip(self._encoders, states, strict=True):
            encoder.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in state.items()})

    @torch.inference_mode()
    def _encode(self, places: NDArray[np.int64]) -> None:
        for part in np.array_split(places, max(1, -(-len(places) // _BATCH))):
            frames = torch.from_numpy(self._replay.rows_at("obs", part))
            z, z_target = (encoder(frames).to(torch.float16).numpy() for encoder in self._encoders)
            self._replay.set_latents(part, z, z_target, self.version)
