"""Batch inference with Ray Data: a frames dataset becomes a dataset of latents that RLlib's offline readers take.

One row a transition, in the columns obs, new_obs, actions, rewards, terminateds, truncateds, eps_id, t; latents are
single and standardised, stacking is the reader's business. The layout is that of a frames dataset: `data/*.parquet`,
and `meta/manifest.json` written last. An unfinished folder is taken up where it was left: each file appears whole.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import ray
import ray.data
import torch
from numpy.typing import NDArray

from pipeline import artifact
from pipeline.artifact import Encoder
from pipeline.errors import UserError, reading
from pipeline.order import RowRange
from pipeline.schema import MANIFEST_FILE
from pipeline.source import Place, read_rows
from pipeline.storage import hash_file, locate, read_small, reason, shown, write_atomically, writing_told
from pipeline.store import FileEntry, FramesDataset, clear
from pipeline.untrusted import parse_object, short

LATENTS_VERSION = 1
PLAN_FILE = "meta/plan.json"
PART_ROWS = 16_384
READ_ROWS = 1024
FRAME_COLUMNS = ("episode_id", "t", "obs", "action", "reward", "terminated", "truncated")


@dataclass(frozen=True)
class Part:
    """A file to write: its name, and whole episodes of one frames file, as rows."""

    name: str
    rows: RowRange


@dataclass(frozen=True)
class Encoded:
    """A finished dataset of latents.

    Attributes:
        address: As given.
        frames: Frames that the dataset was made of.
        transitions: Its rows.
        frames_now: Frames encoded in this session; fewer than `frames` after a resumption.
        seconds: Of this session's encoding.
    """

    address: str
    frames: int
    transitions: int
    frames_now: int
    seconds: float


def encode_dataset(
    dataset: FramesDataset,
    bundle_path: Path,
    out: str,
    *,
    overwrite: bool = False,
    on_frames: Callable[[int], None] = lambda frames: None,
) -> Encoded:
    """Encodes every frame once, on all CPUs that Ray has; Ray must be running.

    Args:
        dataset: The frames.
        bundle_path: A verified encoder bundle.
        out: Folder or pyarrow.fs address.
        overwrite: Replaces a dataset of latents that is there.
        on_frames: Called with the number of frames just done.

    Raises:
        UserError: The encoder is for other frames; `out` exists or belongs to another dataset or encoder; a frames file
            is damaged.
    """
    encoder = artifact.load_encoder(bundle_path, preprocess=dataset.preprocess)
    parts = plan_parts(dataset)
    plan = {"version": LATENTS_VERSION, "dataset": dataset.digest, "encoder": encoder.sha256, "parts": len(parts)}
    filesystem, root = locate(out)
    _make_room(filesystem, root, out, plan, overwrite=overwrite)
    with writing_told(filesystem, out):
        waiting = [p for p in parts if filesystem.get_file_info(f"{root}/{p.name}").type != pafs.FileType.File]
        on_frames(sum(part.rows.num_rows for part in parts if part not in waiting))
        began = time.perf_counter()
        _encode_parts(dataset, bundle_path, encoder.sha256, (filesystem, root), waiting, on_frames)
        seconds = time.perf_counter() - began
        files = [_entry(filesystem, root, part) for part in parts]
        transitions = sum(file.rows for file in files)
        manifest = {**plan, "z_dim": encoder.z_dim, "frames": dataset.num_frames, "transitions": transitions}
        manifest |= {"preprocess": asdict(dataset.preprocess), "files": [asdict(file) for file in files]}
        write_atomically(filesystem, f"{root}/{MANIFEST_FILE}", json.dumps(manifest, indent=1).encode())
    now = sum(part.rows.num_rows for part in waiting)
    return Encoded(out, dataset.num_frames, transitions, now, seconds)


def plan_parts(dataset: FramesDataset) -> list[Part]:
    """Whole episodes, neighbours in one frames file, up to PART_ROWS rows or one episode a part."""
    spans: list[RowRange] = []
    rows = dataset.episodes.select(["file", "first_row", "length"]).to_pylist()
    for file, first, length in sorted((row["file"], row["first_row"], row["length"]) for row in rows):
        last = spans[-1] if spans else None
        if last and last.file == file and last.stop == first and first + length - last.start <= PART_ROWS:
            spans[-1] = RowRange(file, last.start, first + length)
        else:
            spans.append(RowRange(file, first, first + length))
    return [Part(f"data/part-{index:05d}.parquet", span) for index, span in enumerate(spans)]


def _make_room(filesystem: pafs.FileSystem, root: str, out: str, plan: dict[str, Any], *, overwrite: bool) -> None:
    """Leaves a folder with this plan, new or begun, or refuses."""
    try:
        entries = filesystem.get_file_info(pafs.FileSelector(root, allow_not_found=True))
        if filesystem.get_file_info(root).type == pafs.FileType.File:
            raise UserError(f"{shown(out)} is a file; name a folder for the latents")
        if entries and not _is_begun(filesystem, root, out, plan, overwrite=overwrite):
            clear(filesystem, root)
        filesystem.create_dir(f"{root}/data", recursive=True)
        filesystem.create_dir(f"{root}/meta", recursive=True)
        write_atomically(filesystem, f"{root}/{PLAN_FILE}", json.dumps(plan).encode())
    except OSError as error:
        raise UserError(f"cannot write to {shown(out)} ({reason(error)}); mend that, or name another place") from None


def _is_begun(filesystem: pafs.FileSystem, root: str, out: str, plan: dict[str, Any], *, overwrite: bool) -> bool:
    """Whether a folder that is not empty holds the beginning of this very dataset; refuses what it may not replace."""
    found = _read_json(filesystem, f"{root}/{PLAN_FILE}")
    if found is None:
        raise UserError(f"{shown(out)} is not empty and holds no dataset of latents; name another folder")
    if overwrite:
        return False
    if _read_json(filesystem, f"{root}/{MANIFEST_FILE}") is not None:
        raise UserError(f"{shown(out)} exists; add --overwrite or name another folder")
    if found != plan:
        both = "; ".join(
            f"{key}: there {short(found.get(key))}, now {plan[key]!r}" for key in plan if found.get(key) != plan[key]
        )
        raise UserError(f"{shown(out)} was begun with something else ({both}); add --overwrite or name another folder")
    return True


def _read_json(filesystem: pafs.FileSystem, path: str) -> dict[str, Any] | None:
    if filesystem.get_file_info(path).type != pafs.FileType.File:
        return None
    return parse_object(read_small(filesystem, path), path)


def _entry(filesystem: pafs.FileSystem, root: str, part: Part) -> FileEntry:
    path = f"{root}/{part.name}"
    with reading(f"{part.name} of the latents", "remove it and run again"), filesystem.open_input_file(path) as source:
        rows = pq.ParquetFile(source).metadata.num_rows
    return FileEntry(part.name, rows, filesystem.get_file_info(path).size, hash_file(filesystem, path))


def _encode_parts(
    dataset: FramesDataset,
    bundle_path: Path,
    sha256: str,
    target: tuple[pafs.FileSystem, str],
    parts: list[Part],
    on_frames: Callable[[int], None],
) -> None:
    """Runs the parts through a pool of actors, each with its own copy of the encoder."""
    if not parts:
        return
    num_actors = max(1, min(len(parts), int(ray.cluster_resources().get("CPU", 1))))
    indices = ray.data.from_items([{"index": index} for index in range(len(parts))], override_num_blocks=len(parts))
    indices.context.enable_progress_bars = False
    done = indices.map_batches(
        _PartEncoder,
        fn_constructor_args=(dataset, ray.put(artifact.pack(bundle_path)), sha256, target, parts),
        batch_size=1,
        concurrency=num_actors,
        num_cpus=1,
    )
    for row in done.iter_rows():
        if row["error"]:
            raise UserError(row["error"])
        on_frames(int(row["frames"]))


class _PartEncoder:
    """An actor: reads frames, encodes them, writes transitions."""

    def __init__(
        self, dataset: FramesDataset, blob: Any, sha256: str, target: tuple[pafs.FileSystem, str], parts: list[Part]
    ) -> None:
        torch.set_num_threads(1)
        self._place, self._target, self._parts = Place.of(dataset), target, parts
        self._shape = (dataset.preprocess.height, dataset.preprocess.width)
        self._encoder = _unpacked(ray.get(blob), sha256)

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, list[Any]]:
        """Writes one part; a UserError travels as text, since Ray Data drops the causes of exceptions."""
        part = self._parts[int(batch["index"][0])]
        try:
            self._write(part, as_transitions(*self._encoded(part.rows)))
        except UserError as error:
            return {"frames": [0], "error": [str(error)]}
        return {"frames": [part.rows.num_rows], "error": [""]}

    def _encoded(self, rows: RowRange) -> tuple[pa.Table, NDArray[np.float32]]:
        """The rows' columns without pixels, and their latents (N, Z)."""
        tables, latents = [], []
        for start in range(rows.start, rows.stop, READ_ROWS):
            piece = RowRange(rows.file, start, min(start + READ_ROWS, rows.stop))
            table = read_rows(self._place, piece, FRAME_COLUMNS)
            pixels = np.frombuffer(b"".join(table["obs"].to_pylist()), np.uint8).reshape(-1, *self._shape).copy()
            latents.append(self._encoder.encode(torch.from_numpy(pixels)).numpy())
            tables.append(table.drop_columns(["obs"]))
        return pa.concat_tables(tables), np.concatenate(latents)

    def _write(self, part: Part, table: pa.Table) -> None:
        filesystem, root = self._target
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        with writing_told(filesystem, root):
            write_atomically(filesystem, f"{root}/{part.name}", sink.getvalue().to_pybytes())


