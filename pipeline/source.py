"""A frames dataset as a source of Ray Data: one read task per chunk of rows, pages checked, bad files named."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from pipeline.errors import UserError
from pipeline.order import RowRange
from pipeline.pages import require_moderate
from pipeline.storage import is_away, is_object_store, reason
from pipeline.store import FramesDataset

AWAY_S = 300.0  # that a store may be away in the midst of reading
LOOK_AGAIN_S = 3.0


@dataclass(frozen=True)
class Place:
    """Where the files of a dataset lie; small, since it travels with every read task."""

    filesystem: pafs.FileSystem
    root: str
    uri: str
    schema: pa.Schema

    @classmethod
    def of(cls, dataset: FramesDataset) -> Place:
        """The place of an opened dataset."""
        return cls(dataset.filesystem, dataset.root, dataset.uri, dataset.schema)


@dataclass(frozen=True)
class Chunk:
    """What one task reads: ranges of rows, shuffled with a seed of its own (None keeps their order), then without the
    first `skip_rows`."""

    ranges: tuple[RowRange, ...]
    seed: tuple[int, ...] | None = None
    skip_rows: int = 0

    @property
    def num_rows(self) -> int:
        """How many rows."""
        return sum(rows.num_rows for rows in self.ranges) - self.skip_rows

    def read(self, place: Place, columns: Sequence[str]) -> pa.Table:
        """The chunk's rows as one table.

        Raises:
            UserError: A file is damaged or unreadable; it is named.
        """
        table = pa.concat_tables(read_rows(place, rows, columns) for rows in self.ranges).combine_chunks()
        if self.seed is None:
            return table.slice(self.skip_rows)
        return table.take(np.random.default_rng(self.seed).permutation(table.num_rows)[self.skip_rows :])


class FramesSource(Datasource):
    """Reads chunks of a dataset, each in a task of its own, in the given order where Ray Data preserves order."""

    def __init__(self, place: Place, chunks: Sequence[Chunk], columns: Sequence[str], row_bytes: int) -> None:
        """`row_bytes`: about what a row takes in memory, by which Ray Data plans."""
        super().__init__()
        self._place, self._chunks, self._columns, self._row_bytes = place, chunks, columns, row_bytes

    def get_name(self) -> str:
        """Shown in Ray's statistics."""
        return "Frames"

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of all chunks."""
        return sum(chunk.num_rows for chunk in self._chunks) * self._row_bytes

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        """One task per chunk, whatever the parallelism: the chunks are part of the order."""
        return [ReadTask(self._reader(chunk), self._metadata(chunk)) for chunk in self._chunks]

    def _reader(self, chunk: Chunk) -> Callable[[], list[pa.Table]]:
        return functools.partial(_read_blocks, chunk, self._place, tuple(self._columns))

    def _metadata(self, chunk: Chunk) -> BlockMetadata:
        rows = chunk.num_rows
        return BlockMetadata(num_rows=rows, size_bytes=rows * self._row_bytes, exec_stats=None, input_files=None)


def _read_blocks(chunk: Chunk, place: Place, columns: tuple[str, ...]) -> list[pa.Table]:
    return [chunk.read(place, columns)]


def read_rows(place: Place, rows: RowRange, columns: Sequence[str]) -> pa.Table:
    """A range of rows of one file; an object store that is away is waited for.

    Raises:
        UserError: The file is damaged or unreadable; it is named. Or its store has been away for AWAY_S.
    """
    until = time.monotonic() + AWAY_S
    while True:
        try:
            return _read(place, rows, columns)
        except Exception as error:  # whatever a hostile file makes Arrow's parts raise
            if not (is_object_store(place.filesystem) and is_away(error)):
                raise UserError(
                    f"{rows.file} of dataset {place.uri} is damaged or unreadable ({reason(error)}); "
                    f"`latentrl data check {place.uri}` names every bad file"
                ) from None
            if time.monotonic() > until:
                raise UserError(
                    f"the store of dataset {place.uri} has been away for {AWAY_S:.0f} s ({reason(error)}); mend that "
                    "and run the command again, a training with --resume"
                ) from None
        time.sleep(LOOK_AGAIN_S)


def _read(place: Place, rows: RowRange, columns: Sequence[str]) -> pa.Table:
    with place.filesystem.open_input_file(f"{place.root}/{rows.file}") as source:
        parquet = pq.ParquetFile(source, page_checksum_verification=True)
        _require_types(parquet.schema_arrow, place.schema, columns)
        groups, first_row = _groups(parquet, rows)
        require_moderate(source, parquet, groups, set(columns))
        table = parquet.read_row_groups(groups, columns=list(columns), use_threads=False)
        return table.slice(rows.start - first_row, rows.num_rows)


def _require_types(held: pa.Schema, wanted: pa.Schema, columns: Sequence[str]) -> None:
    """Refuses other types before a value is asked for: a column of Ray's type for Python objects unpickles then.

    The stages have compared the schema before, but a store may have been given another file since.
    """
    for name in columns:
        if held.field(name).type != wanted.field(name).type:
            raise pa.ArrowInvalid(f"column {name} has type {held.field(name).type}, not {wanted.field(name).type}")


def _groups(parquet: pq.ParquetFile, rows: RowRange) -> tuple[list[int], int]:
    """The row groups that hold the rows, and the first row of the first of them."""
    groups: list[int] = []
    first_row = start = 0
    for index in range(parquet.metadata.num_row_groups):
        stop = start + parquet.metadata.row_group(index).num_rows
        if start < rows.stop and stop > rows.start:
            first_row = first_row if groups else start
            groups.append(index)
        start = stop
    if start < rows.stop:
        raise pa.ArrowInvalid(f"it ends at row {start}, before row {rows.stop}")
    return groups, first_row
