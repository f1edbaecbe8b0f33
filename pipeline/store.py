"""A frames dataset on disk or in an object store: opened, verified, its episodes split.

Layout under the dataset's root: `data/*.parquet`, `meta/episodes.parquet`, `meta/manifest.json`. The manifest is
written last: a folder without one is an unfinished dataset and is refused.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipeline.errors import UserError
from pipeline.schema import EPISODES_FILE, EPISODES_SCHEMA, MANIFEST_FILE, SCHEMA_VERSION, Preprocess, frames_schema
from pipeline.server import mask

VALIDATION_SHARE = 0.1
_HASH_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class FileEntry:
    """One Parquet file of a dataset: name relative to the root, rows, bytes, sha256 of its bytes."""

    name: str
    rows: int
    bytes: int
    sha256: str


def locate(address: str) -> tuple[pafs.FileSystem, str]:
    """The file system and the path inside it of a local path or any `pyarrow.fs` address (s3://, gs://, file://).

    Raises:
        UserError: Not an address that pyarrow understands.
    """
    try:
        if "://" in address:
            filesystem, path = pafs.FileSystem.from_uri(address)
            return filesystem, path.rstrip("/")
        return pafs.LocalFileSystem(), _absolute(address)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise UserError(f"cannot use {shown(address)!r} as a place for data ({shown(_first_line(error))})") from None


def base_name(address: str) -> str:
    """What a dataset is called: the last part of its path."""
    return locate(address)[1].rpartition("/")[2]


def shown(address: str) -> str:
    """An address without the secrets it may hold."""
    return mask(address) if "://" in address else address


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path)).rstrip("/")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def dataset_digest(files: tuple[FileEntry, ...]) -> str:
    """Digest of a dataset's content: sha256 over the sha256 of its files, in order (64 hex digits)."""
    return hashlib.sha256("".join(f"{f.name} {f.sha256}\n" for f in files).encode()).hexdigest()


def hash_file(filesystem: pafs.FileSystem, path: str) -> str:
    """sha256 of a file's bytes (64 hex digits), read in chunks."""
    digest = hashlib.sha256()
    with filesystem.open_input_stream(path) as stream:
        while chunk := stream.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def write_atomically(filesystem: pafs.FileSystem, path: str, content: bytes) -> None:
    """Writes a whole file so that a reader sees either nothing or all of it."""
    with filesystem.open_output_stream(f"{path}.tmp") as stream:
        stream.write(content)
    filesystem.move(f"{path}.tmp", path)


def episode_hash(game: str, seed: int, episode_id: int) -> float:
    """Uniform number in [0, 1) that depends on an episode's identity alone."""
    digest = hashlib.sha256(f"{game}/{seed}/{episode_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def assign_splits(hashes: list[float]) -> list[str]:
    """Split of each episode, "train" or "val", by its hash; both occur as soon as there are two episodes."""
    splits = ["val" if h < VALIDATION_SHARE else "train" for h in hashes]
    if len(hashes) >= 2 and "val" not in splits:
        splits[hashes.index(min(hashes))] = "val"
    if "train" not in splits:
        splits[hashes.index(max(hashes))] = "train"
    return splits


@dataclass(frozen=True)
class FramesDataset:
    """A finished frames dataset.

    Attributes:
        uri: The address it was opened with, fit to be shown.
        filesystem: Where it lives.
        root: Its path inside that file system.
        preprocess: How its frames were made.
        files: Its Parquet files, in order.
        digest: Digest of its content, 64 hex digits.
        episodes_sha256: Of the table of episodes.
        has_ram: Whether the RAM column is there.
        collection: Settings of the collection (policy, seed, lanes).
    """

    uri: str
    filesystem: pafs.FileSystem
    root: str
    preprocess: Preprocess
    files: tuple[FileEntry, ...]
    digest: str
    episodes_sha256: str
    has_ram: bool
    num_frames: int
    num_episodes: int
    collection: dict[str, Any]

    @classmethod
    def open(cls, uri: str) -> FramesDataset:
        """Opens a dataset by its manifest; the frames themselves are not read.

        Raises:
            UserError: The folder does not exist, is empty, is unfinished, or has another schema version.
        """
        filesystem, root = locate(uri)
        manifest = _read_manifest(filesystem, root, shown(uri))
        try:
            files = tuple(FileEntry(**entry) for entry in manifest["files"])
            return cls(
                uri=shown(uri),
                filesystem=filesystem,
                root=root,
                preprocess=Preprocess.from_json(json.dumps(manifest["preprocess"])),
                files=files,
                digest=str(manifest["digest"]),
                episodes_sha256=str(manifest["episodes_sha256"]),
                has_ram=bool(manifest["has_ram"]),
                num_frames=int(manifest["frames"]),
                num_episodes=int(manifest["episodes"]),
                collection=dict(manifest["collection"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"the manifest of dataset {shown(uri)} is damaged ({error!r}); collect the dataset again"
            ) from None

    @functools.cached_property
    def episodes(self) -> pa.Table:
        """One row an episode: episode_id, file, first_row, length (rows), return, seed, split."""
        path = f"{self.root}/{EPISODES_FILE}"
        try:
            with self.filesystem.open_input_stream(path) as source:
                content = source.read()
        except OSError as error:
            raise UserError(f"cannot read {EPISODES_FILE} of dataset {self.uri} ({_first_line(error)})") from None
        if hashlib.sha256(content).hexdigest() != self.episodes_sha256:
            raise UserError(f"{EPISODES_FILE} of dataset {self.uri} has changed bytes (sha256 differs)")
        return pq.read_table(pa.BufferReader(content), schema=EPISODES_SCHEMA)

    def path(self, file: FileEntry) -> str:
        """A file's path inside the file system."""
        return f"{self.root}/{file.name}"

    @property
    def schema(self) -> pa.Schema:
        """The schema that each file must have, footer metadata included."""
        return frames_schema(self.preprocess, with_ram=self.has_ram)

    @property
    def num_bytes(self) -> int:
        """Bytes of all Parquet files."""
        return sum(file.bytes for file in self.files)

    def require_sound_files(self) -> None:
        """Fast check before a long job: every file is there with its recorded size, checksum and schema.

        Raises:
            UserError: Names every bad file.
        """
        problems = [problem for file in self.files for problem in self._file_problems(file)]
        problems += self._episodes_problems()
        if problems:
            raise UserError(
                f"dataset {self.uri} is unsound: {'; '.join(problems)}; collect it again or restore the files"
            )

    def _episodes_problems(self) -> list[str]:
        try:
            _ = self.episodes
        except UserError as error:
            return [str(error)]
        return []

    def _file_problems(self, file: FileEntry) -> Iterator[str]:
        info = self.filesystem.get_file_info(self.path(file))
        if info.type != pafs.FileType.File:
            yield f"{file.name} is missing"
        elif info.size != file.bytes:
            yield f"{file.name} has {info.size} bytes, not {file.bytes}"
        elif hash_file(self.filesystem, self.path(file)) != file.sha256:
            yield f"{file.name} has changed bytes (sha256 differs)"
        else:
            yield from self._schema_problems(file)

    def _schema_problems(self, file: FileEntry) -> Iterator[str]:
        try:
            with self.filesystem.open_input_file(self.path(file)) as source:
                schema = pq.read_schema(source)
        except (pa.ArrowException, OSError) as error:
            yield f"{file.name} is not a Parquet file ({_first_line(error)})"
            return
        if not schema.equals(self.schema, check_metadata=True):
            held, wanted = schema.metadata or {}, self.schema.metadata
            differing = sorted(key.decode() for key in wanted if held.get(key) != wanted[key]) or ["columns"]
            shown = {name: held.get(name.encode(), b"none").decode() for name in differing}
            yield f"{file.name} has another schema than the manifest says ({shown})"

    def verify(self) -> list[str]:
        """Every problem of the dataset, each naming its file; an empty list when it is sound.

        Checks sizes and checksums, schemas, row counts, and that the episodes are whole and in order.
        """
        problems = [problem for file in self.files for problem in self._file_problems(file)]
        if dataset_digest(self.files) != self.digest:
            problems.append(f"{MANIFEST_FILE} does not fit its own digest")
        problems += self._episodes_problems()
        if problems:
            return problems
        return self._content_problems()

    def _content_problems(self) -> list[str]:
        episodes = self.episodes
        problems = [problem for file in self.files for problem in _frames_problems(self, file, episodes)]
        rows = sum(file.rows for file in self.files)
        if rows != self.num_frames:
            problems.append(f"{MANIFEST_FILE} counts {self.num_frames} frames, its files {rows}")
        if episodes.num_rows != self.num_episodes:
            problems.append(f"{EPISODES_FILE} lists {episodes.num_rows} episodes, the manifest {self.num_episodes}")
        return problems


def write_manifest(
    filesystem: pafs.FileSystem,
    root: str,
    *,
    preprocess: Preprocess,
    files: tuple[FileEntry, ...],
    episodes: pa.Table,
    has_ram: bool,
    collection: dict[str, Any],
) -> None:
    """Finishes a dataset: the table of episodes, then the manifest, each by atomic rename."""
    filesystem.create_dir(f"{root}/meta", recursive=True)
    sink = pa.BufferOutputStream()
    pq.write_table(episodes, sink)
    table = sink.getvalue().to_pybytes()
    write_atomically(filesystem, f"{root}/{EPISODES_FILE}", table)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "frames": sum(file.rows for file in files),
        "episodes": episodes.num_rows,
        "digest": dataset_digest(files),
        "episodes_sha256": hashlib.sha256(table).hexdigest(),
        "has_ram": has_ram,
        "preprocess": asdict(preprocess),
        "collection": collection,
        "files": [asdict(file) for file in files],
    }
    write_atomically(filesystem, f"{root}/{MANIFEST_FILE}", json.dumps(manifest, indent=1).encode())


def _read_manifest(filesystem: pafs.FileSystem, root: str, uri: str) -> dict[str, Any]:
    try:
        info = filesystem.get_file_info(root)
        if info.type == pafs.FileType.NotFound:
            raise UserError(f"there is no dataset at {uri}; make one with `latentrl collect --out {uri}`")
        if info.type == pafs.FileType.File:
            raise UserError(f"{uri} is a file, not a dataset; name the folder that `latentrl collect` wrote")
        if filesystem.get_file_info(f"{root}/{MANIFEST_FILE}").type != pafs.FileType.File:
            raise _not_finished(filesystem, root, uri)
        with filesystem.open_input_stream(f"{root}/{MANIFEST_FILE}") as stream:
            manifest = json.loads(stream.read())
    except OSError as error:
        raise UserError(f"cannot read dataset {uri} ({_first_line(error)}); check the address and its access") from None
    except ValueError:
        raise UserError(f"{MANIFEST_FILE} of dataset {uri} is not JSON; collect the dataset again") from None
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(
            f"dataset {uri} has schema version {version!r}, this version of latentrl reads {SCHEMA_VERSION}; "
            "collect it again"
        )
    return dict(manifest)


def _not_finished(filesystem: pafs.FileSystem, root: str, uri: str) -> UserError:
    entries = filesystem.get_file_info(pafs.FileSelector(root))
    if not entries:
        return UserError(f"the folder {uri} is empty; make a dataset with `latentrl collect --out {uri}`")
    if any(entry.base_name == "data" for entry in entries):
        return UserError(f"dataset {uri} is unfinished (no {MANIFEST_FILE}); collect it again with --overwrite")
    return UserError(f"{uri} is not a frames dataset (no {MANIFEST_FILE}); name a folder that `latentrl collect` wrote")


def _frames_problems(dataset: FramesDataset, file: FileEntry, episodes: pa.Table) -> Iterator[str]:
    """Problems inside one file whose bytes are as recorded: what a faulty writer would leave."""
    try:
        with dataset.filesystem.open_input_file(dataset.path(file)) as source:
            parquet = pq.ParquetFile(source, page_checksum_verification=True)
            if parquet.metadata.num_rows != file.rows:
                yield f"{file.name} has {parquet.metadata.num_rows} rows, not {file.rows}"
            columns = ["episode_id", "t", "action", "terminated", "truncated"]
            table = parquet.read(columns=columns)
            for _ in parquet.iter_batches(columns=["obs"]):
                pass  # decoding every page checks its checksum
    except (pa.ArrowException, OSError) as error:
        yield f"{file.name} cannot be read ({_first_line(error)})"
        return
    yield from _episode_problems(file, table, episodes)


def _episode_problems(file: FileEntry, table: pa.Table, episodes: pa.Table) -> Iterator[str]:
    listed = episodes.filter(pc.equal(episodes["file"], file.name))
    if sum(listed["length"].to_pylist()) != table.num_rows:
        yield f"{file.name}: the episodes listed for it do not add up to its rows"
        return
    episode_id, t = table["episode_id"].to_numpy(), table["t"].to_numpy()
    is_last = np.zeros(table.num_rows, bool)
    for row in listed.to_pylist():
        span = slice(row["first_row"], row["first_row"] + row["length"])
        if not 0 <= span.start < span.stop <= table.num_rows:
            yield f"{file.name}: episode {row['episode_id']} is listed outside of its rows"
            return
        if not (episode_id[span] == row["episode_id"]).all() or not (t[span] == np.arange(row["length"])).all():
            yield f"{file.name}: the rows of episode {row['episode_id']} are not whole and in order"
            return
        is_last[span.stop - 1] = True
    ended = table["terminated"].to_numpy() | table["truncated"].to_numpy()
    if not (ended == is_last).all() or not (table["action"].is_null().to_numpy() == is_last).all():
        yield f"{file.name}: an episode does not end on its last row"
