"""Data in a real object store: the same stages, the same bytes, and one line in time when the store says no."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from programs import LOOPBACK, free_ports
from services import ObjectStore

from jobs.cli import main
from pipeline import source
from pipeline.artifact import LatentStats, save_encoder
from pipeline.atari import preprocess_for
from pipeline.errors import UserError
from pipeline.models.vae import VAE, VAESettings
from pipeline.order import RowRange
from pipeline.schema import MANIFEST_FILE
from pipeline.source import Place
from pipeline.storage import locate
from pipeline.store import FramesDataset

ROOT = Path(__file__).resolve().parents[2]
ANSWER_WITHIN_S = 20.0
FRAMES = 600
COLLECT = ("collect", "--game", "pong", "--frames", FRAMES, "--num-workers", 1, "--json", "--out")


@pytest.fixture(scope="module")
def shelf(store: ObjectStore) -> Iterator[ObjectStore]:
    """The store, its keys in the environment of this process and of Ray's workers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for name, value in store.variables().items():
            patch.setenv(name, value)
        ray.init("local", num_cpus=2, object_store_memory=200 << 20, include_dashboard=False, log_to_driver=False)
        yield store
        ray.shutdown()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTRL_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def run(capfd: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """A stage's result."""
    assert main([str(argument) for argument in arguments]) == 0
    return dict(json.loads(capfd.readouterr().out.splitlines()[-1]))


def refused(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a stage complains with, within the time that it may take."""
    began = time.monotonic()
    with contextlib.suppress(SystemExit):
        assert main([str(argument) for argument in arguments]) == 2
    complaint = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(complaint) == 1
    assert time.monotonic() - began < ANSWER_WITHIN_S, complaint
    return complaint[0]


def encoder_bundle(path: Path) -> Path:
    settings = VAESettings(z_dim=4, widths=(4,))
    save_encoder(path, VAE(settings.for_frames(84, 84)), LatentStats.identity(4), preprocess_for("pong"), {})
    return path


def files(store: ObjectStore, folder: str) -> list[str]:
    """Objects below a folder, without the marks that stand for folders."""
    return [key.removeprefix(f"{folder}/") for key in store.keys(f"{folder}/") if not key.endswith("/")]


def test_the_same_bytes_as_on_disk(shelf: ObjectStore, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    there, here = shelf.uri("same/frames"), tmp_path / "frames"
    on_s3, on_disk = run(capfd, *COLLECT, there), run(capfd, *COLLECT, here)
    assert on_s3["dataset"] == there
    assert on_s3["digest"] == on_disk["digest"]
    on_disk_too = {str(path.relative_to(here)): path.read_bytes() for path in here.rglob("*") if path.is_file()}
    assert sorted(files(shelf, "same/frames")) == sorted(on_disk_too)
    for name, content in on_disk_too.items():
        assert shelf.get(f"same/frames/{name}") == content
    assert run(capfd, "data", "check", there, "--json")["errors"] == []
    assert run(capfd, "data", "info", there, "--json")["frames"] == FRAMES

    encoder = encoder_bundle(tmp_path / "encoder")
    for data, out in ((there, shelf.uri("same/latents")), (here, tmp_path / "latents")):
        assert run(capfd, "encode", "--data", data, "--encoder", encoder, "--out", out, "--json")["frames"] == FRAMES
    latents = {str(path.relative_to(tmp_path / "latents")) for path in (tmp_path / "latents").rglob("*.parquet")}
    assert latents
    for name in latents:
        assert shelf.get(f"same/latents/{name}") == (tmp_path / "latents" / name).read_bytes()


def test_nothing_is_replaced_by_accident_and_nothing_left_over(
    shelf: ObjectStore, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = shelf.uri("kept/frames")
    first = run(capfd, *COLLECT, out)
    assert "add --overwrite" in refused(capfd, *COLLECT, out)
    second = run(capfd, *COLLECT, out, "--overwrite", "--seed", 1)
    assert second["digest"] != first["digest"] == run(capfd, *COLLECT, out, "--overwrite")["digest"]
    dataset = FramesDataset.open(out)
    assert sorted(files(shelf, "kept/frames")) == sorted(
        [*(file.name for file in dataset.files), "meta/episodes.parquet", MANIFEST_FILE]
    )
    shelf.put("kept/other/notes.txt", b"mine")
    assert "holds other things" in refused(capfd, *COLLECT, shelf.uri("kept/other"), "--overwrite")
    encode = ("encode", "--data", out, "--encoder", encoder_bundle(tmp_path / "enc"), "--json", "--out")
    assert "holds no dataset of latents" in refused(capfd, *encode, shelf.uri("kept/frames"))
    run(capfd, *encode, shelf.uri("kept/latents"))
    assert "add --overwrite" in refused(capfd, *encode, shelf.uri("kept/latents"))
    shelf.client().delete_object(Bucket=shelf.bucket, Key=f"kept/latents/{MANIFEST_FILE}")
    assert run(capfd, *encode, shelf.uri("kept/latents"))["frames_per_s"] == 0  # all its files were there already


def test_damage_is_named(shelf: ObjectStore, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = shelf.uri("damaged/frames")
    run(capfd, *COLLECT, out)
    name = FramesDataset.open(out).files[0].name
    content = bytearray(shelf.get(f"damaged/frames/{name}"))
    content[len(content) // 2] ^= 1
    shelf.put(f"damaged/frames/{name}", bytes(content))
    pretrain = ("pretrain", "--data", out, "--register", "enc")
    assert f"{name} has changed bytes" in refused(capfd, *pretrain)
    shelf.client().delete_object(Bucket=shelf.bucket, Key=f"damaged/frames/{name}")
    assert f"{name} is missing" in refused(capfd, *pretrain)
    shelf.client().delete_object(Bucket=shelf.bucket, Key=f"damaged/frames/{MANIFEST_FILE}")
    assert "unfinished" in refused(capfd, *pretrain)
    assert "there is no dataset at" in refused(capfd, *pretrain[:2], shelf.uri("nowhere"), *pretrain[3:])


def test_a_collection_that_is_killed_is_an_unfinished_one(
    shelf: ObjectStore, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = shelf.uri("killed/frames")
    command = [sys.executable, "-m", "jobs.cli", *map(str, COLLECT), out]
    command += ["--ray-address", ray.get_runtime_context().gcs_address]
    command[command.index(str(FRAMES))] = "1000000"
    said = tmp_path / "said.txt"
    with (
        said.open("w") as errors,
        subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True, stderr=errors
        ) as stage,
    ):
        try:
            while not shelf.keys("killed/frames/data/"):
                assert stage.poll() is None, said.read_text()
                time.sleep(0.2)
            time.sleep(3)
        finally:
            os.killpg(stage.pid, signal.SIGKILL)
    assert "is unfinished" in refused(capfd, "data", "check", out)
    assert run(capfd, *COLLECT, out, "--overwrite")["frames"] == FRAMES
    assert run(capfd, "data", "check", out, "--json")["errors"] == []


SECRET = "a-secret"
WRONG = {
    "no such bucket": ({}, "s3://no-bucket/frames", "there is no bucket 'no-bucket'"),
    "no bucket": ({}, "s3://", "names no bucket"),
    "an unknown key": ({"AWS_ACCESS_KEY_ID": SECRET}, "{data}", "check AWS_ACCESS_KEY_ID"),
    "a wrong secret": ({"AWS_SECRET_ACCESS_KEY": SECRET}, "{data}", "AWS_SECRET_ACCESS_KEY"),
    "keys in the address": ({}, f"s3://me:{SECRET}@latentrl/frames", "check AWS_ACCESS_KEY_ID"),
    "an unknown option": ({}, f"s3://latentrl/frames?token={SECRET}", "Unexpected query parameter"),
    "nobody there": ({"AWS_ENDPOINT_URL_S3": "http://{closed}"}, "{data}", "connection refused"),
    "no answer": ({"AWS_ENDPOINT_URL_S3": "http://{mute}"}, "{data}", "does not answer in time"),
    "no such host": ({"AWS_ENDPOINT_URL_S3": "http://no-such-host.invalid"}, "{data}", "unknown host name"),
    "a place in the address": ({}, "{data}?endpoint_override={closed}&scheme=http", "connection refused"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_store_that_says_no_is_one_line_in_time(
    case: str, shelf: ObjectStore, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    variables, address, words = WRONG[case]
    with socket.create_server((LOOPBACK, 0)) as mute:
        places = {
            "data": shelf.uri("wrong/frames"),
            "closed": f"{LOOPBACK}:{free_ports(1)[0]}",
            "mute": f"{LOOPBACK}:{mute.getsockname()[1]}",
        }
        for name, value in variables.items():
            monkeypatch.setenv(name, value.format(**places))
        for command in ((*COLLECT, address), ("pretrain", "--register", "enc", "--data", address)):
            complaint = refused(capfd, *(str(word).format(**places) for word in command))
            assert words in complaint
            assert SECRET not in complaint.replace("a wrong secret", "")


def test_keys_that_may_only_read(
    shelf: ObjectStore, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shelf.uri("read-only/frames")
    run(capfd, *COLLECT, out)
    for name, value in shelf.variables(shelf.reader).items():
        monkeypatch.setenv(name, value)
    assert run(capfd, "data", "check", out, "--json")["errors"] == []
    assert "access denied" in refused(capfd, *COLLECT, shelf.uri("read-only/more"))
    assert "access denied" in refused(capfd, *COLLECT, out, "--overwrite")
    assert run(capfd, "data", "check", out, "--json")["errors"] == []


def test_a_store_that_goes_away(
    shelf: ObjectStore,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In the middle of a collection, and of reading."""
    out = shelf.uri("away/frames")
    run(capfd, *COLLECT, out)
    dataset = FramesDataset.open(out)
    rows = RowRange(dataset.files[0].name, 0, 10)
    shelf.kill()
    try:
        with pytest.raises(UserError, match="connection refused"):
            dataset.require_sound_files()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(source, "AWAY_S", 1.0)
            with pytest.raises(UserError, match=r"has been away for 1 s .*connection refused.*--resume"):
                source.read_rows(Place.of(dataset), rows, ["obs"])
        starter = threading.Timer(1.0, shelf.start)
        starter.start()
        assert source.read_rows(Place.of(dataset), rows, ["obs"]).num_rows == 10
        starter.join()
    finally:
        if not shelf.is_running:
            shelf.start()
    dataset.require_sound_files()

    killed: list[float] = []

    def kill_in_the_middle() -> None:
        while not files(shelf, "away/more"):
            time.sleep(0.2)
        time.sleep(3)
        shelf.kill()
        killed.append(time.monotonic())

    killer = threading.Thread(target=kill_in_the_middle)
    killer.start()
    try:
        big = [1_000_000 if word == FRAMES else word for word in COLLECT]
        assert main([str(word) for word in (*big, shelf.uri("away/more"))]) == 2
        assert time.monotonic() - killed[0] < 60
        (complaint,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("error: "))
        assert "connection refused" in complaint
        assert "is left there, without a manifest" in caplog.text
    finally:
        killer.join()
        shelf.start()
    assert "is unfinished" in refused(capfd, "data", "check", shelf.uri("away/more"))
    assert run(capfd, *COLLECT, shelf.uri("away/more"), "--overwrite")["frames"] == FRAMES


def test_keys_travel_in_no_message(shelf: ObjectStore) -> None:
    """What workers are handed holds the store's address, not the keys: they have their own."""
    filesystem, _ = locate(shelf.uri("x"))
    blob = pickle.dumps(filesystem)
    assert shelf.endpoint.encode() in blob
    assert not [key for key in shelf.owner if key.encode() in blob]
