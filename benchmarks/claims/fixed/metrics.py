"""How disentangled is a representation? Higgins' metric, MIG and DCI, of codes of every combination of some factors.

Codes are given for all combinations at once, so that a metric draws factors and looks their codes up.

Shapes: N combinations in the order of `np.unravel_index(n, sizes)`, Z code dimensions, K factors.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from sklearn.ensemble import ExtraTreesClassifier, ExtraTreesRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

PAIRS_A_POINT = 64
POINTS = (5_000, 2_500)  # to fit the classifier, and to score it
_MAX_ITER = 1_000
_BLOCK = 50

MIG_BINS = 20

DCI_ROWS = (4_000, 2_000)
DCI_TREES = 20
DCI_DIMENSIONS_MOST = 64  # of a wider code, those that vary most


def higgins(codes: np.ndarray, sizes: Sequence[int], seed: int) -> float:
    """The accuracy, per cent, with which a linear classifier tells which factor was held fixed.

    A point is the mean over 64 pairs of |z - z'|, where the two share one factor's value and all else is drawn anew.

    Args:
        codes: (N, Z), in the representation's own units.
        sizes: Of the factors.
        seed: Of the draws.

    References:
        Higgins et al. (2017), ICLR, section 3. Sizes and classifier as in Locatello et al. (2019), arXiv:1811.12359,
        with half as many points.
    """
    rng = np.random.default_rng(seed)
    (points, labels), (held_points, held_labels) = (_fixed_factor_points(codes, sizes, n, rng) for n in POINTS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # on thousands of pixels
        classifier = LogisticRegression(max_iter=_MAX_ITER if codes.shape[1] <= 256 else 50).fit(points, labels)
    return 100 * float(classifier.score(held_points, held_labels))


def _fixed_factor_points(
    codes: np.ndarray, sizes: Sequence[int], count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Points (count, Z) float32 and which factor was fixed (count,)."""
    fixed = rng.integers(0, len(sizes), count)
    points = np.empty((count, codes.shape[1]), np.float32)
    for start in range(0, count, _BLOCK):
        label = fixed[start : start + _BLOCK]
        first, second = (rng.integers(0, sizes, (len(label), PAIRS_A_POINT, len(sizes))) for _ in range(2))
        rows = np.arange(len(label))
        second[rows, :, label] = first[rows, :, label]
        difference = codes[_index(first, sizes)].astype(np.float32) - codes[_index(second, sizes)]
        points[start : start + _BLOCK] = np.abs(difference).mean(1)
    return points, fixed


def _index(factors: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    return np.asarray(np.ravel_multi_index(tuple(np.moveaxis(factors, -1, 0)), tuple(sizes)))


def mutual_information_gap(codes: np.ndarray, sizes: Sequence[int]) -> float:
    """Mean over factors of (I(z_1; f) - I(z_2; f)) / H(f), z_1 and z_2 the two dimensions that know most of f; 0 to 1.

    Args:
        codes: (N, Z); each dimension is cut into 20 bins of equal width.
        sizes: Of the factors.

    References:
        Chen et al. (2018), arXiv:1802.04942, section 4; binned as in Locatello et al. (2019).
    """
    factors = np.stack(np.unravel_index(np.arange(len(codes)), tuple(sizes)), 1)
    information = np.array([_informations(_binned(column), factors, sizes) for column in codes.T])
    information = np.vstack([information, np.zeros((2, len(sizes)))])  # a code of one dimension has a second of none
    second, first = np.sort(information, 0)[-2:]
    return float(((first - second) / np.log(sizes)).mean())


def _binned(column: np.ndarray) -> np.ndarray:
    low, high = float(column.min()), float(column.max())
    if high <= low:
        return np.zeros(len(column), np.int64)
    return np.minimum(((column - low) / (high - low) * MIG_BINS).astype(np.int64), MIG_BINS - 1)


def _informations(bins: np.ndarray, factors: np.ndarray, sizes: Sequence[int]) -> list[float]:
    """Mutual information, nats, of a binned dimension with each factor."""
    informations = []
    for factor, size in zip(factors.T, sizes):
        joint = np.bincount(bins * size + factor, minlength=MIG_BINS * size).reshape(MIG_BINS, size) / len(bins)
        independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
        is_there = joint > 0
        informations.append(float((joint[is_there] * np.log(joint[is_there] / independent[is_there])).sum()))
    return informations


def dci(codes: np.ndarray, sizes: Sequence[int], seed: int) -> dict[str, float]:
    """Disentanglement, completeness and informativeness, 0 to 1, by trees that predict each factor from the code.

    A factor of fewer than 4 values is a class; the others are numbers. Informativeness is the mean over factors of the
    held-out accuracy (of the classes) or R2 (of the numbers).

    Args:
        codes: (N, Z).
        sizes: Of the factors.
        seed: Of the rows that are drawn, and of the trees.

    References:
        Eastwood & Williams (2018), ICLR, section 2.
    """
    rng = np.random.default_rng(seed)
    rows = rng.choice(len(codes), min(len(codes), sum(DCI_ROWS)), replace=False)
    factors = np.stack(np.unravel_index(rows, tuple(sizes)), 1)
    kept = np.argsort(-codes[rows].var(0, dtype=np.float64), kind="stable")[:DCI_DIMENSIONS_MOST]
    inputs = codes[rows][:, kept].astype(np.float32)
    split = round(len(rows) * DCI_ROWS[0] / sum(DCI_ROWS))
    importance, scores = [], []
    for factor, size in zip(factors.T, sizes):
        trees = (ExtraTreesClassifier if size < 4 else ExtraTreesRegressor)(
            DCI_TREES, max_features=1.0, min_samples_leaf=4, random_state=seed
        )
        trees.fit(inputs[:split], factor[:split])
        importance.append(trees.feature_importances_)
        scores.append(max(0.0, float(trees.score(inputs[split:], factor[split:]))))
    return {**_disentanglement(np.array(importance).T), "informativeness": float(np.mean(scores))}


def _disentanglement(importance_ZK: np.ndarray) -> dict[str, float]:
    """By the entropies of rows (what a dimension is for) and of columns (where a factor is)."""
    total = max(float(importance_ZK.sum()), 1e-12)
    by_dimension = 1 - _entropies(importance_ZK) / np.log(importance_ZK.shape[1])
    by_factor = 1 - _entropies(importance_ZK.T) / np.log(max(2, importance_ZK.shape[0]))
    return {
        "disentanglement": float((by_dimension * importance_ZK.sum(1)).sum() / total),
        "completeness": float((by_factor * importance_ZK.sum(0)).sum() / total),
    }


def _entropies(rows: np.ndarray) -> np.ndarray:
    shares = rows / np.maximum(rows.sum(1, keepdims=True), 1e-12)
    return -(shares * np.log(np.maximum(shares, 1e-12))).sum(1)
