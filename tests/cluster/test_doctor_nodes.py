"""`latentrl doctor` on several nodes, with faults planted into nodes, places, servers and credentials."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
import ray
from doctor_toys import Found, doctor, findings, said, states
from mlflow import MlflowClient
from mlflow.entities import ViewType
from nodes import Node, RayCluster
from ray._common.usage import usage_constants, usage_lib
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from services import Mlflow, ObjectStore
from test_registry_server import Doorman

from pipeline.secrets import SECRETS_FILE_VARIABLE

ROOT = Path(__file__).resolve().parents[2]
SHIFT_S = 500


@pytest.fixture
def odd_node(tmp_path: Path) -> dict[str, str]:
    """The environment of a node with another torch, and a clock that is ahead, both as Python sees them."""
    shim = tmp_path / "shim"
    (shim / "torch-1.2.3.dist-info").mkdir(parents=True)
    (shim / "torch-1.2.3.dist-info" / "METADATA").write_text("Name: torch\nVersion: 1.2.3\n")
    (shim / "sitecustomize.py").write_text(f"import time\nreal = time.time\ntime.time = lambda: real() + {SHIFT_S}\n")
    return {"PYTHONPATH": str(shim)}


@pytest.fixture
def odd_cluster(odd_node: dict[str, str]) -> Iterator[Cluster]:
    ray.init("local", num_cpus=1, include_dashboard=False)  # sets up Ray's token, as every local session does
    ray.shutdown()
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 600 << 20})
    nodes.add_node(num_cpus=1, num_gpus=1, object_store_memory=100 << 20, env_vars=odd_node)
    nodes.wait_for_nodes()
    yield nodes
    nodes.shutdown()


@pytest.fixture
def locked_server() -> Iterator[str]:
    """Address of a server that wants a password."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Doorman) as server:
        server.status = 401  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_faults_of_a_cluster(
    odd_cluster: Cluster, locked_server: str, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch
) -> None:
    home = tmp_path / "home"
    places = ("--home", home, "--ray-address", odd_cluster.address, "--tracking-uri", locked_server)
    code, found = doctor(capfd, *places, "--for", "train", "--num-env-runners", 3, "--num-gpus", 1)
    assert code == 1
    assert states(found) == {
        **{"ray": "ok", "nodes": "ok", "versions": "bad", "clock": "bad", "object store": "warn", "token": "ok"},
        **{"home": "ok", "tracking": "bad", "CPUs": "bad", "GPUs": "bad", "memory": "ok"},
    }
    assert "has torch 1.2.3; here: torch " in said(found, "versions", "bad")
    assert "the same on 1 node" in said(found, "versions", "ok")
    assert f"is {SHIFT_S} s away" in said(found, "clock", "bad")
    assert "0.10 GiB" in said(found, "object store", "warn")
    assert "this process and 2 nodes" in said(found, "home", "ok")
    assert "MLFLOW_TRACKING_PASSWORD" in said(found, "tracking", "bad")
    assert "3 rollout workers take 3 at once; Ray has 2" in said(found, "CPUs", "bad")
    assert "torch sees 0" in said(found, "GPUs", "bad")
    assert not home.exists()
    assert not ray.is_initialized()

    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 32)
    _, found = doctor(capfd, *places)
    assert "does not take this process's; set RAY_AUTH_MODE=token" in said(found, "ray", "bad")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    pretend_to_be_ray("2.59.0", odd_cluster.address)
    _, found = doctor(capfd, *places)
    assert f"cluster has Ray version 2.59.0 but local Ray version is {ray.__version__}" in said(found, "ray", "bad")


def pretend_to_be_ray(version: str, address: str) -> None:
    """Writes another version where the cluster's head keeps its own, which Ray compares with that of who joins."""
    client = GcsClient(address=address)
    record = {**usage_lib.get_cluster_metadata(client), "ray_version": version}
    key, space = usage_constants.CLUSTER_METADATA_KEY, b"cluster"
    client.internal_kv_put(key, json.dumps(record).encode(), True, namespace=space)


# --- machines with disks of their own


