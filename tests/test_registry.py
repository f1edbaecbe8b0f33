"""Runs on a real sqlite store: what arrives, what goes on, what is delivered later."""

from __future__ import annotations

import contextlib
import json
import shlex
import time
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from registry_toys import register

from jobs import sync as sync_stage
from jobs.workspace import Workspace
from pipeline import machine
from pipeline.errors import TrackingPending, UserError
from pipeline.registry import (
    Run,
    Tracking,
    registrations,
    resolve,
    sync,
    ui_command,
)
from pipeline.tracking import flatten

pytest_plugins = ["registry_fixtures"]


def test_a_run_arrives_whole(run: Run, client: MlflowClient, tmp_path: Path) -> None:
    before_ms = time.time() * 1000
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"png")
    (tmp_path / "note.txt").write_text("x")
    run.log_params({"model": {"z_dim": 6, "widths": (4, 8)}, "seed": 0, "long": "x" * 9000, "none": None})
    for step in range(3):
        run.log_metrics({"loss": 1.0 / (step + 1), "epoch": step}, step)
    run.set_tags({"game": "pong"})
    with pytest.raises(ValueError, match="not in the run's folder"):
        run.log_file(tmp_path / "note.txt")
    run.log_file((tmp_path / "note.txt").rename(run.folder / "note.txt"))
    run.log_folder((tmp_path / "pictures").rename(run.folder / "pictures"), "pictures")
    run.log_dataset({"uri": "/data/pong", "game": "pong", "digest": "ab" * 32, "policy_uri": None}, "pretrain")
    run.close()
    assert not run.pending

    seen = client.get_run(run.run_id)
    assert seen.info.status == "FINISHED"
    assert {k: v for k, v in seen.data.params.items() if k != "long"} == {
        "model.z_dim": "6",
        "model.widths": "(4, 8)",
        "seed": "0",
        "none": "None",
    }
    assert len(seen.data.params["long"]) == 6000
    history = client.get_metric_history(run.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(0, 1.0), (1, 0.5), (2, 1.0 / 3)]
    assert all(before_ms - 1 <= m.timestamp <= time.time() * 1000 for m in history)
    assert seen.data.tags["game"] == "pong"
    assert seen.data.tags["stage"] == "pretrain"
    assert seen.data.tags["version.torch"] == torch.__version__
    assert seen.data.tags["dataset.digest"] == "ab" * 32
    (dataset,) = seen.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("pong", "ab" * 18)
    assert dataset.tags[0].value == "pretrain"
    assert {file.path for file in client.list_artifacts(run.run_id)} == {"note.txt", "pictures"}
    assert [file.path for file in client.list_artifacts(run.run_id, "pictures")] == ["pictures/a.png"]


def test_nan_and_infinity_are_left_out_and_said_once(
    run: Run, client: MlflowClient, caplog: pytest.LogCaptureFixture
) -> None:
    for step in range(3):
        run.log_metrics({"loss": float("nan"), "grad": float("inf"), "ok": torch.tensor(1.5)}, step)
    run.close()
    assert set(client.get_run(run.run_id).data.metrics) == {"ok"}
    warnings = [record.getMessage() for record in caplog.records]
    assert sum("metric loss is nan" in text for text in warnings) == 1
    assert sum("metric grad is inf" in text for text in warnings) == 1


def test_runs_nest_under_a_parent(run: Run, uri: str, client: MlflowClient, tmp_path: Path) -> None:
    child = Tracking(uri).start_run("c", stage="train", folder=tmp_path / "c", parent_run_id=run.run_id)
    child.close()
    assert client.get_run(child.run_id).data.tags["mlflow.parentRunId"] == run.run_id


