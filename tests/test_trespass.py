"""Names that lead elsewhere, and folders and servers of other people: nothing outside of its place is read, written,
removed or sent, and no password goes to a stranger.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import pytest
from mlflow import MlflowClient
from toy_frames import toy_dataset

from jobs.cli import main
from jobs.workspace import Workspace
from pipeline import bundle
from pipeline.errors import UserError
from pipeline.journal import JOURNAL_FILE
from pipeline.outbox import REFUSED_FILE, read_lines
from pipeline.registry import Run, check_model_name, resolve, sync
from pipeline.schema import MANIFEST_FILE
from pipeline.storage import locate
from pipeline.store import FramesDataset
from pipeline.tracking import RunRecord
from pipeline.untrusted import require_inside

pytest_plugins = ["registry_fixtures"]

ELSEWHERE = ("..", "../x", "a/../../x", "/etc/passwd", "a\\..\\x", "~/x", "%2e%2e/x", "a\0b", "x\n/../y", "c:/x", "")


@pytest.mark.parametrize("name", ELSEWHERE)
def test_names_that_lead_elsewhere(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="leads elsewhere"):
        require_inside(name, "an archive")
    with pytest.raises(UserError):
        check_model_name(name)
    dataset = toy_dataset(tmp_path / "data", [20, 20])
    path = tmp_path / "data" / MANIFEST_FILE
    manifest = json.loads(path.read_text())
    manifest["files"][0]["name"] = name
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="leads elsewhere"):
        FramesDataset.open(dataset.uri)


@pytest.mark.parametrize("address", ["runs:/0123/../../x", "runs:/0123/a/../../../x", "runs:/0123/%2e%2e/x"])
def test_addresses_that_lead_elsewhere(uri: str, client: MlflowClient, tmp_path: Path, address: str) -> None:
    with pytest.raises(UserError, match="leads elsewhere"):
        resolve(address, uri, tmp_path / "cache")
    for place in ("s3://bucket/a/../../b", "file:///tmp/../etc", "gs://bucket/..", "a\0b"):
        with pytest.raises(UserError, match="as a place for data"):
            locate(place)


def test_a_name_of_a_run_is_no_path(tmp_path: Path) -> None:
    """A run's folder may be given as a path, as the help says; a bare name is looked for among the runs only."""
    workspace = Workspace.at(str(tmp_path / "home"))
    (tmp_path / "home/runs/train-001").mkdir(parents=True)
    (tmp_path / "home/secret").mkdir()
    for folder in ("runs/train-001", "secret"):
        RunRecord("0" * 32, "1", "sqlite:////x.db", "n", "train", 1).write(tmp_path / "home" / folder)
    assert workspace.find_run("train-001").name == "train-001"
    for name in ("../secret", "..", "train-001/../../secret", "a\0b", "~nobody/x"):
        with pytest.raises(UserError, match="there is no run"):
            workspace.find_run(name)


def test_sums_that_name_files_elsewhere(tmp_path: Path) -> None:
    with bundle.writing(tmp_path / "it") as draft:
        (draft / "a").write_text("a")
    (tmp_path / "outside").write_text("secret")
    sums = (tmp_path / "it/SHA256SUMS").read_text()
    (tmp_path / "it/SHA256SUMS").write_text(f"{sums}{bundle._hash(tmp_path / 'outside')}  ../outside\n")
    with pytest.raises(UserError, match=r"\.\./outside is missing"):
        bundle.verify(tmp_path / "it")
    (tmp_path / "it/SHA256SUMS").write_text(f"{sums}{'0' * 64}  {'x' * 5000}\n")
    with pytest.raises(UserError, match=r"xxx' is missing") as refusal:
        bundle.verify(tmp_path / "it")
    assert len(str(refusal.value)) < 400


