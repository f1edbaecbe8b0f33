"""Which observations Q sees at once: the last `stack` of them, the first of an episode repeated at its start.

The one rule, in the two forms that need it: indices into a history (replay) and a rolling stack (runner, policy).

Shapes: E environments, K stacked observations, ... the shape of one observation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def stack_positions(position: NDArray[np.int64], age: NDArray[np.int32], stack: int) -> NDArray[np.int64]:
    """Positions in a history whose observations make up each state, oldest first.

    Args:
        position: (N,) position of the newest observation.
        age: (N,) steps between the episode's first observation and that one.
        stack: K.

    Returns:
        (N, K) positions, clipped at the episode's first observation.
    """
    back = np.arange(stack - 1, -1, -1)
    clipped: NDArray[np.int64] = position[:, None] - np.minimum(back, age[:, None])
    return clipped


class RollingStack:
    """The last observations of several environments that run on."""

    def __init__(self, stack: int) -> None:
        """`stack` is K; the shape of an observation is learned from the first one."""
        self._stack = stack
        self._history: NDArray[Any] | None = None

    def push(self, newest: NDArray[Any], is_first: NDArray[np.bool_]) -> NDArray[Any]:
        """Appends one observation per environment.

        Args:
            newest: (E, ...) any dtype.
            is_first: (E,) whether it is the first of an episode.

        Returns:
            (E, K, ...) of the same dtype, oldest first; a fresh array.
        """
        if self._history is None:
            self._history = np.repeat(newest[:, None], self._stack, axis=1)
            return self._history
        rolled = np.concatenate([self._history[:, 1:], newest[:, None]], axis=1)
        rolled[is_first] = newest[is_first, None]
        self._history = rolled
        return rolled

    def hold(self, history: NDArray[Any]) -> NDArray[Any]:
        """Goes on from stacks (E, K, ...), which it returns."""
        self._history = history
        return history

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been seen yet."""
        return self._history is None

    def clear(self) -> None:
        """Forgets everything; the next observation is the first of every environment."""
        self._history = None
