"""The whole pipeline on a Ray cluster of two nodes and an MLflow server: two addresses, and nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from mlflow import MlflowClient
from ray.cluster_utils import Cluster
from registry_toys import MlflowServer, running_server
from test_demo import TOY

from jobs import collect, demo
from jobs.workspace import Workspace
from pipeline.artifact import load_encoder
from pipeline.registry import resolve


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Two nodes that ask for Ray's token, as a local session makes every process do that starts one."""
    ray.init("local", num_cpus=1, include_dashboard=False)
    ray.shutdown()
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 200 << 20})
    nodes.add_node(num_cpus=2, object_store_memory=200 << 20)
    nodes.wait_for_nodes()
    yield nodes
    nodes.shutdown()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MlflowServer]:
    with running_server(tmp_path / "server") as server:
        yield server


def test_two_addresses_and_nothing_else_changes(cluster: Cluster, server: MlflowServer, tmp_path: Path) -> None:
    plan = replace(
        TOY,
        num_workers=3,
        num_env_runners=3,
        agent_steps=600,
        encoder=replace(TOY.encoder, train=replace(TOY.encoder.train, num_workers=2)),
        agent=replace(TOY.agent, train=replace(TOY.agent.train, warmup_agent_steps=300, synchronous=True)),
    )
    beside = Workspace.at(str(tmp_path / "local"))  # without an address: a Ray of its own, whatever runs here
    assert collect.run(beside, game="pong", frames=60, out=str(tmp_path / "few"), num_workers=1)["frames"] == 60
    home = tmp_path / "shared"
    result = demo.run(str(home), plan, ray_address=cluster.address, tracking_uri=server.uri)
    assert result["num_train_workers"] == 2
    assert len(result["steps_per_worker"]) == 3  # on one CPU each: both nodes took part
    assert all(steps > 0 for steps in result["steps_per_worker"].values())
    assert not list(home.glob("mlflow.db*"))  # everything went to the server
    assert {model.name for model in MlflowClient(server.uri).search_registered_models()} == {
        "pong-encoder",
        "pong-agent",
    }
    assert load_encoder(resolve(result["model_uri"], server.uri, tmp_path / "cache").path).z_dim > 0
