"""Ray Data: frames of a dataset, read in a given order, as uint8 torch batches.

Ray tasks read chunks of rows, check the pages' checksums and shuffle each chunk; the consumer gets exact batches, in an
order that depends on the seed alone. Frames stay uint8 all the way.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import ray.data
import torch
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.collate_fn import ArrowBatchCollateFn
from torch import Tensor

from pipeline.errors import UserError
from pipeline.order import ReadingOrder, RowRange
from pipeline.source import Chunk, FramesSource, Place, read_rows
from pipeline.store import FramesDataset

CHUNK_BYTES = 32 << 20
READ_AHEAD_CHUNKS = 3
PLANNED_CHUNKS = 1_000  # of a pipeline, about; a training that ends by time may have any number of epochs
STREAM_BYTES = 2 * READ_AHEAD_CHUNKS * CHUNK_BYTES  # of the object store, at most
PREFETCH_BATCHES = 4
SCHEDULER_REST_S = 0.1
SAMPLED_PIECES = 64
CPU = torch.device("cpu")

Item = TypeVar("Item")


def training_batches(
    dataset: FramesDataset,
    order: ReadingOrder,
    epochs: range,
    worker: int,
    skip_batches: int = 0,
    device: torch.device = CPU,
) -> Generator[Tensor, None, None]:
    """A worker's batches of several epochs, one after the other, from one Ray Data pipeline for many of them.

    Args:
        dataset: Where the frames are.
        order: What is read when.
        epochs: Consecutive epochs.
        worker: Rank of this worker.
        skip_batches: Batches of the first epoch that have been read before, and are not read again.
        device: Where the batches are wanted; to a GPU they are copied ahead, from pinned memory.

    Yields:
        Exactly `len(epochs) * order.num_batches - skip_batches` tensors (order.worker_batch_size, H, W) uint8.

    Raises:
        UserError: A file is damaged; it is named.
        RuntimeError: Frames were lost on the way.
    """
    size = order.worker_batch_size
    chunks_an_epoch = -(-order.num_batches * size // _chunk_rows(dataset))
    together = max(1, PLANNED_CHUNKS // chunks_an_epoch)
    for first in range(0, len(epochs), together):
        span = epochs[first : first + together]
        chunks = [chunk for epoch in span for chunk in _epoch_chunks(dataset, order, epoch, worker)]
        chunks = list(_after(chunks, skip_batches * size))
        expected = len(span) * order.num_batches - skip_batches
        yield from _counted(_stream(dataset, chunks, size, device), expected, size)
        skip_batches = 0


def all_batches(
    dataset: FramesDataset, order: ReadingOrder, worker: int, device: torch.device = CPU
) -> Iterator[Tensor]:
    """A worker's share of every frame of the split, each once, in file order; the last batch may be smaller."""
    chunks = [Chunk(ranges) for ranges in _grouped(order.shares(worker), _chunk_rows(dataset))]
    return _stream(dataset, chunks, order.worker_batch_size, device)


def sample_frames(dataset: FramesDataset, order: ReadingOrder, num_frames: int) -> Tensor:
    """At most `num_frames` frames (N, H, W) uint8 spread evenly over the split, read in this process."""
    place, collate = Place.of(dataset), _collate_for(dataset)
    pieces = _spread(order.pieces, SAMPLED_PIECES)
    frames = torch.cat([collate(read_rows(place, piece, ["obs"])) for piece in pieces])
    return frames[_spread(range(len(frames)), num_frames)]


def _spread(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` of the items, evenly spaced."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def _epoch_chunks(dataset: FramesDataset, order: ReadingOrder, epoch: int, worker: int) -> Iterator[Chunk]:
    for index, ranges in enumerate(_grouped(order.epoch(epoch, worker), _chunk_rows(dataset))):
        yield Chunk(ranges, (order.seed, epoch, worker, index))


def _after(chunks: list[Chunk], num_rows: int) -> Iterator[Chunk]:
    """What is left of chunks after their first `num_rows` rows."""
    for chunk in chunks:
        if num_rows < chunk.num_rows:
            yield replace(chunk, skip_rows=num_rows)
        num_rows = max(0, num_rows - chunk.num_rows)


def _chunk_rows(dataset: FramesDataset) -> int:
    return max(1, CHUNK_BYTES // dataset.preprocess.frame_bytes)


def _grouped(ranges: list[RowRange], max_rows: int) -> Iterator[tuple[RowRange, ...]]:
    """Groups neighbours in the order until a group holds `max_rows`."""
    group: list[RowRange] = []
    for item in ranges:
        group.append(item)
        if sum(member.num_rows for member in group) >= max_rows:
            yield tuple(group)
            group = []
    if group:
        yield tuple(group)


def _stream(dataset: FramesDataset, chunks: list[Chunk], batch_size: int, device: torch.device) -> Iterator[Tensor]:
    """Batches from one Ray task per chunk, in order."""
    if not chunks:
        return
    for name in ("ray.data", "ray.data.exceptions"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    source = FramesSource(Place.of(dataset), chunks, ["obs"], dataset.preprocess.frame_bytes)
    frames = ray.data.read_datasource(source, override_num_blocks=len(chunks))
    options = frames.context.execution_options
    options.preserve_order = True
    options.resource_limits = options.resource_limits.copy(cpu=1, object_store_memory=STREAM_BYTES)
    frames.context.enable_progress_bars = False
    frames.context.custom_execution_callback_classes = [_Paced]
    try:
        yield from frames.iter_torch_batches(
            batch_size=batch_size,
            collate_fn=_collate_for(dataset),
            prefetch_batches=PREFETCH_BATCHES,
            device=device,
            pin_memory=device.type != "cpu",
        )
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(*error.cause.args) from None
        raise


class _Paced(ExecutionCallback):
    """Lets Ray Data's scheduler rest between its steps.

    While the reader is far enough ahead the scheduler finds nothing to wait for and polls without a pause, in a thread
    of the training process: a fifth of a core, and the interpreter lock with it. Rests of 20 ms still slow training on
    two cores; with rests of 500 ms the training waits for data. The hook is Ray's own, its base class is not
    public (2.60); a test holds that it is called.
    """

    def on_execution_step(self, executor: Any) -> None:
        """Called by the scheduler after each of its steps."""
        time.sleep(SCHEDULER_REST_S)


def _counted(batches: Iterable[Tensor], expected: int, batch_size: int) -> Iterator[Tensor]:
    """Passes on exactly the expected full batches: a stream that loses or adds a frame is an error."""
    count = 0
    for batch in batches:
        count += 1
        if len(batch) != batch_size or count > expected:
            raise RuntimeError(f"batch {count} of {expected} has {len(batch)} frames, not {batch_size}")
        yield batch
    if count != expected:
        raise RuntimeError(f"the stream ended after {count} of {expected} batches: frames were lost")


def _collate_for(dataset: FramesDataset) -> _Collate:
    return _Collate(dataset.preprocess.height, dataset.preprocess.width)


class _Collate(ArrowBatchCollateFn):
    """Table with a fixed-size-binary column obs to (B, H, W) uint8."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self._shape = (height, width)

    def __call__(self, batch: pa.Table) -> Tensor:
        frame_bytes = self._shape[0] * self._shape[1]
        parts = [
            np.frombuffer(chunk.buffers()[1], np.uint8, len(chunk) * frame_bytes, chunk.offset * frame_bytes)
            for chunk in batch["obs"].chunks
        ]
        return torch.from_numpy(np.concatenate(parts).reshape(-1, *self._shape))
