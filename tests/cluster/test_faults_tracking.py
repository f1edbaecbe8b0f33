"""Tracking servers that die in the midst of a run: for a minute, until after its end, or their database or store."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from fault_rows import Record, measured
from mlflow import MlflowClient
from registry_toys import running_server
from running import Stage
from services import Mlflow, ObjectStore, Postgres
from test_faults_disk import pretraining

from pipeline.registry import resolve

pytestmark = pytest.mark.long

AWAY_S = 60.0


def recorded(home: Path) -> list[int]:
    """Updates by which the run has a loss in its own record."""
    lines = (home / "runs" / "pretrain-toy-001" / "metrics.jsonl").read_text().splitlines()
    return [values["step"] for values in map(json.loads, lines) if "loss" in values]


def served(uri: str, home: Path) -> list[int]:
    """The same as the server has it."""
    run_id = json.loads((home / "runs" / "pretrain-toy-001" / "run.json").read_text())["run_id"]
    return [metric.step for metric in MlflowClient(uri, uri).get_metric_history(run_id, "loss")]


def under_way(tmp_path: Path, uri: str, seconds: float) -> Stage:
    """A pretraining of about so many seconds, of which the server has heard something."""
    stage = pretraining(tmp_path, tmp_path / "home", uri, epochs=10**6, frames_per_epoch=3_200, max_seconds=seconds)
    metrics = tmp_path / "home" / "runs" / "pretrain-toy-001" / "metrics.jsonl"
    stage.wait_for(lambda: metrics.is_file() and metrics.stat().st_size > 5_000)
    return stage


def test_a_server_that_is_down_for_a_minute(tmp_path: Path, record_property: Record) -> None:
    with running_server(tmp_path / "server") as server:
        stage = under_way(tmp_path, server.uri, AWAY_S + 45.0)
        server.kill()
        noticed = stage.wait_for_line("the run goes on and is sent when tracking is back")
        before = len(recorded(tmp_path / "home"))
        time.sleep(AWAY_S - noticed)
        meanwhile = len(recorded(tmp_path / "home")) - before
        assert meanwhile > 0
        server.start()
        back = stage.wait_for_line("tracking is back after")
        result = stage.result()
        assert result["model_uri"] == "models:/toy/1"
        steps = recorded(tmp_path / "home")
        assert served(server.uri, tmp_path / "home") == steps
    measured(
        record_property,
        "MLflow server down for a minute",
        lost=f"nothing: {len(steps)} of {len(steps)} rows are there, {meanwhile} of them from while it was away",
        read=str(stage.line("the run goes on")),
        until_noticed=noticed,
        from_its_return_until_delivery=back,
    )


def test_a_server_that_is_down_until_after_the_end(tmp_path: Path, record_property: Record) -> None:
    with running_server(tmp_path / "server") as server:
        stage = under_way(tmp_path, server.uri, 20.0)
        server.kill()
        stage.wait_for_line("the run goes on and is sent when tracking is back")
        code, _ = stage.end()
        assert code == 3, stage.lines[-20:]
        server.start()
        began = time.monotonic()
        place = ["--home", tmp_path / "home", "--tracking-uri", server.uri]
        delivered = Stage(tmp_path / "said", "sync", "pretrain-toy-001", *place).result()
        seconds = time.monotonic() - began
        steps = recorded(tmp_path / "home")
        assert served(server.uri, tmp_path / "home") == steps
        assert delivered["registered"] == ["models:/toy/1"]
    measured(
        record_property,
        "MLflow server down until after the end",
        lost=f"nothing: `latentrl sync` delivered {delivered['delivered']} entries, the registration among them",
        read=str(stage.line("latentrl sync")),
        sync_took=seconds,
    )


def test_its_database_restarts_and_its_store_goes_away(
    postgres: Postgres, store: ObjectStore, mlflow_server: Mlflow, tmp_path: Path, record_property: Record,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name, value in mlflow_server.variables().items():
        monkeypatch.setenv(name, value)
    stage = under_way(tmp_path, mlflow_server.address, 60.0)
    postgres.kill()
    noticed = stage.wait_for_line("the run goes on and is sent when tracking is back")
    postgres.start()
    back = stage.wait_for_line("tracking is back after")
    measured(
        record_property,
        "PostgreSQL killed and started again",
        lost="nothing: see the next row for the count",
        read=str(stage.line("the run goes on")),
        until_noticed=noticed,
        from_its_return_until_delivery=back,
    )
    store.kill()
    code, _ = stage.end()
    assert code == 3, stage.lines[-20:]
    store.start()
    place = ["--home", tmp_path / "home", "--tracking-uri", mlflow_server.address]
    began = time.monotonic()
    delivered = Stage(tmp_path / "said", "sync", "pretrain-toy-001", *place).result()
    steps = recorded(tmp_path / "home")
    assert served(mlflow_server.address, tmp_path / "home") == steps
    result = json.loads((tmp_path / "home" / "runs" / "pretrain-toy-001" / "result.json").read_text())
    (uri,) = delivered["registered"]
    assert resolve(uri, mlflow_server.address, tmp_path / "cache").sha256 == result["sha256"]
    measured(
        record_property,
        "artifact store away during an upload",
        lost=f"nothing: `latentrl sync` delivered {delivered['delivered']} entries; {len(steps)} of {len(steps)} rows",
        read=str(stage.line("latentrl sync")),
        sync_took=time.monotonic() - began,
    )
