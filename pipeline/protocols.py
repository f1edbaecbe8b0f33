"""Atari protocols: the published sets of rules that a result is quoted under.

A protocol's name and rules stand in the `Preprocess` record of each dataset, encoder and policy.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import UserError

RESOLUTIONS = {"84x84": (84, 84), "210x160": (210, 160)}  # height x width, pixels
PARTS = ("pretrain", "probe")  # of a benchmark's data: what an encoder learns from, and what it is measured on


@dataclass(frozen=True)
class Rules:
    """One published way to play Atari games.

    Attributes:
        sticky_probability: Chance that the emulator repeats the previous action in a frame.
        has_full_action_set: All 18 actions, or the game's minimal set.
        noop_max: A game starts after fewer than this many no-op frames, drawn uniformly.
        fire_reset: Whether FIRE is pressed at the start where the game has it.
        life_loss_ends_episode: Whether an episode of collected data ends with a life.
        random_skips_noop: Whether the random policy never draws action 0.
        source: Where the protocol is published.
    """

    sticky_probability: float
    has_full_action_set: bool
    noop_max: int
    fire_reset: bool
    life_loss_ends_episode: bool
    random_skips_noop: bool
    source: str


PROTOCOLS = {
    "atari100k": Rules(0.0, False, 30, True, False, False, "Kaiser et al. 2020, arXiv:1903.00374"),
    "machado": Rules(0.25, True, 0, False, False, False, "Machado et al. 2018, arXiv:1709.06009"),
    "atariari": Rules(0.0, False, 30, True, True, True, "Anand et al. 2019, arXiv:1906.08226"),
}


def protocol_rules(protocol: str) -> Rules:
    """The rules of a named protocol, or a UserError that lists the names."""
    if protocol not in PROTOCOLS:
        raise UserError(f"unknown protocol {protocol!r}; choose one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[protocol]
