"""What this machine has and how busy it is: processor and memory, sampled now and then for a run's system metrics."""

from __future__ import annotations

import contextlib
import math
import os
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

MEGABYTE = 1_000_000
_CGROUP = Path("/sys/fs/cgroup")


class MachineMeter:
    """Reads processor and memory use; rates are since the previous reading."""

    def __init__(self) -> None:
        self._cpu = _cpu_ticks()

    def read(self) -> dict[str, float]:
        """Figures of the whole machine where /proc has them, and of this process.

        Returns:
            Metric name to value, named as MLflow names its own system metrics where it has the same one.
        """
        usage = resource.getrusage(resource.RUSAGE_SELF)
        figures = {
            "system/process_cpu_seconds": usage.ru_utime + usage.ru_stime,
            "system/process_peak_memory_megabytes": usage.ru_maxrss * 1024 / MEGABYTE,
            "system/load_average_1min": os.getloadavg()[0],
        }
        return {**figures, **self._cpu_share(), **_memory()}

    def _cpu_share(self) -> dict[str, float]:
        previous, self._cpu = self._cpu, _cpu_ticks()
        if previous is None or self._cpu is None or self._cpu[1] == previous[1]:
            return {}
        busy, total = self._cpu[0] - previous[0], self._cpu[1] - previous[1]
        return {"system/cpu_utilization_percentage": 100.0 * busy / total}


def cores() -> int:
    """Processors that this process may use: those it is bound to, or the control group's share where that is less."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no cgroup version 2, or no limit ("max")
        quota, period = (_CGROUP / "cpu.max").read_text().split()
        allowed = min(allowed, math.ceil(int(quota) / int(period)))
    return allowed


def ray_cpus() -> int:
    """CPUs that a Ray of this machine alone counts: two at least, for a training worker and its data stream."""
    return max(2, cores())


def free_bytes() -> int:
    """Memory that can still be taken here: of the machine, or of the control group where that has less left."""
    free = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):  # no cgroup version 2, or no limit ("max")
        limit, used = (int((_CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, limit - used)
    return free


def every(interval_s: float, report: Callable[[dict[str, float]], None]) -> Callable[[], None]:
    """Calls `report` with fresh figures every `interval_s` seconds from a daemon thread.

    Returns:
        A callable that stops it.
    """
    stop = threading.Event()
    meter = MachineMeter()

    def work() -> None:
        next_at = time.monotonic() + interval_s
        while not stop.wait(max(0.0, next_at - time.monotonic())):
            next_at += interval_s
            report(meter.read())

    threading.Thread(target=work, name="machine-meter", daemon=True).start()
    return stop.set


def _cpu_ticks() -> tuple[int, int] | None:
    """(busy, all) ticks of every core since boot; None where there is no /proc."""
    try:
        fields = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    idle = fields[3] + fields[4]
    return sum(fields) - idle, sum(fields)


def _memory() -> dict[str, float]:
    try:
        lines = [line.split() for line in Path("/proc/meminfo").read_text().splitlines()]
        kilobytes = {words[0]: int(words[1]) for words in lines}
        total, free = kilobytes["MemTotal:"], kilobytes["MemAvailable:"]
    except (OSError, ValueError, KeyError, IndexError):
        return {}
    return {
        "system/system_memory_usage_megabytes": (total - free) * 1024 / MEGABYTE,
        "system/system_memory_usage_percentage": 100.0 * (total - free) / total,
    }
