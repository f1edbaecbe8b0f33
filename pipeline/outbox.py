"""Delivers a run's journal to the tracking server, in order; keeps it while the server is away.

Knows nothing of MLflow: how an operation is delivered is a callable given from outside.

Files beside each other in a run's folder:
    outbox.jsonl           every operation, one JSON object a line, with its sequence number and time
    outbox.done            how far delivery has come: sequence number and byte offset, replaced atomically
    outbox.results.jsonl   what the server answered to operations that have an answer (a registered version)
    outbox.refused.jsonl   operations that the server will never take, with its reason
    outbox.lock            held by the process that delivers
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.journal import JOURNAL_FILE, Body, Journal, Operation, append_line, read_lines

RESULTS_FILE = "outbox.results.jsonl"
REFUSED_FILE = "outbox.refused.jsonl"
LOCK_FILE = "outbox.lock"

MAX_GROUP_VALUES = 1000
FIRST_DELAY_S = 0.5
MAX_DELAY_S = 30.0
GATHER_S = 0.5
URGENT_DELAY_S = 1.0

log = logging.getLogger(__name__)


class Unreachable(Exception):
    """The server cannot take operations now; the same operation may go through later."""


class Refused(Exception):
    """The server answered that it will never take this operation.

    Attributes:
        is_missing: Whether it says so because something that the operation needs does not exist there.
    """

    def __init__(self, reason: str, *, is_missing: bool = False) -> None:
        super().__init__(reason)
        self.is_missing = is_missing


Deliver = Callable[[Sequence[Operation]], Body | None]


class Outbox:
    """Delivers a folder's journal in order, from one background thread or, with `drain`, from the caller.

    Args:
        folder: The run's folder.
        deliver: Takes a non-empty sequence of operations (several only when all kinds are in `batched`), returns an
            answer to keep or None. Raises `Unreachable` or `Refused`; any other exception counts as unreachable.
        batched: Kinds of which neighbours are delivered together.
        slow: Kinds that may take minutes (uploads), so that waiting for them is not given up early.
        lock_wait_s: How long to wait for another process that delivers this folder.

    Raises:
        UserError: Another process delivers this folder.
    """

    def __init__(
        self,
        folder: Path,
        deliver: Deliver,
        *,
        batched: frozenset[str] = frozenset(),
        slow: frozenset[str] = frozenset(),
        lock_wait_s: float = 0.0,
    ) -> None:
        self.folder = folder
        self.last_error = ""
        self._deliver, self._batched, self._slow = deliver, batched, slow
        self._lock_file = _exclusive(folder / LOCK_FILE, lock_wait_s)
        self._journal = Journal(folder)
        self._changed = threading.Condition()
        self._stopped = False
        self._num_waiting = 0
        self._failing_since: float | None = None
        self._progress_at = time.monotonic()
        self._current_kind = ""
        self._thread: threading.Thread | None = None
        self._is_journal_broken = False

    def start(self) -> None:
        """Starts the background thread."""
        self._thread = threading.Thread(target=self._work, name="outbox", daemon=True)
        self._thread.start()

    @property
    def num_pending(self) -> int:
        """Operations not yet delivered."""
        return self._journal.last_seq - self._journal.done_seq

    def append(self, kind: str, body: Body) -> int | None:
        """Journals one operation; never raises for a full disk, since training must go on.

        Returns:
            Its sequence number, or None when it could not be written (said once, loudly).
        """
        try:
            seq = self._journal.append(kind, body)
        except OSError as error:
            if not self._is_journal_broken:
                log.warning("cannot write %s (%s): tracking is incomplete", self.folder / JOURNAL_FILE, error)
            self._is_journal_broken = True
            return None
        with self._changed:
            self._changed.notify_all()
        return seq

    def wait(self, seq: int, patience_s: float) -> bool:
        """Waits until operation `seq` has been dealt with.

        Gives up when delivery has been failing for `patience_s`, or stands still that long (ten times as long during
        an upload).
        """
        started = time.monotonic()
        with self._changed:
            self._num_waiting += 1
            self._changed.notify_all()
            try:
                while self._journal.done_seq < seq:
                    if self._is_hopeless(started, patience_s):
                        return False
                    self._changed.wait(0.1)
                return True
            finally:
                self._num_waiting -= 1

    def drain(self) -> int:
        """Delivers everything now, in this thread.

        Returns:
            Operations dealt with.

        Raises:
            Unreachable: The server went away; what was delivered until then is recorded.
        """
        first = self._journal.done_seq
        while self._deliver_next():
            pass
        return self._journal.done_seq - first

    def result(self, seq: int) -> Body | None:
        """The answer to operation `seq`; None when there is none."""
        return next((answer for number, answer in read_results(self.folder) if number == seq), None)

    def refusal(self, seq: int) -> str | None:
        """Why the server refused operation `seq`; None when it did not."""
        return next((r.get("reason", "") for r in read_lines(self.folder / REFUSED_FILE) if r.get("seq") == seq), None)

    def close(self, patience_s: float) -> int:
        """Waits for delivery (see `wait`), stops the thread and frees the folder.

        Returns:
            Operations that stay undelivered.
        """
        if self._thread is not None:
            self.wait(self._journal.last_seq, patience_s)
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        pending = self.num_pending
        if self._thread is None:
            self._free()
        elif threading.current_thread() is not self._thread:
            self._thread.join(timeout=2.0)  # One that hangs in a request frees the folder when the request ends.
        return pending

    def _free(self) -> None:
        self._journal.close()
        self._lock_file.close()

    def _work(self) -> None:
        delay_s = FIRST_DELAY_S
        while not self._stopped:
            try:
                has_moved = self._deliver_next()
                delay_s = FIRST_DELAY_S
            except Exception as error:  # Whatever happens here must not end the delivery of this run.
                self._note_failure(error)
                self._pause(delay_s)
                delay_s = min(2 * delay_s, MAX_DELAY_S)
                continue
            if not has_moved:
                self._idle()
        self._free()

    def _deliver_next(self) -> bool:
        """Delivers one group of operations; False when nothing is pending."""
        operations = self._journal.pending()
        if not operations:
            return False
        self._journal.flush_to_disk()
        group = self._group(operations)
        try:
            self._deliver_group(group)
        except Refused as error:
            if len(group) == 1:
                self._refuse(group[0], error)
            else:
                self._deliver_singly(group)
        return True

    def _group(self, operations: list[Operation]) -> list[Operation]:
        """The longest head of `operations` that goes into one request."""
        head = operations[:1]
        if head[0].kind not in self._batched:
            return head
        num_values = head[0].num_values
        for operation in operations[1:]:
            num_values += operation.num_values
            if operation.kind not in self._batched or num_values > MAX_GROUP_VALUES:
                break
            head.append(operation)
        return head

    def _deliver_singly(self, group: list[Operation]) -> None:
        for operation in group:
            try:
                self._deliver_group([operation])
            except Refused as error:
                self._refuse(operation, error)

    def _deliver_group(self, group: list[Operation]) -> None:
        self._current_kind = group[0].kind
        answer = self._deliver(group)
        if answer is not None:
            append_line(self.folder / RESULTS_FILE, {"seq": group[-1].seq, "result": answer})
        self._mark(group[-1])

    def _refuse(self, operation: Operation, error: Refused) -> None:
        log.warning("MLflow refuses %s %s: %s", operation.kind, _label(operation), error)
        record = {"seq": operation.seq, "kind": operation.kind, "body": operation.body, "reason": str(error)}
        append_line(self.folder / REFUSED_FILE, record)
        self._mark(operation)

    def _mark(self, operation: Operation) -> None:
        self._journal.mark(operation)
        with self._changed:
            if self._failing_since is not None:
                log.warning("tracking is back after %.0f s", time.monotonic() - self._failing_since)
            self._failing_since = None
            self._progress_at = time.monotonic()
            self._changed.notify_all()

    def _note_failure(self, error: Exception) -> None:
        with self._changed:
            self.last_error = str(error) if isinstance(error, Unreachable) else f"{type(error).__name__}: {error}"
            if self._failing_since is None:
                self._failing_since = time.monotonic()
                log.warning("%s; the run goes on and is sent when tracking is back", self.last_error)
            self._changed.notify_all()

    def _pause(self, delay_s: float) -> None:
        """Waits before the next attempt; shortly when somebody waits for delivery."""
        until = time.monotonic() + delay_s
        with self._changed:
            if self._num_waiting:
                until = min(until, time.monotonic() + URGENT_DELAY_S)
            num_waiting = self._num_waiting
            while not self._stopped and self._num_waiting <= num_waiting and time.monotonic() < until:
                self._changed.wait(until - time.monotonic())

    def _idle(self) -> None:
        """Waits for an operation, then a moment longer for its neighbours, unless somebody waits for delivery."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self.num_pending > 0)
            self._changed.wait_for(lambda: self._stopped or self._num_waiting > 0, GATHER_S)

    def _is_hopeless(self, started: float, patience_s: float) -> bool:
        now = time.monotonic()
        if self._failing_since is not None:
            return now - max(self._failing_since, started) >= patience_s
        stand_still_s = patience_s * (10 if self._current_kind in self._slow else 1)
        return now - max(self._progress_at, started) >= stand_still_s


