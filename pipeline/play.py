"""Whole games by an agent, for a score and for a film. Any agent will do: these loops only ask it for actions.

Shapes: E environments side by side, N episodes, H height and W width of a frame.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.atari import Step, VectorAtari, make_player, make_vector
from pipeline.emulator import PlainAtari
from pipeline.gameplay import Moment
from pipeline.plate import Pixels
from pipeline.policies import Behaviour, random_policy
from pipeline.schema import Preprocess

MAX_ENVS = 20
NUM_THREADS = 2

Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]
Reconstruct = Callable[[Pixels], Pixels]  # (N, H, W) uint8 -> (N, H, W) uint8, the decoder's mean for each frame


class Player(Protocol):
    """Whoever chooses the actions of E games at once."""

    def act(self, frames: Pixels, is_first: Flags, seeds: Ints) -> Ints:
        """Chooses the next action of each game.

        Args:
            frames: (E, H, W) uint8, what each game shows now. E is the same for all calls on one player.
            is_first: (E,) bool, where a game has just begun: what was remembered of the last one is void.
            seeds: (E,) int64, the seed of the game being played; the source of all randomness.

        Returns:
            (E,) int64, indices into the action set.
        """


class RandomPlayer:
    """Draws every action as the protocol's random agent does, each game from a generator of its own."""

    def __init__(self, preprocess: Preprocess) -> None:
        self._preprocess = preprocess
        self._games: dict[int, Behaviour] = {}

    def act(self, frames: Pixels, is_first: Flags, seeds: Ints) -> Ints:
        """See Player."""
        for lane in np.flatnonzero(is_first).tolist():
            self._games[lane] = random_policy("random")(self._preprocess, [int(seeds[lane])])
        lanes = range(len(frames))
        return np.array([self._games[i].act(frames[i : i + 1], is_first[i : i + 1])[0] for i in lanes], np.int64)


@dataclass(frozen=True)
class EpisodeResults:
    """N whole games, in the order of their numbers.

    Attributes:
        seeds: (N,) int64, of the emulators.
        returns: (N,) float64, raw points.
        lengths: (N,) int64, agent steps.
        truncated: (N,) bool, where the cap of emulator frames ended the game.
    """

    seeds: Ints
    returns: NDArray[np.float64]
    lengths: Ints
    truncated: Flags


def episode_seed(seed: int, episode: int) -> int:
    """The emulator's seed for one numbered episode: depends on these two alone, and not on who plays beside it."""
    return int(np.random.SeedSequence([seed, episode]).generate_state(1)[0] >> 1)


def play(
    player: Player,
    preprocess: Preprocess,
    episodes: int,
    seed: int,
    *,
    max_envs: int = MAX_ENVS,
    make_env: Callable[[Preprocess, int, int], VectorAtari] = make_vector,
    on_finished: Callable[[int], None] = lambda count: None,
) -> EpisodeResults:
    """Plays numbered games to their end (or to the cap of 108,000 emulator frames), several side by side.

    Args:
        player: Chooses the actions.
        preprocess: Game, protocol and frames.
        episodes: N, how many games.
        seed: With an episode's number, decides its start and its chances.
        max_envs: At most so many games at once. Another number gives the same games: only where an agent's arithmetic
            differs in the last bit between batch sizes can a tie between two actions fall differently.
        make_env: (preprocess, E, threads) -> the environment.
        on_finished: Called with the number of games that have just ended.

    Returns:
        The results of all games.
    """
    table = _Table(episodes, seed, num_lanes=min(episodes, max_envs))
    env = make_env(preprocess, table.num_lanes, NUM_THREADS)
    try:
        step, is_first = env.reset(seeds=table.lane_seeds()), np.ones(table.num_lanes, bool)
        while table.is_playing.any():
            step = env.step(player.act(step.frames, is_first, table.lane_seeds()))
            on_finished(table.record(step))
            step, is_first = _start_next(env, table, step)
    finally:
        env.close()
    return table.results()


