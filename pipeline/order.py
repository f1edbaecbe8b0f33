"""Which frames every worker reads in every epoch, and in which order: arithmetic only, nothing is opened.

The frames of a split form pieces, runs of neighbouring rows. All pieces in a random order make one pass over the split;
passes follow each other without end, each in an order of its own. Epoch e is the window of rows [e F, (e + 1) F) of
that endless stream, F frames long, less a remainder that fills no batch. So an epoch may be shorter or longer than the
split, every frame is still seen once per pass, and any epoch can be found without reading those before it: training
resumes at an epoch's start exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc

from pipeline.errors import UserError
from pipeline.store import FramesDataset

PIECE_ROWS = 256


@dataclass(frozen=True, order=True)
class RowRange:
    """Rows [start, stop) of one file."""

    file: str
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        """How many rows."""
        return self.stop - self.start


def split_pieces(dataset: FramesDataset, split: str) -> tuple[RowRange, ...]:
    """The rows of a split as pieces of at most PIECE_ROWS rows, in file order; an episode is in one split only."""
    episodes = dataset.episodes.filter(pc.equal(dataset.episodes["split"], split))
    columns = (episodes[name].to_pylist() for name in ("file", "first_row", "length"))
    spans = sorted(RowRange(file, first, first + length) for file, first, length in zip(*columns, strict=True))
    return tuple(piece for span in spans for piece in _cut(span))


def _cut(span: RowRange) -> Iterator[RowRange]:
    """Cuts at multiples of PIECE_ROWS, so that no piece lies in two row groups."""
    start = span.start
    while start < span.stop:
        stop = min(span.stop, (start // PIECE_ROWS + 1) * PIECE_ROWS)
        yield RowRange(span.file, start, stop)
        start = stop


@dataclass(frozen=True)
class ReadingOrder:
    """The order in which the workers of one training read a split.

    Attributes:
        split: "train" or "val".
        pieces: Of the split.
        batch_size: Frames of a batch over all workers; smaller when an epoch has fewer.
        num_workers: Workers that share a batch equally.
        epoch_frames: F, the frames of an epoch.
        seed: Decides the order.
    """

    split: str
    pieces: tuple[RowRange, ...]
    batch_size: int
    num_workers: int
    epoch_frames: int
    seed: int

    @classmethod
    def plan(
        cls, dataset: FramesDataset, split: str, *, batch_size: int, num_workers: int, epoch_frames: int, seed: int
    ) -> ReadingOrder:
        """Plans an order; `epoch_frames` 0 means the split's own size.

        Raises:
            UserError: Fewer frames than workers, or a batch that the workers cannot share equally.
        """
        pieces = split_pieces(dataset, split)
        frames = epoch_frames or sum(piece.num_rows for piece in pieces)
        if frames < num_workers or not pieces:
            raise UserError(
                f"the {split} split of {dataset.uri} gives an epoch of {frames} frames, too few for "
                f"{num_workers} workers; collect more frames"
            )
        if batch_size % num_workers:
            raise UserError(
                f"a batch of {batch_size} frames cannot be shared equally by {num_workers} workers; "
                f"choose a multiple of {num_workers}"
            )
        share = min(batch_size, frames) // num_workers
        return cls(split, pieces, share * num_workers, num_workers, frames, seed)

    @classmethod
    def whole(cls, dataset: FramesDataset, split: str, batch_size: int, num_workers: int) -> ReadingOrder:
        """For one look at every frame of the split, by `shares`."""
        pieces = split_pieces(dataset, split)
        return cls(split, pieces, batch_size, num_workers, sum(piece.num_rows for piece in pieces), 0)

    @property
    def num_frames(self) -> int:
        """Frames of the split."""
        return sum(piece.num_rows for piece in self.pieces)

    @property
    def num_batches(self) -> int:
        """Batches of an epoch, the same for every worker."""
        return self.epoch_frames // self.batch_size

    @property
    def worker_batch_size(self) -> int:
        """One worker's share of a batch, frames."""
        return self.batch_size // self.num_workers

    @property
    def remainder(self) -> int:
        """Frames of an epoch that fill no batch and are left out; others in every epoch."""
        return self.epoch_frames - self.num_batches * self.batch_size

    def epoch(self, epoch: int, worker: int) -> list[RowRange]:
        """What a worker reads in an epoch: num_batches x worker_batch_size rows."""
        rows = self.num_batches * self.worker_batch_size
        start = epoch * self.epoch_frames + worker * rows
        return list(self._window(start, start + rows))

    def shares(self, worker: int) -> list[RowRange]:
        """A worker's share of one look at every frame of the split, in file order; shares differ by at most a row."""
        start, stop = (self.num_frames * (worker + k) // self.num_workers for k in (0, 1))
        return list(_clip(self.pieces, start, stop))

    def _window(self, start: int, stop: int) -> Iterator[RowRange]:
        """Rows [start, stop) of the endless stream."""
        total = self.num_frames
        for number in range(start // total, -(-stop // total)):
            yield from _clip(self._pass(number), start - number * total, stop - number * total)

    def _pass(self, number: int) -> list[RowRange]:
        order = np.random.default_rng([self.seed, number]).permutation(len(self.pieces))
        return [self.pieces[index] for index in order]


def _clip(pieces: list[RowRange] | tuple[RowRange, ...], start: int, stop: int) -> Iterator[RowRange]:
    """The part [start, stop) of the rows of all pieces, counted one piece after the other."""
    offset = 0
    for piece in pieces:
        first, last = max(start - offset, 0), min(stop - offset, piece.num_rows)
        if first < last:
            yield RowRange(piece.file, piece.start + first, piece.start + last)
        offset += piece.num_rows
