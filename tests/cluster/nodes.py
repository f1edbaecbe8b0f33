"""A Ray cluster of several machines on one: each node in a mount and process namespace of its own.

A node sees its own disk at a path that all nodes have in common (Ray's temporary folder, the working folder and HOME
lie there), one folder that all share, and its own processes only; it has an IP address of its own. So a path that
means another file on another machine does so here, and a driver that runs on a node joins that node's Ray. Killing a
node ends everything on it at once.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from secrets import token_hex
from typing import Any

import psutil
from programs import Program, answers, free_ports

BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parents[2]
OBJECT_STORE_BYTES = 300 << 20
SECRETS_FILE = "secrets.env"
TOO_SLOW = "The current node timed out during startup"  # Ray gives a raylet 30 s, which cannot be set
STARTS = 3
UNSHARE = [
    *("unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"),
    *([] if os.geteuid() == 0 else ["--user", "--map-root-user"]),
]


class Node(Program):
    """One machine: `ray start --block` as the first process of its namespaces.

    Args:
        cluster: The folder of the cluster.
        name: Of the node; a resource `node:NAME` says so to Ray too.
        ip: Its address, one of loopback's.
        cpus: That it offers.
        role: Options of `ray start` that tell head and workers apart.
        variables: What its owner has put into its environment.

    Attributes:
        options: More of `ray start`'s.
        before: Shell commands that its namespaces' first process runs before Ray.
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
        self.options, self._variables = list(role), dict(variables)
        self.before: list[str] = []
        self._ports = free_ports(4)
        for folder in ("t", "work", "home"):
            (self.folder / folder).mkdir(parents=True)

    def keep_secret(self, secrets: Mapping[str, str]) -> None:
        """Puts a file of lines NAME=VALUE into the node's HOME that only its owner can read."""
        path = self.folder / "home" / SECRETS_FILE
        path.touch(mode=0o600)
        path.write_text("".join(f"{name}={value!r}\n" for name, value in secrets.items()))

    def command(self) -> Sequence[str]:
        """Enters the namespaces, mounts the node's disk, hides the others' and starts Ray."""
        here, disks = shlex.quote(str(self.here)), shlex.quote(str(self.here.parent / "disks"))
        mounts = f"mount --bind {shlex.quote(str(self.folder))} {here} && mount -t tmpfs none {disks}"
        script = " && ".join([mounts, *self.before, f"cd {here}/work", f"exec {shlex.join(self._ray_start())}"])
        return [*UNSHARE, "sh", "-c", script]

    def _ray_start(self) -> list[str]:
        names = "dashboard-agent-listen-port dashboard-agent-grpc-port metrics-export-port runtime-env-agent-port"
        ports = [f"--{name}={port}" for name, port in zip(names.split(), self._ports, strict=True)]
        return [
            *(str(BIN / "ray"), "start", "--block", *self.options, *ports),
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

    def entered(self) -> list[str]:
        """What to put before a command so that it runs on this node."""
        assert self.process is not None
        (first,) = psutil.Process(self.process.pid).children()
        return ["nsenter", f"--target={first.pid}", "--mount", "--pid"]

    def is_ready(self) -> bool:
        """Whether Ray says so on its output."""
        return "Ray runtime started." in self.log.read_text(errors="replace")

    def start(self) -> None:
        """Starts it, again where Ray found the machine too slow; what an earlier start has said is forgotten."""
        for tries_left in reversed(range(STARTS)):
            self.log.write_text("")
            try:
                return super().start()
            except AssertionError:
                if not tries_left or TOO_SLOW not in self.log.read_text(errors="replace"):
                    raise
                self.kill()


class RayCluster:
    """A head and workers; Ray asks for its token everywhere.

    Args:
        workers: CPUs of each worker, by name.
        variables: What every node has in its environment: addresses.
        secrets: What every node has in a file that only its owner can read: passwords and keys.
        head_cpus: That the head offers.
    """

    def __init__(
        self,
        workers: Mapping[str, int],
        variables: Mapping[str, str],
        secrets: Mapping[str, str] | None = None,
        *,
        head_cpus: int = 1,
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="latentrl-ray-"))
        self.shared, self.here = self.folder / "shared", self.folder / "here"
        for folder in (self.shared, self.here):
            folder.mkdir()
        self.secrets_file = self.here / "home" / SECRETS_FILE
        self.token = token_hex(16)
        self._variables, self._secrets = {**variables, **self.variables()}, dict(secrets or {})
        port, dashboard, client = free_ports(3)
        self.address = f"127.0.0.11:{port}"
        self.dashboard = f"http://127.0.0.11:{dashboard}"
        role = ["--head", f"--port={port}", f"--ray-client-server-port={client}"]
        role += ["--include-dashboard=true", "--dashboard-host=127.0.0.11", f"--dashboard-port={dashboard}"]
        self.nodes: dict[str, Node] = {}
        self._add("head", head_cpus, role)
        for name, cpus in workers.items():
            self._add(name, cpus, ["--address", self.address])

    def _add(self, name: str, cpus: int, role: Sequence[str]) -> Node:
        ip = f"127.0.0.{11 + len(self.nodes)}"
        node = self.nodes[name] = Node(self.folder, name, ip, cpus, role, self._variables)
        node.keep_secret(self._secrets)
        return node

    def add(self, name: str, cpus: int = 1) -> Node:
        """Starts another worker, with an empty disk."""
        node = self._add(name, cpus, ["--address", self.address])
        node.start()
        self.wait_for(lambda: name in self.alive())
        return node

    def lose(self, name: str) -> None:
        """Ends a node as a power cut does, and waits until Ray has noticed."""
        self.nodes[name].kill()
        self.wait_for(lambda: name not in self.alive())

    @property
    def head(self) -> Node:
        """The node of the dashboard and of Ray's own records."""
        return self.nodes["head"]

    @property
    def workers(self) -> dict[str, Node]:
        """The other nodes, by name."""
        return {name: node for name, node in self.nodes.items() if name != "head"}

    def variables(self) -> dict[str, str]:
        """What a user of the cluster has in the environment."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}

    def start(self) -> None:
        """Starts head and workers and waits until jobs can be submitted."""
        self.head.start()
        with ThreadPoolExecutor() as pool:
            list(pool.map(Node.start, self.workers.values()))
        self.wait_for(lambda: answers(f"{self.dashboard}/api/version") and self.alive().keys() == self.nodes.keys())

    def wait_for(self, condition: Callable[[], bool], within_s: float = 60.0) -> None:
        """Waits until something is so."""
        until = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < until, f"not so within {within_s:.0f} s"
            time.sleep(0.3)

    def alive(self) -> dict[str, str]:
        """The nodes that Ray believes to be there: id by name."""
        return {self._name(row): row["node_id"] for row in self.state("nodes") if row["state"] == "ALIVE"}

    def name_of(self, node_id: str) -> str:
        """The node of that id, also when it has gone."""
        return next(self._name(row) for row in self.state("nodes") if row["node_id"] == node_id)

    def _name(self, row: Mapping[str, Any]) -> str:
        return next(name for name, node in self.nodes.items() if node.ip == row["node_ip"])

    def state(self, what: str) -> list[dict[str, Any]]:
        """All that Ray's state API lists of "nodes", "actors" or "tasks", those that have ended included."""
        address = f"{self.dashboard}/api/v0/{what}?limit=10000&detail=1"
        request = urllib.request.Request(address, headers={"Authorization": f"Bearer {self.token}"})
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
            return list(json.loads(answer.read())["data"]["result"]["result"])

    def remove(self) -> None:
        """Kills all nodes and deletes their disks and the shared folder."""
        for node in reversed(self.nodes.values()):
            node.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


def on_a_bare_machine(command: Sequence[str], variables: Mapping[str, str], hidden: Sequence[Path]) -> str:
    """Runs a command on a machine that has latentrl installed and nothing else.

    Args:
        command: What is run, in an empty working folder that is also its HOME.
        variables: All that it has in its environment, but for HOME and PATH.
        hidden: Folders that it does not see.

    Returns:
        Its standard output.
    """
    with tempfile.TemporaryDirectory(prefix="latentrl-bare-") as home:
        mounts = [f"mount -t tmpfs none {shlex.quote(str(folder))}" for folder in hidden]
        script = " && ".join([*mounts, f"exec {shlex.join(command)}"])
        answer = subprocess.run(
            [*UNSHARE, "sh", "-c", script],
            cwd=home,
            env={"PATH": f"{BIN}:/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": home, "TMPDIR": home, **variables},
            capture_output=True,
            text=True,
        )
        assert answer.returncode == 0, answer.stderr
        return answer.stdout
