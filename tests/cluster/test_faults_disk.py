"""Disks that fill up under a checkpoint or an artifact: one line, nothing half-written, and on when there is space."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from fault_rows import Record, measured
from mlflow import MlflowClient
from registry_toys import MlflowServer
from rl_toys import make_encoder
from running import Stage
from small_disk import small_disk
from test_train_command import SETTINGS, TINY
from toy_frames import toy_dataset

from pipeline import bundle
from pipeline.atari import preprocess_for
from pipeline.registry import resolve

pytestmark = pytest.mark.long

MODEL = {"model.z_dim": 4, "model.patch": 2, "model.widths": "[8,8]", "train.batch_size": 16, "train.num_threads": 1}


def sets(settings: dict[str, object]) -> list[str]:
    return [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]


def pretraining(folder: Path, home: Path, tracking: str, *more: object, **settings: object) -> Stage:
    """Of a toy dataset, by a Ray of its own."""
    data = folder / "frames"
    if not data.exists():
        toy_dataset(data, [60] * 12, num_files=3)
    chosen = {**MODEL, **{f"train.{name}": value for name, value in settings.items()}}
    given = ["--data", data, "--register", "toy", "--home", home, "--tracking-uri", tracking, *sets(chosen)]
    return Stage(folder / "said", "pretrain", *given, *more)


def test_a_disk_full_in_a_checkpoint_of_train(tmp_path: Path, record_property: Record) -> None:
    encoder = make_encoder(tmp_path / "encoder", preprocess_for("pong"), TINY, standardise=False)
    with small_disk(tmp_path / "disk", 16) as disk:
        folder = disk.path / "runs" / "train-pong-frozen-001"
        chosen = sets({f"train.{name}": value for name, value in SETTINGS.items()})
        places = ["--home", disk.path, "--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db"]
        given = ["train", "--game", "pong", "--encoder", encoder, *chosen, *places, "--num-env-runners", 0]
        stage = Stage(tmp_path / "said", *given, "--agent-steps", 10**9)
        stage.wait_for(lambda: (folder / "checkpoint" / "SHA256SUMS").is_file())
        disk.fill(leave_bytes=40_000)
        code, seconds = stage.end()
        assert code == 2, stage.lines[-20:]
        line = str(stage.line("^error"))
        assert line.startswith(f"error: the disk of {folder} is full")
        assert "of 16.0 MiB free" in line
        assert not stage.line("Traceback")
        bundle.verify(folder / "checkpoint")
        assert [path.name for path in folder.glob(".checkpoint*")] == []
        disk.empty()
        kept = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]
        result = Stage(tmp_path / "said", *given, "--agent-steps", kept + 500, "--resume").result()
        assert result["agent_steps"] >= kept + 500
        measured(
            record_property,
            "disk full in a checkpoint of train",
            lost="what came after the checkpoint before, which is whole",
            read=line,
            until_exit_2=seconds,
        )


def test_a_disk_full_in_a_checkpoint_of_pretrain(tmp_path: Path, record_property: Record) -> None:
    with small_disk(tmp_path / "disk", 16) as disk:
        folder = disk.path / "runs" / "pretrain-toy-001"
        tracking = f"sqlite:///{tmp_path}/mlflow.db"
        stage = pretraining(tmp_path, disk.path, tracking, epochs=15, frames_per_epoch=3_200)
        stage.wait_for(lambda: [*(folder / "checkpoints").glob("step-*/SHA256SUMS")])
        disk.fill(leave_bytes=8_192)
        code, seconds = stage.end()
        assert code == 2, stage.lines[-20:]
        line = str(stage.line("^error"))
        assert line.startswith(f"error: the disk of {disk.path}")
        assert "of 16.0 MiB free" in line
        assert not stage.line("Traceback")
        disk.empty()
        resumed = pretraining(tmp_path, disk.path, tracking, "--resume", epochs=15, frames_per_epoch=3_200)
        assert resumed.result()["updates"] == 15 * 200
        measured(
            record_property,
            "disk full in a checkpoint of pretrain",
            lost="what came after the checkpoint before, which is whole",
            read=line,
            until_exit_2=seconds,
        )


def test_a_disk_full_under_the_artifact_store(tmp_path: Path, record_property: Record) -> None:
    (tmp_path / "server").mkdir()
    server = MlflowServer(tmp_path / "server")
    with small_disk(server.folder / "artifacts", 4) as disk:
        server.start()
        try:
            disk.fill(leave_bytes=4_096)
            began = time.monotonic()
            stage = pretraining(tmp_path, tmp_path / "home", server.uri, epochs=1)
            code, _ = stage.end()
            assert code == 3, stage.lines[-20:]
            line = str(stage.line("latentrl sync"))
            seconds = time.monotonic() - began
            disk.empty()
            home = ["--home", tmp_path / "home", "--tracking-uri", server.uri]
            delivered = Stage(tmp_path / "said", "sync", "pretrain-toy-001", *home).result()
            assert delivered["registered"] == ["models:/toy/1"]
            result = json.loads((tmp_path / "home" / "runs" / "pretrain-toy-001" / "result.json").read_text())
            assert resolve("models:/toy/1", server.uri, tmp_path / "cache").sha256 == result["sha256"]
            assert len(MlflowClient(server.uri, server.uri).search_model_versions("name='toy'")) == 1
        finally:
            server.kill()
    measured(
        record_property,
        "disk full in an artifact upload",
        lost=f"nothing: {delivered['delivered']} entries waited in the run's folder for `latentrl sync`",
        read=line,
        whole_stage=seconds,
    )
