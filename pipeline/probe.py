"""What does a representation know? Linear probes on frozen features, under the protocol of AtariARI (arXiv:1906.08226).

Per variable one linear layer from the features to its 256 values; all variables of a game learn together, as the rows
of one matrix, each with its own learning rate, validation and stop. A value that never occurs in the training part has
no row: it is never right there, so its row could only sink.

Shapes: N rows of the dataset, B batch, F features and a constant one, V variables, C values of all variables.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline import atariari
from pipeline.labels import TEST, TRAIN, VALIDATION, Labels

BATCH = 64
MAX_EPOCHS = 100
LR, MIN_LR, LR_FACTOR, LR_PATIENCE, LR_THRESHOLD = 5e-4, 1e-5, 0.2, 5, 1e-4
STOP_PATIENCE = 15
ADAM_BETAS, ADAM_EPS = (0.9, 0.999), 1e-5
LEVELS = 256

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class ProbeResult:
    """What the probes of a game say.

    Attributes:
        f1: Mean over categories of the mean over a category's variables of the weighted F1 on test frames.
        accuracy: The same of the accuracy.
        f1_by_category: By category.
        f1_by_variable: By variable.
        accuracy_by_variable: By variable.
        epochs: After which each variable's probe stopped.
        num_frames: Of the training, validation and test part.
    """

    f1: float
    accuracy: float
    f1_by_category: dict[str, float]
    f1_by_variable: dict[str, float]
    accuracy_by_variable: dict[str, float]
    epochs: dict[str, int]
    num_frames: tuple[int, int, int]


def probe_features(
    features: Tensor, labels: Labels, *, seed: int = 0, on_epochs: Callable[[int], None] = lambda epochs: None
) -> ProbeResult:
    """Probes features that have been computed already: latents, pixels, anything.

    Args:
        features: (N, Z) float32, one row for each row of the dataset (`pipeline.labels.features_of`).
        labels: Of the same dataset.
        seed: Decides initial weights and batches.
        on_epochs: Called with the number of epochs just done, MAX_EPOCHS in all.

    Raises:
        ValueError: The features are no matrix of as many rows as there are labels.
    """
    if features.dim() != 2 or len(features) != len(labels.values):
        raise ValueError(f"features have shape {tuple(features.shape)}, the labels {len(labels.values)} rows")
    probes = _Probes(features.float(), labels, seed)
    done = 0
    while done < MAX_EPOCHS and probes.learn():
        done += 1
        on_epochs(1)
    on_epochs(MAX_EPOCHS - done)
    return scored(labels, probes.predicted(labels.rows(TEST)), dict(zip(labels.variables, probes.epochs.tolist())))


def standardised(features: Tensor, labels: Labels) -> Tensor:
    """Features with mean 0 and variance 1 over the training part, each; one that is constant there becomes 0.

    The protocol takes features as they are, and its probes learn so little a step that the scale of the features
    decides much of the score (docs/probe.md).
    """
    known = features[torch.from_numpy(labels.rows(TRAIN))]
    spread, size = known.std(0, unbiased=False), known.abs().amax(0)
    is_constant = spread <= 1e-6 * size  # rounding, not a spread
    return torch.where(is_constant, torch.zeros(()), (features - known.mean(0)) / spread.clamp(min=1e-30))


def scored(labels: Labels, predicted: NDArray[np.uint8], epochs: dict[str, int] | None = None) -> ProbeResult:
    """Scores predictions (T, V) of the T test rows.

    The released code draws test frames as it draws training frames; a weight of one over the length of its episode
    gives each frame what it has in that draw on average.
    """
    rows = labels.rows(TEST)
    length = np.bincount(labels.episode[rows])[labels.episode[rows]]
    figures = {
        name: weighted_scores(labels.values[rows, index], predicted[:, index], 1 / length)
        for index, name in enumerate(labels.variables)
    }
    f1, accuracy = ({name: pair[which] for name, pair in figures.items()} for which in (0, 1))
    mean_f1, by_category = atariari.score(labels.game, f1)
    return ProbeResult(
        f1=mean_f1,
        accuracy=atariari.score(labels.game, accuracy)[0],
        f1_by_category=by_category,
        f1_by_variable=f1,
        accuracy_by_variable=accuracy,
        epochs=epochs or {},
        num_frames=(len(labels.rows(TRAIN)), len(labels.rows(VALIDATION)), len(rows)),
    )


def majority(labels: Labels) -> NDArray[np.uint8]:
    """The commonest value of each variable in the training part, for every test row: (T, V)."""
    values = labels.values[labels.rows(TRAIN)]
    commonest = np.array([np.bincount(column).argmax() for column in values.T], np.uint8)
    return np.tile(commonest, (len(labels.rows(TEST)), 1))


def weighted_scores(
    true: NDArray[np.uint8], predicted: NDArray[np.uint8], weight: NDArray[np.float64]
) -> tuple[float, float]:
    """F1 averaged over values by their support (scikit-learn's `average="weighted"`), and accuracy; all (T,)."""
    is_hit = true == predicted
    support, called = (np.bincount(values, weight, LEVELS) for values in (true, predicted))
    hits = np.bincount(true[is_hit], weight[is_hit], LEVELS)
    f1 = 2 * hits / np.maximum(support + called, np.finfo(np.float64).tiny)
    return float((f1 * support).sum() / support.sum()), float(hits.sum() / support.sum())


class EpisodeSampler:
    """Draws rows as the released code does: a uniform episode, then a uniform row of it.

    Args:
        rows: Numbers of the rows to draw from.
        episode: (N,) number of the episode of every row.
    """

    def __init__(self, rows: Ints, episode: Ints) -> None:
        order = np.argsort(episode[rows], kind="stable")
        self._rows = rows[order]
        _, self._first, self._length = np.unique(episode[self._rows], return_index=True, return_counts=True)

    def epoch(self, rng: np.random.Generator) -> Ints:
        """(batches, BATCH) rows: as many whole batches as the part has rows for, one at least."""
        shape = (max(1, len(self._rows) // BATCH), BATCH)
        which = rng.integers(len(self._first), size=shape)
        return self._rows[self._first[which] + (rng.random(shape) * self._length[which]).astype(np.int64)]


class Plateau:
    """Learning rates and stops of V probes, by validation accuracy (`ReduceLROnPlateau` and early stopping)."""

    def __init__(self, num_variables: int) -> None:
        self.lr = np.full(num_variables, LR)
        self.is_stopped = np.zeros(num_variables, bool)
        self._best_for_lr, self._bad_for_lr = np.full(num_variables, -np.inf), np.zeros(num_variables, np.int64)
        self._best, self._bad = np.full(num_variables, -np.inf), np.zeros(num_variables, np.int64)

    def step(self, accuracy: NDArray[np.float64]) -> None:
        """Takes the accuracies (V,) of an epoch; those of stopped probes are ignored."""
        at_work = ~self.is_stopped
        self._bad = np.where(accuracy > self._best, 0, self._bad + 1)
        self._best = np.maximum(self._best, accuracy)
        self.is_stopped |= at_work & (self._bad >= STOP_PATIENCE)
        is_better = accuracy > self._best_for_lr * (1 + np.where(self._best_for_lr > 0, LR_THRESHOLD, 0))
        self._best_for_lr = np.where(is_better, accuracy, self._best_for_lr)
        self._bad_for_lr = np.where(is_better, 0, self._bad_for_lr + 1)
        is_flat = self._bad_for_lr > LR_PATIENCE
        self.lr = np.where(is_flat, np.maximum(self.lr * LR_FACTOR, MIN_LR), self.lr)
        self._bad_for_lr[is_flat] = 0


class _Probes:
    """The probes of all variables, at work."""

    def __init__(self, features: Tensor, labels: Labels, seed: int) -> None:
        self._x_NF = torch.cat([features, features.new_ones(len(features), 1)], 1)
        self._rng = np.random.default_rng(seed)
        self._train = EpisodeSampler(labels.rows(TRAIN), labels.episode)
        self._validation = EpisodeSampler(labels.rows(VALIDATION), labels.episode)
        self._values = labels.values
        known = [np.unique(column) for column in labels.values[labels.rows(TRAIN)].T]
        self._known = [torch.from_numpy(values) for values in known]
        self._target_NV = torch.from_numpy(_targets(labels.values, known))
        self._bounds = np.concatenate([[0], np.cumsum([len(values) for values in known])])
        self._matrix = _Matrix(self._x_NF.shape[1], self._bounds, seed)
        self._plateau = Plateau(len(known))
        self.epochs = np.zeros(len(known), np.int64)

    def learn(self) -> bool:
        """One epoch; False, and nothing done, once every probe has stopped."""
        at_work = np.flatnonzero(~self._plateau.is_stopped)
        if not len(at_work):
            return False
        self._matrix.begin(at_work, self._plateau.lr)
        for rows in torch.from_numpy(self._train.epoch(self._rng)):
            self._matrix.update(self._x_NF[rows], self._target_NV[rows])
        self._matrix.end()
        self.epochs[at_work] += 1
        rows = self._validation.epoch(self._rng).reshape(-1)
        self._plateau.step((self.predicted(rows) == self._values[rows]).mean(0))
        return True

    @torch.inference_mode()
    def predicted(self, rows: Ints) -> NDArray[np.uint8]:
        """The likeliest values of rows: (R, V)."""
        found = []
        for some in torch.split(torch.from_numpy(rows), 1024):
            logits = self._x_NF[some] @ self._matrix.weight.T
            spans = zip(self._known, self._bounds[:-1], self._bounds[1:])
            found.append(torch.stack([known[logits[:, low:high].argmax(1)] for known, low, high in spans], 1))
        return torch.cat(found).numpy()


def _targets(values: NDArray[np.uint8], known: list[NDArray[np.uint8]]) -> Ints:
    """Row of the matrix, counted from the variable's first, that each value (N, V) belongs to; 0 where it has none."""
    tables = np.zeros((len(known), LEVELS), np.int64)
    for table, seen in zip(tables, known):
        table[seen] = np.arange(len(seen))
    return np.stack([table[column] for table, column in zip(tables, values.T)], 1)


class _Matrix:
    """A row of weights for each value of each variable, and Adam (Kingma & Ba 2015) with a learning rate a variable.

    The rows of variables that have stopped are left out of the work; those at work lie in a matrix of their own.
    """

    def __init__(self, num_features: int, bounds: Ints, seed: int) -> None:
        scale = (num_features - 1) ** -0.5  # as torch initialises a linear layer, the bias among the weights
        drawn = torch.rand(int(bounds[-1]), num_features, generator=torch.Generator().manual_seed(seed))
        self.weight = (2 * drawn - 1) * scale
        self._variable = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
        self._moments = torch.zeros(2, *self.weight.shape)
        self._num_updates = 0

    def begin(self, at_work: Ints, lr: NDArray[np.float64]) -> None:
        """Takes the rows of these variables to work on."""
        is_at_work = np.isin(self._variable, at_work)
        self._rows = torch.from_numpy(np.flatnonzero(is_at_work))
        self._columns = torch.from_numpy(at_work)
        place = np.searchsorted(at_work, self._variable[is_at_work])
        self._place_C = torch.from_numpy(place)
        self._first_V = torch.from_numpy(np.searchsorted(place, np.arange(len(at_work))))
        self._lr_C1 = torch.from_numpy(lr[at_work][place]).float()[:, None]
        self._w_CF = self.weight[self._rows]
        self._m_CF, self._v_CF = self._moments[:, self._rows]

    @torch.inference_mode()
    def update(self, x_BF: Tensor, target_BV: Tensor) -> None:
        """One step on the mean cross-entropy of each variable."""
        logits_BC = x_BF @ self._w_CF.T
        index_BC = self._place_C.expand_as(logits_BC)
        top_BV = logits_BC.new_full((len(x_BF), len(self._columns)), -torch.inf)
        top_BV.scatter_reduce_(1, index_BC, logits_BC, "amax")
        share_BC = logits_BC.sub_(top_BV[:, self._place_C]).exp_()
        total_BV = torch.zeros_like(top_BV).index_add_(1, self._place_C, share_BC)
        share_BC.div_(total_BV[:, self._place_C])
        at_BV = target_BV[:, self._columns] + self._first_V
        share_BC.scatter_add_(1, at_BV, share_BC.new_full(at_BV.shape, -1.0))
        self._adam(share_BC.T @ x_BF / len(x_BF))

    def end(self) -> None:
        """Puts the rows back."""
        self.weight[self._rows] = self._w_CF
        self._moments[:, self._rows] = torch.stack([self._m_CF, self._v_CF])

    def _adam(self, gradient_CF: Tensor) -> None:
        self._num_updates += 1
        first, second = (1 - beta**self._num_updates for beta in ADAM_BETAS)
        self._m_CF.lerp_(gradient_CF, 1 - ADAM_BETAS[0])
        self._v_CF.mul_(ADAM_BETAS[1]).addcmul_(gradient_CF, gradient_CF, value=1 - ADAM_BETAS[1])
        spread_CF = self._v_CF.sqrt().mul_(second**-0.5).add_(ADAM_EPS)
        self._w_CF.sub_(self._lr_C1 / first * self._m_CF / spread_CF)
