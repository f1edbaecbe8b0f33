"""How a row is measured: a loop yields its counters; rate, processor time and memory are read around it."""

from __future__ import annotations

import contextlib
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator
from typing import NamedTuple

import psutil

from pipeline.machine import ray_cpus

MEGABYTE = 1_000_000
OBJECT_STORE_BYTES = 1 << 30


class Counts(NamedTuple):
    """Where a loop stands: decisions taken, and gradient updates made (None where nothing learns)."""

    agent_steps: int
    updates: int | None = None


def measure(loop: Iterator[Counts], seconds: float, settle_s: float) -> dict[str, float | None]:
    """Runs a loop past its first update and some seconds more, then reads it over `seconds`.

    Returns:
        `agent_steps_per_s`, `updates_per_agent_step`, `cpu_s_per_agent_step` and `resident_mb` (this process and all
        below it), `time_to_first_update_s` (since this process was started, imports included), `agent_steps` and
        `updates` in all. What has no updates has None there. Where there is a GPU, `gpu_busy` is the share of the
        window in which it computed.
    """
    counts = next(loop)
    while counts.updates == 0:
        counts = next(loop)
    first_update_s = None if counts.updates is None else time.time() - psutil.Process().create_time()
    _run_for(loop, settle_s, counts.agent_steps)
    before, started, cpu = next(loop), time.perf_counter(), cpu_seconds()
    with gpu_busy() as busy:
        after = _run_for(loop, seconds, before.agent_steps)
        wall, cpu = time.perf_counter() - started, cpu_seconds() - cpu
    steps = after.agent_steps - before.agent_steps
    return {
        "agent_steps_per_s": steps / wall,
        "updates_per_agent_step": None if after.updates is None else (after.updates - (before.updates or 0)) / steps,
        "cpu_s_per_agent_step": cpu / steps,
        "resident_mb": resident_mb(),
        "time_to_first_update_s": first_update_s,
        "agent_steps": after.agent_steps,
        "updates": after.updates,
        **busy,
    }


@contextlib.contextmanager
def gpu_busy() -> Iterator[dict[str, float]]:
    """Fills in `gpu_busy`: the mean of NVIDIA's utilisation, the share of time with a kernel running, read 5 times a s.

    Nothing where there is no GPU.
    """
    figures: dict[str, float] = {}
    if shutil.which("nvidia-smi") is None:
        yield figures
        return
    command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "200"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield figures
        process.terminate()
        shares = [float(word) / 100 for word in process.communicate()[0].split() if word.isdigit()]
    figures["gpu_busy"] = statistics.mean(shares)


def _run_for(loop: Iterator[Counts], seconds: float, steps_before: int) -> Counts:
    end = time.perf_counter() + seconds
    while True:
        counts = next(loop)
        if time.perf_counter() >= end and counts.agent_steps > steps_before:
            return counts


def resident_mb() -> float:
    """Megabytes resident in this process and all below it; a page that several share is counted once."""
    return sum(_resident_bytes(process) for process in _tree()) / MEGABYTE


def cpu_seconds() -> float:
    """Processor time that this process and all below it have used."""
    return sum(_cpu_seconds(process) for process in _tree())


def _tree() -> list[psutil.Process]:
    root = psutil.Process()
    return [root, *root.children(recursive=True)]


def _resident_bytes(process: psutil.Process) -> float:
    with contextlib.suppress(psutil.Error):
        memory = process.memory_full_info()
        return float(getattr(memory, "pss", memory.uss))
    return 0.0


def _cpu_seconds(process: psutil.Process) -> float:
    with contextlib.suppress(psutil.Error):
        times = process.cpu_times()
        return float(times.user + times.system)
    return 0.0


@contextlib.contextmanager
def ray_here(num_cpus: int | None = None) -> Iterator[None]:
    """A local Ray session with all cores, or with as many as are declared."""
    import ray

    ray.init(
        address="local",
        num_cpus=num_cpus or ray_cpus(),
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    try:
        yield
    finally:
        ray.shutdown()
