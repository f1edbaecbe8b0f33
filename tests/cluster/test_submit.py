"""Submitting to a real Ray cluster with a token: what runs there, how it is watched, and what nobody can read of it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from nodes import ROOT, RayCluster
from services import ObjectStore

from jobs import readers
from jobs.package import MAX_BYTES, packed
from pipeline.store import FramesDataset


@pytest.fixture(scope="module")
def ray_cluster(store: ObjectStore) -> Iterator[RayCluster]:
    """Head and one worker, which know where the store is; its keys lie in a file on each that only its owner reads."""
    store.put(".bucket", b"is made")
    nodes = RayCluster({"one": 1}, store.place(), store.keys_of(store.owner))
    nodes.start()
    yield nodes
    nodes.remove()


def environment(cluster: RayCluster, **changes: str | None) -> dict[str, str]:
    """Of somebody who knows the cluster's token and nothing else of it."""
    mine = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_", "LATENTRL_", "MLFLOW_"))}
    changed = {**mine, **cluster.variables(), "RAY_API_SERVER_ADDRESS": cluster.dashboard, "PYTHONPATH": str(ROOT)}
    return {name: value for name, value in {**changed, **changes}.items() if value is not None}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "jobs.cli", *map(str, arguments)]


def latentrl(cluster: RayCluster, *arguments: object, **changes: str | None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        env=environment(cluster, **changes),
        cwd=cluster.shared,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def api(cluster: RayCluster, method: str, path: str, **body: Any) -> Any:
    headers = {"Authorization": f"Bearer {cluster.token}"}
    answer = requests.request(
        method, f"{cluster.dashboard}/api/jobs/{path}", json=body or None, headers=headers, timeout=30
    )
    answer.raise_for_status()
    return answer.json()


def collect(cluster: RayCluster, out: str, *more: object, frames: int = 60) -> list[str]:
    home = ["--home", cluster.shared / "home"]
    return [
        *map(str, ("collect", "--game", "pong", "--frames", frames, "--num-workers", 1, "--out", out, *home, *more))
    ]


# --- what runs there


def test_the_code_that_is_sent_runs_on_the_nodes(ray_cluster: RayCluster, tmp_path: Path) -> None:
    with packed(ROOT) as package, zipfile.ZipFile(package.archive) as archive:
        archive.extractall(tmp_path / "project")
    recipes = tmp_path / "project" / "jobs" / "recipes.py"
    recipes.write_text(recipes.read_text().replace("PretrainConfig(epochs=5)", "PretrainConfig(epochs=7)"))
    done = latentrl(ray_cluster, "submit", "--watch", "--working-dir", recipes.parents[1], "--", "recipes", "--json")
    assert done.returncode == 0, done.stderr
    printed = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert json.loads(printed[-1])["pretrain"]["vae"]["train"]["epochs"] == 7


def test_one_command_is_one_job_until_it_fails(ray_cluster: RayCluster) -> None:
    without_home = ("submit", "--watch", "--json", "--", "evaluate", "random:pong", "--episodes", 1)
    names = []
    for _ in range(2):
        done = latentrl(ray_cluster, *without_home)
        assert done.returncode == 1
        assert "no --home: the job takes the nodes' LATENTRL_HOME" in done.stderr
        assert "give --home, a folder that every node sees" in done.stderr
        result = json.loads(done.stdout.splitlines()[-1])
        assert (result["status"], result["exit_code"], result["num_cpus"]) == ("FAILED", 2, 1)
        names.append(result["job"])
    assert names[1] == f"{names[0]}-2"

    job = ("submit", "--json", "--", *collect(ray_cluster, str(ray_cluster.shared / "frames")))
    first = json.loads(latentrl(ray_cluster, *job).stdout.splitlines()[-1])
    doubled = latentrl(ray_cluster, *job)
    assert doubled.returncode == 2
    assert f"already: {first['job']}; see it with `latentrl jobs logs {first['job']} --follow`" in doubled.stderr
    watched = latentrl(ray_cluster, "jobs", "logs", first["job"], "--follow")
    assert watched.returncode == 0, watched.stderr
    assert (
        watched.stdout.removesuffix(f"{first['job']} succeeded\n")
        == api(ray_cluster, "GET", f"{first['job']}/logs")["logs"]
    )
    assert FramesDataset.open(str(ray_cluster.shared / "frames")).num_frames == 60
    assert "has succeeded already" in latentrl(ray_cluster, *job).stderr
    listed = latentrl(ray_cluster, "jobs", "list", "--json")
    states = {row["job"]: row["status"] for row in json.loads(listed.stdout.splitlines()[-1])["jobs"]}
    assert states[first["job"]] == "SUCCEEDED"
    assert states[names[0]] == states[names[1]] == "FAILED"


def test_the_drivers_processor_is_not_counted_twice(ray_cluster: RayCluster) -> None:
    stage = collect(ray_cluster, "/nowhere/frames", "--num-workers", 2)
    done = latentrl(ray_cluster, "submit", "--watch", "--num-cpus", 1, "--", *stage)
    assert done.returncode == 1
    assert "2 collecting workers need 2 CPUs, Ray has 1 for them" in done.stdout


# --- watching


PERIOD_S = 2.0


@contextlib.contextmanager
def unreliable(cluster: RayCluster) -> Iterator[tuple[str, list[int]]]:
    """A way to the dashboard that, from when a log is followed, breaks all its connections every two seconds.

    It is closed for a while each time.
    """
    target = cluster.dashboard.removeprefix("http://").split(":")
    has_ended, breaks = threading.Event(), [0]
    address = ("127.0.0.1", 0)

    def carry(listener: socket.socket) -> None:
        until = time.monotonic() + PERIOD_S if breaks[0] else math.inf
        with selectors.DefaultSelector() as ready, contextlib.ExitStack() as held:
            ready.register(listener, selectors.EVENT_READ)
            while time.monotonic() < until and not has_ended.is_set():
                for key, _ in ready.select(0.1):
                    if key.fileobj is listener:
                        near = held.enter_context(listener.accept()[0])
                        far = held.enter_context(socket.create_connection((target[0], int(target[1]))))
                        ready.register(near, selectors.EVENT_READ, far)
                        ready.register(far, selectors.EVENT_READ, near)
                        continue
                    data = b""
                    with contextlib.suppress(OSError):  # either side may have gone
                        data = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
                        key.data.sendall(data)
                    if b"/logs/tail" in data:
                        until = min(until, time.monotonic() + PERIOD_S)
                    if not data:
                        ready.unregister(key.fileobj)
            breaks[0] += 1

    def serve() -> None:
        while not has_ended.is_set():
            with socket.create_server(address) as listener:
                carry(listener)
            has_ended.wait(0.7)

    with socket.create_server(address) as probe:
        address = ("127.0.0.1", probe.getsockname()[1])
    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{address[1]}", breaks
    has_ended.set()
    thread.join()


COUNTING = """python -u -c "
import sys, time
for i in range(600):
    sys.stdout.write(f'{i} half ')
    sys.stdout.flush()
    time.sleep(0.03)
    print('and \u00fc' * (i % 7))
print('the end', end='')
" """


def test_a_log_is_whole_though_its_connection_breaks(ray_cluster: RayCluster) -> None:
    api(ray_cluster, "POST", "", entrypoint=COUNTING, submission_id="counting")
    with unreliable(ray_cluster) as (address, breaks):
        done = latentrl(ray_cluster, "jobs", "logs", "counting", "--follow", "--address", address)
    assert done.returncode == 0, done.stderr
    assert breaks[0] >= 5
    whole = api(ray_cluster, "GET", "counting/logs")["logs"]
    assert done.stdout == f"{whole}\ncounting succeeded\n"
    assert whole.endswith("599 half and üand üand üand ü\nthe end")


def test_whoever_has_read_enough_ends_the_watching_quietly(ray_cluster: RayCluster) -> None:
    api(ray_cluster, "POST", "", entrypoint=COUNTING, submission_id="headed")
    watching = subprocess.Popen(
        command("jobs", "logs", "headed", "--follow"),
        env=environment(ray_cluster),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert watching.stdout is not None
    assert watching.stderr is not None
    assert watching.stdout.readline()
    watching.stdout.close()
    complaint = watching.stderr.read()
    assert watching.wait(60) == readers.EXIT_CODE, complaint
    assert "Error" not in complaint
    assert api(ray_cluster, "GET", "headed")["status"] in ("RUNNING", "SUCCEEDED")


def test_interrupting_leaves_the_job_alone_and_stop_ends_it(ray_cluster: RayCluster) -> None:
    long = collect(ray_cluster, str(ray_cluster.shared / "many"), frames=5_000_000)
    watching = subprocess.Popen(
        command("submit", "--watch", "--name", "long", "--", *long),
        env=environment(ray_cluster),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert watching.stdout is not None
    assert any("Running entrypoint" in line for line in watching.stdout)
    watching.send_signal(signal.SIGINT)
    _, complaint = watching.communicate(timeout=60)
    assert watching.returncode == 130
    assert f"latentrl jobs logs long --follow --address {ray_cluster.dashboard}" in complaint
    assert "Traceback" not in complaint
    assert api(ray_cluster, "GET", "long")["status"] == "RUNNING"

    stopped = latentrl(ray_cluster, "jobs", "stop", "long")
    assert (stopped.returncode, stopped.stdout) == (0, "long stopped\n")
    followed = latentrl(ray_cluster, "jobs", "logs", "long", "--follow")
    assert followed.returncode == 1
    assert "long stopped" in followed.stdout
    assert "there is no job 'long-2'" in latentrl(ray_cluster, "jobs", "stop", "long-2").stderr


def test_a_failed_environment_says_what_ray_says(ray_cluster: RayCluster) -> None:
    api(ray_cluster, "POST", "", entrypoint="true", submission_id="bad", runtime_env={"working_dir": "gcs://gone.zip"})
    done = latentrl(ray_cluster, "jobs", "logs", "bad", "--follow")
    assert done.returncode == 1
    assert "bad failed: runtime_env setup failed" in done.stdout
    assert "gone.zip" in done.stdout


# --- secrets


def test_keys_reach_driver_and_workers_and_nobody_else(ray_cluster: RayCluster, store: ObjectStore) -> None:
    secrets = ray_cluster.secrets_file
    stage = collect(ray_cluster, store.uri("frames"))
    refused = latentrl(ray_cluster, "submit", "--watch", "--", *stage)
    assert refused.returncode == 1  # no process has keys
    submit = ("submit", "--watch", "--json", "--secrets-file", secrets, "--", *stage)
    done = latentrl(ray_cluster, *submit)
    assert done.returncode == 0, done.stderr
    assert any(key.startswith("frames/meta/") for key in store.keys("frames/"))
    job = json.loads(done.stdout.splitlines()[-1])["job"]
    seen = json.dumps(api(ray_cluster, "GET", "")) + done.stdout + done.stderr + json.dumps(ray_cluster.state("actors"))
    assert str(secrets) in seen
    files = [path for path in (ray_cluster.folder / "disks").rglob("*") if path.is_file() and path.name != secrets.name]
    files = [path for path in files if "working_dir_files" not in path.parts]  # which hold this folder's source
    assert any(job in path.name for path in files)  # logs are among them
    for value in (*store.owner, ray_cluster.token):
        assert value not in seen
        assert [path for path in files if value.encode() in path.read_bytes()] == []

    (ray_cluster.head.folder / "home" / secrets.name).chmod(0o640)
    opened = latentrl(ray_cluster, *submit[:3], "--again", *submit[3:])
    assert opened.returncode == 1
    assert "can be read by others (mode 640); chmod 600 it" in opened.stderr


# --- tokens, addresses, sizes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RAY_AUTH_TOKEN": "another"}, "refuses this token"),
        ({"RAY_AUTH_TOKEN": None, "RAY_AUTH_MODE": None}, "asks for a token, and none was sent"),
        ({"RAY_AUTH_TOKEN": None, "HOME": "/nowhere"}, "there is no token to send"),
        ({"RAY_AUTH_TOKEN": None, "RAY_AUTH_TOKEN_PATH": "/nowhere"}, "there is no token to send"),
    ],
)
@pytest.mark.parametrize("arguments", [("jobs", "list"), ("submit", "--", "recipes")])
def test_a_wrong_token_and_none_are_one_line(
    ray_cluster: RayCluster, arguments: tuple[str, ...], changes: dict[str, str | None], message: str
) -> None:
    done = latentrl(ray_cluster, *arguments, **changes)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert "RAY_AUTH_TOKEN_PATH" in line
    assert ray_cluster.token not in line


def test_a_token_in_a_file_will_do(ray_cluster: RayCluster, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(ray_cluster.token)
    done = latentrl(ray_cluster, "jobs", "list", RAY_AUTH_TOKEN=None, RAY_AUTH_TOKEN_PATH=str(path))
    assert done.returncode == 0, done.stderr


def test_no_answer_is_told_within_20_seconds(ray_cluster: RayCluster) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        address = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        began = time.monotonic()
        done = latentrl(ray_cluster, "jobs", "list", "--address", address)
        assert time.monotonic() - began < 20
    assert (done.returncode, done.stdout) == (2, "")
    assert f"no Ray dashboard answers at {address}" in done.stderr


def test_our_limit_of_a_package_is_rays(ray_cluster: RayCluster) -> None:
    """The dashboard's; Ray's documentation has another. Ray's client sends packages by this request."""
    headers = {"Authorization": f"Bearer {ray_cluster.token}"}
    url = f"{ray_cluster.dashboard}/api/packages/gcs/_ray_pkg_limit{{}}.zip"
    for size, status in ((MAX_BYTES, 200), (MAX_BYTES + 1, 413)):
        answer = requests.put(url.format(size), data=bytes(size), headers=headers, timeout=120)
        assert answer.status_code == status