def _unpacked(blob: bytes, sha256: str) -> Encoder:
    with tempfile.TemporaryDirectory(prefix="latentrl-encoder-") as folder:
        return artifact.load_encoder(artifact.unpack(blob, Path(folder) / "bundle", sha256))


def as_transitions(rows: pa.Table, z_NZ: NDArray[np.float32]) -> pa.Table:
    """Whole episodes, row by row, as transitions.

    Args:
        rows: N rows of a frames dataset without pixels; the last row of each episode has no action.
        z_NZ: (N, Z) float32, the latent of each row.

    Returns:
        One row for each row that has an action; `terminateds` and `truncateds` are those of the row that follows.
    """
    start = np.flatnonzero(rows["action"].is_valid().to_numpy())
    taken = rows.take(start)
    following = rows.take(start + 1)
    return pa.table(
        {
            "obs": _latent_column(z_NZ[start]),
            "new_obs": _latent_column(z_NZ[start + 1]),
            "actions": taken["action"].cast(pa.int64()),
            "rewards": taken["reward"],
            "terminateds": following["terminated"],
            "truncateds": following["truncated"],
            "eps_id": taken["episode_id"].cast(pa.string()),
            "t": taken["t"].cast(pa.int64()),
        }
    )


def _latent_column(z_NZ: NDArray[np.float32]) -> pa.Array:
    offsets = np.arange(len(z_NZ) + 1, dtype=np.int32) * z_NZ.shape[1]
    return pa.ListArray.from_arrays(offsets, np.ascontiguousarray(z_NZ).reshape(-1))
