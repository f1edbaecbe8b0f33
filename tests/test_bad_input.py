"""Bad input: one line that says what, the value seen and what to do; exit code 2, no traceback, nothing left behind."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fault_rows import Record, measured
from toy_frames import toy_dataset, toy_preprocess

from jobs.cli import main
from pipeline import artifact, bundle, crew
from pipeline.artifact import LatentStats, save_encoder
from pipeline.atari import preprocess_for
from pipeline.errors import TrackingPending
from pipeline.machine import ray_cpus
from pipeline.models.vae import VAE, VAESettings
from pipeline.schema import EPISODES_FILE, MANIFEST_FILE
from pipeline.store import FramesDataset

ANSWER_WITHIN_S = 20.0


@pytest.fixture(autouse=True)
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTRL_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def refused(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Runs the command line in this process; the one line that it complains with."""
    with contextlib.suppress(SystemExit):
        assert main([str(argument) for argument in arguments]) == 2
    complaint = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(complaint) == 1
    return complaint[0]


def toy_encoder(path: Path, game: str = "pong", protocol: str = "atari100k") -> Path:
    preprocess = preprocess_for(game, protocol)
    settings = VAESettings(z_dim=4, widths=(4,))
    save_encoder(path, VAE(settings.for_frames(84, 84)), LatentStats.identity(4), preprocess, {})
    return path


COLLECT = ("collect", "--game", "pong", "--frames", 100, "--out", "data")


def test_unknown_game(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "did you mean pong" in refused(capfd, "collect", "--game", "pongo", "--frames", 9, "--out", "data")
    assert "did you mean breakout" in refused(capfd, "train", "--game", "braekout", "--mode", "pixels")
    assert not (tmp_path / "data").exists()
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*COLLECT, "--protocol", "atari200k"), "choose one of atari100k, machado, atariari"),
        ((*COLLECT, "--resolution", "64x64"), "choose one of 84x84, 210x160"),
        ((*COLLECT, "--policy", "rondom"), "unknown policy 'rondom'"),
        ((*COLLECT, "--policy", "folder/without/policy"), "folder/without/policy"),
        ((*COLLECT, "--num-workers", 0), "--num-workers is 0"),
        (("collect", "--game", "pong", "--frames", 0, "--out", "data"), "--frames is 0"),
        (("collect", "--game", "pong", "--frames", "many", "--out", "data"), "invalid int value: 'many'"),
        (("train", "--game", "pong"), "needs a pretrained encoder"),
        (("train", "--game", "pong", "--mode", "pixels", "--encoder", "x"), "leave out --encoder"),
        (("evaluate", "nowhere"), "nowhere"),
        (("report", "no-such-run"), "no run 'no-such-run'"),
        (("sync", "no-such-run"), "no run 'no-such-run'"),
        ((*COLLECT, "--seed", -1), "'-1' is no seed"),
        (("demo", "--seed", "-1"), "'-1' is no seed"),
        (("train", "--game", "pong", "--mode", "pixels", "--seed", 2**32), "'4294967296' is no seed"),
        (("train", "--game", "pong", "--mode", "pixels", "--seed", "1.5"), "'1.5' is no seed"),
        (
            ("train", "--game", "pong", "--mode", "pixels", "--set", "train.lr=.nan"),
            "train.lr = '.nan' is not a finite number",
        ),
        (
            ("train", "--game", "pong", "--mode", "pixels", "--set", "q.v_min=-.inf"),
            "q.v_min = '-.inf' is not a finite number",
        ),
        ((*COLLECT, "--epsilon", "nan"), "'nan' is no share"),
        ((*COLLECT[:-1], "ftp9://me:hunter2@host/frames"), "ftp9://***@host"),
        (("train", "--game", "pong", "--mode", "pixels", "--set", "q.hidden=[-1]"), "q.hidden is [-1]"),
        (("fly",), "invalid choice: 'fly'"),
    ],
)
def test_wrong_arguments(capfd: pytest.CaptureFixture[str], tmp_path: Path, arguments: tuple, message: str) -> None:
    assert message in refused(capfd, *arguments)
    assert not (tmp_path / "data").exists()


def make_empty(path: Path) -> None:
    path.mkdir()


def make_unfinished(path: Path) -> None:
    toy_dataset(path, [40, 30])
    (path / MANIFEST_FILE).unlink()


def make_truncated(path: Path) -> None:
    file = Path(FramesDataset.open(toy_dataset(path, [40, 30]).uri).root) / toy_dataset_file(path)
    file.write_bytes(file.read_bytes()[:-100])


def make_flipped(path: Path) -> None:
    toy_dataset(path, [40, 30])
    file = path / toy_dataset_file(path)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 64
    file.write_bytes(content)


def make_other_episodes(path: Path) -> None:
    """A table of episodes that sends the held-out ones to training, well-formed in itself."""
    toy_dataset(path, [40, 30])
    table = pq.read_table(path / EPISODES_FILE)
    column = table.schema.get_field_index("split")
    pq.write_table(table.set_column(column, "split", pa.array(["train"] * len(table))), path / EPISODES_FILE)