@pytest.mark.parametrize(
    ("error", "status"), [(None, "FINISHED"), (ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")]
)
def test_the_status_tells_how_it_ended(
    error: type[BaseException] | None, status: str, run: Run, client: MlflowClient
) -> None:
    with contextlib.suppress(ValueError, KeyboardInterrupt), run:
        if error is not None:
            raise error
    assert client.get_run(run.run_id).info.status == status


def test_a_changed_parameter_is_refused_without_harm(run: Run, client: MlflowClient) -> None:
    run.log_params({"lr": 1})
    run.log_params({"lr": 2, "seed": 0})
    run.log_metrics({"loss": 1.0}, 0)
    run.close()
    assert not run.pending
    seen = client.get_run(run.run_id)
    assert seen.data.params == {"lr": "1", "seed": "0"}
    assert seen.data.metrics == {"loss": 1.0}
    assert "lr" in (run.folder / "outbox.refused.jsonl").read_text()


def test_a_run_goes_on_in_its_folder(run: Run, uri: str, client: MlflowClient, tmp_path: Path) -> None:
    run.log_metrics({"loss": 1.0}, 0)
    run.close("KILLED")
    tracking = Tracking(uri)
    with pytest.raises(UserError, match="--resume"):
        tracking.start_run("again", stage="pretrain", folder=run.folder)
    resumed = tracking.resume_run(run.folder)
    assert resumed.run_id == run.run_id
    resumed.log_metrics({"loss": 0.5}, 1)
    with pytest.raises(UserError, match="another process"):
        tracking.resume_run(run.folder)
    resumed.close()
    assert [m.step for m in client.get_metric_history(run.run_id, "loss")] == [0, 1]
    assert client.get_run(run.run_id).info.status == "FINISHED"
    with pytest.raises(UserError, match="is tracked at sqlite"):
        Tracking(f"sqlite:///{tmp_path}/other.db").resume_run(run.folder)
    with pytest.raises(UserError, match=r"no run\.json"):
        tracking.resume_run(tmp_path)


def test_delivering_everything_again_changes_nothing(run: Run, bundle: Path, client: MlflowClient, name: str) -> None:
    run.log_params({"lr": 1})
    run.log_metrics({"loss": 1.0}, 0)
    registered = register(run, bundle, name)
    run.close()
    (run.folder / "outbox.done").unlink()
    assert sync(run.folder) > 5
    assert sync(run.folder) == 0
    assert len(client.get_metric_history(run.run_id, "loss")) == 1
    assert len(client.search_model_versions(f"name='{name}'")) == 1
    assert len(client.search_logged_models([run.record.experiment_id], f"source_run_id = '{run.run_id}'")) == 1
    assert registrations(run.folder) == [registered]
    assert not list((run.folder / "staged").iterdir())


def test_looking_does_not_make_a_database(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tracking database at"):
        resolve("models:/x@latest", f"sqlite:///{tmp_path}/none/mlflow.db", tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


def test_sync_takes_only_runs(uri: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run's folder"):
        sync(tmp_path)
    with pytest.raises(UserError, match="no run 'x'"):
        sync_stage.run(Workspace.at(str(tmp_path), uri), "x")


def test_a_store_that_forgot_the_run_gets_nothing_and_loses_nothing(run: Run, tmp_path: Path) -> None:
    run.close()
    record = json.loads((run.folder / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**record, "run_id": "0" * 32}))
    (tmp_path / "outbox.jsonl").write_bytes((run.folder / "outbox.jsonl").read_bytes())
    with pytest.raises(TrackingPending, match=f"does not know run 0000.*latentrl sync {tmp_path.name}$"):
        sync(tmp_path)
    with pytest.raises(TrackingPending):
        sync(tmp_path)


def test_sync_fills_in_what_the_stage_could_not_know(
    run: Run, bundle: Path, uri: str, name: str, tmp_path: Path
) -> None:
    registered = register(run, bundle, name)
    run.close()
    unknown = {"model_uri": None, "version": None, "aliases": [], "seconds": 1.0}
    (run.folder / "result.json").write_text(json.dumps(unknown))
    report = sync_stage.run(Workspace.at(str(tmp_path), uri), str(run.folder))
    assert report == {"run": run.folder.name, "delivered": 0, "registered": [registered.uri]}
    result = json.loads((run.folder / "result.json").read_text())
    assert result == {
        **{"model_uri": registered.uri, "version": "1", "aliases": ["latest", "champion"]},
        "seconds": 1.0,
    }


def test_system_metrics(run: Run, client: MlflowClient) -> None:
    run._log_machine(machine.MachineMeter().read())
    run.close()
    metrics = client.get_run(run.run_id).data.metrics
    assert metrics["system/process_cpu_seconds"] > 0
    assert metrics["system/process_peak_memory_megabytes"] > 10


def test_the_meter_reports_until_it_is_stopped() -> None:
    figures: list[dict[str, float]] = []
    stop = machine.every(0.02, figures.append)
    time.sleep(0.3)
    stop()
    time.sleep(0.05)
    num = len(figures)
    assert num >= 3
    assert all(0 <= f.get("system/cpu_utilization_percentage", 0) <= 100 for f in figures)
    time.sleep(0.1)
    assert len(figures) == num


def test_flatten() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": 2}, "e": []}) == {"a.b.c": 1, "a.d": 2, "e": []}


def test_the_ui_command_is_one_a_shell_takes(uri: str) -> None:
    words = shlex.split(ui_command(uri))
    assert words[1:] == ["ui", "--backend-store-uri", uri]
    assert Path(words[0]).exists()
    assert ui_command("http://user:secret@host:5000/") == "http://host:5000"
