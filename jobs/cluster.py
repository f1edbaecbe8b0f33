"""A Ray session for the length of a command: a local one started and stopped, or a running cluster joined."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator

import psutil
import ray

from jobs.joining import require_joinable
from jobs.workspace import Workspace
from pipeline.errors import UserError

_OBJECT_STORE_BYTES = 1 << 30


@contextlib.contextmanager
def ray_session(workspace: Workspace, *, needs: dict[str, float], what: str) -> Iterator[None]:
    """Starts or joins Ray, checks that it has room, and leaves nothing of it behind.

    Inside an enclosing session (the demo's) the running Ray is used.

    Args:
        workspace: Says whether to start or to join.
        needs: Resources that the stage takes at once, for example {"CPU": 3}.
        what: The same in words, for the message ("2 collecting workers").

    Raises:
        UserError: The cluster does not answer, or has too few resources.
    """
    if ray.is_initialized():
        _require(needs, what)
        yield
        return
    on_terminate = signal.getsignal(signal.SIGTERM)
    if workspace.ray_address is None:
        _require_local(needs, what)
        _start_local()
    else:
        _join(workspace.ray_address)
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_terminate)  # Ray has put its own in its place
        _require(needs, what)
        yield
    finally:
        ray.shutdown()


def _start_local() -> None:
    memory = min(_OBJECT_STORE_BYTES, psutil.virtual_memory().available // 4)
    ray.init(
        address="local",
        num_cpus=os.cpu_count(),
        object_store_memory=memory,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        configure_logging=True,
    )


def _join(address: str) -> None:
    if address.startswith("ray://"):
        raise UserError(f"--ray-address {address} is a Ray client address; give the cluster's own HOST:PORT or auto")
    require_joinable(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        line = (str(error).splitlines() or ["no reason given"])[0]
        raise UserError(f"cannot join the Ray cluster at {address} ({line}); check --ray-address") from None


def _require_local(needs: dict[str, float], what: str) -> None:
    cpus = os.cpu_count() or 1
    if needs.get("CPU", 0) > cpus:
        raise UserError(
            f"{what} need {needs['CPU']:g} CPUs, this machine has {cpus}; ask for fewer or give --ray-address"
        )


def _require(needs: dict[str, float], what: str) -> None:
    has = ray.cluster_resources()
    for resource, amount in needs.items():
        if amount > has.get(resource, 0):
            raise UserError(
                f"{what} need {amount:g} {resource}s, Ray has {has.get(resource, 0):g}; ask for fewer or add nodes"
            )
