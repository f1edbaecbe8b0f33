"""Montezuma's Revenge: who plays so that the labels vary, what the labels are, and how they are read off a code.

Shapes: N frames, Z code dimensions, E environments.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.policies import Behaviour
from pipeline.schema import Preprocess

GAME = "montezuma_revenge"
# Bytes of the emulator's RAM: Anand et al. 2019, arXiv:1906.08226, whose released code names them so.
LABELS = {"player_x": 42, "player_y": 43, "enemy_skull_x": 47}
ROOM_BYTE, FIRST_ROOM = 3, 1  # frames of other rooms, where no skull rolls, are left out
HELD_OUT_SHARE = 0.2  # of the episodes
RIDGES = tuple(10.0**power for power in range(-4, 5))
PCA_DIMENSIONS = 256

# Scripts: names of actions and for how many agent steps each is held, (fewest, most).
SCRIPTS: dict[str, tuple[tuple[str, int, int], ...]] = {
    "go-left": (("LEFT", 4, 16),),
    "go-right": (("RIGHT", 4, 16),),
    "jump-left": (("LEFTFIRE", 1, 2), ("LEFT", 6, 10)),
    "jump-right": (("RIGHTFIRE", 1, 2), ("RIGHT", 6, 10)),
    "jump": (("FIRE", 1, 1), ("NOOP", 6, 8)),
    "ladder-down": (("DOWN", 12, 40),),
    "ladder-up": (("UP", 12, 40),),
    "wait": (("NOOP", 4, 12),),
    # From the start: down the ladder, over to the rope, onto the ledge, down and left to the skull.
    "to-the-skull": (
        ("DOWN", 18, 22),
        ("RIGHT", 5, 7),
        ("RIGHTFIRE", 2, 2),
        ("RIGHT", 8, 10),
        ("RIGHTFIRE", 2, 2),
        ("RIGHT", 14, 18),
        ("DOWN", 28, 34),
        ("LEFT", 4, 30),
    ),
}
FIRST_SCRIPT_SHARE = 0.6  # of the episodes begin with "to-the-skull"


@dataclass(frozen=True)
class ScriptsFactory:
    """Plays scripts drawn at random, one after another; see pipeline.policies.BehaviourFactory."""

    def __call__(self, preprocess: Preprocess, lane_seeds: list[int]) -> Behaviour:
        """See BehaviourFactory."""
        return Scripts(preprocess.action_set, lane_seeds)


class Scripts:
    """Each environment goes through a script and then draws its next; its generator is its own."""

    def __init__(self, action_set: tuple[str, ...], lane_seeds: list[int]) -> None:
        """`action_set` names the actions by index."""
        self._index = {name: index for index, name in enumerate(action_set)}
        self._generators = [np.random.default_rng([seed, 5]) for seed in lane_seeds]
        self._queues: list[list[int]] = [[] for _ in lane_seeds]

    def act(self, frames: np.ndarray, is_first: np.ndarray) -> np.ndarray:
        """See pipeline.policies.Behaviour."""
        actions = np.zeros(len(self._queues), np.int64)
        for lane, queue in enumerate(self._queues):
            if is_first[lane]:
                queue[:] = self._opening(self._generators[lane])
            if not queue:
                queue[:] = self._any_script(self._generators[lane])
            actions[lane] = queue.pop(0)
        return actions

    def _opening(self, generator: np.random.Generator) -> list[int]:
        if generator.random() < FIRST_SCRIPT_SHARE:
            return self._played("to-the-skull", generator)
        return self._any_script(generator)

    def _any_script(self, generator: np.random.Generator) -> list[int]:
        names = [name for name in SCRIPTS if name != "to-the-skull"]
        return self._played(names[generator.integers(len(names))], generator)

    def _played(self, name: str, generator: np.random.Generator) -> list[int]:
        steps = []
        for action, fewest, most in SCRIPTS[name]:
            steps += [self._index[action]] * int(generator.integers(fewest, most + 1))
        return steps


def held_out(episode_ids: np.ndarray, seed: int) -> np.ndarray:
    """(N,) bool: the frames of a fifth of the episodes, drawn by `seed`."""
    episodes = np.unique(episode_ids)
    chosen = np.random.default_rng(seed).permutation(episodes)[: max(1, round(HELD_OUT_SHARE * len(episodes)))]
    return np.isin(episode_ids, chosen)


def linear_r2(codes: np.ndarray, labels: np.ndarray, is_held_out: np.ndarray, episode_ids: np.ndarray) -> np.ndarray:
    """R2 on held-out frames of labels (N, L), by ridge regression on codes (N, Z), standardised; one value a label.

    The ridge is the one, of RIDGES, that does best on a fifth of the other episodes; the fit is then on all of them.
    """
    is_choosing = np.zeros(len(codes), bool)
    is_choosing[~is_held_out] = held_out(episode_ids[~is_held_out], seed=1)
    is_fitting = ~is_held_out & ~is_choosing
    best = np.array([_r2(codes, labels, is_fitting, is_choosing, ridge) for ridge in RIDGES]).argmax(0)
    return np.array(
        [_r2(codes, labels[:, [k]], ~is_held_out, is_held_out, RIDGES[best[k]])[0] for k in range(labels.shape[1])]
    )


def _r2(codes: np.ndarray, labels: np.ndarray, fit: np.ndarray, score: np.ndarray, ridge: float) -> np.ndarray:
    mean, scale = codes[fit].mean(0, dtype=np.float64), codes[fit].std(0, dtype=np.float64) + 1e-6
    x, y = (codes[fit] - mean) / scale, labels[fit].astype(np.float64)
    centre = y.mean(0)
    weights = np.linalg.solve(x.T @ x + ridge * len(x) * np.eye(x.shape[1]), x.T @ (y - centre))
    truth = labels[score].astype(np.float64)
    residual = truth - centre - (codes[score] - mean) / scale @ weights
    return np.asarray(1 - (residual**2).sum(0) / ((truth - truth.mean(0)) ** 2).sum(0))
