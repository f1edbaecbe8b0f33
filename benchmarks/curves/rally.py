"""Rally: a small pixel game that a Q-learner learns within minutes, behind both libraries' interfaces.

A ball falls diagonally, bounces off the walls, and is to be met by a paddle below; the next ball follows at once. Its
direction shows only between frames. A ball met is +1; a game is over with the first one missed, which is -1, or with
the tenth one met: it returns -1 to 10.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from pipeline.atari import Step
from pipeline.schema import Preprocess

CELLS = 8
CELL_PIXELS = 6
SIZE = CELLS * CELL_PIXELS
PADDLE = 2
BALLS = 10
ACTIONS = ("LEFT", "NOOP", "RIGHT")


def rally_preprocess(cell_pixels: int = CELL_PIXELS) -> Preprocess:
    """What identifies its frames; a cell is a square of so many pixels."""
    return Preprocess(
        game="rally",
        protocol="own",
        ale_version="0",
        rom_md5="0",
        frame_skip=1,
        sticky_probability=0.0,
        max_pool=False,
        height=CELLS * cell_pixels,
        width=CELLS * cell_pixels,
        grayscale=True,
        resize="none",
        action_set=ACTIONS,
        noop_max=0,
        fire_reset=False,
    )


class VectorRally:
    """E games behind `pipeline.atari.VectorAtari`: uint8 frames of 8 x 8 cells, NEXT_STEP autoreset."""

    def __init__(self, num_envs: int, cell_pixels: int = CELL_PIXELS) -> None:
        """`reset` before the first step."""
        self._cell_pixels = cell_pixels
        self.num_envs, self.num_actions, self.action_names = num_envs, len(ACTIONS), ACTIONS
        self._rng = [np.random.default_rng(e) for e in range(num_envs)]
        self._ball = np.zeros((num_envs, 2), np.int64)  # row, column
        self._drift = np.ones(num_envs, np.int64)
        self._paddle = np.zeros(num_envs, np.int64)
        self._left = np.zeros(num_envs, np.int64)
        self._over = np.zeros(num_envs, bool)

    def reset(self, seeds: np.ndarray | None = None, mask: np.ndarray | None = None) -> Step:
        """See VectorAtari."""
        chosen = np.flatnonzero(np.ones(self.num_envs, bool) if mask is None else mask)
        for i, e in enumerate(chosen):
            if seeds is not None:
                self._rng[e] = np.random.default_rng(int(seeds[i]))
            self._start(e)
        self._over[chosen] = False
        return self._result(np.zeros(self.num_envs, np.float32))

    def step(self, actions: np.ndarray) -> Step:
        """See VectorAtari."""
        starting, rewards = self._over.copy(), np.zeros(self.num_envs, np.float32)
        for e in np.flatnonzero(starting):
            self._start(e)
        playing = np.flatnonzero(~starting)
        self._over[:] = False
        self._paddle[playing] = (self._paddle[playing] + actions[playing] - 1).clip(0, CELLS - PADDLE)
        column = self._ball[playing, 1] + self._drift[playing]
        bounces = (column < 0) | (column >= CELLS)
        self._drift[playing[bounces]] *= -1
        self._ball[playing, 1] += self._drift[playing]
        self._ball[playing, 0] += 1
        for e in playing[self._ball[playing, 0] == CELLS - 1]:
            met = 0 <= self._ball[e, 1] - self._paddle[e] < PADDLE
            rewards[e] = 1.0 if met else -1.0
            self._left[e] -= 1
            self._over[e] = not met or self._left[e] == 0
            if not self._over[e]:
                self._drop(e)
        return self._result(rewards)

    def close(self) -> None:
        """Nothing to free."""

    def _start(self, e: int) -> None:
        self._left[e] = BALLS
        self._paddle[e] = self._rng[e].integers(0, CELLS - PADDLE + 1)
        self._drop(e)

    def _drop(self, e: int) -> None:
        self._ball[e] = 0, self._rng[e].integers(0, CELLS)
        self._drift[e] = self._rng[e].choice((-1, 1))

    def _result(self, rewards: np.ndarray) -> Step:
        grid, every = np.zeros((self.num_envs, CELLS, CELLS), np.uint8), np.arange(self.num_envs)
        grid[every, self._ball[:, 0], self._ball[:, 1]] = 255
        grid[every[:, None], CELLS - 1, self._paddle[:, None] + np.arange(PADDLE)] = 160
        frames = grid.repeat(self._cell_pixels, 1).repeat(self._cell_pixels, 2)
        return Step(
            frames, rewards, self._over.copy(), np.zeros(self.num_envs, bool), np.zeros(self.num_envs, np.int32)
        )


def rally_factory(preprocess: Preprocess, num_envs: int, num_threads: int) -> VectorRally:
    """For `LatentDQNConfig.latent(env_factory=...)`."""
    return VectorRally(num_envs, preprocess.height // CELLS)


class GymRally(gym.Env[np.ndarray, int]):
    """One game behind Gymnasium's interface: uint8 frames (48, 48, 1)."""

    def __init__(self) -> None:
        """`reset` before the first step."""
        self._vector = VectorRally(1)
        self.observation_space = gym.spaces.Box(0, 255, (SIZE, SIZE, 1), np.uint8)
        self.action_space = gym.spaces.Discrete(len(ACTIONS))  # type: ignore[assignment]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """A new game; with a seed always the same one."""
        super().reset(seed=seed)
        first = self._vector.reset(self.np_random.integers(0, 2**31 - 1, 1))
        return first.frames[0, :, :, None], {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """One agent step."""
        step = self._vector.step(np.array([action]))
        return step.frames[0, :, :, None], float(step.rewards[0]), bool(step.terminated[0]), False, {}
