"""A trained policy as the behaviour of a collection: mostly greedy, sometimes random."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.bundle import pack, sha256_of, unpack
from pipeline.policies import Behaviour, RandomBehaviour
from pipeline.schema import Preprocess
from rllib_ext.policy import Policy, load_policy


@dataclass(frozen=True)
class PolicyFactory:
    """Carries a policy bundle's bytes to the collecting workers, which verify them.

    Attributes:
        blob: The packed bundle.
        sha256: What it must hash to.
        epsilon: Share of random actions, so that games from one start differ.
    """

    blob: bytes = field(repr=False)
    sha256: str
    epsilon: float

    @classmethod
    def load(cls, bundle: Path, preprocess: Preprocess, epsilon: float) -> PolicyFactory:
        """Reads a bundle and checks it against the environment.

        Raises:
            UserError: Not a sound policy bundle, or made for frames prepared differently.
        """
        policy = load_policy(bundle)
        policy.preprocess.require_match(preprocess, mine="the policy", theirs="the environment")
        return cls(pack(bundle), sha256_of(bundle), epsilon)

    def __call__(self, preprocess: Preprocess, lane_seeds: list[int]) -> Behaviour:
        """See pipeline.policies.BehaviourFactory."""
        with tempfile.TemporaryDirectory() as folder:
            policy = load_policy(unpack(self.blob, Path(folder) / "policy", self.sha256))
        return EpsilonGreedy(policy, lane_seeds, self.epsilon)


class EpsilonGreedy:
    """Greedy actions of a policy, replaced by uniformly random ones with probability epsilon."""

    def __init__(self, policy: Policy, lane_seeds: list[int], epsilon: float) -> None:
        self._policy = policy
        self._epsilon = epsilon
        self._random = RandomBehaviour(0, len(policy.config.action_names), lane_seeds, 0.0)
        self._generators = [np.random.default_rng([seed, 1]) for seed in lane_seeds]
        policy.reset(len(lane_seeds))

    def act(self, frames: np.ndarray, is_first: np.ndarray) -> np.ndarray:
        """See pipeline.policies.Behaviour."""
        greedy = self._policy.act(frames, is_first)
        explores = np.array([g.random() for g in self._generators]) < self._epsilon
        return np.where(explores, self._random.act(frames, is_first), greedy)