def inside(node: Node, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a command on a node: with its mounts, its processes and its environment."""
    at_work = ["sh", "-c", 'cd "$0" && exec "$@"', str(node.here / "work")]
    words, environment = [*node.entered(), *at_work, *command], {**os.environ, **node.environment(), **variables}
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)


def doctor_on(node: Node, *arguments: object, **variables: str) -> tuple[int, Found]:
    """`latentrl doctor` typed on a node."""
    words = [sys.executable, "-m", "jobs.cli", "doctor", "--json", "--ray-address", "auto", *map(str, arguments)]
    done = inside(node, *words, **variables)
    assert done.stdout, done.stderr
    return done.returncode, findings(done.stdout)


def test_a_sound_cluster_is_left_as_it_was(cluster: RayCluster, store: ObjectStore, mlflow_server: Mlflow) -> None:
    keys, secrets = store.keys(), {SECRETS_FILE_VARIABLE: str(cluster.secrets_file)}
    addresses = ("--storage", store.uri("new/frames"), "--tracking-uri", mlflow_server.address)
    places = ("--home", cluster.shared / "home", *addresses)
    code, found = doctor_on(cluster.head, *places, "--for", "pretrain", **secrets)
    assert set(states(found).values()) == {"ok", "warn"}, found
    assert code == 0
    assert "little for frames under way" in said(found, "object store", "warn")
    assert "this process and 4 nodes" in said(found, "home", "ok")
    assert "this process and 4 nodes" in said(found, "storage", "ok")
    assert "answers 4 nodes too" in said(found, "tracking", "ok"), said(found, "tracking", "warn")
    assert "wrote a run and an artifact" in said(found, "tracking", "ok")
    assert store.keys() == keys
    assert not list(cluster.shared.iterdir())
    with pytest.MonkeyPatch.context() as patch:
        for name, value in mlflow_server.variables().items():
            patch.setenv(name, value)
        client = MlflowClient(mlflow_server.address)
        everywhere = [experiment.experiment_id for experiment in client.search_experiments(view_type=ViewType.ALL)]
        names = [run.info.run_name for run in client.search_runs(everywhere)]
        assert "latentrl-doctor" not in names
        assert not [e for e in client.search_experiments() if e.name.startswith("latentrl-doctor")]


def test_what_differs_between_machines(
    cluster: RayCluster, store: ObjectStore, mlflow_server: Mlflow, tmp_path: Path
) -> None:
    one, two = cluster.workers["one"], cluster.workers["two"]
    home, storage = cluster.head.here / "work" / "home", cluster.shared / "frames"
    probe = ROOT / "jobs" / "node_probe.py"
    (tmp_path / "other.py").write_text("raise RuntimeError('this latentrl cannot be asked')")
    for node in (cluster.head, one):
        inside(node, "mkdir", "home").check_returncode()
    inside(one, "mount", "--bind", str(tmp_path / "other.py"), str(probe)).check_returncode()
    inside(two, "mount", "--bind", str(cluster.shared), str(cluster.shared)).check_returncode()
    inside(two, "mount", "-o", "remount,bind,ro", str(cluster.shared)).check_returncode()
    try:
        places = ("--home", home, "--storage", storage, "--tracking-uri", mlflow_server.address)
        password = {"MLFLOW_TRACKING_USERNAME": mlflow_server.user, "MLFLOW_TRACKING_PASSWORD": "wrong"}
        code, found = doctor_on(cluster.head, *places, **password)
    finally:
        inside(one, "umount", str(probe)).check_returncode()
        inside(two, "umount", str(cluster.shared)).check_returncode()
        for node in (cluster.head, one):
            inside(node, "rmdir", "home").check_returncode()  # fails where something was left in it
    assert code == 1
    assert {check for check, state in states(found).items() if state == "bad"} == {
        *("versions", "home", "storage", "tracking"),
    }
    assert "has code " in said(found, "versions", "bad")
    assert "the same on 3 nodes" in said(found, "versions", "ok")
    assert said(found, "home", "bad").count(f"{home} is not shared") == 1
    assert said(found, "home", "bad").count(f"{home} is not there on") == 2
    assert said(found, "storage", "bad").count("cannot write") == 1
    assert "Read-only file system" in said(found, "storage", "bad")
    assert "this process and 3 nodes" in said(found, "storage", "ok")
    assert "MLFLOW_TRACKING_PASSWORD" in said(found, "tracking", "bad")
    assert not list(cluster.shared.iterdir())


def test_keys_that_are_wrong_or_missing_on_a_node(cluster: RayCluster, store: ObjectStore) -> None:
    places = ("--home", cluster.shared / "home", "--storage", store.uri("frames"))
    _, found = doctor_on(cluster.head, *places, **store.variables(store.reader))
    assert "cannot write to s3://" in said(found, "storage", "bad")
    assert store.reader[1] not in json.dumps(found)

    three = cluster.workers["three"]
    inside(three, "mv", str(cluster.secrets_file), f"{cluster.secrets_file}.away").check_returncode()
    try:
        _, found = doctor_on(cluster.head, *places, **{SECRETS_FILE_VARIABLE: str(cluster.secrets_file)})
    finally:
        inside(three, "mv", f"{cluster.secrets_file}.away", str(cluster.secrets_file)).check_returncode()
    assert said(found, "nodes", "bad").count("starts no worker") == 1
    assert f"see that the secrets file {cluster.secrets_file} is there" in said(found, "nodes", "bad")
    assert "this process and 3 nodes" in said(found, "storage", "ok")
    assert not list(cluster.shared.iterdir())


def test_a_machine_that_is_no_node(
    cluster: RayCluster, capfd: pytest.CaptureFixture[str], tmp_path, monkeypatch
) -> None:
    for name, value in cluster.variables().items():
        monkeypatch.setenv(name, value)
    code, found = doctor(capfd, "--home", tmp_path / "home", "--ray-address", cluster.address)
    assert code == 1
    assert "this machine is not a node of the Ray cluster" in said(found, "ray", "bad")
    assert states(found)["home"] == "ok"
