"""A frames dataset on disk or in an object store: opened, verified, its episodes split.

Layout under the dataset's root: `data/*.parquet`, `meta/episodes.parquet`, `meta/manifest.json`. The manifest is
written last: a folder without one is an unfinished dataset and is refused.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipeline.episodes import read_episodes, require_within, row_problems
from pipeline.errors import UserError, reading
from pipeline.pages import require_moderate
from pipeline.schema import EPISODES_FILE, MANIFEST_FILE, ROW_GROUP_ROWS, SCHEMA_VERSION, Preprocess, frames_schema
from pipeline.storage import hash_file, locate, not_shared, read_small, reason, require_bucket, shown, write_atomically
from pipeline.untrusted import converted, parse_object, require_inside, short

VALIDATION_SHARE = 0.1


@dataclass(frozen=True)
class FileEntry:
    """One Parquet file of a dataset: name relative to the root, rows, bytes, sha256 of its bytes."""

    name: str
    rows: int
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        """Refuses counts below 0 and names that lead out of the dataset.

        Raises:
            ValueError, UserError: Names the value.
        """
        require_inside(self.name, "the manifest")
        if not (0 <= self.rows < 2**48 and 0 <= self.bytes < 2**60):
            raise ValueError(f"{self.name} has {self.rows} rows in {self.bytes} bytes")


def dataset_digest(files: tuple[FileEntry, ...]) -> str:
    """Digest of a dataset's content: sha256 over the sha256 of its files, in order (64 hex digits)."""
    return hashlib.sha256("".join(f"{f.name} {f.sha256}\n" for f in files).encode()).hexdigest()


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
        what = f"the manifest of dataset {shown(uri)}"
        with reading(what, "collect the dataset again"):
            return cls(
                uri=shown(uri),
                filesystem=filesystem,
                root=root,
                preprocess=Preprocess.from_record(manifest["preprocess"], what),
                files=converted(manifest["files"], tuple[FileEntry, ...], what),
                digest=_sha256(manifest, "digest"),
                episodes_sha256=_sha256(manifest, "episodes_sha256"),
                has_ram=converted(manifest["has_ram"], bool, what),
                num_frames=_count(manifest, "frames"),
                num_episodes=_count(manifest, "episodes"),
                collection=converted(manifest["collection"], dict[str, Any], what),
            )

    @functools.cached_property
    def episodes(self) -> pa.Table:
        """One row an episode: episode_id, file, first_row, length (rows), return, seed, split."""
        path = f"{self.root}/{EPISODES_FILE}"
        try:
            content = read_small(self.filesystem, path)
        except OSError as error:
            raise UserError(f"cannot read {EPISODES_FILE} of dataset {self.uri} ({reason(error)})") from None
        if hashlib.sha256(content).hexdigest() != self.episodes_sha256:
            raise UserError(f"{EPISODES_FILE} of dataset {self.uri} has changed bytes (sha256 differs)")
        with reading(f"{EPISODES_FILE} of dataset {self.uri}", "collect the dataset again"):
            return require_within(read_episodes(content, self.num_frames), {f.name: f.rows for f in self.files})

    def facts(self) -> dict[str, Any]:
        """What a run that uses the dataset records of it: where it is, what it holds, who played.

        Returns:
            uri, digest, game, protocol, frames and episodes; of the collection policy, seed, part and, where a policy
            bundle played, policy_uri, policy_sha256 and epsilon (None where they do not apply).
        """
        names = ("policy", "policy_uri", "policy_sha256", "epsilon", "seed", "part")
        played = {key: self.collection.get(key) for key in names}
        held = {"frames": self.num_frames, "episodes": self.num_episodes}
        rules = {"game": self.preprocess.game, "protocol": self.preprocess.protocol}
        return {"uri": self.uri, "digest": self.digest, **rules, **held, **played}

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
        try:
            yield from self._size_and_sum_problems(file)
        except OSError as error:
            raise UserError(f"cannot read {file.name} of dataset {self.uri} ({reason(error)})") from None

    def _size_and_sum_problems(self, file: FileEntry) -> Iterator[str]:
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
        except Exception as error:  # whatever a hostile footer makes Arrow's parts raise
            yield f"{file.name} is not a Parquet file ({reason(error)})"
            return
        if not schema.equals(self.schema, check_metadata=True):
            held, wanted = schema.metadata or {}, self.schema.metadata
            differing = sorted(key.decode() for key in wanted if held.get(key) != wanted[key]) or ["columns"]
            values = {name: short(held.get(name.encode(), b"none").decode(errors="replace")) for name in differing}
            yield f"{file.name} has another schema than the manifest says ({values})"

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


def clear(filesystem: pafs.FileSystem, root: str) -> None:
    """Empties a dataset's folder, its manifest first: what is left of it at any moment is an unfinished dataset."""
    if filesystem.get_file_info(f"{root}/{MANIFEST_FILE}").type == pafs.FileType.File:
        filesystem.delete_file(f"{root}/{MANIFEST_FILE}")
    filesystem.delete_dir_contents(root)


def require_written(filesystem: pafs.FileSystem, root: str, files: Iterable[FileEntry], address: str) -> None:
    """Finds out that workers on other machines wrote to disks of their own.

    Raises:
        UserError: A file is not there as this process sees it.
    """
    for file in files:
        if filesystem.get_file_info(f"{root}/{file.name}").size != file.bytes:
            raise not_shared(address, f"{file.name}, written by a worker, is not there")


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
    """Finishes a dataset: the table of episodes, then the manifest, each appearing whole."""
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
            require_bucket(filesystem, root, uri)
            raise UserError(f"there is no dataset at {uri}; make one with `latentrl collect --out {uri}`")
        if info.type == pafs.FileType.File:
            raise UserError(f"{uri} is a file, not a dataset; name the folder that `latentrl collect` wrote")
        if filesystem.get_file_info(f"{root}/{MANIFEST_FILE}").type != pafs.FileType.File:
            raise _not_finished(filesystem, root, uri)
        manifest = parse_object(read_small(filesystem, f"{root}/{MANIFEST_FILE}"), f"{MANIFEST_FILE} of dataset {uri}")
    except OSError as error:
        raise UserError(f"cannot read dataset {uri} ({reason(error)}); check the address and its access") from None
    version = manifest.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UserError(
            f"dataset {uri} has schema version {short(version)}, this version of latentrl reads {SCHEMA_VERSION}; "
            "collect it again"
        )
    return dict(manifest)


def _count(manifest: dict[str, Any], key: str) -> int:
    count: int = converted(manifest[key], int, key)
    if not 1 <= count < 2**48:
        raise ValueError(f"it counts {short(count)} {key}")
    return count


def _sha256(manifest: dict[str, Any], key: str) -> str:
    digest: str = converted(manifest[key], str, key)
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ValueError(f"its {key} is {short(digest)}, not 64 hex digits")
    return digest


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
            require_moderate(source, parquet, range(parquet.num_row_groups), {*columns, "obs"})
            table = parquet.read(columns=columns)
            for _ in parquet.iter_batches(ROW_GROUP_ROWS, columns=["obs"]):
                pass  # decoding every page checks its checksum
    except Exception as error:  # as above
        yield f"{file.name} cannot be read ({reason(error)})"
        return
    yield from row_problems(file.name, table, episodes)
