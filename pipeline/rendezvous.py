"""How processes that train one model find each other on one machine: through a file and loopback.

Torch's own way is a port on all interfaces that answers everyone and knows no password, for a single process too.
Ray's other services listen on loopback in a local session (jobs/loopback.py), and so should this.
"""

from __future__ import annotations

import datetime
import os
import shutil
import tempfile
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
import torch.distributed as dist
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

LOOPBACK = "127.0.0.1"


def on_one_machine(num_processes: int) -> OneMachine | None:
    """How so many processes meet: None leaves it to Torch, on a cluster. Ray must be running."""
    is_local = ray.util.get_node_ip_address() == LOOPBACK
    return OneMachine() if is_local or num_processes == 1 else None


@dataclass
class OneMachine(TorchConfig):
    """A process group of workers that share a disk; none for a single worker, which has nobody to talk to.

    Attributes:
        folder: Where they meet; removed with the group.
    """

    folder: str = field(default_factory=lambda: f"{tempfile.gettempdir()}/latentrl-rendezvous-{uuid.uuid4().hex}")

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """Ray Train's hook."""
        return _ThroughFile


class _ThroughFile(_TorchBackend):
    """Ray Train's hooks around a group of workers."""

    def on_start(self, worker_group: Any, backend_config: OneMachine) -> None:
        """Joins the workers; those of a group that replaces a failed one meet anew."""
        size, timeout_s = len(worker_group), backend_config.timeout_s
        if size == 1:
            return
        os.makedirs(backend_config.folder, mode=0o700, exist_ok=True)
        path = f"{backend_config.folder}/{uuid.uuid4().hex}"
        ray.get([worker_group.execute_single_async(rank, _join, path, rank, size, timeout_s) for rank in range(size)])

    def on_shutdown(self, worker_group: Any, backend_config: OneMachine) -> None:
        """Parts them; a worker that is lost raises here."""
        try:
            super().on_shutdown(worker_group, backend_config)
        finally:
            shutil.rmtree(backend_config.folder, ignore_errors=True)


def _join(path: str, rank: int, size: int, timeout_s: float) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = _loopback_interface()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    timeout = datetime.timedelta(seconds=timeout_s)
    dist.init_process_group(backend, init_method=Path(path).as_uri(), rank=rank, world_size=size, timeout=timeout)


def _loopback_interface() -> str:
    """`lo` on Linux, `lo0` on macOS."""
    addresses = psutil.net_if_addrs().items()
    return next(name for name, known in addresses if any(address.address == LOOPBACK for address in known))
