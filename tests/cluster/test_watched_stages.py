"""The real stages at toy size, watched: where a planted password or key turns up, and what listens to whom."""

from __future__ import annotations

import base64
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from registry_toys import MlflowServer, running_server
from test_loopback import is_loopback, listening

ROOT = Path(__file__).resolve().parent.parent.parent
ALL_STAGES = """
import json, sys
from test_demo import TOY
from jobs import demo
print(json.dumps(demo.run(sys.argv[1], TOY, tracking_uri=sys.argv[2])))
"""
SEVERAL = """
import sys
from dataclasses import replace
import ray
from test_demo import TOY
from jobs import collect, pretrain, train
from jobs.loopback import on_loopback
from jobs.workspace import Workspace
with on_loopback():
    ray.init("local", num_cpus=6, include_dashboard=False, log_to_driver=False)  # whatever this machine has
there = Workspace.at(sys.argv[1])
frames = collect.run(there, game="pong", frames=1200, out=f"{sys.argv[1]}/frames", num_workers=2)
recipe = replace(TOY.encoder, train=replace(TOY.encoder.train, num_workers=2))
encoder = pretrain.run(there, recipe, frames["dataset"], "encoder")
assert encoder["num_train_workers"] == 2
agent = train.run(
    there, TOY.agent, game="pong", encoder=encoder["model_uri"], mode="frozen", agent_steps=300, num_env_runners=1,
    num_learners=2,
)
print("played", agent["agent_steps"])
"""
# Each ends in an error that has seen the secret.
ERRORS = (
    ("pretrain", "--register", "x", "--data", "s3://AK:{0}@bucket/x?endpoint_override=127.0.0.1:9&scheme=http"),
    ("collect", "--game", "pong", "--frames", "9", "--out", "ftp9://me:{0}@host/frames"),
    ("train", "--game", "pong", "--encoder", "https://me:{0}@host/encoder"),
    ("evaluate", "random:pong", "--tracking-uri", "http://me:{0}@127.0.0.1:9"),
    ("collect", "--game", "pong", "--frames", "9", "--out", "x", "--ray-address", "ray://me:{0}@host:1"),
    ("report", "--tracking-uri", "postgresql://me:{0}@host/db", "no-such-run"),
    ("submit", "--address", "http://me:{0}@127.0.0.1:9", "--", "collect", "--game", "pong", "--frames", "9"),
    ("submit", "--address", "http://127.0.0.1:9", "--", "train", "--game", "pong", "--tracking-uri", "http://me:{0}@h"),
    ("data", "info", "s3://AKIA:{0}@bucket/frames?endpoint_override=127.0.0.1:9&scheme=http"),
)  # fmt: skip


@pytest.fixture
def room() -> Iterator[Path]:
    """A folder with a short name, since Ray's sockets lie in it."""
    path = Path(tempfile.mkdtemp(prefix="lw-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def server(room: Path) -> Iterator[MlflowServer]:
    with running_server(room / "server") as server:
        yield server


def run_watched(
    command: list[str], environment: dict[str, str], room: Path, seconds: float
) -> tuple[str, set[tuple[str, str]]]:
    """Runs a command to its end: what it printed, and the sockets that it and its children listened on."""
    seen: set[tuple[str, str]] = set()
    until = time.monotonic() + seconds
    with (room / "printed").open("w") as printed:
        stage = subprocess.Popen(
            [sys.executable, *command], env=environment, cwd=room, stdout=printed, stderr=subprocess.STDOUT
        )
        while stage.poll() is None and time.monotonic() < until:
            seen |= listening(psutil.Process(stage.pid))
            time.sleep(0.3)
        stage.kill()
        stage.wait()
    text = (room / "printed").read_text()
    assert stage.returncode in (0, 1, 2), text  # 1: a doctor's finding
    return text, seen


def environment(room: Path, **more: str) -> dict[str, str]:
    """Of a user who has nothing but this checkout."""
    for folder in ("user", "t", "tmp"):
        (room / folder).mkdir(exist_ok=True)
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_", "AWS_"))}
    return {
        **mine,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "HOME": str(room / "user"),
        "RAY_TMPDIR": str(room / "t"),
        "TMPDIR": str(room / "tmp"),
        "OMP_NUM_THREADS": "1",
        "LATENTRL_HOME": str(room / "home"),
        **more,
    }


def test_workers_that_learn_together_meet_on_loopback(room: Path) -> None:
    """Two training workers and two learners, in a local session: torch's own way would be a port for everyone."""
    printed, sockets = run_watched(["-c", SEVERAL, str(room / "home")], environment(room), room, 900)
    assert printed.splitlines()[-1].startswith("played ")
    assert [(program, where) for program, where in sockets if not is_loopback(where)] == []
    assert any(program.startswith("ray::") for program, _ in sockets)
    assert list((room / "tmp").glob("latentrl-rendezvous-*")) == []


def test_planted_secrets_stay_where_they_were_put(room: Path, server: MlflowServer) -> None:
    values = {name: f"planted{secrets.token_hex(12)}" for name in ("address", "password", "aws", "session", "other")}
    values["token"] = secrets.token_hex(32)
    planted = environment(
        room,
        MLFLOW_TRACKING_USERNAME="someone",
        MLFLOW_TRACKING_PASSWORD=values["password"],
        AWS_ACCESS_KEY_ID="AKIAPLANTED",
        AWS_SECRET_ACCESS_KEY=values["aws"],
        AWS_SESSION_TOKEN=values["session"],
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN=values["token"],
        GITHUB_TOKEN=values["other"],
    )
    address = server.uri.replace("://", f"://me:{values['address']}@")
    printed, sockets = run_watched(["-c", ALL_STAGES, str(room / "demo"), address], planted, room, 900)
    assert '"trained"' in printed.splitlines()[-1]
    programs = {program for program, _ in sockets}
    assert {"gcs_server", "raylet"} <= programs
    assert [(program, where) for program, where in sockets if not is_loopback(where)] == []

    report, _ = run_watched(
        ["-m", "jobs.cli", "report", "train-pong-frozen-001", "--home", str(room / "demo"), "--tracking-uri", address],
        planted, room, 120,
    )  # fmt: skip
    assert "report.html" in report
    bucket = f"s3://AK:{values['address']}@bucket/x?endpoint_override=127.0.0.1:9&scheme=http"
    found, _ = run_watched(
        ["-m", "jobs.cli", "doctor", "--tracking-uri", address, "--storage", bucket, "--for", "train"],
        planted, room, 400,
    )  # fmt: skip
    assert "ok    tracking" in found
    assert "bad   storage" in found
    texts = [printed, report, found]
    for words in ERRORS:
        command = ["-m", "jobs.cli", *(word.format(values["address"]) for word in words)]
        complaint, _ = run_watched(command, planted, room, 60)
        assert "error: " in complaint, complaint
        assert "Traceback" not in complaint
        texts.append(complaint)
    server.kill()

    sought = {value.encode() for value in values.values()}
    users = {"me": values["address"], "someone": values["password"]}
    sought |= {base64.b64encode(f"{user}:{password}".encode()) for user, password in users.items()}
    leaks = [f"{secret!r} was printed" for secret in sought if secret in "".join(texts).encode()]
    (room / "printed").unlink()
    num_files = 0
    for path in room.rglob("*"):
        if path.is_file() and not path.is_symlink():
            num_files += 1
            content = path.read_bytes()
            leaks += [f"{secret!r} stands in {path}" for secret in sought if secret in content]
    assert leaks == []
    assert num_files > 100  # runs, artifacts, MLflow's database and log, Ray's logs
