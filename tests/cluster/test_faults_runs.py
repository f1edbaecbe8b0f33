"""Runs that get into each other's way, and machines with too little memory for objects."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import nodes
import pytest
from fault_rows import Record, measured
from mlflow import MlflowClient
from nodes import RayCluster
from rl_toys import make_encoder
from running import Stage
from test_faults_disk import MODEL, sets
from test_train_command import SETTINGS, TINY
from toy_frames import toy_dataset

from pipeline.atari import preprocess_for

pytestmark = pytest.mark.long

STORE_BYTES = 80 << 20  # Ray takes no less than 75 MiB


def training(folder: Path, encoder: Path, agent_steps: int, *more: str) -> Stage:
    """In the driver alone."""
    chosen = sets({f"train.{name}": value for name, value in SETTINGS.items()})
    given = ["train", "--game", "pong", "--encoder", encoder, *chosen, "--num-env-runners", 0]
    return Stage(folder / "said", *given, "--home", folder / "home", "--agent-steps", agent_steps, *more)


def test_two_runs_of_one_name(tmp_path: Path, record_property: Record) -> None:
    encoder = make_encoder(tmp_path / "encoder", preprocess_for("pong"), TINY, standardise=False)
    both = [training(tmp_path, encoder, 600) for _ in range(2)]
    results = [stage.result() for stage in both]
    assert {Path(result["run_folder"]).name for result in results} == {f"train-pong-frozen-00{k}" for k in (1, 2)}
    assert {result["model_uri"] for result in results} == {"models:/pong-agent/1", "models:/pong-agent/2"}
    uri = f"sqlite:///{tmp_path}/home/mlflow.db"
    runs = MlflowClient(uri, uri).search_runs(["0", "1"])
    assert sorted(run.info.run_id for run in runs) == sorted(result["run_id"] for result in results)
    measured(
        record_property,
        "two runs started with one name",
        lost="nothing: each has a folder, a run and a version of its own",
        read=f"{results[0]['model_uri']} and {results[1]['model_uri']}",
    )

    first = training(tmp_path, encoder, 10**9)
    folder = tmp_path / "home" / "runs" / "train-pong-frozen-003"
    first.wait_for(lambda: (folder / "checkpoint" / "SHA256SUMS").is_file())
    second = training(tmp_path, encoder, 10**9, "--resume")
    code, seconds = second.end()
    assert code == 2
    line = str(second.line("^error"))
    assert "train-pong-frozen-003 is being written by another process" in line
    first.driver.send_signal(signal.SIGTERM)
    assert first.end()[0] == 143
    kept = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert training(tmp_path, encoder, kept + 300, "--resume").result()["agent_steps"] >= kept + 300
    measured(
        record_property,
        "a run resumed while it is still going on",
        lost="nothing: the second is refused",
        read=line,
        until_refused=seconds,
    )


def test_an_object_store_too_small_for_the_stream(
    tmp_path: Path, record_property: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "OBJECT_STORE_BYTES", STORE_BYTES)
    cluster = RayCluster({"one": 2}, {}, head_cpus=0)
    cluster.start()
    try:
        data = toy_dataset(cluster.shared / "frames", [1_500] * 14, num_files=4, height=84, width=84)
        assert data.num_frames * data.preprocess.frame_bytes > STORE_BYTES
        chosen = {**MODEL, "model.patch": 12, "train.batch_size": 64, "train.epochs": 1}
        places = ["--home", cluster.shared / "home", "--ray-address", cluster.address]
        given = ["pretrain", "--data", data.uri, "--register", "toy", *sets(chosen), *places]
        stage = Stage(cluster.shared / "said", *given, node=cluster.head)
        result = stage.result()
        line = stage.line("^note")
    finally:
        cluster.remove()
    assert result["updates"] > 200
    assert line
    assert "80 MiB" in line
    measured(
        record_property,
        "object store too small for the data stream",
        lost="time only",
        read=line,
        whole_stage=result["seconds"],
    )


def test_shared_memory_too_small_for_the_object_store(tmp_path: Path, record_property: Record) -> None:
    stage = [sys.executable, "-m", "jobs.cli", "collect", "--game", "pong", "--frames", "600", "--num-workers", "1"]
    stage += ["--out", str(tmp_path / "frames"), "--json"]
    inside = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"'  # what docker gives by default
    as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    command = ["unshare", *as_root, "--mount", "sh", "-c", inside, "sh", *stage]
    variables = {**os.environ, "PYTHONPATH": str(nodes.ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=variables)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["frames"] == 600
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
    assert "/dev/shm has 64 MiB free" in line
    measured(record_property, "shared memory too small for the object store", lost="speed only", read=line)