class _Table:
    """Which lane plays which episode, and how the episodes stand."""

    def __init__(self, episodes: int, seed: int, num_lanes: int) -> None:
        self.num_lanes = num_lanes
        self.is_playing = np.ones(num_lanes, bool)
        self._episode_of = np.arange(num_lanes)
        self._next_episode = num_lanes
        self._seeds = np.array([episode_seed(seed, number) for number in range(episodes)], np.int64)
        self._returns = np.zeros(episodes)
        self._lengths = np.zeros(episodes, np.int64)
        self._truncated = np.zeros(episodes, bool)

    def lane_seeds(self) -> Ints:
        return self._seeds[self._episode_of]

    def record(self, step: Step) -> int:
        """Adds a step to the books; lanes whose game ended stop playing. Gives their number."""
        playing = self._episode_of[self.is_playing]
        self._returns[playing] += step.rewards[self.is_playing]
        self._lengths[playing] += 1
        self._truncated[playing] = step.truncated[self.is_playing]
        ended = self.is_playing & (step.terminated | step.truncated)
        self.is_playing &= ~ended
        return int(ended.sum())

    def seat_next(self) -> Flags:
        """Gives free lanes the next episodes; (E,) bool, the lanes that begin one."""
        free = np.flatnonzero(~self.is_playing)[: len(self._seeds) - self._next_episode]
        self._episode_of[free] = self._next_episode + np.arange(len(free))
        self._next_episode += len(free)
        self.is_playing[free] = True
        begins = np.zeros(self.num_lanes, bool)
        begins[free] = True
        return begins

    def results(self) -> EpisodeResults:
        return EpisodeResults(self._seeds, self._returns, self._lengths, self._truncated)


def _start_next(env: VectorAtari, table: _Table, step: Step) -> tuple[Step, Flags]:
    """Begins waiting episodes in free lanes. Lanes left over play on unwatched until the last game is done."""
    begins = table.seat_next()
    if not begins.any():
        return step, begins
    started = env.reset(seeds=table.lane_seeds()[begins], mask=begins)
    frames = np.where(begins[:, None, None], started.frames, step.frames)
    return step._replace(frames=frames), begins


@dataclass(frozen=True)
class Film:
    """A stretch of one game.

    Attributes:
        moments: One for each agent step shown.
        game_return: Raw points of the whole game.
        game_length: Agent steps of the whole game.
        first_agent_step: Where in the game the stretch begins.
    """

    moments: list[Moment]
    game_return: float
    game_length: int
    first_agent_step: int


def film(
    player: Player, preprocess: Preprocess, seed: int, *, num_moments: int, reconstruct: Reconstruct | None = None
) -> Film:
    """Plays one game, then once more by the same actions to film the stretch in which most points were gained.

    Args:
        player: Chooses the actions, for one game (E = 1).
        preprocess: Game, protocol and frames.
        seed: The emulator's.
        num_moments: Length of the stretch in agent steps; a shorter game is filmed whole.
        reconstruct: What the latents keep of frames; None for an agent without a decoder.
    """
    game = make_player(preprocess)
    actions, rewards = _play_alone(player, game, seed)
    first = _liveliest(np.array(rewards), num_moments)
    screens, frames = _replay(game, seed, actions, first, first + num_moments)
    kept = reconstruct(np.stack(frames)) if reconstruct else [None] * len(frames)
    moments = [Moment(*shown) for shown in zip(screens, frames, kept, strict=True)]
    return Film(moments, float(sum(rewards)), len(actions), first)


def _play_alone(player: Player, game: PlainAtari, seed: int) -> tuple[list[int], list[float]]:
    step, is_first = game.reset(seed), True
    actions, rewards = [], []
    while not game.is_over:
        action = int(player.act(step.frame[None], np.array([is_first]), np.array([seed], np.int64))[0])
        step, is_first = game.step(action), False
        actions.append(action)
        rewards.append(step.reward)
    return actions, rewards


def _liveliest(rewards: NDArray[np.float64], length: int) -> int:
    """First step of the window of `length` steps with the greatest sum of positive rewards; the earliest of equals."""
    if len(rewards) <= length:
        return 0
    gained = np.concatenate([[0.0], np.cumsum(np.maximum(rewards, 0))])
    return int(np.argmax(gained[length:] - gained[:-length]))


def _replay(
    game: PlainAtari, seed: int, actions: list[int], first: int, last: int
) -> tuple[list[Pixels], list[Pixels]]:
    """Screens (210, 160, 3) and frames (H, W) before the actions first, ..., last - 1 of a game."""
    step = game.reset(seed)
    screens, frames = [], []
    for number, action in enumerate(actions[:last]):
        if number >= first:
            screens.append(game.rgb().copy())
            frames.append(step.frame)
        step = game.step(action)
    return screens, frames
