"""Every stage on a cluster of separate machines: data on S3, runs and models in MLflow on PostgreSQL and S3.

The stages follow each other as fixtures; each test holds what one of them promises.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient
from nodes import RayCluster, on_a_bare_machine
from services import Mlflow, ObjectStore
from stages import Job, Stages

from pipeline.artifact import load_encoder
from pipeline.bundle import sha256_of, verify
from pipeline.schema import MANIFEST_FILE
from rllib_ext.checkpoint import find_checkpoint

FRAMES, AGENT_STEPS, FIRST_CHECKPOINT = 1_600, 8_000, 400
SMALL_ENCODER = ("model.latent_channels=1", "model.widths=[4,4]", "train.epochs=2", "train.stats_frames=256")
SMALL_AGENT = (
    *("train.warmup_agent_steps=200", "train.replay_capacity=4000", f"train.checkpoint_agent_steps={FIRST_CHECKPOINT}"),
    *("train.envs_per_runner=4", "train.fragment_length=8", "q.hidden=[16]"),
)
TRAIN = (
    *("train", "--game", "pong", "--encoder", "models:/pong-encoder@champion", "--num-env-runners", 2),
    *("--agent-steps", AGENT_STEPS, *(word for setting in SMALL_AGENT for word in ("--set", setting))),
)


@pytest.fixture(scope="module")
def stages(cluster: RayCluster, store: ObjectStore, mlflow_server: Mlflow) -> Stages:
    return Stages(cluster, store, mlflow_server)


@pytest.fixture(scope="module")
def client(mlflow_server: Mlflow) -> MlflowClient:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in mlflow_server.variables().items():
            patch.setenv(name, value)
        yield MlflowClient(mlflow_server.address, mlflow_server.address)


@pytest.fixture(scope="module")
def collected(stages: Stages) -> Job:
    out = stages.store.uri("pong/frames")
    return stages.run("collect", "--game", "pong", "--frames", FRAMES, "--num-workers", 3, "--out", out)


@pytest.fixture(scope="module")
def pretrained(stages: Stages, collected: Job) -> Job:
    settings = [word for setting in (*SMALL_ENCODER, "train.num_workers=2") for word in ("--set", setting)]
    data = collected.result["dataset"]
    return stages.run("pretrain", "--data", data, "--register", "pong-encoder", *settings)


@pytest.fixture(scope="module")
def encoded(stages: Stages, collected: Job, pretrained: Job) -> Job:
    out, encoder = stages.store.uri("pong/latents"), "models:/pong-encoder@champion"
    return stages.run("encode", "--data", collected.result["dataset"], "--encoder", encoder, "--out", out)


@pytest.fixture(scope="module")
def interrupted(stages: Stages, pretrained: Job) -> Job:
    """Q-learning whose driver's machine is lost after a checkpoint; a new machine takes its place."""
    job = stages.start(*TRAIN)
    checkpoint = stages.home / "runs" / "train-pong-frozen-001" / "checkpoint"
    stages.cluster.wait_for(lambda: find_checkpoint(checkpoint) is not None or job.status == "FAILED", 400)
    assert job.status == "RUNNING", job.log()
    stages.cluster.lose(job.driver_node)
    stages.cluster.add("four")
    return job


@pytest.fixture(scope="module")
def resumed(stages: Stages, interrupted: Job) -> Job:
    return stages.run(*TRAIN, "--resume")


def test_collect_writes_to_s3_from_every_machine(stages: Stages, collected: Job) -> None:
    result = collected.result
    assert collected.actors("_Collector") == {"one": 1, "two": 1, "three": 1}
    manifest = json.loads(stages.store.get(f"pong/frames/{MANIFEST_FILE}"))
    assert manifest["digest"] == result["digest"]
    assert manifest["frames"] == FRAMES == result["frames"]
    checked = stages.run("data", "check", result["dataset"]).result
    assert (checked["errors"], checked["digest"]) == ([], result["digest"])