def make_other_shape(path: Path) -> None:
    """The manifest of one size of frames over the files of another, checksums and all."""
    toy_dataset(path, [40, 30])
    manifest = json.loads((path / MANIFEST_FILE).read_text())
    manifest["preprocess"] |= {"height": 10, "width": 12}
    (path / MANIFEST_FILE).write_text(json.dumps(manifest))


def make_other_version(path: Path) -> None:
    toy_dataset(path, [40, 30])
    manifest = json.loads((path / MANIFEST_FILE).read_text())
    (path / MANIFEST_FILE).write_text(json.dumps({**manifest, "schema_version": 7}))


def toy_dataset_file(path: Path) -> str:
    return str(FramesDataset.open(str(path)).files[0].name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "there is no dataset at"),
        (make_empty, "is empty"),
        (make_unfinished, "unfinished"),
        (make_truncated, ".parquet has"),
        (make_flipped, "changed bytes"),
        (make_other_episodes, "episodes.parquet of dataset"),
        (make_other_shape, "another schema"),
        (make_other_version, "schema version 7"),
    ],
)
def test_bad_dataset(capfd: pytest.CaptureFixture[str], tmp_path: Path, make, message: str) -> None:  # type: ignore[no-untyped-def]
    make(tmp_path / "it")
    assert message in refused(capfd, "pretrain", "--data", tmp_path / "it", "--register", "enc")
    assert not (tmp_path / "home" / "runs").exists()
    if message in ("there is no dataset at", "is empty", "unfinished", "schema version 7"):
        assert message in refused(capfd, "data", "check", tmp_path / "it")
    else:
        assert main(["data", "check", str(tmp_path / "it")]) == 1
        assert ".parquet" in capfd.readouterr().out


@pytest.mark.parametrize("address", ["models:/nobody@champion", "models:/nobody/3", "runs:/0123/bundle", "models:/"])
def test_encoder_before_anything_is_registered(capfd: pytest.CaptureFixture[str], tmp_path: Path, address: str) -> None:
    """A look-up does not create the database that it looks into."""
    assert "register a model first" in refused(capfd, "train", "--game", "pong", "--encoder", address)
    assert not (tmp_path / "home").exists()


