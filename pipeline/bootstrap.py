"""Intervals for a mean by the bootstrap: the uncertainty of every result that the project prints."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLES_PER_BLOCK = 1_000


def bootstrap_interval(
    values: Sequence[float] | NDArray[np.floating], *, level: float = 0.95, num_resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean.

    Args:
        values: (N,) independent results, for instance the returns of N episodes.
        level: Probability that the interval is to cover, between 0 and 1.
        num_resamples: How often N values are drawn anew, with replacement.
        seed: Of the resampling, so that the same values give the same interval.

    Returns:
        (low, high) in the unit of the values. Both equal the value when there is only one.

    Raises:
        ValueError: No values, or a value that is not finite.

    References:
        Efron & Tibshirani (1993), An Introduction to the Bootstrap, chapter 13.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or len(sample) == 0 or not np.isfinite(sample).all():
        raise ValueError(f"bootstrap_interval needs at least one value, all finite: got {sample!r}")
    rng = np.random.default_rng(seed)
    means = np.concatenate([_resampled_means(sample, size, rng) for size in _blocks(num_resamples)])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _blocks(total: int) -> list[int]:
    """Sizes that add up to `total`, so that memory stays small for thousands of values."""
    full, rest = divmod(total, RESAMPLES_PER_BLOCK)
    return [RESAMPLES_PER_BLOCK] * full + ([rest] if rest else [])


def _resampled_means(sample: NDArray[np.float64], count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    picks = rng.integers(0, len(sample), size=(count, len(sample)))
    means: NDArray[np.float64] = sample[picks].mean(axis=1)
    return means
