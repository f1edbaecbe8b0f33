"""The frames dataset: columns, types, footer keys, version, and the record of how its frames were made."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.errors import UserError
from pipeline.untrusted import from_record, short

SCHEMA_VERSION = 1
RAM_BYTES = 128
ROW_GROUP_ROWS = 1024

VERSION_KEY = b"latentrl.schema_version"
SHAPE_KEY = b"latentrl.shape"
DTYPE_KEY = b"latentrl.dtype"
PREPROCESS_KEY = b"latentrl.preprocess"

MAX_ACTIONS = 18
# Of a `Preprocess`: what decides which frames come, and not what a frame looks like.
RULES_OF_PLAY = ("protocol", "sticky_probability", "action_set", "noop_max", "fire_reset")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_RANGES = {
    "frame_skip": (1, 60),
    "sticky_probability": (0, 1),
    "height": (1, 1024),
    "width": (1, 1024),
    "noop_max": (0, 1000),
}

EPISODES_FILE = "meta/episodes.parquet"
MANIFEST_FILE = "meta/manifest.json"

EPISODES_SCHEMA = pa.schema(
    [
        ("episode_id", pa.int64()),
        ("file", pa.string()),
        ("first_row", pa.int64()),
        ("length", pa.int64()),
        ("return", pa.float64()),
        ("seed", pa.int64()),
        ("split", pa.string()),
    ]
)


@dataclass(frozen=True)
class Preprocess:
    """Everything that decides what a frame of a game looks like and which actions lead to it.

    Stored with every dataset, encoder and policy. Two parts of the pipeline fit together when their records agree in
    every field but `ale_version`.
    """

    game: str
    protocol: str
    ale_version: str
    rom_md5: str
    frame_skip: int
    sticky_probability: float
    max_pool: bool
    height: int
    width: int
    grayscale: bool
    resize: str
    action_set: tuple[str, ...]
    noop_max: int
    fire_reset: bool

    def __post_init__(self) -> None:
        """Refuses what no environment can be: records come with bundles and datasets of other people.

        Raises:
            ValueError: Names the field and its value.
        """
        for name, (least, greatest) in _RANGES.items():
            if not least <= getattr(self, name) <= greatest:
                raise ValueError(f"{name} is {short(getattr(self, name))}; it must lie from {least} to {greatest}")
        if not (_NAME.fullmatch(self.game) and _NAME.fullmatch(self.protocol)):
            raise ValueError(f"game {short(self.game)} or protocol {short(self.protocol)} is no name")
        if not 1 <= len(self.action_set) <= MAX_ACTIONS:
            raise ValueError(f"action_set has {len(self.action_set)} names; it must have 1 to {MAX_ACTIONS}")

    @property
    def frame_bytes(self) -> int:
        """Bytes of one frame: height x width, one grey byte a pixel."""
        return self.height * self.width

    def to_json(self) -> str:
        """One-line JSON with sorted keys."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_record(cls, record: Any, what: str) -> Preprocess:
        """Reads what `to_json` wrote, parsed; `what` names it for the message.

        Raises:
            UserError: Not an object with exactly these keys, types and ranges.
        """
        return from_record(cls, record, what)

    def require_match(self, other: Preprocess, *, mine: str, theirs: str, may_differ: Collection[str] = ()) -> None:
        """Refuses to combine what was made from differently prepared frames.

        Args:
            other: The record to compare with.
            mine: What this record belongs to, for the message ("the encoder").
            theirs: What the other belongs to ("the environment").
            may_differ: Fields that do not matter; `RULES_OF_PLAY` where frames are only looked at.

        Raises:
            UserError: Names each field that differs, with both values.
        """
        names = [f.name for f in dataclasses.fields(self) if f.name not in {"ale_version", *may_differ}]
        differing = [n for n in names if getattr(self, n) != getattr(other, n)]
        if differing:
            both = "; ".join(f"{n}: {mine} has {getattr(self, n)!r}, {theirs} {getattr(other, n)!r}" for n in differing)
            raise UserError(f"{mine} and {theirs} prepare frames differently ({both}); use matching ones")


def frames_schema(preprocess: Preprocess, *, with_ram: bool) -> pa.Schema:
    """Arrow schema of a frames file; the footer metadata makes each file self-describing."""
    columns = [
        pa.field("episode_id", pa.int64(), nullable=False),
        pa.field("t", pa.int32(), nullable=False),
        pa.field("obs", pa.binary(preprocess.frame_bytes), nullable=False),
        pa.field("action", pa.int32()),
        pa.field("reward", pa.float32(), nullable=False),
        pa.field("terminated", pa.bool_(), nullable=False),
        pa.field("truncated", pa.bool_(), nullable=False),
        pa.field("lives", pa.int8(), nullable=False),
    ]
    if with_ram:
        columns.append(pa.field("ram", pa.binary(RAM_BYTES), nullable=False))
    metadata = {
        VERSION_KEY: str(SCHEMA_VERSION).encode(),
        SHAPE_KEY: json.dumps([preprocess.height, preprocess.width]).encode(),
        DTYPE_KEY: b"uint8",
        PREPROCESS_KEY: preprocess.to_json().encode(),
    }
    return pa.schema(columns, metadata=metadata)
