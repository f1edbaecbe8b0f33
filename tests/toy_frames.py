"""Small frames datasets made without an emulator: moving squares, every frame stamped with its number."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipeline.schema import EPISODES_SCHEMA, ROW_GROUP_ROWS, Preprocess, frames_schema
from pipeline.storage import hash_file
from pipeline.store import FileEntry, FramesDataset, assign_splits, episode_hash, write_manifest

STAMP_BYTES = 4


def toy_preprocess(height: int = 12, width: int = 10, game: str = "toy") -> Preprocess:
    """A record for frames of this size."""
    return Preprocess(
        game=game,
        protocol="atari100k",
        ale_version="0",
        rom_md5="0",
        frame_skip=4,
        sticky_probability=0.0,
        max_pool=True,
        height=height,
        width=width,
        grayscale=True,
        resize="area",
        action_set=("NOOP", "FIRE"),
        noop_max=30,
        fire_reset=True,
    )


def toy_frames(count: int, height: int, width: int, first_number: int = 0) -> np.ndarray:
    """(count, height, width) uint8: a bright square on a noisy ground; the first 4 bytes are the frame's number."""
    rng = np.random.default_rng(first_number)
    frames = rng.integers(0, 8, (count, height, width), dtype=np.uint8)
    for index, (top, left) in enumerate(rng.integers(0, (height - 2, width - 2), (count, 2))):
        frames[index, top : top + 3, left : left + 3] = 200
    numbers = np.arange(first_number, first_number + count, dtype="<u4")
    frames.reshape(count, -1)[:, :STAMP_BYTES] = numbers.view(np.uint8).reshape(count, STAMP_BYTES)
    return frames


def stamps(frames: np.ndarray) -> list[int]:
    """The numbers that `toy_frames` wrote into frames (N, H, W)."""
    flat = np.ascontiguousarray(frames.reshape(len(frames), -1)[:, :STAMP_BYTES])
    return flat.view("<u4").reshape(-1).tolist()


def toy_dataset(
    root: Path, lengths: Sequence[int], *, num_files: int = 1, height: int = 12, width: int = 10, seed: int = 0
) -> FramesDataset:
    """Writes episodes of these lengths (rows) as a dataset; frame k of the dataset is stamped k."""
    preprocess = toy_preprocess(height, width)
    filesystem = pafs.LocalFileSystem()
    (root / "data").mkdir(parents=True)
    files, episodes, number = [], [], 0
    for index, members in enumerate(np.array_split(np.arange(len(lengths)), num_files)):
        name, first_row, tables = f"data/part-{index}.parquet", 0, []
        for episode in members.tolist():
            tables.append(_episode(preprocess, episode, lengths[episode], number))
            episodes.append((episode, name, first_row, lengths[episode], float(lengths[episode] - 1), seed))
            first_row, number = first_row + lengths[episode], number + lengths[episode]
        path = str(root / name)
        pq.write_table(
            pa.concat_tables(tables),
            path,
            row_group_size=ROW_GROUP_ROWS,
            use_dictionary=False,
            compression="zstd",
            write_page_checksum=True,
        )
        files.append(FileEntry(name, first_row, Path(path).stat().st_size, hash_file(filesystem, path)))
    splits = assign_splits([episode_hash("toy", seed, row[0]) for row in episodes])
    columns = [list(column) for column in zip(*[(*row, split) for row, split in zip(episodes, splits)])]
    write_manifest(
        filesystem,
        str(root),
        preprocess=preprocess,
        files=tuple(files),
        episodes=pa.table(columns, schema=EPISODES_SCHEMA),
        has_ram=False,
        collection={"policy": "toy"},
    )
    return FramesDataset.open(str(root))


def _episode(preprocess: Preprocess, episode: int, length: int, first_number: int) -> pa.Table:
    frames = toy_frames(length, preprocess.height, preprocess.width, first_number)
    is_last = np.arange(length) == length - 1
    columns = {
        "episode_id": np.full(length, episode),
        "t": np.arange(length),
        "obs": [frame.tobytes() for frame in frames],
        "action": [None if last else t % 2 for t, last in enumerate(is_last)],
        "reward": np.where(is_last, 0.0, 1.0),
        "terminated": is_last if episode % 2 == 0 else np.zeros(length, bool),
        "truncated": is_last if episode % 2 else np.zeros(length, bool),
        "lives": np.ones(length),
    }
    schema = frames_schema(preprocess, with_ram=False)
    return pa.table([pa.array(columns[field.name], field.type) for field in schema], schema=schema)