def test_pretrain_reads_s3_on_two_machines_and_registers(
    stages: Stages, client: MlflowClient, collected: Job, pretrained: Job
) -> None:
    result = pretrained.result
    workers = pretrained.actors("TrainWorker")
    assert sorted(workers.values()) == [1, 1]
    assert all(steps > 0 for steps in result["train_worker_steps"].values())
    assert set(pretrained.tasks("ReadFrames"))
    assert pretrained.driver_node == "head"
    version = client.get_model_version_by_alias("pong-encoder", "champion")
    assert version.run_id == result["run_id"]
    assert version.tags["bundle_sha256"] == result["sha256"] == sha256_of(Path(result["bundle"]))
    run = client.get_run(result["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.tags["dataset.digest"] == collected.result["digest"]
    (data,) = run.inputs.dataset_inputs
    assert json.loads(data.dataset.source)["uri"] == collected.result["dataset"]
    assert json.loads(data.dataset.profile)["digest"] == collected.result["digest"]
    assert run.info.artifact_uri.startswith("mlflow-artifacts:")
    stored = [key for key in stages.store.keys("mlflow/") if key.endswith("bundle/model.safetensors")]
    assert len(stored) == 1
    assert stages.store.get(stored[0]) == (Path(result["bundle"]) / "model.safetensors").read_bytes()


@pytest.mark.long
def test_encode_works_on_every_machine(stages: Stages, collected: Job, pretrained: Job, encoded: Job) -> None:
    assert set(encoded.actors("_PartEncoder")) == {"one", "two", "three"}
    result = encoded.result
    assert (result["frames"], result["transitions"]) == (FRAMES, FRAMES - collected.result["episodes"])
    assert result["encoder_sha256"] == pretrained.result["sha256"]
    manifest = json.loads(stages.store.get(f"pong/latents/{MANIFEST_FILE}"))
    encoder = load_encoder(Path(pretrained.result["bundle"]))
    part = manifest["files"][0]
    table = pq.read_table(pa.BufferReader(stages.store.get(f"pong/latents/{part['name']}")))
    assert table.num_rows == part["rows"]
    assert len(table["obs"][0].as_py()) == encoder.z_dim == manifest["z_dim"]


def test_training_goes_on_on_another_machine(
    stages: Stages, client: MlflowClient, pretrained: Job, interrupted: Job, resumed: Job
) -> None:
    lost, result = interrupted.driver_node, resumed.result
    assert resumed.driver_node != lost
    assert lost not in resumed.actors("EnvRunner")
    for job in (interrupted, resumed):
        assert sorted(job.actors("EnvRunner").values()) == [1, 1]
        assert job.driver_node not in job.actors("EnvRunner")
    assert "four" in {resumed.driver_node, *resumed.actors("EnvRunner")}
    (folder,) = (stages.home / "runs").glob("train-*")
    assert result["run_folder"] == str(folder)
    assert result["agent_steps"] >= AGENT_STEPS
    assert sum(result["steps_per_worker"].values()) == result["agent_steps"]
    assert interrupted.status == "FAILED"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(steps)
    timed = [line for line in lines if "seconds" in line]
    sittings = [later for earlier, later in pairwise(timed) if later["seconds"] < earlier["seconds"]]
    assert [line["step"] > FIRST_CHECKPOINT for line in sittings] == [True]  # not from the start, and once
    assert result["encoder_sha256_before"] == result["encoder_sha256_after"]
    assert client.get_run(result["run_id"]).info.status == "FINISHED"
    runs = client.search_runs([client.get_run(result["run_id"]).info.experiment_id], "tags.stage = 'train'")
    assert [run.info.run_id for run in runs] == [result["run_id"]]


def test_the_agent_knows_its_encoder_and_the_encoder_its_data(
    client: MlflowClient, collected: Job, pretrained: Job, resumed: Job
) -> None:
    (agent,) = client.search_model_versions("name='pong-agent'")
    assert agent.run_id == resumed.result["run_id"]
    assert agent.tags["encoder.uri"] == pretrained.result["model_uri"] == "models:/pong-encoder/1"
    assert agent.tags["encoder.sha256"] == pretrained.result["sha256"]
    encoder = client.get_model_version("pong-encoder", "1")
    (used,) = client.get_run(agent.run_id).inputs.model_inputs
    assert used.model_id == encoder.source.removeprefix("models:/")
    assert client.get_run(encoder.run_id).data.tags["dataset.digest"] == collected.result["digest"]


@pytest.mark.long
def test_an_agent_plays_on_every_machine_for_the_next_dataset(stages: Stages, collected: Job, resumed: Job) -> None:
    out = stages.store.uri("pong/agent")
    job = stages.run(
        "collect", "--game", "pong", "--frames", FRAMES, "--policy", "models:/pong-agent@latest", "--out", out
    )
    there = stages.cluster.alive().keys() - {"head"}
    assert job.actors("_Collector") == dict.fromkeys(there, 1)  # one a CPU, without being told
    manifest = json.loads(stages.store.get(f"pong/agent/{MANIFEST_FILE}"))
    assert manifest["collection"]["policy_uri"] == resumed.result["policy"]
    assert manifest["frames"] == FRAMES
    assert manifest["digest"] != collected.result["digest"]


def test_a_machine_that_has_nothing_else_plays_the_same_games(
    stages: Stages, mlflow_server: Mlflow, cluster: RayCluster, pretrained: Job, resumed: Job
) -> None:
    evaluate = ("evaluate", "models:/pong-agent@latest", "--episodes", "2")
    there = stages.run(*evaluate).result
    hidden = [cluster.folder, stages.store.folder]
    places = ("--tracking-uri", mlflow_server.address, "--json")
    printed = on_a_bare_machine(["latentrl", *evaluate, *places], mlflow_server.variables(), hidden)
    here: dict[str, Any] = json.loads(printed.splitlines()[-1])
    for key in ("mean_return", "ci95_low", "ci95_high", "policy_sha256"):
        assert here.get(key) == there.get(key)
    script = (
        "import sys; from pathlib import Path; from pipeline.registry import resolve;"
        "from pipeline.artifact import load_encoder;"
        "found = resolve('models:/pong-encoder@champion', sys.argv[1], Path('cache'));"
        "print(load_encoder(found.path).sha256)"
    )
    printed = on_a_bare_machine(["python", "-c", script, mlflow_server.address], mlflow_server.variables(), hidden)
    assert printed.split()[-1] == pretrained.result["sha256"] == verify(Path(pretrained.result["bundle"]))


def test_a_folder_of_one_machine_is_told(stages: Stages, cluster: RayCluster, collected: Job) -> None:
    own = cluster.here / "work"
    collect = ("collect", "--game", "pong", "--frames", 20_000, "--num-workers", 3, "--out", own / "frames")
    assert f"{own / 'frames'} is not the same folder on all nodes" in stages.refused(*collect)
    pretrain = ("pretrain", "--data", collected.result["dataset"], "--register", "other", "--home", own / "home")
    settings = [word for setting in (*SMALL_ENCODER, "train.num_workers=2") for word in ("--set", setting)]
    assert "is not the same folder on all nodes" in stages.refused(*pretrain, *settings)
