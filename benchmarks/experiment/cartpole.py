"""Pixel CartPole: Gymnasium's CartPole-v1 drawn as one grey frame a step, many games at once.

Physics, limits and rewards are CartPole-v1's (Barto, Sutton & Anderson 1983): +1 a step, over when the pole leans by
more than 12 degrees or the cart leaves the track, cut after 500 steps. A frame shows where cart and pole are; how fast
they move shows only between frames. The drawing is smooth, so that a tenth of a pixel is seen as a shade.

Shapes: E games, H x W pixels. A state is (cart position, its velocity, pole angle, its velocity): m, m/s, rad, rad/s.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from curves.rally import rally_preprocess

from pipeline.atari import Step
from pipeline.schema import Preprocess

SIZE = 60
ACTIONS = ("LEFT", "RIGHT")
MOST_STEPS = 500
TRACK, LEAN = 2.4, 12 * math.pi / 180  # where a game is over
LIMITS = np.array([TRACK, 3.0, LEAN, 3.5])  # of a state's numbers as bytes; velocities beyond are cut
ANYWHERE = np.array([0.9 * TRACK, 1.0, 0.9 * LEAN, 1.0])  # where games of `anywhere` start
_GRAVITY, _CART_KG, _POLE_KG, _HALF_POLE, _FORCE, _TICK_S = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02
_FLOOR, _POLE, _HALF_WIDTH, _CART = 48.0, 38.0, 1.6, (6.5, 4.0)  # pixels
_PIXELS_PER_M = 0.5 * (SIZE - 2 * _CART[0]) / TRACK
_POLE_LEVEL, _CART_LEVEL = 255.0, 160.0


def cartpole_preprocess(height: int = SIZE, width: int = SIZE, drawing: str = "smooth") -> Preprocess:
    """What identifies its frames; `drawing` "bytes" are those of `state_factory`."""
    own = {"game": "cartpole", "height": height, "width": width, "resize": drawing, "action_set": ACTIONS}
    return dataclasses.replace(rally_preprocess(), **own)


def advance(states: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """States (E, 4) float64 after one step of 20 ms with the cart pushed left (0) or right (1)."""
    _, speed, angle, turn = states.T
    force = np.where(actions == 1, _FORCE, -_FORCE)
    cos, sin, total = np.cos(angle), np.sin(angle), _CART_KG + _POLE_KG
    push = (force + _POLE_KG * _HALF_POLE * turn**2 * sin) / total
    turning = (_GRAVITY * sin - cos * push) / (_HALF_POLE * (4 / 3 - _POLE_KG * cos**2 / total))
    speeding = push - _POLE_KG * _HALF_POLE * turning * cos / total
    return states + _TICK_S * np.stack([speed, speeding, turn, turning], 1)


def draw(states: np.ndarray) -> np.ndarray:
    """Frames (E, 60, 60) uint8 of states (E, 4); the pole is drawn longer than it is to scale."""
    cart = (SIZE / 2 + _PIXELS_PER_M * states[:, 0]).astype(np.float32)[:, None, None]
    sin, cos = (part.astype(np.float32)[:, None, None] for part in (np.sin(states[:, 2]), np.cos(states[:, 2])))
    up = (_FLOOR - np.arange(SIZE, dtype=np.float32) - 0.5)[None, :, None]
    right = np.arange(SIZE, dtype=np.float32)[None, None, :] + 0.5 - cart
    along = (right * sin + up * cos).clip(0, _POLE)
    pole = _shade(_HALF_WIDTH - np.hypot(right - along * sin, up - along * cos)) * _POLE_LEVEL
    box = _shade(_CART[0] - np.abs(right)) * _shade(_CART[1] - np.abs(up)) * _CART_LEVEL
    return np.maximum(pole, box).round().astype(np.uint8)


def _shade(inside: np.ndarray) -> np.ndarray:
    """How much of a pixel is covered by what reaches `inside` pixels beyond its middle."""
    return (inside + 0.5).clip(0, 1)


class VectorCartPole:
    """E games behind `pipeline.atari.VectorAtari`, NEXT_STEP autoreset."""

    def __init__(self, num_envs: int, *, anywhere: bool = False) -> None:
        """`anywhere`: games start all over the track, leaning and moving, instead of CartPole-v1's upright start."""
        self.num_envs, self.num_actions, self.action_names = num_envs, len(ACTIONS), ACTIONS
        self._rng = [np.random.default_rng(e) for e in range(num_envs)]
        self._spread = ANYWHERE if anywhere else np.full(4, 0.05)
        self.states = np.zeros((num_envs, 4))
        self._steps = np.zeros(num_envs, np.int64)
        self._over = np.zeros(num_envs, bool)

    def reset(self, seeds: np.ndarray | None = None, mask: np.ndarray | None = None) -> Step:
        """See VectorAtari."""
        chosen = np.flatnonzero(np.ones(self.num_envs, bool) if mask is None else mask)
        for i, e in enumerate(chosen):
            if seeds is not None:
                self._rng[e] = np.random.default_rng(int(seeds[i]))
            self._start(e)
        self._over[chosen] = False
        none = np.zeros(self.num_envs, bool)
        return self._result(none, none, none)

    def step(self, actions: np.ndarray) -> Step:
        """See VectorAtari."""
        starting = self._over.copy()
        for e in np.flatnonzero(starting):
            self._start(e)
        self.states[~starting] = advance(self.states[~starting], actions[~starting])
        self._steps[~starting] += 1
        fallen = ~starting & ((np.abs(self.states[:, 0]) > TRACK) | (np.abs(self.states[:, 2]) > LEAN))
        cut = ~starting & ~fallen & (self._steps >= MOST_STEPS)
        self._over = fallen | cut
        return self._result(~starting, fallen, cut)

    def close(self) -> None:
        """Nothing to free."""

    def frames(self) -> np.ndarray:
        """What the games show now."""
        return draw(self.states)

    def _start(self, e: int) -> None:
        self.states[e] = self._rng[e].uniform(-self._spread, self._spread)
        self._steps[e] = 0

    def _result(self, rewarded: np.ndarray, fallen: np.ndarray, cut: np.ndarray) -> Step:
        lives = np.zeros(self.num_envs, np.int32)
        return Step(self.frames(), rewarded.astype(np.float32), fallen.copy(), cut.copy(), lives)


class VectorStates(VectorCartPole):
    """The same games; their frames (E, 1, 4) are the states' numbers as bytes."""

    def frames(self) -> np.ndarray:
        """See above."""
        shares = (self.states / LIMITS).clip(-1, 1)
        return np.asarray(((shares + 1) * 127.5).round().astype(np.uint8)[:, None])


def cartpole_factory(preprocess: Preprocess, num_envs: int, num_threads: int) -> VectorCartPole:
    """For `LatentDQNConfig.latent(env_factory=...)`."""
    return VectorCartPole(num_envs)


def anywhere_factory(preprocess: Preprocess, num_envs: int, num_threads: int) -> VectorCartPole:
    """Games that start anywhere, for frames to learn an encoder from."""
    return VectorCartPole(num_envs, anywhere=True)


def state_preprocess() -> Preprocess:
    """What identifies states as bytes."""
    return cartpole_preprocess(1, 4, "bytes")


def state_factory(preprocess: Preprocess, num_envs: int, num_threads: int) -> VectorStates:
    """CartPole whose frames are its states."""
    return VectorStates(num_envs)


def anywhere_state_factory(preprocess: Preprocess, num_envs: int, num_threads: int) -> VectorStates:
    """The same from anywhere."""
    return VectorStates(num_envs, anywhere=True)