def test_encoder_folder_that_is_none(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    complaint = refused(capfd, "train", "--game", "pong", "--encoder", "no/folder")
    assert "'no/folder' is neither a folder nor an address" in complaint
    assert "is not a bundle" in refused(capfd, "train", "--game", "pong", "--encoder", tmp_path)


@pytest.mark.parametrize("content", ["", "train: [", "- 1", "name: toy", "run: 3", "\x80", None])
def test_resuming_a_run_whose_settings_are_lost(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, content: str | None
) -> None:
    folder = tmp_path / "home" / "runs" / "train-pong-pixels-001"
    with bundle.writing(folder / "checkpoint") as draft:
        (draft / "run").write_text("its id")
    if content is not None:
        (folder / "config.yaml").write_bytes(content.encode("latin-1"))
    complaint = refused(capfd, "train", "--game", "pong", "--mode", "pixels", "--resume")
    assert "config.yaml does not hold the settings of a run" in complaint
    assert {path.name for path in folder.iterdir()} <= {"checkpoint", "config.yaml"}


def test_sealed_folder_that_is_no_encoder(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "note").write_text("sealed")
    (tmp_path / "SHA256SUMS").write_text(f"{hashlib.sha256(b'sealed').hexdigest()}  note\n")
    complaint = refused(capfd, "train", "--game", "pong", "--encoder", tmp_path)
    assert "neither an encoder bundle nor a policy bundle" in complaint


def test_encoder_with_a_changed_byte(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    weights = toy_encoder(tmp_path / "enc") / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "model.safetensors have changed" in refused(capfd, "train", "--game", "pong", "--encoder", tmp_path / "enc")


def test_encoder_from_other_preprocessing(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    encoder = toy_encoder(tmp_path / "enc", protocol="machado")
    complaint = refused(capfd, "train", "--game", "pong", "--encoder", encoder)
    assert "sticky_probability: the encoder" in complaint
    assert "0.25" in complaint
    complaint = refused(capfd, "train", "--game", "breakout", "--encoder", toy_encoder(tmp_path / "enc2"))
    assert "'pong'" in complaint
    assert "'breakout'" in complaint
    data = toy_dataset(tmp_path / "data", [20, 20]).uri
    complaint = refused(capfd, "encode", "--data", data, "--encoder", encoder, "--out", tmp_path / "z")
    assert "height" in complaint
    assert not (tmp_path / "z").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [("train.epoch=1", "did you mean train.epochs?"), ("train.lr=fast", "is not of type float"), ("x", "has no '='")],
)
def test_recipe_key(capfd: pytest.CaptureFixture[str], tmp_path: Path, override: str, message: str) -> None:
    data = toy_dataset(tmp_path / "data", [40, 30]).uri
    assert message in refused(capfd, "pretrain", "--data", data, "--register", "enc", "--set", override)


def test_output_that_cannot_be_written_or_exists(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot write to" in refused(capfd, *COLLECT[:-1], tmp_path / "file" / "data")
    assert "is a file" in refused(capfd, *COLLECT[:-1], tmp_path / "file")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").write_text("keep")
    assert "--overwrite" in refused(capfd, *COLLECT)
    assert "holds other things" in refused(capfd, *COLLECT, "--overwrite")
    assert (tmp_path / "data" / "mine").read_text() == "keep"
    assert "is a file" in refused(capfd, *COLLECT[:-1], "new", "--home", tmp_path / "file")


def test_full_disk(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Record
) -> None:
    """On a real full disk where this user may mount one, else on a writer that reports one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:

        def fail(*arguments: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(crew.Crew, "play", fail)
    try:
        complaint = refused(capfd, "collect", "--game", "seaquest", "--frames", 4000, "--out", disk / "data")
        assert "is full (" in complaint
        assert "MiB free" in complaint
        assert not (disk / "data").exists()
        measured(record_property, "disk full in collect", lost="all of it", read=complaint)
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture
def mute_port() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def closed_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@pytest.mark.parametrize("is_mute", [True, False])
def test_servers_that_do_not_answer(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, mute_port: int, is_mute: bool
) -> None:
    address = f"127.0.0.1:{mute_port if is_mute else closed_port()}"
    data = toy_dataset(tmp_path / "frames", [40, 30]).uri
    began = time.monotonic()
    complaint = refused(capfd, "pretrain", "--data", data, "--register", "enc", "--tracking-uri", f"http://{address}")
    assert address in complaint
    assert time.monotonic() - began < ANSWER_WITHIN_S
    began = time.monotonic()
    assert address in refused(capfd, *COLLECT, "--ray-address", address)
    assert time.monotonic() - began < ANSWER_WITHIN_S
    assert not (tmp_path / "data").exists()


def test_more_workers_than_cpus(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cpus = ray_cpus()
    assert f"need {cpus + 1} CPUs, this machine has {cpus}" in refused(capfd, *COLLECT, "--num-workers", cpus + 1)
    encoder = toy_encoder(tmp_path / "enc")
    arguments = ("train", "--game", "pong", "--encoder", encoder, "--num-env-runners", cpus + 1)
    assert f"need {cpus + 1} CPUs" in refused(capfd, *arguments)
    data = toy_dataset(tmp_path / "frames", [40, 30]).uri
    arguments = ("pretrain", "--data", data, "--register", "enc", "--set", f"train.num_workers={cpus}")
    assert f"need {cpus + 1} CPUs" in refused(capfd, *arguments)


def test_waiting_is_for_clusters(capfd: pytest.CaptureFixture[str]) -> None:
    assert "give --ray-address, or leave it out" in refused(capfd, *COLLECT, "--wait", 3)
    assert "'-1' is no duration" in refused(capfd, *COLLECT, "--wait", -1)


def test_ctrl_c_leaves_no_process_and_no_dataset(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jobs.cli", "collect", "--game", "pong", "--frames", "2000000", "--out", "data"]
    root = Path(__file__).resolve().parent.parent
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(root)}, start_new_session=True
    ) as stage:
        assert stage.stderr is not None
        while not (tmp_path / "data" / "data").is_dir():
            time.sleep(0.2)
            assert stage.poll() is None
        time.sleep(3)
        family = psutil.Process(stage.pid).children(recursive=True)
        assert family
        stage.send_signal(2)
        complaint = stage.stderr.read()
    assert stage.returncode == 130
    assert "Traceback" not in complaint
    assert not (tmp_path / "data").exists()
    _, alive = psutil.wait_procs(family, timeout=15)
    assert not alive


def test_toy_helpers_are_what_they_seem(tmp_path: Path) -> None:
    """The damage above is what is refused: the undamaged originals are fine."""
    assert FramesDataset.open(toy_dataset(tmp_path / "it", [40, 30]).uri).verify() == []
    assert artifact.load_encoder(toy_encoder(tmp_path / "enc")).preprocess == preprocess_for("pong")
    assert toy_preprocess().height == 12
    shutil.rmtree(tmp_path / "it")


def test_done_but_not_delivered(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 3 comes with the result."""
    result = {"path": "report.html"}

    def late(*arguments: object) -> None:
        raise TrackingPending("the server is behind; `latentrl sync RUN` when it is back", result)

    monkeypatch.setattr("jobs.report.run", late)
    assert main(["report", "RUN", "--json"]) == 3
    printed = capfd.readouterr()
    assert json.loads(printed.out.splitlines()[-1]) == result
    assert "latentrl sync RUN" in printed.err
