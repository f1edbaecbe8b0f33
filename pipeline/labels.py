"""What is known of the frames of a game: RAM variables frame by frame, and which frames a probe learns from.

Shapes: N rows of the dataset in the order of its files, V variables, E episodes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline import atariari
from pipeline.errors import UserError
from pipeline.order import RowRange
from pipeline.schema import RAM_BYTES, ROW_GROUP_ROWS
from pipeline.source import Place, read_rows
from pipeline.store import FramesDataset

UNUSED, TRAIN, VALIDATION, TEST = -1, 0, 1, 2
SPLIT_AT = (0.7, 0.8)
MIN_EPISODE_ROWS = 65
MIN_ENTROPY_NATS = 0.6
BATCH_ROWS = 256

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Labels:
    """Labels of every row of a dataset.

    Attributes:
        game: ALE's id.
        variables: Names of the V variables whose entropy is high enough to be probed.
        values: (N, V) uint8.
        ram: (N, 128) uint8, all of it.
        episode: (N,) int64, the number of the episode, from 0.
        split: (N,) int8: TRAIN, VALIDATION, TEST or UNUSED.
        dropped: Names of the variables whose entropy is too low.
        num_duplicates: Frames of the test part that are left out, since the probe may have learned from the same bytes.
    """

    game: str
    variables: tuple[str, ...]
    values: Bytes
    ram: Bytes
    episode: NDArray[np.int64]
    split: NDArray[np.int8]
    dropped: tuple[str, ...]
    num_duplicates: int

    def rows(self, part: int) -> NDArray[np.int64]:
        """Numbers of the rows of a part, in order."""
        return np.flatnonzero(self.split == part)


def read_labels(dataset: FramesDataset, seed: int = 0) -> Labels:
    """Reads labels and deals the episodes to the probe's parts, as the released code of AtariARI does.

    Episodes of 64 frames or fewer are left out, then variables of less than 0.6 nats. Of the rest 70% of the episodes
    train the probes, 10% validate them and 20% test them, without the frames whose bytes occur in the other parts. A
    frame on which an episode terminated is left out: a game that ends inside of a frame skip shows the frame before.

    Args:
        dataset: With RAM.
        seed: Deals the episodes.

    Raises:
        UserError: No RAM, no labels for the game, too few episodes, or a damaged file.
    """
    if not dataset.has_ram:
        raise UserError(f"dataset {dataset.uri} holds no RAM to take labels from; collect it with --with-ram")
    places = atariari.variables(dataset.preprocess.game)
    ram, episode, is_terminal, hashes = _read(dataset)
    split = _dealt(episode, is_terminal, seed, dataset.uri)
    kept = split != UNUSED
    names = tuple(name for name, at in places.items() if entropy_nats(ram[kept, at]) >= MIN_ENTROPY_NATS)
    if not names:
        raise UserError(f"every variable of {dataset.uri} is nearly constant; collect more frames")
    num_duplicates = _leave_out_duplicates(split, episode, hashes)
    if not (split == TEST).any():
        raise UserError(f"all test frames of {dataset.uri} occur in its other parts too; collect more frames")
    return Labels(
        game=dataset.preprocess.game,
        variables=names,
        values=ram[:, [places[name] for name in names]],
        ram=ram,
        episode=episode,
        split=split,
        dropped=tuple(name for name in places if name not in names),
        num_duplicates=num_duplicates,
    )


def entropy_nats(values: Bytes) -> float:
    """Entropy of the empirical distribution of (N,) uint8."""
    share = np.bincount(values) / max(1, len(values))
    return float(-(share[share > 0] * np.log(share[share > 0])).sum())


def features_of(
    dataset: FramesDataset, encode: Callable[[Tensor], Tensor], on_frames: Callable[[int], None] = lambda frames: None
) -> Tensor:
    """Features (N, Z) float32 of every frame of a dataset, in the order of its files.

    Args:
        dataset: Where the frames are.
        encode: Frames (B, H, W) uint8 to features (B, Z), for example `Encoder.encode`.
        on_frames: Called with the number of frames just done.
    """
    shape = (dataset.preprocess.height, dataset.preprocess.width)
    found = []
    with torch.inference_mode():
        for table in _tables(dataset, ("obs",)):
            frames = torch.from_numpy(_bytes(table["obs"], dataset.preprocess.frame_bytes).reshape(-1, *shape))
            found += [encode(batch).float() for batch in torch.split(frames, BATCH_ROWS)]
            on_frames(len(frames))
    return torch.cat(found)


def _tables(dataset: FramesDataset, columns: tuple[str, ...]) -> Iterator[pa.Table]:
    place = Place.of(dataset)
    for file in dataset.files:
        for start in range(0, file.rows, ROW_GROUP_ROWS):
            yield read_rows(place, RowRange(file.name, start, min(start + ROW_GROUP_ROWS, file.rows)), columns)


def _bytes(column: pa.ChunkedArray, width: int) -> Bytes:
    return np.frombuffer(bytearray().join(column.to_pylist()), np.uint8).reshape(-1, width)


def _read(dataset: FramesDataset) -> tuple[Bytes, NDArray[np.int64], NDArray[np.bool_], NDArray[np.uint64]]:
    """RAM, number of the episode, whether it terminated there, and a hash of the frame, of every row."""
    ram, episodes, terminated, hashes = [], [], [], []
    for table in _tables(dataset, ("episode_id", "obs", "ram", "terminated")):
        ram.append(_bytes(table["ram"], RAM_BYTES))
        episodes.append(table["episode_id"].to_numpy())
        terminated.append(table["terminated"].to_numpy())
        hashes += [hashlib.blake2b(frame, digest_size=8).digest() for frame in table["obs"].to_pylist()]
    episode = np.unique(np.concatenate(episodes), return_inverse=True)[1].astype(np.int64)
    return np.concatenate(ram), episode, np.concatenate(terminated), np.frombuffer(b"".join(hashes), np.uint64)


def _dealt(episode: NDArray[np.int64], is_terminal: NDArray[np.bool_], seed: int, uri: str) -> NDArray[np.int8]:
    """The part of every row, by episode."""
    is_long = np.bincount(episode[~is_terminal], minlength=episode.max() + 1) >= MIN_EPISODE_ROWS
    dealt = np.random.default_rng(seed).permutation(np.flatnonzero(is_long))
    bounds = [int(share * len(dealt)) for share in SPLIT_AT]
    if not 0 < bounds[0] < bounds[1] < len(dealt):
        raise UserError(
            f"dataset {uri} has {len(dealt)} episodes of {MIN_EPISODE_ROWS} frames or more, too few for three parts; "
            "collect more frames"
        )
    part_of_episode = np.full(episode.max() + 1, UNUSED, np.int8)
    for part, members in enumerate(np.split(dealt, bounds)):
        part_of_episode[members] = part
    split: NDArray[np.int8] = np.where(is_terminal, np.int8(UNUSED), part_of_episode[episode])
    return split


def _leave_out_duplicates(split: NDArray[np.int8], episode: NDArray[np.int64], hashes: NDArray[np.uint64]) -> int:
    """Takes test frames that occur in the other parts out of `split`, and what is left of an episode if one frame."""
    is_test = split == TEST
    is_duplicate = is_test & np.isin(hashes, hashes[(split == TRAIN) | (split == VALIDATION)])
    split[is_duplicate] = UNUSED
    left = np.bincount(episode[split == TEST], minlength=episode.max() + 1)
    split[(split == TEST) & (left[episode] < 2)] = UNUSED
    return int(is_duplicate.sum())
