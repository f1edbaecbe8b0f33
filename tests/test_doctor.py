"""`latentrl doctor` on one machine: fit, and with faults. On several nodes: tests/cluster/test_doctor_nodes.py."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from doctor_toys import doctor, said, states
from registry_toys import free_port

from jobs.cli import main
from jobs.joining import asks_for_token
from jobs.place_trial import PlaceTrial
from pipeline.errors import UserError


def test_a_laptop_needs_nothing_and_is_left_as_it_was(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, found = doctor(capfd, "--home", tmp_path / "not" / "there", "--for", "train", "--storage", tmp_path)
    assert code == 0
    assert set(states(found).values()) <= {"ok", "warn"}
    assert found.keys() == {
        *("ray", "nodes", "versions", "clock", "object store", "token"),
        *("home", "storage", "tracking", "artifacts", "CPUs", "memory"),
    }
    assert "1 rollout worker take 1 at once" in said(found, "CPUs", "ok")
    assert "a full replay of 200,000 rows takes 0.15 GiB" in said(found, "memory", "ok")
    assert "asks for a token" in said(found, "token", "ok")
    assert not list(tmp_path.iterdir())


def test_what_is_away_is_named_in_time(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    began, closed = time.monotonic(), free_port()
    places = ("--home", tmp_path / "home", "--storage", "/sys/kernel/latentrl")
    addresses = ("--ray-address", f"127.0.0.1:{closed}", "--tracking-uri", f"http://127.0.0.1:{closed}")
    huge = ("--for", "train", "--set", "train.replay_capacity=1000000000000")
    code, found = doctor(capfd, *places, *addresses, *huge)
    assert time.monotonic() - began < 60
    assert code == 1
    assert states(found) == {"ray": "bad", "home": "bad", "storage": "bad", "tracking": "bad", "memory": "bad"}
    assert "start one (`ray start --head`)" in said(found, "ray", "bad")
    assert "cannot write to /sys/kernel/latentrl" in said(found, "storage", "bad")
    assert "connection refused; start it" in said(found, "tracking", "bad")
    assert "lower train.replay_capacity" in said(found, "memory", "bad")
    assert "two replays" in said(found, "home", "bad")
    assert not list((tmp_path / "home").iterdir())


def test_a_store_that_cannot_be_asked_is_no_bad_input() -> None:
    """Amazon is asked where a bucket is; HDFS's library, which is not installed, stands in for it."""
    trial = PlaceTrial("hdfs://127.0.0.1:9/frames")
    with pytest.raises(UserError, match=r"cannot use hdfs://127.0.0.1:9/frames: "), trial.begun():
        pass
    with pytest.raises(UserError, match="cannot use 'ftp9"):
        PlaceTrial("ftp9://host/frames")


def test_a_token_is_asked_for_only_where_that_is_what_the_cluster_says() -> None:
    """Whoever answers nothing has not refused."""
    with pytest.raises(UserError, match="does not say whether it asks for a token"):
        asks_for_token(f"127.0.0.1:{free_port()}")
    program = (
        "import ray; from jobs.joining import asks_for_token; "
        "ray.init('local', num_cpus=1, include_dashboard=False); "
        "print(asks_for_token(ray.get_runtime_context().gcs_address))"
    )
    open_to_all = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=open_to_all, check=True)
    assert ended.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("demo",), "--for pretrain or train"),
        (("no-such-recipe",), "unknown recipe"),
        (("--for", "train", "--set", "train.lrr=1"), "lr"),
        (("--for", "collect", "--num-workers", "0"), "--num-workers is 0"),
        (("--for", "train", "--num-env-runners", "-1"), "--num-env-runners is -1"),
        (("--num-env-runners", "2"), "--num-env-runners says nothing without a stage; add --for"),
        (("vae", "--num-workers", "2"), "--num-workers is not for pretrain"),
        (("--tracking-uri", "mlflow.db"), "is not one I know"),
        (("--storage", "ftp9://me:hunter2@host/frames"), "ftp9://***@host"),
        (("--for", "fly"), "invalid choice"),
    ],
)
def test_bad_input(capfd: pytest.CaptureFixture[str], tmp_path: Path, arguments: tuple, message: str) -> None:
    with contextlib.suppress(SystemExit):
        assert main(["doctor", "--home", str(tmp_path / "home"), *arguments]) == 2
    assert message in capfd.readouterr().err
    assert not list(tmp_path.iterdir())
