"""A Ray cluster of several machines on one: each node in a mount and process namespace of its own.

A node sees its own disk at a path that all nodes have in common (Ray's temporary folder, the working folder and HOME
lie there), one folder that all share, and its own processes only; it has an IP address of its own. So a path that
means another file on another machine does so here, and a driver that runs on a node joins that node's Ray. Killing a
node ends everything on it at once.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from programs import Program, answers, free_ports

BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parents[2]
OBJECT_STORE_BYTES = 300 << 20
ALIVE_WITHIN_S = 60.0


class Node(Program):
    """One machine: `ray start --block` as the first process of its namespaces.

    Args:
        cluster: The folder of the cluster.
        name: Of the node; a resource `node:NAME` says so to Ray too.
        ip: Its address, one of loopback's.
        cpus: That it offers.
        role: Options of `ray start` that tell head and workers apart.
        variables: What its owner has put into its environment.
    """

    name = "node"

    def __init__(
        self, cluster: Path, name: str, ip: str, cpus: int, role: Sequence[str], variables: Mapping[str, str]
    ) -> None:
        self.name, self.ip, self.cpus = name, ip, cpus
        self.folder = cluster / "disks" / name
        self.log = self.folder / "log.txt"
        self.process = None
        self.here = cluster / "here"
        self._role, self._variables = list(role), dict(variables)
        self._ports = free_ports(4)
        for folder in ("t", "work", "home"):
            (self.folder / folder).mkdir(parents=True)

    def command(self) -> Sequence[str]:
        """Enters the namespaces, mounts the node's disk, hides the others' and starts Ray."""
        here, disks = shlex.quote(str(self.here)), shlex.quote(str(self.here.parent / "disks"))
        mounts = f"mount --bind {shlex.quote(str(self.folder))} {here} && mount -t tmpfs none {disks}"
        script = f"{mounts} && cd {here}/work && exec {shlex.join(self._ray_start())}"
        as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        namespaces = ["--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
        return ["unshare", *as_root, *namespaces, "sh", "-c", script]

    def _ray_start(self) -> list[str]:
        names = "dashboard-agent-listen-port dashboard-agent-grpc-port metrics-export-port runtime-env-agent-port"
        ports = [f"--{name}={port}" for name, port in zip(names.split(), self._ports, strict=True)]
        return [
            *(str(BIN / "ray"), "start", "--block", *self._role, *ports),
            *("--node-ip-address", self.ip, "--temp-dir", str(self.here / "t")),
            *("--num-cpus", str(self.cpus), "--num-gpus", "0", "--resources", f'{{"node:{self.name}": 1}}'),
            *("--object-store-memory", str(OBJECT_STORE_BYTES), "--min-worker-port", "0", "--max-worker-port", "0"),
            *("--disable-usage-stats",),
        ]

    def environment(self) -> Mapping[str, str]:
        """A machine with latentrl installed; Ray's other processes take their place from TMPDIR and HOME."""
        return {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "HOME": str(self.here / "home"),
            "TMPDIR": str(self.here / "t"),
            "OMP_NUM_THREADS": "1",
            **self._variables,
        }

    def is_ready(self) -> bool:
        """Whether Ray says so on its output."""
        return "Ray runtime started." in self.log.read_text(errors="replace")

    def start(self) -> None:
        """Starts it; what an earlier start has said is forgotten."""
        self.log.write_text("")
        super().start()


class RayCluster:
    """A head without work for others to do, and workers, with Ray's token asked for everywhere.

    Args:
        workers: CPUs of each worker, by name.
        variables: What every node has in its environment: addresses and credentials.
    """

    def __init__(self, workers: Mapping[str, int], variables: Mapping[str, str], *, head_cpus: int = 1) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="latentrl-ray-"))
        self.shared = self.folder / "shared"
        for folder in (self.shared, self.folder / "here"):
            folder.mkdir()
        self.token = secrets.token_hex(16)
        port, dashboard, client = free_ports(3)
        self.address = f"127.0.0.11:{port}"
        self.dashboard = f"http://127.0.0.11:{dashboard}"
        variables = {**variables, **self.variables()}
        role = ["--head", f"--port={port}", f"--ray-client-server-port={client}"]
        role += ["--include-dashboard=true", "--dashboard-host=127.0.0.11", f"--dashboard-port={dashboard}"]
        self.head = Node(self.folder, "head", "127.0.0.11", head_cpus, role, variables)
        self.workers = {
            name: Node(self.folder, name, f"127.0.0.{12 + index}", cpus, ["--address", self.address], variables)
            for index, (name, cpus) in enumerate(workers.items())
        }

    @property
    def nodes(self) -> list[Node]:
        """Head first."""
        return [self.head, *self.workers.values()]

    def variables(self) -> dict[str, str]:
        """What a user of the cluster has in the environment."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}

    def start(self) -> None:
        """Starts head and workers and waits until jobs can be submitted."""
        self.head.start()
        with ThreadPoolExecutor() as pool:
            list(pool.map(Node.start, self.workers.values()))
        until = time.monotonic() + ALIVE_WITHIN_S
        while not answers(f"{self.dashboard}/api/version") or len(self.alive()) < len(self.nodes):
            assert time.monotonic() < until, f"{sorted(self.alive())} of {len(self.nodes)} nodes are there"
            time.sleep(0.5)

    def alive(self) -> dict[str, str]:
        """The nodes that Ray believes to be there: id by name."""
        by_ip = {node.ip: node.name for node in self.nodes}
        rows = self.state("nodes")
        return {by_ip[row["node_ip"]]: row["node_id"] for row in rows if row["state"] == "ALIVE"}

    def state(self, what: str) -> list[dict[str, Any]]:
        """All that Ray's state API lists of "nodes", "actors" or "tasks", those that have ended included."""
        address = f"{self.dashboard}/api/v0/{what}?limit=10000&detail=1"
        request = urllib.request.Request(address, headers={"Authorization": f"Bearer {self.token}"})
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
            return list(json.loads(answer.read())["data"]["result"]["result"])

    def remove(self) -> None:
        """Kills all nodes and deletes their disks and the shared folder."""
        for node in reversed(self.nodes):
            node.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
