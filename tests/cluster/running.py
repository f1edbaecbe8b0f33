"""A `latentrl` command under way on a node of the cluster or on this machine, to be read, signalled and waited for."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import psutil
from nodes import ROOT, Node

PATIENCE_S = 420.0


def processes(node: Node, title: str) -> list[psutil.Process]:
    """The processes on a node that bear a title, as Ray gives its workers one."""
    found = []
    for process in node.family() if node.is_running else []:
        try:
            found += [process] if title in " ".join(process.cmdline()) else []
        except psutil.NoSuchProcess:
            continue
    return found


class Stage:
    """A command and the files that its output goes to.

    Args:
        folder: For the files.
        arguments: Of `latentrl`.
        node: Where it runs; this machine if None.
        variables: Into its environment.

    Attributes:
        started: All that were started and not removed.
    """

    started: ClassVar[list[Stage]] = []

    def __init__(
        self, folder: Path, *arguments: object, node: Node | None = None, variables: Mapping[str, str] | None = None
    ) -> None:
        command = [sys.executable, "-m", "jobs.cli", *map(str, arguments), "--json"]
        given = {**os.environ, "PYTHONPATH": str(ROOT), **(variables or {})}
        if node is not None:
            given |= node.environment()
            command = [*node.entered(), "sh", "-c", 'cd "$0" && exec "$@"', str(node.here / "work"), *command]
        self._node = node
        folder.mkdir(parents=True, exist_ok=True)
        self._out, self._err = (folder / f"{time.monotonic_ns()}.{kind}" for kind in ("out", "err"))
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=ROOT, env=given, start_new_session=True
            )
        self.started.append(self)

    @property
    def driver(self) -> psutil.Process:
        """The command's own process."""
        first = psutil.Process(self._process.pid)
        return first if self._node is None else first.children()[0]

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    @property
    def lines(self) -> list[str]:
        """What the user has read so far: standard error, a progress bar's states as lines of their own."""
        return re.split(r"[\r\n]+", self._err.read_text(errors="replace"))

    def line(self, pattern: str, number: int = 0) -> str | None:
        """One of the lines in which a pattern is found, the first by default; None where there are not as many."""
        found = [line for line in self.lines if re.search(pattern, line)]
        return found[number].strip() if number < len(found) else None

    def count(self, pattern: str) -> int:
        """The lines in which a pattern is found."""
        return sum(bool(re.search(pattern, line)) for line in self.lines)

    def wait_for(self, condition: Callable[[], object], within_s: float = PATIENCE_S) -> float:
        """Waits while the command runs; seconds that it took."""
        began = time.monotonic()
        while not condition():
            assert self.is_running, self._story()
            assert time.monotonic() - began < within_s, self._story()
            time.sleep(0.1)
        return time.monotonic() - began

    def wait_for_line(self, pattern: str, number: int = 0, within_s: float = PATIENCE_S) -> float:
        """Waits for a line; seconds that it took."""
        return self.wait_for(lambda: self.line(pattern, number), within_s)

    def end(self, within_s: float = PATIENCE_S) -> tuple[int, float]:
        """Waits for the command's end; its exit code, and the seconds that it took."""
        began = time.monotonic()
        try:
            code = self._process.wait(within_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(self._story()) from None
        return code, time.monotonic() - began

    def result(self, within_s: float = PATIENCE_S) -> dict[str, Any]:
        """Waits for the command to be done; its result."""
        code, _ = self.end(within_s)
        assert code == 0, self._story()
        result: dict[str, Any] = json.loads(self._out.read_text().splitlines()[-1])
        return result

    def kill(self) -> None:
        """SIGKILL to the command's own process."""
        self.driver.kill()
        self._process.wait(30)

    @classmethod
    def remove_all(cls) -> None:
        """Ends whatever is still going on, for the end of a test."""
        while cls.started:
            stage = cls.started.pop()
            if stage.is_running:
                os.killpg(stage._process.pid, signal.SIGKILL)
                stage._process.wait(30)

    def _story(self) -> str:
        return "\n".join(self.lines[-40:])
