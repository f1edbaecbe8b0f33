"""The table of a dataset's episodes: that it keeps to the files, and that the files keep to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.pages import page_sizes
from pipeline.schema import EPISODES_SCHEMA
from pipeline.untrusted import short

SPLITS = ("train", "val")
_MOST_EPISODES = 10**6
_MOST_BYTES = 256 << 20  # of all pages; and of all texts


def read_episodes(content: bytes, num_frames: int) -> pa.Table:
    """The table of episodes in a Parquet file, its columns of text never larger than they may be once unpacked.

    Args:
        content: The file.
        num_frames: Of the dataset; an episode has one at least.

    Raises:
        ValueError: Other columns, more rows, larger pages or longer texts than such a table has.
    """
    source = pa.BufferReader(content)
    file = pq.ParquetFile(source)
    if file.schema_arrow.remove_metadata() != EPISODES_SCHEMA:
        raise ValueError(f"it has the columns {short(file.schema_arrow.names)}, or others' types")
    if file.metadata.num_rows > min(num_frames, _MOST_EPISODES):
        raise ValueError(f"it has {file.metadata.num_rows} rows, more than episodes can be")
    groups = (file.metadata.row_group(index) for index in range(file.num_row_groups))
    chunks = (group.column(number) for group in groups for number in range(group.num_columns))
    size = sum(size for chunk in chunks for size in page_sizes(source, chunk))
    if size > _MOST_BYTES:
        raise ValueError(f"its pages take {size} bytes, more than all of it can")
    texts = ["file", "split"]
    table = pq.ParquetFile(source, read_dictionary=texts).read()
    if sum(_text_bytes(table[name]) for name in texts) > _MOST_BYTES:
        raise ValueError("its texts are longer than names can be")
    return table.cast(EPISODES_SCHEMA)


def _text_bytes(column: pa.ChunkedArray) -> int:
    """Of a column that names its values by numbers, when each stands where it is named."""
    lengths = (pc.binary_length(chunk.dictionary).take(chunk.indices.drop_null()) for chunk in column.chunks)
    return sum(pc.sum(length.cast(pa.int64())).as_py() or 0 for length in lengths)


def require_within(table: pa.Table, rows_by_file: Mapping[str, int]) -> pa.Table:
    """The table of episodes, none of which lies outside of the files: readers go by it without another look.

    Raises:
        ValueError: Names the first that does.
    """
    columns = (table[name].to_pylist() for name in ("file", "first_row", "length", "split"))
    for file, first, length, split in zip(*columns, strict=True):
        if file not in rows_by_file or first is None or length is None or split not in SPLITS:
            raise ValueError(f"it lists an episode of {short(file)}, row {first}, {length} rows, split {short(split)}")
        if not (length >= 1 and first >= 0 and first + length <= rows_by_file[file]):
            raise ValueError(f"{file} has {rows_by_file[file]} rows, and it lists {length} of them from row {first} on")
    if any(table[name].null_count for name in table.column_names):
        raise ValueError("it has gaps")
    return table


def row_problems(file: str, table: pa.Table, episodes: pa.Table) -> Iterator[str]:
    """What is wrong with the rows of one file: each episode must be whole, in order, and end on its last row.

    Args:
        file: Its name.
        table: Its rows without the pixels.
        episodes: The table of episodes.
    """
    listed = episodes.filter(pc.equal(episodes["file"], file))
    if sum(listed["length"].to_pylist()) != table.num_rows:
        yield f"{file}: the episodes listed for it do not add up to its rows"
        return
    episode_id, t = table["episode_id"].to_numpy(), table["t"].to_numpy()
    is_last = np.zeros(table.num_rows, bool)
    for row in listed.to_pylist():
        span = slice(row["first_row"], row["first_row"] + row["length"])
        if not 0 <= span.start < span.stop <= table.num_rows:
            yield f"{file}: episode {row['episode_id']} is listed outside of its rows"
            return
        if not (episode_id[span] == row["episode_id"]).all() or not (t[span] == np.arange(row["length"])).all():
            yield f"{file}: the rows of episode {row['episode_id']} are not whole and in order"
            return
        is_last[span.stop - 1] = True
    ended = table["terminated"].to_numpy() | table["truncated"].to_numpy()
    if not (ended == is_last).all() or not (table["action"].is_null().to_numpy() == is_last).all():
        yield f"{file}: an episode does not end on its last row"
