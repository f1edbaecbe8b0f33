"""A Ray cluster that an autoscaler makes larger and smaller: Ray's own, with its provider of nodes on one machine."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import ray
from nodes import RayCluster
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

PROVIDER = Path(ray.__file__).parent / "autoscaler" / "_private" / "fake_multi_node"
IDLE_S = 15.0  # then a node goes; longer than a busy machine takes from a node's start to its first worker
HEAD = "ray.head.default"
LISTS = (
    "initialization_commands setup_commands head_setup_commands worker_setup_commands head_start_ray_commands "
    "worker_start_ray_commands cluster_synced_files rsync_exclude rsync_filter"
)


class GrowingCluster(RayCluster):
    """A head of one CPU, and an autoscaler that adds nodes of one CPU each.

    Args:
        max_nodes: That it adds at most.
        is_v2: Whether it is Ray's second autoscaler, the one of KubeRay, or the first.
    """

    def __init__(self, max_nodes: int, *, is_v2: bool) -> None:
        super().__init__({}, {})
        own = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        if is_v2:
            own |= {"RAY_enable_autoscaler_v2": "1", "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID}
            own |= {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID}
        description = json.dumps(self._description(max_nodes, is_v2=is_v2))
        (self.head.folder / "autoscaling.json").write_text(description)
        provider = self.head.folder / "provider"
        shutil.copytree(PROVIDER, provider)
        (provider / "example.yaml").write_text(description)  # its defaults, which Ray's wheel leaves out (2.60)
        self.head.options += ["--autoscaling-config", str(self.here / "autoscaling.json")]
        self.head.before += [f"export {name}={value}" for name, value in own.items()]
        self.head.before += [f"mount --bind {shlex.quote(str(self.here / 'provider'))} {shlex.quote(str(PROVIDER))}"]

    def _description(self, max_nodes: int, *, is_v2: bool) -> dict[str, Any]:
        provider = {"type": "fake_multinode", "use_node_id_as_ip": True, "gcs_address": self.address}
        provider |= {"disable_node_updaters": True, "disable_launch_config_check": True}
        if is_v2:
            provider |= {"launch_multiple": True, "head_node_id": FAKE_HEAD_NODE_ID}
        worker = {"resources": {"CPU": 1, "object_store_memory": 100 << 20}, "max_workers": max_nodes}
        return {
            **{"cluster_name": "growing", "max_workers": max_nodes, "upscaling_speed": 1.0, "provider": provider},
            **{
                "idle_timeout_minutes": IDLE_S / 60,
                "head_node_type": HEAD,
                "auth": {},
                "docker": {},
                "file_mounts": {},
            },
            **{name: [] for name in LISTS.split()},
            "file_mounts_sync_continuously": False,
            "available_node_types": {
                "worker": {**worker, "node_config": {}, "min_workers": 0},
                HEAD: {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            },
        }

    @property
    def num_nodes(self) -> int:
        """Nodes that are there, the head included."""
        return sum(row["state"] == "ALIVE" for row in self.state("nodes"))
