"""A Ray session for the length of a command: a local one started and stopped, or a running cluster joined."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path

import psutil
import ray

from jobs import room
from jobs.joining import require_joinable
from jobs.loopback import on_loopback
from jobs.watch import watched
from jobs.workspace import JOB_VARIABLE, Workspace
from pipeline import secrets
from pipeline.errors import UserError
from pipeline.machine import ray_cpus

_OBJECT_STORE_BYTES = 1 << 30
_SMALLEST_OBJECT_STORE_BYTES = 80 << 20  # Ray refuses less than 75 MiB
_END_BY_THEMSELVES_S = 2.0
_SHARED_MEMORY = Path("/dev/shm")


@contextlib.contextmanager
def ray_session(
    workspace: Workspace, *, needs: dict[str, float], what: str, object_bytes: int = 0, data: str | None = None
) -> Iterator[None]:
    """Starts or joins Ray, makes sure that it has room, and leaves nothing of it behind.

    Inside an enclosing session (the demo's) the running Ray is used.

    Args:
        workspace: Says whether to start or to join, and how long to wait for room.
        needs: Resources that the stage takes at once, for example {"CPU": 3}.
        what: The same in words, for the message ("2 collecting workers").
        object_bytes: What the stage would have in the object store of a node; with less it is slower, and says so.
        data: Address that the stage's workers read or write.

    Raises:
        UserError: The cluster does not answer, or has too few resources and does not get them in time.
    """
    if ray.is_initialized():
        room.require(needs, what, workspace.wait_s, is_cluster=workspace.ray_address is not None)
        _note_small_object_stores(object_bytes)
        with watched(what, needs, data):
            yield
        return
    on_terminate = signal.getsignal(signal.SIGTERM)
    before, rays = _children(), set[psutil.Process]()
    if workspace.ray_address is None:
        _require_local(needs, what, workspace.wait_s)
        _start_local()
        rays = _children() - before
    else:
        _join(workspace.ray_address)
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_terminate)  # Ray has put its own in its place
        room.require(needs, what, workspace.wait_s, is_cluster=workspace.ray_address is not None)
        _note_small_object_stores(object_bytes)
        with watched(what, needs, data):
            yield
    finally:
        if workspace.ray_address is None:
            rays |= _children() - before
        ray.shutdown()
        _end(rays)


def _children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def _end(rays: set[psutil.Process]) -> None:
    """Ends what is left of a Ray of one's own: its agents go when they notice that it has, on a busy machine late."""
    late = _late(rays)
    for process in late:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _late(late)


def _late(processes: Collection[psutil.Process]) -> list[psutil.Process]:
    """Those that are still at work after a moment; the dead that nobody has buried, as in some containers, are not."""
    until = time.monotonic() + _END_BY_THEMSELVES_S
    while (late := [process for process in processes if _is_at_work(process)]) and time.monotonic() < until:
        time.sleep(0.02)
    return late


def _is_at_work(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _start_local() -> None:
    memory = min(_OBJECT_STORE_BYTES, psutil.virtual_memory().available // 4)
    _require_object_store(memory)
    try:
        with on_loopback():
            ray.init(
                address="local",
                num_cpus=ray_cpus(),
                object_store_memory=memory,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=True,
            )
    except UserError:
        raise
    except Exception as error:  # Ray raises nothing more special where its processes do not come up
        ray.shutdown()
        raise UserError(
            f"Ray cannot be started on this machine ({_first_line(error)}); see that it is not overloaded and that "
            "/tmp has room, and try again"
        ) from None


def _require_object_store(memory: int) -> None:
    """Refuses to start where Ray could not; says when Ray will put its object store onto the disk.

    Raises:
        UserError: Too little memory is free.
    """
    if memory < _SMALLEST_OBJECT_STORE_BYTES:
        raise UserError(
            f"this machine has {4 * memory >> 20} MiB of memory free, and Ray with its object store needs at least "
            f"{4 * _SMALLEST_OBJECT_STORE_BYTES >> 20}; end other programs"
        )
    free = shutil.disk_usage(_SHARED_MEMORY).free if _SHARED_MEMORY.is_dir() else memory
    if free < memory:
        print(
            f"note: {_SHARED_MEMORY} has {free >> 20} MiB free, Ray's object store takes {memory >> 20}: it goes to "
            f"the disk and is slower (docker: --shm-size=2g)",
            file=sys.stderr,
        )


def _note_small_object_stores(wanted: int) -> None:
    sizes = [node["Resources"].get("object_store_memory", 0) for node in ray.nodes() if node["Alive"]]
    if sizes and min(sizes) < wanted:
        print(
            f"note: the smallest object store of Ray's nodes has {int(min(sizes)) >> 20} MiB, the data takes up to "
            f"{wanted >> 20}: what does not fit goes through the disk and is slower (ray start --object-store-memory)",
            file=sys.stderr,
        )


def _join(address: str) -> None:
    if address.startswith("ray://"):
        raise UserError(f"--ray-address {address} is a Ray client address; give the cluster's own HOST:PORT or auto")
    if not (address == "auto" and os.environ.get(JOB_VARIABLE)):  # a job's own cluster has just started it
        require_joinable(address)
    try:
        ray.init(
            address=address,
            runtime_env=secrets.for_workers() or None,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"cannot join the Ray cluster at {address} ({_first_line(error)}); check --ray-address"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _require_local(needs: dict[str, float], what: str, wait_s: float | None) -> None:
    if wait_s is not None:
        raise UserError(f"--wait {wait_s:g} waits for a cluster's nodes; give --ray-address, or leave it out")
    cpus = ray_cpus()
    if needs.get("CPU", 0) > cpus:
        raise UserError(
            f"{what} need {needs['CPU']:g} CPUs, this machine has {cpus}; ask for fewer or give --ray-address"
        )
