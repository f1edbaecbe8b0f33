"""THE Atari preprocessing: games by name, protocols, and the vector environment that every stage calls.

What a frame is follows from the game and from the protocol (pipeline.protocols) under which it is played.
"""

from __future__ import annotations

import difflib
import functools
import re
from importlib import metadata
from typing import NamedTuple, Protocol

import ale_py
import numpy as np
from ale_py import roms
from ale_py.vector_env import AtariVectorEnv

from pipeline.emulator import PlainAtari, PlainStep
from pipeline.errors import UserError
from pipeline.protocols import protocol_rules
from pipeline.schema import Preprocess

EPISODE_CAP_ENV_FRAMES = 108_000  # 30 minutes at 60 Hz, in emulator frames (27,000 agent steps at frame skip 4)


class Step(NamedTuple):
    """What a vector step gave, for E environments.

    `frames` (E, H, W) uint8, a fresh array; `rewards` (E,) float32, raw points; `terminated`, `truncated` (E,) bool;
    `lives` (E,) int32; `ram` (E, 128) uint8, or None where it was not asked for.
    """

    frames: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    lives: np.ndarray
    ram: np.ndarray | None = None


class VectorAtari(Protocol):
    """Several environments stepped together, which start their next episode by themselves.

    The step after a termination or truncation ignores its action and gives the first frame of the next episode, with
    reward 0 (Gymnasium's NEXT_STEP autoreset).
    """

    num_envs: int
    num_actions: int

    def reset(self, seeds: np.ndarray | None = None, mask: np.ndarray | None = None) -> Step:
        """Starts new episodes in the environments that `mask` (E,) bool selects, with one seed for each of them."""

    def step(self, actions: np.ndarray) -> Step:
        """Takes one agent step; `actions` (E,) int64, indices into the action set."""

    def close(self) -> None:
        """Frees the emulators."""


def _squash(name: str) -> str:
    name = name.removeprefix("ALE/")
    name = re.sub(r"(NoFrameskip|Deterministic)?-v\d+$", "", name)
    return re.sub(r"[^a-z0-9]", "", name.lower())


@functools.lru_cache(maxsize=1)
def _games() -> dict[str, str]:
    return {_squash(game): game for game in roms.get_all_rom_ids()}


def canonical_game(name: str) -> str:
    """ALE's id of a game from any usual spelling (`ms_pacman`, `MsPacman`, `ALE/MsPacman-v5`, `ms-pacman`).

    Raises:
        UserError: No such game; the message shows near matches.
    """
    games = _games()
    key = _squash(name)
    if key in games:
        return games[key]
    near = [games[match] for match in difflib.get_close_matches(key, games, n=3, cutoff=0.5)]
    hint = f"did you mean {', '.join(near)}?" if near else "games go by their ALE id, for example pong or ms_pacman"
    raise UserError(f"unknown game {name!r}; {hint}")


@functools.lru_cache(maxsize=64)
def _action_names(game: str, has_full_action_set: bool) -> tuple[str, ...]:
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    ale = ale_py.ALEInterface()
    ale.loadROM(roms.get_rom_path(game))
    actions = ale.getLegalActionSet() if has_full_action_set else ale.getMinimalActionSet()
    return tuple(action.name for action in actions)


@functools.lru_cache(maxsize=64)
def preprocess_for(game: str, protocol: str = "atari100k", resolution: tuple[int, int] = (84, 84)) -> Preprocess:
    """The record of how frames of a game are made under a protocol.

    Args:
        game: In any spelling that `canonical_game` takes.
        protocol: One of PROTOCOLS.
        resolution: (height, width) of a frame in pixels.

    Raises:
        UserError: Unknown game or protocol.
    """
    game, rules = canonical_game(game), protocol_rules(protocol)
    return Preprocess(
        game=game,
        protocol=protocol,
        ale_version=metadata.version("ale-py"),
        rom_md5=roms._get_expected_bin_hashes()[f"{game}.bin"],
        frame_skip=4,
        sticky_probability=rules.sticky_probability,
        max_pool=True,
        height=resolution[0],
        width=resolution[1],
        grayscale=True,
        resize="none" if resolution == (210, 160) else "area",
        action_set=_action_names(game, rules.has_full_action_set),
        noop_max=rules.noop_max,
        fire_reset=rules.fire_reset,
    )


def make_vector(
    preprocess: Preprocess,
    num_envs: int,
    num_threads: int = 1,
    *,
    with_ram: bool = False,
    life_loss_ends: bool = False,
    max_env_frames: int = EPISODE_CAP_ENV_FRAMES,
) -> VectorAtari:
    """Builds `num_envs` environments of one game.

    Args:
        preprocess: What a frame is.
        num_envs: E, environments stepped together.
        num_threads: Threads of the C++ environment.
        with_ram: Gives the 128 bytes of RAM too, by plain Python emulators (slower, the same frames).
        life_loss_ends: Ends an episode when a life is lost; the game goes on with the next one after one no-op.
        max_env_frames: Emulator frames after which an episode is truncated.
    """
    if with_ram:
        return PlainVector(preprocess, num_envs, life_loss_ends=life_loss_ends, max_env_frames=max_env_frames)
    return CppVector(preprocess, num_envs, num_threads, life_loss_ends=life_loss_ends, max_env_frames=max_env_frames)