def test_the_journal_of_a_stranger(run: Run, client: MlflowClient, tmp_path: Path) -> None:
    """Delivered by `latentrl sync`, it can neither send this user's files nor remove them."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/key").write_text("secret")
    (run.folder / "inner").symlink_to(tmp_path / "mine")
    (run.folder / "note.txt").write_text("hello")
    run.log_file(run.folder / "note.txt")
    run.close()
    seq = len((run.folder / JOURNAL_FILE).read_text().splitlines())
    version = {"name": "x", "tags": {"kind": "policy", "bundle_sha256": "0"}, "promote": False}
    planted = [
        ("file", {"path": str(tmp_path / "mine/key"), "directory": ""}),
        ("file", {"path": f"{run.folder}/../mine/key", "directory": ""}),
        ("file", {"path": str(run.folder / "inner/key"), "directory": ""}),
        ("folder", {"path": str(tmp_path / "mine"), "directory": "x"}),
        ("folder", {"path": str(run.folder), "directory": "x"}),
        ("register", {**version, "path": str(tmp_path / "mine")}),
        ("register", {**version, "path": "/"}),
        ("describe", {"sha256": "0", "description": "x", "tags": {"bundle_sha256": "1"}}),
        ("describe", {"sha256": "0", "description": "x", "tags": {"probe.f1": 1}}),
        ("execute", {"command": "true"}),
        ("metrics", {"step": 1, "values": {"a": "b"}}),
        ("tag", {"key": ["a"], "value": "b"}),
    ]
    with (run.folder / JOURNAL_FILE).open("a") as journal:
        for number, (kind, body) in enumerate(planted):
            journal.write(json.dumps({"seq": seq + 1 + number, "time_ms": 1, "kind": kind, "body": body}) + "\n")
    with pytest.raises(UserError, match="'inner', neither a file nor a folder"):
        sync(run.folder)
    (run.folder / "inner").unlink()
    assert sync(run.folder) == len(planted)
    refused = read_lines(run.folder / REFUSED_FILE)
    assert [record["kind"] for record in refused] == [kind for kind, _ in planted]
    assert [file.path for file in client.list_artifacts(run.run_id)] == ["note.txt"]
    assert (tmp_path / "mine/key").read_text() == "secret"


def test_another_programs_database_is_left_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with sqlite3.connect(tmp_path / "browser.db") as database:
        database.execute("CREATE TABLE bookmarks (url TEXT)")
    before = (tmp_path / "browser.db").read_bytes()
    folder = tmp_path / "home/runs/train-001"
    folder.mkdir(parents=True)
    RunRecord("0" * 32, "1", f"sqlite:///{tmp_path}/browser.db", "n", "train", 1).write(folder)
    line = {"seq": 1, "time_ms": 1, "kind": "status", "body": {"status": "FINISHED"}}
    (folder / JOURNAL_FILE).write_text(json.dumps(line) + "\n")
    assert main(["sync", "train-001", "--home", str(tmp_path / "home")]) == 2
    assert "is another program's database" in capfd.readouterr().err
    assert (tmp_path / "browser.db").read_bytes() == before


@dataclass
class Stranger:
    """An HTTP server that answers as MLflow's would, names files as it likes, and remembers who asked it."""

    port: int = 0
    names: tuple[str, ...] = ()
    headers: list[dict[str, str]] = field(default_factory=list)

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def answer(self, path: str) -> bytes:
        """What MLflow's client wants to hear on the way to a run's artifacts."""
        parts = urlparse(path)
        asked = parse_qs(parts.query).get("path", [""])[0]
        if parts.path.endswith("runs/get"):
            info = {"run_id": "0123", "run_uuid": "0123", "experiment_id": "1", "status": "FINISHED"}
            info |= {"artifact_uri": "mlflow-artifacts:/1/0123/artifacts", "lifecycle_stage": "active"}
            return json.dumps({"run": {"info": info, "data": {}}}).encode()
        if parts.path.endswith("mlflow-artifacts/artifacts"):
            files = [{"path": name, "is_dir": False, "file_size": 4} for name in self.names]
            in_root = [{"path": "bundle", "is_dir": True}]
            listed = in_root if asked.endswith("artifacts") else files if asked.endswith("bundle") else []
            return json.dumps({"files": listed}).encode()
        return b"evil" if "/mlflow-artifacts/artifacts/" in parts.path else b"{}"


@pytest.fixture
def stranger() -> Iterator[Stranger]:
    it = Stranger()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            it.headers.append({key.lower(): value for key, value in self.headers.items()})
            self.rfile.read(int(self.headers.get("content-length") or 0))
            content = it.answer(self.path)
            self.send_response(200)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        it.port = server.server_port
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield it
        server.shutdown()


@pytest.mark.parametrize("name", ["../../../../evil", "/tmp/latentrl-evil", "..\\..\\evil", "a/../../../../../evil"])
def test_a_server_that_names_files_elsewhere(stranger: Stranger, tmp_path: Path, name: str) -> None:
    stranger.names = ("SHA256SUMS", name)
    with pytest.raises(UserError):
        resolve("runs:/0123/bundle", stranger.uri, tmp_path / "home/cache")
    assert stranger.headers
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"] == []
    assert not Path("/tmp/latentrl-evil").exists()


def test_a_version_whose_files_lie_at_a_stranger(
    uri: str, client: MlflowClient, stranger: Stranger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who may register a model chooses where its files lie, and MLflow would take the user's password there."""
    client.create_registered_model("bait")
    client.create_model_version("bait", f"{stranger.uri}/api/2.0/mlflow-artifacts/artifacts/x")
    with pytest.raises(UserError):
        resolve("models:/bait/1", uri, tmp_path / "cache")
    assert stranger.headers  # without a password it was asked, and its files were not sound
    asked = len(stranger.headers)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    with pytest.raises(UserError, match="would be sent there"):
        resolve("models:/bait/1", uri, tmp_path / "cache")
    assert len(stranger.headers) == asked


def test_a_run_that_says_it_is_tracked_at_a_stranger(
    stranger: Stranger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    folder = tmp_path / "home/runs/train-001"
    folder.mkdir(parents=True)
    RunRecord("0" * 32, "1", stranger.uri, "train-001", "train", 1).write(folder)
    (folder / JOURNAL_FILE).write_text('{"seq": 1, "time_ms": 1, "kind": "status", "body": {"status": "FINISHED"}}\n')
    for command in ("sync", "report"):
        assert main([command, "train-001", "--home", str(tmp_path / "home")]) == 2
        complaint = capfd.readouterr().err
        assert f"add --tracking-uri {stranger.uri}" in complaint
        assert "hunter2" not in complaint
    assert stranger.headers == []
