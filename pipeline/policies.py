"""Behaviour policies for collecting frames: who presses the buttons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pipeline.errors import UserError
from pipeline.protocols import protocol_rules
from pipeline.schema import Preprocess

STICKY_RANDOM_REPEAT = 0.75


class Behaviour(Protocol):
    """Chooses actions for the E environments of a shard."""

    def act(self, frames: np.ndarray, is_first: np.ndarray) -> np.ndarray:
        """Actions (E,) int64 for frames (E, H, W) uint8; `is_first` (E,) bool marks the first frame of an episode."""


class BehaviourFactory(Protocol):
    """Makes a shard's behaviour; travels to the collecting workers, so it must be picklable and small."""

    def __call__(self, preprocess: Preprocess, lane_seeds: list[int]) -> Behaviour:
        """One behaviour for the lanes with these seeds."""


@dataclass(frozen=True)
class RandomFactory:
    """Uniformly random actions, each repeated with a probability.

    Attributes:
        repeat_probability: Chance that an environment repeats its previous action (0: independent actions).
    """

    repeat_probability: float = 0.0

    def __call__(self, preprocess: Preprocess, lane_seeds: list[int]) -> Behaviour:
        """See BehaviourFactory."""
        lowest = 1 if protocol_rules(preprocess.protocol).random_skips_noop else 0
        return RandomBehaviour(lowest, len(preprocess.action_set), lane_seeds, self.repeat_probability)


class RandomBehaviour:
    """Random actions from one generator a lane, so that a lane's actions do not depend on its neighbours."""

    def __init__(self, lowest: int, num_actions: int, lane_seeds: list[int], repeat_probability: float) -> None:
        self._generators = [np.random.default_rng(seed) for seed in lane_seeds]
        self._range = (lowest, num_actions)
        self._repeat_probability = repeat_probability
        self._previous = np.zeros(len(lane_seeds), np.int64)

    def act(self, frames: np.ndarray, is_first: np.ndarray) -> np.ndarray:
        """See Behaviour."""
        drawn = np.array([g.integers(*self._range) for g in self._generators], np.int64)
        if self._repeat_probability > 0:
            repeats = np.array([g.random() for g in self._generators]) < self._repeat_probability
            drawn = np.where(repeats & ~is_first, self._previous, drawn)
        self._previous = drawn
        return drawn


RANDOM_POLICIES = {"random": RandomFactory(), "sticky-random": RandomFactory(STICKY_RANDOM_REPEAT)}


def random_policy(name: str) -> RandomFactory:
    """The random behaviour of that name, or a UserError that lists the names."""
    if name not in RANDOM_POLICIES:
        raise UserError(f"unknown policy {name!r}; use {', '.join(RANDOM_POLICIES)} or the address of a policy")
    return RANDOM_POLICIES[name]
