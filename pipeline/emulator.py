"""One game of Atari in plain Python: the same frames as ALE's C++ vector environment, with RAM and colours beside them.

The C++ environment (pipeline.atari) is the fast way; this one exists for what it cannot give (the 128 bytes of RAM, the
coloured screen for a video) and as the reference that it is tested against, frame by frame.
"""

from __future__ import annotations

from typing import NamedTuple

import ale_py
import cv2
import numpy as np
from ale_py import roms

from pipeline.schema import Preprocess


class PlainStep(NamedTuple):
    """What one agent step gave: frame (H, W) uint8, raw reward, how it ended, lives left, RAM (128,) uint8."""

    frame: np.ndarray
    reward: float
    terminated: bool
    truncated: bool
    lives: int
    ram: np.ndarray


class PlainAtari:
    """A single emulator with frame skip, pooling, no-op start and resizing as the C++ vector environment does them.

    Args:
        preprocess: What a frame is.
        max_env_frames: Emulator frames after which a game is truncated (no-op frames not counted).
        life_loss_ends: Whether `terminated` is also set when a life is lost; the game itself goes on.
    """

    def __init__(self, preprocess: Preprocess, *, max_env_frames: int, life_loss_ends: bool = False) -> None:
        self._preprocess = preprocess
        self._max_env_frames = max_env_frames
        self._life_loss_ends = life_loss_ends
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        self._ale = ale_py.ALEInterface()
        self._ale.setFloat("repeat_action_probability", preprocess.sticky_probability)
        self._load(0)
        by_name = {action.name: action for action in self._ale.getLegalActionSet()}
        self._actions = [by_name[name] for name in preprocess.action_set]
        height, width = self._ale.getScreenDims()
        # Pooled in place and kept between steps, as in C++: a game that ends inside a skip shows the last pooled frame.
        self._raw = [np.zeros((height, width), np.uint8) for _ in range(2)]

    def reset(self, seed: int | None = None) -> PlainStep:
        """Starts a game; a seed makes it reproducible (same no-ops, same sticky actions)."""
        if seed is not None:
            self._load(seed)
        self._ale.reset_game()
        has_fire_start = self._preprocess.fire_reset and "FIRE" in self._preprocess.action_set
        if has_fire_start:
            self._ale.act(ale_py.Action.FIRE)
        for _ in range(self._draw_noops() - int(has_fire_start)):
            self._ale.act(ale_py.Action.NOOP)
            if self._ale.game_over():
                self._ale.reset_game()
        self._ale.getScreenGrayscale(self._raw[0])
        self._raw[1].fill(0)
        self._elapsed_env_frames = 0
        self._lives = self._ale.lives()
        return self._result(0.0, lost_life=False)

    def step(self, action: int) -> PlainStep:
        """Repeats an action (an index into the action set) for the frames of one skip."""
        reward, lost_life = 0.0, False
        for remaining in range(self._preprocess.frame_skip, 0, -1):
            reward += self._ale.act(self._actions[action])
            self._elapsed_env_frames += 1
            lost_life = 0 < self._ale.lives() < self._lives
            if self._ale.game_over() or self._elapsed_env_frames >= self._max_env_frames:
                break
            if remaining <= 2:
                self._ale.getScreenGrayscale(self._raw[remaining - 1])
        self._lives = self._ale.lives()
        return self._result(reward, lost_life=lost_life)

    @property
    def is_over(self) -> bool:
        """Whether the game itself has ended or been truncated (a lost life does not end it)."""
        return bool(self._ale.game_over()) or self._elapsed_env_frames >= self._max_env_frames

    def rgb(self) -> np.ndarray:
        """The coloured screen as it is now: (210, 160, 3) uint8 for most games."""
        return np.asarray(self._ale.getScreenRGB())

    def _load(self, seed: int) -> None:
        self._ale.setInt("random_seed", seed)
        self._noop_generator = np.random.MT19937()
        self._noop_generator._legacy_seeding(seed)  # type: ignore[attr-defined]
        self._ale.loadROM(roms.get_rom_path(self._preprocess.game))

    def _draw_noops(self) -> int:
        """Uniform in {0, ..., noop_max - 1}, drawn as libstdc++ does (Lemire 2019, arXiv:1805.10941)."""
        span = self._preprocess.noop_max
        if span <= 1:
            return 0
        product = int(self._noop_generator.random_raw()) * span
        while (product & 0xFFFFFFFF) < (2**32 - span) % span:
            product = int(self._noop_generator.random_raw()) * span
        return product >> 32

    def _result(self, reward: float, *, lost_life: bool) -> PlainStep:
        if self._preprocess.max_pool:
            np.maximum(self._raw[0], self._raw[1], out=self._raw[0])
        terminated = bool(self._ale.game_over()) or (self._life_loss_ends and lost_life)
        truncated = self._elapsed_env_frames >= self._max_env_frames and not terminated
        ram = np.asarray(self._ale.getRAM())
        return PlainStep(self._resized(), reward, terminated, truncated, self._lives, ram)

    def _resized(self) -> np.ndarray:
        size = (self._preprocess.width, self._preprocess.height)
        if self._raw[0].shape == (self._preprocess.height, self._preprocess.width):
            return self._raw[0].copy()
        return cv2.resize(self._raw[0], size, interpolation=cv2.INTER_AREA)