def read_results(folder: Path) -> list[tuple[int, Body]]:
    """What the server has answered to this folder's operations: (sequence number, answer) in order."""
    lines = [(record.get("seq"), record.get("result")) for record in read_lines(folder / RESULTS_FILE)]
    return [(seq, answer) for seq, answer in lines if isinstance(seq, int) and isinstance(answer, dict)]


@contextlib.contextmanager
def held(folder: Path, *, may_create: bool) -> Iterator[bool]:
    """Keeps other processes from writing a run for as long as the context lasts, unless one does already.

    Args:
        folder: The run's.
        may_create: Whether to make the file that is locked; a run that has never been opened has none.

    Yields:
        Whether the run is held; False when another process writes it.
    """
    try:
        descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if may_create else 0), 0o644)
    except FileNotFoundError:
        yield True
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        yield False
        return
    try:
        yield True
    finally:
        os.close(descriptor)


def _label(operation: Operation) -> str:
    named = [str(operation.body[key]) for key in ("key", "name", "path") if key in operation.body]
    return named[0] if named else f"(operation {operation.seq})"


def _exclusive(path: Path, wait_s: float) -> Any:
    """Opens and locks a file for this process alone; the lock goes with the process, however it ends."""
    file = path.open("a+")
    until = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() >= until:
                file.close()
                raise UserError(f"{path.parent} is being written by another process; wait until it ends") from None
            time.sleep(0.1)
