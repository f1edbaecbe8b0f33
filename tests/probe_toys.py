"""Datasets with RAM whose state is known: a ball that bounces in a box, called Pong, drawn as one bright pixel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from toy_frames import toy_preprocess

from pipeline.atariari import variables
from pipeline.schema import EPISODES_SCHEMA, RAM_BYTES, ROW_GROUP_ROWS, Preprocess, frames_schema
from pipeline.storage import hash_file
from pipeline.store import FileEntry, FramesDataset, write_manifest

HEIGHT, WIDTH = 24, 20
PONG = replace(toy_preprocess(HEIGHT, WIDTH), game="pong", protocol="atariari", resize="none")


def ball_dataset(
    root: Path,
    lengths: Sequence[int],
    *,
    emulator_seed: int = 1,
    is_noisy: bool = True,
    preprocess: Preprocess = PONG,
    has_ram: bool = True,
    **collection: Any,
) -> FramesDataset:
    """Writes episodes of these lengths, which end terminated; without noise the same state is the same picture.

    Another `preprocess` or no RAM is what the manifest says; the files stay as they are.
    """
    rng = np.random.default_rng(emulator_seed)
    (root / "data").mkdir(parents=True)
    name, tables, episodes, first = "data/part-0.parquet", [], [], 0
    for episode, length in enumerate(lengths):
        tables.append(_episode(rng, episode, length, is_noisy=is_noisy))
        episodes.append((episode, name, first, length, 0.0, emulator_seed, "train"))
        first += length
    path = root / name
    pq.write_table(
        pa.concat_tables(tables), path, row_group_size=ROW_GROUP_ROWS, use_dictionary=False, write_page_checksum=True
    )
    entry = FileEntry(name, first, path.stat().st_size, hash_file(pafs.LocalFileSystem(), str(path)))
    write_manifest(
        pafs.LocalFileSystem(),
        str(root),
        preprocess=preprocess,
        files=(entry,),
        episodes=pa.table([list(column) for column in zip(*episodes)], schema=EPISODES_SCHEMA),
        has_ram=has_ram,
        collection={"policy": "random", "seed": emulator_seed, **collection},
    )
    return FramesDataset.open(str(root))


def positions(ram: np.ndarray) -> np.ndarray:
    """The ball (N, 2), x and y, of RAM (N, 128)."""
    places = variables("pong")
    return ram[:, [places["ball_x"], places["ball_y"]]].astype(np.int64)


def _episode(rng: np.random.Generator, episode: int, length: int, *, is_noisy: bool) -> pa.Table:
    ram, frames = np.zeros((length, RAM_BYTES), np.uint8), np.zeros((length, HEIGHT, WIDTH), np.uint8)
    size = np.array([WIDTH, HEIGHT])
    places = variables("pong")
    place, speed = rng.integers(3, size - 3), rng.choice([-2, -1, 1, 2], 2)
    for t in range(length):
        is_out = (place + speed < 1) | (place + speed >= size)
        speed = np.where(is_out, -speed, speed)
        place = place + speed
        ram[t, [places["ball_x"], places["ball_y"]]] = place
        ram[t, places["player_score"]] = rng.integers(3)  # nowhere in the picture
        if is_noisy:
            frames[t] = rng.integers(0, 8, (HEIGHT, WIDTH))
        frames[t, place[1], place[0]] = 255
    is_last = np.arange(length) == length - 1
    columns = {
        "episode_id": np.full(length, episode),
        "t": np.arange(length),
        "obs": [frame.tobytes() for frame in frames],
        "action": [None if last else 1 for last in is_last],
        "reward": np.zeros(length),
        "terminated": is_last,
        "truncated": np.zeros(length, bool),
        "lives": np.ones(length),
        "ram": [row.tobytes() for row in ram],
    }
    schema = frames_schema(PONG, with_ram=True)
    return pa.table([pa.array(columns[field.name], field.type) for field in schema], schema=schema)
