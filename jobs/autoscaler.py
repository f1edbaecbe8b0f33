"""The autoscaler of the Ray cluster that is joined, as Ray's own records show it (both of Ray 2.60's kinds)."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.exceptions import RayError
from ray.experimental.internal_kv import _internal_kv_get

_MADE_BY_HAND = "node_"  # how Ray names the kind of a node that no autoscaler has made
_TIMEOUT_S = 10


@dataclass(frozen=True)
class Autoscaler:
    """What an autoscaler is doing.

    Attributes:
        num_coming: Nodes that it is starting.
    """

    num_coming: int


def autoscaler() -> Autoscaler | None:
    """The cluster's autoscaler; None where nodes are added by hand only, which Ray watches in the same way."""
    if is_autoscaler_v2():
        try:
            status = get_cluster_status(ray.get_runtime_context().gcs_address, timeout=_TIMEOUT_S)
        except (RayError, RuntimeError):  # too busy to say what it is starting
            return Autoscaler(0)
        return Autoscaler(len(status.pending_nodes) + sum(launch.count for launch in status.pending_launches))
    report: Mapping[str, Any] = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or "{}").get(
        "autoscaler_report", {}
    )
    launches, starting = report.get("pending_launches", {}), report.get("pending_nodes", [])
    kinds = {*report.get("active_nodes", {}), *launches, *(kind for _, kind, *_ in starting)}
    if all(kind.startswith(_MADE_BY_HAND) for kind in kinds):
        return None
    return Autoscaler(len(starting) + sum(launches.values()))


@contextlib.contextmanager
def asked_for(needs: Mapping[str, float]) -> Iterator[None]:
    """Within it, the autoscaler sees a demand for resources, one bundle for each whole unit, beside what others ask.

    A placement group rather than `ray.autoscaler.sdk.request_resources`: that request is one for the whole cluster,
    which anybody's next one replaces (Ray Data's own too) and which stays when this process is killed.
    """
    bundles = [{name: 1.0} for name, amount in needs.items() for _ in range(int(-(-amount // 1)))]
    group = ray.util.placement_group(bundles, strategy="PACK")
    try:
        yield
    finally:
        ray.util.remove_placement_group(group)
