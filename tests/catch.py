"""Catch on 12x12 frames behind the VectorAtari interface: a ball falls, a paddle moves, +1 caught and -1 missed.

Optimal play earns 1 every game. Options add lives, truncation, or a reward for nothing, for tests of the flags.
"""

from __future__ import annotations

import numpy as np

from pipeline.atari import Step
from pipeline.schema import Preprocess

SIZE = 12
PADDLE = 3


def catch_preprocess(size: int = SIZE) -> Preprocess:
    return Preprocess(
        game="catch",
        protocol="toy",
        ale_version="0",
        rom_md5="0",
        frame_skip=1,
        sticky_probability=0.0,
        max_pool=False,
        height=size,
        width=size,
        grayscale=True,
        resize="none",
        action_set=("LEFT", "NOOP", "RIGHT"),
        noop_max=0,
        fire_reset=False,
    )


class VectorCatch:
    """E games; NEXT_STEP autoreset. With `balls` > 1 a missed ball costs a life and the game goes on."""

    def __init__(self, num_envs: int, *, balls: int = 1, max_steps: int = 10**9, scale: float = 1.0) -> None:
        self.num_envs = num_envs
        self.num_actions = 3
        self.action_names = ("LEFT", "NOOP", "RIGHT")
        self._balls, self._max_steps, self._scale = balls, max_steps, scale
        self._rng = [np.random.default_rng(i) for i in range(num_envs)]
        self._over = np.zeros(num_envs, bool)
        self._ball = np.zeros((num_envs, 2), np.int64)
        self._paddle = np.zeros(num_envs, np.int64)
        self._lives = np.zeros(num_envs, np.int64)
        self._steps = np.zeros(num_envs, np.int64)
        self.num_closed = 0

    def reset(self, seeds: np.ndarray | None = None, mask: np.ndarray | None = None) -> Step:
        chosen = np.flatnonzero(np.ones(self.num_envs, bool) if mask is None else mask)
        for i, e in enumerate(chosen):
            if seeds is not None:
                self._rng[e] = np.random.default_rng(int(seeds[i]))
            self._start(e)
        never = np.zeros(self.num_envs, bool)
        return self._result(np.zeros(self.num_envs), never, never.copy())

    def step(self, actions: np.ndarray) -> Step:
        rewards = np.zeros(self.num_envs)
        terminated, truncated = np.zeros(self.num_envs, bool), np.zeros(self.num_envs, bool)
        for e in range(self.num_envs):
            if self._over[e]:
                self._start(e)
            else:
                rewards[e], terminated[e], truncated[e] = self._advance(e, int(actions[e]))
        self._over = terminated | truncated
        return self._result(rewards, terminated, truncated)

    def close(self) -> None:
        self.num_closed += 1

    def _start(self, e: int) -> None:
        self._over[e] = False
        self._lives[e], self._steps[e] = self._balls, 0
        self._paddle[e] = self._rng[e].integers(0, SIZE - PADDLE + 1)
        self._drop(e)

    def _drop(self, e: int) -> None:
        self._ball[e] = 0, self._rng[e].integers(0, SIZE)

    def _advance(self, e: int, action: int) -> tuple[float, bool, bool]:
        self._steps[e] += 1
        self._paddle[e] = np.clip(self._paddle[e] + 2 * (action - 1), 0, SIZE - PADDLE)
        self._ball[e, 0] += 1
        is_cut = self._steps[e] >= self._max_steps
        if self._ball[e, 0] < SIZE - 1:
            return 0.0, False, bool(is_cut)
        caught = 0 <= self._ball[e, 1] - self._paddle[e] < PADDLE
        self._lives[e] -= 1 if self._balls == 1 else int(not caught)
        is_over = self._lives[e] == 0
        if not is_over:
            self._drop(e)
        return (1.0 if caught else -1.0) * self._scale, bool(is_over), bool(is_cut and not is_over)

    def _result(self, rewards: np.ndarray, terminated: np.ndarray, truncated: np.ndarray) -> Step:
        frames = np.zeros((self.num_envs, SIZE, SIZE), np.uint8)
        for e in range(self.num_envs):
            frames[e, self._ball[e, 0], self._ball[e, 1]] = 255
            frames[e, SIZE - 1, self._paddle[e] : self._paddle[e] + PADDLE] = 128
        return Step(frames, rewards.astype(np.float32), terminated, truncated, self._lives.astype(np.int32).copy())


def catch_factory(preprocess: Preprocess, num_envs: int, num_threads: int) -> VectorCatch:
    return VectorCatch(num_envs)


def catch_with_lives_factory(preprocess: Preprocess, num_envs: int, num_threads: int) -> VectorCatch:
    return VectorCatch(num_envs, balls=2, max_steps=40, scale=5.0)
