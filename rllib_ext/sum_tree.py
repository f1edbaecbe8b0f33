"""A sum tree over many weights: draws in proportion to them and changes them, a whole batch at once.

Three rows, each the sums of blocks of `WIDTH` of the one below: leaves, blocks, and a short top row that is searched
directly. Sums are always computed afresh from the block they stand for, never adjusted by differences, so that no
rounding errors pile up however long a run lasts.

References:
    Schaul et al. (2016), Prioritized Experience Replay, appendix B.2.1 (there binary). arXiv:1511.05952.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

WIDTH = 16


def tree_bytes(capacity: int) -> int:
    """Bytes that a tree of so many leaves takes when full."""
    return 8 * _num_top(capacity) * (WIDTH**2 + WIDTH + 1)


class SumTree:
    """Weights >= 0, float64, all 0 at first; memory is touched only where weights are set."""

    def __init__(self, capacity: int) -> None:
        """Reserves memory for `capacity` leaves."""
        num_top = _num_top(capacity)
        self._leaves = np.zeros((num_top * WIDTH, WIDTH))
        self._blocks = np.zeros((num_top, WIDTH))
        self._top = np.zeros(num_top)
        self.weights = self._leaves.reshape(-1)[:capacity]  # (capacity,) a view to read from; `set` writes

    @property
    def total(self) -> float:
        """The sum of all weights."""
        return float(self._top.sum())

    def set(self, places: NDArray[np.int64], weights: NDArray[np.float64]) -> None:
        """Gives leaves new weights.

        Args:
            places: (N,) indices; of one that is named several times the last weight counts.
            weights: (N,) finite, >= 0.
        """
        self.weights[places] = weights
        blocks = places // WIDTH
        self._blocks.reshape(-1)[blocks] = self._leaves.take(blocks, axis=0).sum(1)
        top = blocks // WIDTH
        self._top[top] = self._blocks.take(top, axis=0).sum(1)

    def find(self, shares: NDArray[np.float64]) -> NDArray[np.int64]:
        """The leaves that lie at these shares of the line of all weights.

        Args:
            shares: (N,) in [0, 1); uniform ones draw leaves in proportion to their weights.

        Returns:
            (N,) indices; whatever the rounding, no leaf of weight 0 is among them. The total must not be 0.
        """
        ends = self._top.cumsum()
        rest = np.minimum(shares * ends[-1], np.nextafter(ends[-1], 0.0))
        at = ends.searchsorted(rest, side="right")
        rest -= np.where(at > 0, ends.take(at - 1), 0.0)
        at, rest = _descend(self._blocks, at, rest)
        return _descend(self._leaves, at, rest)[0]


def _num_top(capacity: int) -> int:
    return -(-capacity // WIDTH**2)


def _descend(
    row: NDArray[np.float64], at: NDArray[np.int64], rest: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """From blocks to children: (N,) indices in the row below, and what is left to go inside each."""
    ends = row.take(at, axis=0).cumsum(1)
    rest = np.minimum(rest, np.nextafter(ends[:, -1], 0.0))  # the sum above may differ in its last bit
    child = (ends > rest[:, None]).argmax(1)
    begin = ends.take(np.arange(-1, ends.size - 1, WIDTH) + child, mode="clip")
    return at * WIDTH + child, rest - np.where(child > 0, begin, 0.0)
