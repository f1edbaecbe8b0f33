"""Real programs that tests start, end, kill and start again, each on a port, a folder and a log of its own."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

LOOPBACK = "127.0.0.1"
START_WITHIN_S = 120.0
GIVEN_PORTS: set[int] = set()


def free_ports(count: int) -> list[int]:
    """Loopback ports that nobody listens on and that no earlier call has given, as nobody may listen on those yet.

    A worker one of whose ports is also its head's cannot join (Ray says that the node timed out during startup).
    All lie below those that the system hands to outgoing connections, one of which would else take the port of a
    service that is down for a moment.
    """
    first_handed_out = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(first_handed_out // 2, first_handed_out)
        if port not in GIVEN_PORTS and is_free(port):
            GIVEN_PORTS.add(port)
            found.append(port)
    return found


def is_free(port: int) -> bool:
    """Whether nobody listens on a loopback port."""
    try:
        socket.create_server((LOOPBACK, port)).close()
    except OSError:
        return False
    return True


def answers(url: str, within_s: float = 2.0) -> bool:
    """Whether an HTTP server answers there, with anything but a server's error; proxies are not asked."""
    try:
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=within_s).close()
    except urllib.error.HTTPError as error:
        return error.code < 500
    except OSError:
        return False
    return True


class Program:
    """A program in the background, with all the processes that it starts.

    Its folder lies in the system's temporary folder, not in the test's own: that one is closed to other users, and
    PostgreSQL refuses to run as root.
    """

    name = "program"
    stop_within_s = 30.0  # then it is killed

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=f"latentrl-{self.name}-"))
        self.log = self.folder / "log.txt"
        self.process: subprocess.Popen[bytes] | None = None

    def command(self) -> Sequence[str]:
        """What is started."""
        raise NotImplementedError

    def environment(self) -> Mapping[str, str]:
        """Variables that the program gets besides those of the test."""
        return {}

    def is_ready(self) -> bool:
        """Whether it does its work."""
        raise NotImplementedError

    @property
    def is_running(self) -> bool:
        """Whether its first process is there."""
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Starts it and waits until it is ready."""
        assert not self.is_running, f"{self.name} runs already"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                list(self.command()),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,
                env={**os.environ, **self.environment()},
            )
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Waits until it does its work; fails with its log if it does not."""
        until = time.monotonic() + START_WITHIN_S
        while not self.is_ready():
            if time.monotonic() > until or not self.is_running:
                code = self.process.poll() if self.process is not None else None
                said = self.log.read_text(errors="replace")[-3000:]
                raise AssertionError(f"{self.name} is not ready (exit code {code}): {said}")
            time.sleep(0.1)

    def stop(self) -> None:
        """Ends it as an operator does, and whatever it leaves behind."""
        if self.process is not None:
            family = self.family()
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(self.stop_within_s)
            self._end(family)

    def kill(self) -> None:
        """Ends all its processes at once, as a power cut does."""
        if self.process is not None:
            self._end(self.family())

    def restart(self) -> None:
        """Ends it and starts it again, on the same port and with the same data."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Stops all its processes where they are: connections stay open and nothing answers."""
        for process in self.family():
            process.suspend()

    def resume(self) -> None:
        """Lets them go on."""
        for process in self.family():
            process.resume()

    def remove(self) -> None:
        """Kills it and deletes its folder."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def family(self) -> list[psutil.Process]:
        """Its first process and all descendants."""
        assert self.process is not None
        try:
            first = psutil.Process(self.process.pid)
            return [first, *first.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _end(self, family: list[psutil.Process]) -> None:
        assert self.process is not None
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, self.stop_within_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None
