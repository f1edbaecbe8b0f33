"""A job's output followed to its end, however often the connection breaks: no character lost, none shown twice."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import aiohttp
from ray.job_submission import JobDetails

from jobs.job_server import JobServer, NoAnswer
from pipeline.errors import UserError

POLL_S = 2.0
RECONNECT_AFTER_S = 1.0
DRAIN_S = 10.0  # Ray's server ends a log one or two seconds after its job
SILENCE_S = 120.0  # then a new connection, since a dead one may look like a silent job
FIRST_NOTE_AFTER_S = 10.0
NOTE_EVERY_S = 30.0
GIVE_UP_AFTER_S = 600.0

# Ways in which a connection ends; Ray's client raises RuntimeError for an abnormal one.
BROKEN = (StopAsyncIteration, RuntimeError, aiohttp.ClientError, OSError)

T = TypeVar("T")


class Shown:
    """What has been shown of a log that is read from its start again and again.

    Args:
        show: Takes new text.
    """

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self.length, self._has_open_line = 0, False
        self.changed_at = time.monotonic()

    def take(self, position: int, text: str) -> int:
        """Shows what is new in a piece of the log.

        Args:
            position: Where in the log the piece begins, in characters.
            text: The piece.

        Returns:
            Where it ends.
        """
        fresh = text[max(self.length - position, 0) :]
        if fresh:
            self.length, self.changed_at = position + len(text), time.monotonic()
            self._has_open_line = not fresh.endswith("\n")
            self._show(fresh)
        return position + len(text)

    def end_line(self) -> None:
        """Ends the last line, where the log has not."""
        if self._has_open_line:
            self._show("\n")


def follow(server: JobServer, job_id: str, show: Callable[[str], None]) -> JobDetails:
    """Shows a job's output until the job ends.

    Args:
        server: Where the job is.
        job_id: Its submission id.
        show: Takes text as it comes.

    Returns:
        The ended job.

    Raises:
        UserError: There is no such job.
        NoAnswer: The server has been away for ten minutes.
        KeyboardInterrupt: The user has had enough; the job goes on.
    """
    return asyncio.run(_follow(server, job_id, Shown(show)))


async def _follow(server: JobServer, job_id: str, shown: Shown) -> JobDetails:
    watch = _Watch(server, job_id)
    while not (job := await watch.look()).status.is_terminal():
        reader = asyncio.create_task(_read(server, job_id, shown))
        try:
            await _until_broken_or_ended(reader, watch, shown)
        finally:
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reader
        await asyncio.sleep(RECONNECT_AFTER_S)
    try:
        shown.take(0, await watch.log())
    except UserError as error:  # its node is gone
        print(f"the end of the log of {job_id} cannot be had: {error}", file=sys.stderr)
    shown.end_line()
    return job


async def _read(server: JobServer, job_id: str, shown: Shown) -> None:
    """Shows the log until the connection ends."""
    pieces, position = server.tail(job_id), 0
    while True:
        try:
            piece = await anext(pieces)
        except BROKEN:
            return
        position = shown.take(position, piece)


async def _until_broken_or_ended(reader: asyncio.Task[None], watch: _Watch, shown: Shown) -> None:
    """Returns when the connection or the job has ended, or when neither server nor job has said anything for long."""
    began = time.monotonic()
    while not reader.done():
        await asyncio.wait({reader}, timeout=POLL_S)
        if reader.done():
            return
        if (await watch.look()).status.is_terminal():
            await asyncio.wait({reader}, timeout=DRAIN_S)
            return
        if time.monotonic() - max(began, shown.changed_at) > SILENCE_S:
            return


class _Watch:
    """Looks at a job again and again and says on stderr what it waits for."""

    def __init__(self, server: JobServer, job_id: str) -> None:
        self._server, self._job_id = server, job_id
        self._waiting_since: float | None = None
        self._noted_at = 0.0

    async def look(self) -> JobDetails:
        """The job now; waits for a server that is away."""
        job = await self._patiently(lambda: self._server.job(self._job_id))
        if job.driver_node_id is None and not job.status.is_terminal():
            self._note(job.message or "the job has not started yet")
        else:
            self._waiting_since = None
        return job

    async def log(self) -> str:
        """The whole log of an ended job."""
        return await self._patiently(lambda: self._server.log(self._job_id))

    async def _patiently(self, question: Callable[[], T]) -> T:
        away_since = None
        while True:
            try:
                return await asyncio.to_thread(question)
            except NoAnswer as error:
                away_since = away_since or time.monotonic()
                if time.monotonic() - away_since > GIVE_UP_AFTER_S:
                    raise
                self._note(f"trying again: {error}")
                await asyncio.sleep(POLL_S)

    def _note(self, text: str) -> None:
        now = time.monotonic()
        if self._waiting_since is None:
            self._waiting_since, self._noted_at = now, now + FIRST_NOTE_AFTER_S - NOTE_EVERY_S
        if now - self._noted_at >= NOTE_EVERY_S:
            self._noted_at = now
            print(f"[{now - self._waiting_since:.0f} s] {self._job_id}: {text}", file=sys.stderr, flush=True)
