"""The append-only file in which a run's operations wait for delivery, and how far delivery has come."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.untrusted import converted, parse_object, read_bytes, read_json, require_plain_file

JOURNAL_FILE = "outbox.jsonl"
DONE_FILE = "outbox.done"

MAX_READ_OPERATIONS = 1000
MAX_READ_BYTES = 500_000

log = logging.getLogger(__name__)

Body = dict[str, Any]
_FIELDS: dict[str, Any] = {"seq": int, "time_ms": int, "kind": str, "body": Body}


@dataclass(frozen=True)
class Operation:
    """One journalled thing to tell the server.

    Attributes:
        seq: Position in the journal, from 1, without gaps.
        time_ms: When it was journalled, milliseconds since the epoch.
        kind: What the deliverer does with it ("metrics", "artifact", ...).
        body: The kind's own fields, JSON values only.
        end: Byte offset in the journal just after this operation's line.
    """

    seq: int
    time_ms: int
    kind: str
    body: Body
    end: int = 0

    @property
    def num_values(self) -> int:
        """How much of a batched request it takes: its metrics, or one."""
        values = self.body.get("values")
        return len(values) if isinstance(values, dict) else 1


class Journal:
    """The append-only file and the durable position up to which it has been delivered. Thread-safe."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        for name in (JOURNAL_FILE, DONE_FILE):
            if (folder / name).exists():
                require_plain_file(folder / name, f"{name} of run {folder.name}")
        self.done_seq, self._done_offset = self._read_done()
        self._fd = os.open(folder / JOURNAL_FILE, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._end = self._repair_tail()
        if self._done_offset > self._end:  # The journal is not the one that the position was written for.
            self.done_seq, self._done_offset = 0, 0
        self.last_seq = max((op.seq for op in self._read_from(self._done_offset)), default=self.done_seq)

    def append(self, kind: str, body: Body) -> int:
        """Writes one operation.

        Returns:
            Its sequence number.

        Raises:
            OSError: The disk is full or gone. Nothing of the operation stays in the file.
        """
        with self._lock:
            seq = self.last_seq + 1
            record = {"seq": seq, "time_ms": time.time_ns() // 1_000_000, "kind": kind, "body": body}
            self._write((json.dumps(record) + "\n").encode())
            self.last_seq = seq
            return seq

    def pending(self) -> list[Operation]:
        """The next undelivered operations, in order; at most about one request's worth."""
        with self._lock:
            end = self._end
        operations: list[Operation] = []
        for operation in self._read_from(self._done_offset, end):
            operations.append(operation)
            if operation.end - self._done_offset > MAX_READ_BYTES or len(operations) >= MAX_READ_OPERATIONS:
                break
        return operations

    def mark(self, operation: Operation) -> None:
        """Records durably that everything up to and including `operation` has been dealt with."""
        target = self.folder / DONE_FILE
        temporary = target.with_suffix(".done.tmp")
        with temporary.open("w") as file:
            json.dump({"seq": operation.seq, "offset": operation.end}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
        self.done_seq, self._done_offset = operation.seq, operation.end

    def flush_to_disk(self) -> None:
        """Forces appended operations onto the disk (appending itself only hands them to the operating system)."""
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)

    def _write(self, data: bytes) -> None:
        try:
            written = os.write(self._fd, data)
            if written < len(data):
                raise OSError(f"only {written} of {len(data)} bytes could be written")
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._end)
            raise
        self._end += len(data)

    def _read_done(self) -> tuple[int, int]:
        try:
            if not (self.folder / DONE_FILE).exists():
                return 0, 0
            record = read_json(self.folder / DONE_FILE, DONE_FILE)
            seq, offset = (converted(record[name], int, name) for name in ("seq", "offset"))
            if min(seq, offset) < 0:
                raise ValueError(f"{DONE_FILE} counts below 0")
            return seq, offset
        except (UserError, ValueError, KeyError):
            log.warning("%s is unreadable; the journal is delivered again from its start", self.folder / DONE_FILE)
            return 0, 0

    def _repair_tail(self) -> int:
        """Cuts off a last line that a crash left half-written; returns the file's size."""
        size = os.fstat(self._fd).st_size
        window = 1 << 16
        start = size
        while start > 0:
            start = max(0, start - window)
            newline = os.pread(self._fd, min(window, size - start), start).rfind(b"\n")
            if newline >= 0:
                return self._cut(size, start + newline + 1)
        return self._cut(size, 0)

    def _cut(self, size: int, keep: int) -> int:
        if keep < size:
            log.warning("%s ended in a half-written line, which is dropped", self.folder / JOURNAL_FILE)
            os.ftruncate(self._fd, keep)
        return keep

    def _read_from(self, offset: int, end: int | None = None) -> Iterator[Operation]:
        """Complete operations between two byte offsets. A damaged line is skipped with a warning."""
        with (self.folder / JOURNAL_FILE).open("rb") as file:
            file.seek(offset)
            for line in file:
                offset += len(line)
                if not line.endswith(b"\n") or (end is not None and offset > end):
                    return
                try:
                    record = parse_object(line, JOURNAL_FILE)
                    fields = {name: converted(record[name], kind, name) for name, kind in _FIELDS.items()}
                    operation = Operation(**fields, end=offset)
                except (UserError, ValueError, KeyError):
                    log.warning("%s has a damaged line before byte %d; skipped", self.folder / JOURNAL_FILE, offset)
                    continue
                yield operation


def num_undelivered(folder: Path) -> int:
    """Operations of a folder's journal that have not been dealt with, by looking only; all where that is unclear."""
    try:
        offset = max(0, converted(read_json(folder / DONE_FILE, DONE_FILE)["offset"], int, DONE_FILE))
    except (UserError, ValueError, KeyError):
        offset = 0
    path = folder / JOURNAL_FILE
    if not path.is_file():
        return 0
    if offset > path.stat().st_size:
        offset = 0  # The journal is not the one that the position was written for.
    with path.open("rb") as file:
        file.seek(offset)
        return sum(line.endswith(b"\n") for line in file)


def append_line(path: Path, record: Body) -> None:
    """Appends one JSON line and forces it onto the disk."""
    with path.open("a") as file:
        file.write("\n" + json.dumps(record) + "\n")  # The leading one ends a line that a crash left half-written.
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[Body]:
    """The complete JSON lines of a file; a half-written one counts as absent."""
    if not path.exists():
        return []
    records = []
    for line in read_bytes(path, path.name).split(b"\n"):
        with contextlib.suppress(UserError):
            records.append(parse_object(line, path.name))
    return records
