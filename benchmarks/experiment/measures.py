"""Measures of runs: a curve at a time, and `rliable`'s interquartile mean and probability of improvement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

WINDOW = 10  # training games
ROUNDING_S = 0.05  # of the kept seconds of a game
RESAMPLES = 2_000
SEED = 0


def _rliable() -> tuple[Any, Any]:
    """The two modules of `rliable` that are used, its library and its metrics.

    Its bootstrap is arch's. arch 7.2, the last one that it takes, decorates a time-series model, which nothing here
    uses, with a private function of pandas as it was before pandas 3: imported as it is, it raises a TypeError.
    """
    from pandas.util import _decorators

    theirs = _decorators.deprecate_kwarg
    _decorators.deprecate_kwarg = lambda *names, **options: lambda function: function
    try:
        from rliable import library, metrics
    finally:
        _decorators.deprecate_kwarg = theirs
    return library, metrics


def at_step(games: Sequence[Sequence[float]], agent_steps: float) -> float:
    """Mean of the last 10 training games that had ended after so many agent steps; the first game's before any had.

    NaN where no game ended at all, as in runs of toy size.
    """
    return _last(games, 0, agent_steps)


def at_second(games: Sequence[Sequence[float]], seconds: float) -> float:
    """The same after so many seconds of training. A run that ended before then counts as it ended."""
    return _last(games, 2, seconds + ROUNDING_S)


def _last(games: Sequence[Sequence[float]], column: int, until: float) -> float:
    if not games:
        return math.nan
    ended = [game[1] for game in games if game[column] <= until] or [games[0][1]]
    return float(np.mean(ended[-WINDOW:]))


def interquartile_mean(scores: np.ndarray) -> dict[str, Any]:
    """Of scores (seeds, games): the mean of the middle half, and its 95% interval by stratified bootstrap."""
    library, metrics = _rliable()

    def middle(values: np.ndarray) -> np.ndarray:
        return np.array([metrics.aggregate_iqm(values)])

    points, intervals = library.get_interval_estimates(
        {"arm": scores}, middle, reps=RESAMPLES, random_state=np.random.RandomState(SEED)
    )
    low, high = (round(float(value), 3) for value in intervals["arm"][:, 0])
    seeds, games = scores.shape
    return {"iqm": round(float(points["arm"][0]), 3), "low": low, "high": high, "seeds": seeds, "games": games}


def probability_of_improvement(scores: np.ndarray, others: np.ndarray) -> float:
    """Chance that a run of the first arm beats one of the second, over games; scores (seeds, games)."""
    _, metrics = _rliable()
    return float(metrics.probability_of_improvement(scores, others))