class CppVector:
    """ALE's C++ vector environment behind the `VectorAtari` interface."""

    def __init__(
        self,
        preprocess: Preprocess,
        num_envs: int,
        num_threads: int,
        *,
        life_loss_ends: bool,
        max_env_frames: int,
    ) -> None:
        self.num_envs = num_envs
        self.num_actions = len(preprocess.action_set)
        self._forced_noop = np.zeros(num_envs, bool)
        self._life_loss_ends = life_loss_ends
        self._env = AtariVectorEnv(
            preprocess.game,
            num_envs,
            num_threads=min(num_threads, num_envs),
            max_num_frames_per_episode=max_env_frames,
            repeat_action_probability=preprocess.sticky_probability,
            full_action_space=protocol_rules(preprocess.protocol).has_full_action_set,
            img_height=preprocess.height,
            img_width=preprocess.width,
            stack_num=1,
            frameskip=preprocess.frame_skip,
            maxpool=preprocess.max_pool,
            noop_max=preprocess.noop_max,
            use_fire_reset=preprocess.fire_reset,
            life_loss_info=life_loss_ends,
            reward_clipping=False,
        )

    def reset(self, seeds: np.ndarray | None = None, mask: np.ndarray | None = None) -> Step:
        """See VectorAtari."""
        options = {} if mask is None else {"reset_mask": mask}
        frames, info = self._env.reset(seed=None if seeds is None else seeds.astype(np.int32), options=options)
        self._forced_noop &= False if mask is None else ~mask
        never = np.zeros(self.num_envs, bool)
        rewards = np.zeros(self.num_envs, np.float32)
        return Step(frames[:, 0], rewards, never, never.copy(), info["lives"])

    def step(self, actions: np.ndarray) -> Step:
        """See VectorAtari."""
        if not self._life_loss_ends:
            frames, rewards, terminated, truncated, info = self._env.step(actions)
            return Step(frames[:, 0], rewards.astype(np.float32), terminated, truncated, info["lives"])
        started = self._forced_noop
        frames, rewards, terminated, truncated, info = self._env.step(np.where(started, 0, actions))
        self._forced_noop = terminated | truncated
        rewards = np.where(started, 0, rewards).astype(np.float32)
        return Step(frames[:, 0], rewards, terminated, truncated, info["lives"])

    def close(self) -> None:
        """See VectorAtari."""
        del self._env


class PlainVector:
    """Plain emulators behind the `VectorAtari` interface, with RAM."""

    def __init__(self, preprocess: Preprocess, num_envs: int, *, life_loss_ends: bool, max_env_frames: int) -> None:
        self.num_envs = num_envs
        self.num_actions = len(preprocess.action_set)
        self._results: list[PlainStep | None] = [None] * num_envs
        self._games = [
            PlainAtari(preprocess, max_env_frames=max_env_frames, life_loss_ends=life_loss_ends)
            for _ in range(num_envs)
        ]

    def reset(self, seeds: np.ndarray | None = None, mask: np.ndarray | None = None) -> Step:
        """See VectorAtari."""
        chosen = np.arange(self.num_envs) if mask is None else np.flatnonzero(mask)
        for position, index in enumerate(chosen):
            self._results[index] = self._games[index].reset(None if seeds is None else int(seeds[position]))
        return self._stacked()

    def step(self, actions: np.ndarray) -> Step:
        """See VectorAtari."""
        for index, action in enumerate(actions):
            self._results[index] = self._advance(index, int(action))
        return self._stacked()

    def close(self) -> None:
        """See VectorAtari."""
        self._games.clear()

    def _advance(self, index: int, action: int) -> PlainStep:
        game, before = self._games[index], self._results[index]
        if before is None:
            raise RuntimeError("reset every environment before the first step")
        if game.is_over:
            return game.reset()
        if before.terminated:  # a life was lost: the next episode starts in the same game, after one no-op
            return game.step(0)._replace(reward=0.0)
        return game.step(action)

    def _stacked(self) -> Step:
        results = [result for result in self._results if result is not None]
        return Step(
            np.stack([r.frame for r in results]),
            np.array([r.reward for r in results], np.float32),
            np.array([r.terminated for r in results], bool),
            np.array([r.truncated for r in results], bool),
            np.array([r.lives for r in results], np.int32),
            np.stack([r.ram for r in results]),
        )


def make_player(preprocess: Preprocess, *, max_env_frames: int = EPISODE_CAP_ENV_FRAMES) -> PlainAtari:
    """One game for watching: the frames of the vector environment, with the coloured screen beside them."""
    return PlainAtari(preprocess, max_env_frames=max_env_frames)
