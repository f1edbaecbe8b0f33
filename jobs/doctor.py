"""`latentrl doctor`: whether all that the stages rely on is there and agrees, seen from here and from every node."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from ray.exceptions import RayError

from jobs import checks, joining
from jobs.checks import BAD, OK, WARN, Finding
from jobs.cluster import ray_session
from jobs.needs import Needs
from jobs.node_probe import first_line
from jobs.nodes import Nodes
from jobs.place_trial import PlaceTrial
from jobs.watch import sign_of_life
from jobs.workspace import Workspace
from pipeline.errors import UserError
from pipeline.patience import within
from pipeline.server import Address

# Seconds that checks may take. A sqlite file's tables are made in 2 s, on a busy machine in many times that.
START_S, QUICK_S, PLACE_S, SERVER_S, DATABASE_S, GPU_S = 60.0, 20.0, 45.0, 90.0, 240.0, 75.0
SPARE_S = 5.0  # for a check to say which nodes did not answer in time


def run(
    workspace: Workspace, *, storage: str | None = None, needs: Needs | None = None, num_gpus: int = 0
) -> dict[str, Any]:
    """Checks everything, each part for a bounded time, and leaves nothing behind.

    Args:
        workspace: Home, tracking server and cluster to check; without an address a Ray of its own is started.
        storage: Another folder or address that data is to lie at.
        needs: Of a stage that is to run.
        num_gpus: GPUs that are counted on.

    Returns:
        checks (an object a finding, with the seconds that its check took and might have taken at most), errors and
        warnings (a line each), nodes (how many were asked).

    Raises:
        UserError: An address is malformed.
    """
    doctor = _Doctor(workspace, storage, needs, num_gpus)
    try:
        doctor.examine()
    finally:
        doctor.close()
    lines = {
        state: [f"{row['check']}: {_text(row)}" for row in doctor.rows if row["state"] == state]
        for state in (WARN, BAD)
    }
    num_nodes = len(doctor.nodes.all) if doctor.nodes else 0
    return {"checks": doctor.rows, "errors": lines[BAD], "warnings": lines[WARN], "nodes": num_nodes}


def present(result: dict[str, Any]) -> str:
    """A line for each finding, and the sum of them."""
    rows = [
        f"{row['state']:<4}  {row['check']:<12}  {_text(row)}  [{row['seconds']:.1f} of {row['limit_s']:g} s]"
        for row in result["checks"]
    ]
    return "\n".join([*rows, f"{len(result['errors'])} bad, {len(result['warnings'])} to look at"])


def _text(row: dict[str, Any]) -> str:
    return f"{row['seen']}; {row['advice']}" if row["advice"] else str(row["seen"])


class _Doctor:
    """The checks in their order, and what they have found."""

    def __init__(self, workspace: Workspace, storage: str | None, needs: Needs | None, num_gpus: int) -> None:
        self._workspace, self._needs, self._num_gpus = workspace, needs, num_gpus
        self._address = Address.parse(workspace.tracking_uri)
        self._places = {"home": PlaceTrial(str(workspace.home))}
        if storage is not None:
            self._places["storage"] = PlaceTrial(storage)
        self._open = contextlib.ExitStack()
        self.nodes: Nodes | None = None
        self.rows: list[dict[str, Any]] = []

    def close(self) -> None:
        """Ends the probes and leaves the cluster."""
        self._open.close()

    def examine(self) -> None:
        """Looks at Ray, its nodes, places, tracking and resources; what needs Ray is left out where there is none."""
        self._take("ray", joining.LIMIT_S, self._join, is_bounded=False)
        if not self.has_found(BAD):
            self._take("nodes", START_S + SPARE_S, self._start_probes)
        if self.nodes is not None:
            self._look_at_nodes(self.nodes)
        self._look_at_places()
        self._look_at_tracking()
        self._look_at_resources()

    def has_found(self, state: str) -> bool:
        """Whether the last check ended in this state."""
        return bool(self.rows) and self.rows[-1]["state"] == state

    def _join(self) -> Iterable[Finding]:
        self._open.enter_context(ray_session(self._workspace, needs={}, what="the doctor"))
        where = self._workspace.ray_address
        yield Finding(
            "ray", OK, f"the cluster at {where} takes this process in" if where else "a Ray of one's own starts"
        )

    def _start_probes(self) -> Iterable[Finding]:
        nodes = Nodes(START_S)
        self._open.callback(nodes.close)
        self.nodes = nodes if nodes.all else None
        return checks.probes(nodes)

    def _look_at_nodes(self, nodes: Nodes) -> None:
        within_s = QUICK_S - SPARE_S
        self._take("versions", QUICK_S, checks.versions, nodes, within_s)
        self._take("clock", QUICK_S, checks.clocks, nodes, within_s)
        self._take("object store", QUICK_S, checks.object_stores, nodes, within_s)
        self._take("token", joining.ANSWER_WITHIN_S + SPARE_S, checks.token)

    def _look_at_places(self) -> None:
        replays = checks.KEPT_REPLAYS * self._needs.replay_bytes if self._needs else 0
        for name, trial in self._places.items():
            needed = replays if name == "home" else 0
            self._take(name, PLACE_S, checks.place, name, trial, self.nodes, needed, PLACE_S - SPARE_S)

    def _look_at_tracking(self) -> None:
        uri, is_server = self._workspace.tracking_uri, self._address.database is None
        self._take("tracking", SERVER_S if is_server else DATABASE_S, checks.tracking, uri)
        if is_server and self.nodes is not None and self._workspace.ray_address and not self.has_found(BAD):
            self._take("tracking", SERVER_S, checks.tracking_from, self.nodes, uri, SERVER_S - SPARE_S)

    def _look_at_resources(self) -> None:
        if self.nodes is not None:
            self._take("CPUs", QUICK_S, checks.cpus, self._needs)
            if self._num_gpus:
                self._take("GPUs", GPU_S, checks.gpus, self._num_gpus, self.nodes, GPU_S - SPARE_S)
        if self._needs is not None and self._needs.replay_bytes:
            self._take("memory", QUICK_S, checks.memory, self._needs)

    def _take(
        self, name: str, limit_s: float, check: Callable[..., Iterable[Finding]], *about: Any, is_bounded: bool = True
    ) -> None:
        """Runs a check for so long at most and keeps what it found; one that is not bounded here bounds itself."""
        print(f"looking at {name}, at most {limit_s:.0f} s", file=sys.stderr)
        sign_of_life()
        began = time.monotonic()
        found: list[Finding] = []

        def collect() -> None:
            found.extend(check(*about))

        try:
            within(limit_s, collect, f"doctor-{name}") if is_bounded else collect()
        except UserError as error:
            found.append(Finding.of(name, error))
        except TimeoutError as error:
            found.append(Finding(name, BAD, str(error), "see what holds it up, and run the command again"))
        except RayError as error:
            found.append(
                Finding(name, BAD, f"Ray failed ({first_line(error)})", "see that the cluster's head still runs")
            )
        seconds = round(time.monotonic() - began, 2)
        self.rows += [{**asdict(finding), "seconds": seconds, "limit_s": limit_s} for finding in found]
