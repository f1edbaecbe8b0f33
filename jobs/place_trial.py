"""Whether a folder or address is one place for all nodes: files written here are read there, and vice versa."""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs

from jobs.node_probe import DRIVERS_FILE, content_of, is_there, write_twice
from jobs.nodes import Answers, Nodes
from pipeline.errors import UserError
from pipeline.storage import StoreAway, locate, reason, shown

PREFIX = ".latentrl-doctor-"


class PlaceTrial:
    """A folder of its own in a place, for the length of a `with`; whatever was made is removed.

    Args:
        address: Folder or pyarrow.fs address; it need not exist yet.

    Raises:
        UserError: Not an address that pyarrow understands.
    """

    def __init__(self, address: str) -> None:
        self.address = shown(address)
        self._given = address
        with contextlib.suppress(StoreAway):  # which the trial tells
            self._located = locate(address)
        self._name, self._secret = PREFIX + secrets.token_hex(4), secrets.token_hex(8)

    @functools.cached_property
    def _located(self) -> tuple[pafs.FileSystem, str]:
        return locate(self._given)

    @property
    def _filesystem(self) -> pafs.FileSystem:
        return self._located[0]

    @property
    def _root(self) -> str:
        return self._located[1]

    @property
    def free_bytes(self) -> int | None:
        """Free on its disk; None for an object store."""
        if not isinstance(self._filesystem, pafs.LocalFileSystem):
            return None
        nearest = next(path for path in (Path(self._root), *Path(self._root).parents) if path.exists())
        return shutil.disk_usage(nearest).free

    @contextlib.contextmanager
    def begun(self) -> Iterator[None]:
        """Writes the driver's file, replaces it and reads it back.

        Raises:
            UserError: This process cannot.
        """
        made = self._missing_folders()
        try:
            with self._complaining():
                self._filesystem.create_dir(self._folder, recursive=True)
                write_twice(self._filesystem, f"{self._folder}/{DRIVERS_FILE}", self._secret)
                self._require_same(DRIVERS_FILE)
            yield
        except BaseException:
            with contextlib.suppress(OSError):
                self._remove(made)
            raise
        with self._complaining("delete from"):
            self._remove(made)

    def ask(self, nodes: Nodes, within_s: float) -> Answers:
        """Has every node read the driver's file and write its own; see NodeProbe.place."""
        asked = (self._given, self._name, self._secret)
        return nodes.ask(lambda probe, node: probe.place.remote(*asked, node.id), within_s)

    def reads_back(self, name: str) -> bool:
        """Whether this process reads what a node wrote."""
        return content_of(self._filesystem, f"{self._folder}/{name}") == self._secret

    @property
    def _folder(self) -> str:
        return f"{self._root}/{self._name}"

    def _require_same(self, name: str) -> None:
        if not self.reads_back(name):
            raise OSError("what was written reads back as something else")

    @contextlib.contextmanager
    def _complaining(self, what: str = "write to") -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot {what} {self.address} ({reason(error)}); mend its access, or name another place"
            ) from None

    def _missing_folders(self) -> list[str]:
        """The place itself and the folders above it that are not there yet, the innermost first."""
        parts = self._root.split("/")
        folders = ["/".join(parts[:count]) for count in range(len(parts), 1 if self._is_local else 0, -1)]
        with self._complaining():
            return [folder for folder in folders if folder and not is_there(self._filesystem, folder)]

    @property
    def _is_local(self) -> bool:
        return isinstance(self._filesystem, pafs.LocalFileSystem)

    def _remove(self, made: list[str]) -> None:
        """Removes the trial's folder and those that were made for it, as far as nobody else has put anything there."""
        if is_there(self._filesystem, self._folder):
            self._filesystem.delete_dir(self._folder)
        for folder in made:
            if self._is_local:
                with contextlib.suppress(OSError):  # no longer empty
                    os.rmdir(folder)
            elif is_there(self._filesystem, folder) and not self._filesystem.get_file_info(pafs.FileSelector(folder)):
                self._filesystem.delete_dir(folder)
