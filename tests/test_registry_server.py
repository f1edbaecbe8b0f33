"""A real `mlflow server` that hangs, dies and comes back, and addresses where none is."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import signal
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import pytest
from lineage_toys import Maker
from mlflow import MlflowClient
from registry_toys import PREPROCESS, Z_DIM, MlflowServer, free_port, make_encoder, running_server

from jobs import gc, lineage
from jobs import sync as sync_stage
from jobs.workspace import Workspace
from pipeline import server as server_module
from pipeline import unused
from pipeline.errors import TrackingPending, UserError
from pipeline.registry import Registered, Run, Tracking, register_encoder, registrations, resolve, sync

LIMIT_S = 20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    with running_server(tmp_path_factory.mktemp("server") / "server") as server:
        yield server


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("bundle") / "bundle")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shortens the waits that a user grants a server that may come back."""
    monkeypatch.setattr("pipeline.tracking.CLOSE_PATIENCE_S", 1.0)
    monkeypatch.setattr("pipeline.registry.REGISTER_PATIENCE_S", 1.0)


def start(server: MlflowServer, folder: Path) -> Run:
    return Tracking(server.uri).start_run(folder.name, stage="pretrain", folder=folder)


def register(run: Run, bundle: Path, name: str) -> Registered | None:
    return register_encoder(run, bundle, name, bits_per_dim=1.0, active_fraction=1.0, has_heldout=True)


def steps_of(client: MlflowClient, run: Run) -> list[int]:
    return [metric.step for metric in client.get_metric_history(run.run_id, "loss")]


def test_a_server_serves_as_the_sqlite_file_does(
    server: MlflowServer, bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with start(server, tmp_path / "served-001") as run:
        run.log_params({"seed": 0})
        for step in range(2500):
            run.log_metrics({"loss": 1.0}, step)
        run.log_folder(shutil.copytree(bundle, run.folder / "encoder"), "encoder")
        registered = register(run, bundle, "served")
    assert run.delivered({"key": 1}) == {"key": 1}
    assert registered is not None
    assert capfd.readouterr().out == ""
    client = MlflowClient(server.uri, server.uri)
    assert steps_of(client, run) == list(range(2500))
    for address in ("models:/served@champion", "models:/served@latest", f"runs:/{run.run_id}/encoder"):
        assert resolve(address, server.uri, tmp_path / "cache").sha256 == registered.sha256
    latents = mlflow.pyfunc.load_model(registered.uri).predict(np.zeros((2, 24, 24), np.uint8))
    assert (latents.shape, PREPROCESS.height) == ((2, Z_DIM), 24)
    with pytest.raises(UserError, match="did you mean served"):
        resolve("models:/serve@champion", server.uri, tmp_path / "cache")
    record = json.loads((run.folder / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**record, "run_id": "0" * 32}))
    with pytest.raises(UserError, match="is gone from"):
        Tracking(server.uri).resume_run(tmp_path)


def test_a_server_that_hangs_is_noticed_in_time(server: MlflowServer, tmp_path: Path, impatient: None) -> None:
    run = start(server, tmp_path / "hung-001")
    server.signal(signal.SIGSTOP)
    try:
        run.log_metrics({"loss": 1.0}, 0)
        started = time.monotonic()
        with pytest.raises(UserError, match="no answer in time"):
            Tracking(server.uri).check()
        with pytest.raises(UserError, match="no answer in time"):
            resolve("models:/served@champion", server.uri, tmp_path / "cache")
        run.close()
        assert time.monotonic() - started < LIMIT_S
        assert run.pending
    finally:
        server.signal(signal.SIGCONT)
    sync(run.folder)
    assert steps_of(MlflowClient(server.uri, server.uri), run) == [0]


