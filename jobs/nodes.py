"""The nodes of the Ray cluster that is joined, each with a probe that answers questions about it in bounded time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs import node_probe
from jobs.node_probe import NodeProbe, first_line


@dataclass(frozen=True)
class Node:
    """A node as Ray counts it.

    Attributes:
        id: Ray's, 56 hex digits.
        name: For people: its host name and the beginning of its id.
        cpus, gpus: That it offers.
        object_store_bytes: Memory for Ray's objects.
    """

    id: str
    name: str
    cpus: float
    gpus: float
    object_store_bytes: int


@dataclass(frozen=True)
class Answers:
    """What nodes answered to a question, and why others did not."""

    values: dict[Node, Any]
    failures: dict[Node, str]


class Nodes:
    """A probe on every node that is alive, which takes no CPU; nodes that do not start one are left out later.

    Args:
        within_s: How long the probes' processes may take to start.

    Attributes:
        silent: Why the nodes that are left out are.
    """

    def __init__(self, within_s: float) -> None:
        alive = [_node(row) for row in ray.nodes() if row["Alive"]]
        ray.cloudpickle.register_pickle_by_value(node_probe)
        try:
            probe = ray.remote(num_cpus=0)(NodeProbe)
            self._probes = {node: probe.options(scheduling_strategy=_on(node)).remote() for node in alive}
            started = self.ask(lambda probe, node: probe.clock.remote(), within_s)
        finally:
            ray.cloudpickle.unregister_pickle_by_value(node_probe)
        self.silent = started.failures
        for node in self.silent:
            ray.kill(self._probes.pop(node))

    @property
    def all(self) -> list[Node]:
        """Those that have a probe."""
        return list(self._probes)

    def ask(self, question: Callable[[Any, Node], Any], within_s: float) -> Answers:
        """Puts a question to all probes at once.

        Args:
            question: Given a probe's handle and its node, calls a method on it; the reference to its answer.
            within_s: For all answers together.
        """
        asked = {question(probe, node): node for node, probe in self._probes.items()}
        done, late = ray.wait(list(asked), num_returns=len(asked), timeout=within_s) if asked else ([], [])
        values, failures = {}, {asked[ref]: f"no answer within {within_s:.0f} s" for ref in late}
        for ref in done:
            try:
                values[asked[ref]] = ray.get(ref)
            except RayTaskError as error:
                failures[asked[ref]] = first_line(error.cause) if error.cause else first_line(error)
            except RayActorError as error:
                failures[asked[ref]] = f"its worker process died ({first_line(error)})"
            except RayError as error:
                failures[asked[ref]] = first_line(error)
        return Answers(values, failures)

    def close(self) -> None:
        """Ends the probes."""
        for probe in self._probes.values():
            ray.kill(probe)


def _on(node: Node) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node.id, soft=False)


def _node(row: dict[str, Any]) -> Node:
    has = row["Resources"]
    return Node(
        id=row["NodeID"],
        name=f"{row['NodeManagerHostname']} ({row['NodeID'][:6]})",
        cpus=has.get("CPU", 0.0),
        gpus=has.get("GPU", 0.0),
        object_store_bytes=int(has.get("object_store_memory", 0)),
    )