def test_a_server_that_dies_stops_nobody_and_gets_everything_later(
    server: MlflowServer, bundle: Path, tmp_path: Path, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = MlflowClient(server.uri, server.uri)
    workspace = Workspace.at(str(tmp_path), server.uri)
    ended, going_on = (start(server, workspace.new_run_folder("pretrain")) for _ in range(2))
    for run in (ended, going_on):
        run.log_metrics({"loss": 1.0}, 0)
    server.kill()

    started = time.monotonic()
    for run in (ended, going_on):
        for step in range(1, 1000):
            run.log_metrics({"loss": 1.0}, step)
        run.log_file(Path(shutil.copy(bundle / "config.json", run.folder)))
    assert time.monotonic() - started < 2.0
    assert register(ended, bundle, "late") is None
    ended.close()
    assert ended.pending
    with pytest.raises(TrackingPending, match=f"latentrl sync {ended.folder.name}$"):
        ended.delivered({})
    (ended.folder / "result.json").write_text(json.dumps({"model_uri": None, "version": None, "aliases": []}))
    with pytest.raises(UserError, match="connection refused"):
        sync_stage.run(workspace, ended.folder.name)

    server.start()
    monkeypatch.undo()  # who is back may be slow on a busy machine
    assert sync_stage.run(workspace, ended.run_id)["registered"] == ["models:/late/1"]
    assert sync_stage.run(workspace, ended.folder.name)["delivered"] == 0
    going_on.log_metrics({"loss": 1.0}, 1000)
    monitored = register(going_on, bundle, "late")
    going_on.close()
    assert not going_on.pending
    assert steps_of(client, ended) == list(range(1000))
    assert steps_of(client, going_on) == list(range(1001))
    assert client.get_run(ended.run_id).info.status == "FINISHED"
    assert [file.path for file in client.list_artifacts(ended.run_id)] == ["config.json"]
    assert json.loads((ended.folder / "result.json").read_text())["aliases"] == ["latest", "champion"]
    assert monitored is not None
    assert registrations(going_on.folder) == [monitored]
    assert len(client.search_model_versions("name='late'")) == 2


BAD_ADDRESSES = {
    "http://127.0.0.1:{closed}": "connection refused",
    "http://user:secret@127.0.0.1:{mute}": "no answer in time",
    "http://no-such-host.invalid:5000": "tracking server http://no-such-host.invalid:5000: ",
    "ftp://user:secret@host/x": "is not one I know",
    "mlflow.db": "is not one I know",
    "http://": "malformed",
    "http://user:se/cret@host:port": "malformed",
    "http://host:5000/?token=secret": "malformed",
    "sqlite://": "names no file",
    "sqlite:///:memory:": "names no file",
    "sqlite:////dev/null/mlflow.db": "cannot be used",
    "sqlite:////proc/none/mlflow.db": "cannot be used",
    "sqlite:///{text}": "cannot be used .*not a database",
    "sqlite:///{folder}": "cannot be used",
}


@pytest.mark.parametrize("address", BAD_ADDRESSES)
def test_a_bad_address_is_one_line_in_time_without_its_secrets(address: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no database " * 100)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        places = {"closed": free_port(), "mute": mute.getsockname()[1], "text": tmp_path / "text", "folder": tmp_path}
        started = time.monotonic()
        with pytest.raises(UserError, match=BAD_ADDRESSES[address]) as caught:
            Tracking(address.format(**places)).check()
    assert time.monotonic() - started < LIMIT_S
    assert not [leak for leak in ("secret", "cret@", "\n") if leak in str(caught.value)]


def test_lineage_and_gc_ask_a_server_as_they_do_a_file(
    server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole line, and the files of a deleted version, which the server removes on request."""
    maker = Maker(server.uri, tmp_path, pipeline="tuesday")
    facts = maker.dataset()
    _, encoder = maker.encoder(facts, "distant")
    maker.agent(encoder.uri, "distant-player")
    workspace = Workspace.at(str(tmp_path), server.uri)
    for asked in ("models:/distant-player/1", "tuesday"):
        result = lineage.run(workspace, asked)
        assert [data["key"] for data in result["data"]] == [facts["digest"]]
        assert result["missing"] == 0
    monkeypatch.setattr(unused, "SETTLED_S", -60.0)
    client = MlflowClient(server.uri, server.uri)
    source = client.get_model_version("distant-player", "1").source.removeprefix("models:/")
    client.delete_model_version("distant-player", "1")
    files = server.folder / "artifacts"
    assert any(source in str(path) for path in files.rglob("q.safetensors"))
    assert [item["what"] for item in gc.run(workspace)["items"]] == [f"models:/{source}"]
    assert gc.run(workspace, delete=True)["errors"] == []
    assert not any(source in str(path) for path in files.rglob("q.safetensors"))
    maker.resolved(encoder.uri)


class Doorman(http.server.BaseHTTPRequestHandler):
    """Answers every request with the status that its server holds."""

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(self.server.status)  # type: ignore[attr-defined]
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_GET

    def log_message(self, *args: object) -> None:
        pass


@pytest.mark.parametrize(
    ("status", "reason"),
    [(401, "MLFLOW_TRACKING_PASSWORD"), (403, "denied"), (404, "not as an MLflow server"), (502, "HTTP 502")],
)
def test_an_answer_that_is_not_mlflows(status: int, reason: str) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Doorman) as other:
        other.status = status  # type: ignore[attr-defined]
        threading.Thread(target=other.serve_forever, daemon=True).start()
        with pytest.raises(UserError, match=reason):
            Tracking(f"http://127.0.0.1:{other.server_port}").check()
        other.shutdown()


def test_a_locked_database_is_named_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "DATABASE_LOCK_WAIT_S", 0.2)
    holder = sqlite3.connect(tmp_path / "mlflow.db")
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(UserError, match="database is locked"):
        Tracking(f"sqlite:///{tmp_path}/mlflow.db").check()
    holder.close()


def test_credentials_reach_mlflow_but_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(variable, "")
    address = server_module.Address.parse("https://me:p%40ss@Host:8443/mlflow/")
    assert address.uri == "https://host:8443/mlflow"
    assert "p@ss" not in repr(address)
    server_module.connect(address)
    assert (os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]) == ("me", "p@ss")
