"""Pretraining by property: it resumes exactly, shares work equally, says what is wrong; its job registers a model."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray
import torch
from fault_rows import measured
from toy_frames import toy_dataset

from jobs.cli import parser
from pipeline import board, models
from pipeline.artifact import load_encoder, load_model
from pipeline.checkpoint import Progress
from pipeline.errors import Terminated, UserError
from pipeline.loop import learning_rate
from pipeline.mailbox import Mailbox
from pipeline.models.pca import PCASettings
from pipeline.models.vae import VAESettings
from pipeline.order import ReadingOrder
from pipeline.origin import Origin, load_origin
from pipeline.store import FramesDataset
from pipeline.stream import sample_frames
from pipeline.train import PretrainConfig, pretrain

MODEL = VAESettings(z_dim=4, patch=2, widths=(8, 8), variance="pixel_map")
CONFIG = PretrainConfig(epochs=4, batch_size=16, num_threads=1, frames_per_epoch=320, log_every_steps=5)


@pytest.fixture(scope="module", autouse=True)
def _ray():
    ray.init("local", num_cpus=3, object_store_memory=200 << 20, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> FramesDataset:
    return toy_dataset(tmp_path_factory.mktemp("frames") / "d", [60] * 12, num_files=3)


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    """One uninterrupted training, its folder and the figures that its driver heard."""
    folder, heard = tmp_path_factory.mktemp("run"), []
    result = train(dataset, folder, on_metrics=lambda values, step: heard.append((step, values)))
    return result, folder, heard


def train(dataset, folder, config=CONFIG, model=MODEL, **options):
    return pretrain(model, config, dataset, str(folder), "checkpoints", folder / "bundle", **options)


def test_result_and_bundle(trained, dataset):
    result, _, _ = trained
    assert result.steps == 4 * 20
    assert result.steps_per_worker == (80,)
    assert result.has_heldout
    assert result.images_per_s > 0
    encoder = load_encoder(result.bundle_path, expect_sha256=result.sha256, preprocess=dataset.preprocess)
    assert encoder.stats.num_active == result.active_units
    assert load_origin(result.bundle_path) == Origin.of(dataset)
    assert "| ELBO |" in (result.bundle_path / "README.md").read_text()


def test_latents_are_standardised_by_the_statistics(trained):
    result, _, _ = trained
    stats = load_encoder(result.bundle_path).stats
    assert all(scale >= 0.1 - 1e-6 for scale in stats.scale)
    assert all(kl >= -1e-5 for kl in stats.kl)


def test_an_encoder_of_rate_zero_stays_while_its_decoder_learns(dataset, tmp_path):
    """A lone parameter that went into the wrong group, or into none, would show."""
    once = replace(CONFIG, epochs=1, encoder_lr_scale=0.0)
    results = {lr: train(dataset, tmp_path / str(lr), replace(once, lr=lr)) for lr in (1e-3, 1e-12)}
    learned, idle = (load_model(result.bundle_path).state_dict() for result in results.values())
    moved = {name for name, value in learned.items() if not torch.equal(value, idle[name])}
    rest = {name for name in learned if not name.startswith("encoder.")}
    assert moved >= {name for name in rest if "weight" in name or name in ("mean_frame", "raw_logvar")}
    assert not moved - rest


def test_the_driver_hears_every_row_in_order(trained):
    _, _, heard = trained
    losses = [step for step, values in heard if "loss" in values]
    assert losses == list(range(5, 81, 5))
    assert sum("heldout/elbo_nats" in values for _, values in heard) == 4
    assert {"elbo_nats", "kl_nats", "bits_per_dim", "lr", "images_per_s", "frames"} <= heard[0][1].keys()


def test_an_existing_training_is_not_continued_by_accident(trained, dataset):
    with pytest.raises(UserError, match=r"exists already .* --resume"):
        train(dataset, trained[1])


def test_resuming_what_does_not_exist_is_refused(dataset, tmp_path):
    with pytest.raises(UserError, match="no training to resume"):
        train(dataset, tmp_path, resume=True)


def test_resuming_with_other_settings_names_the_key(trained, dataset):
    with pytest.raises(UserError, match=r"train\.lr: started with 0\.001, now 0\.01"):
        train(dataset, trained[1], replace(CONFIG, lr=0.01), resume=True)
    with pytest.raises(UserError, match=r"model\.beta: started with 1\.0, now 2\.0"):
        train(dataset, trained[1], model=replace(MODEL, beta=2.0), resume=True)


SCRIPT = """
import dataclasses, sys, ray
sys.path.insert(0, {tests!r})
from pathlib import Path
import test_pretrain
from pipeline.store import FramesDataset
from pipeline.stream import sample_frames
ray.init("local", num_cpus=2, object_store_memory=200 << 20, include_dashboard=False, log_to_driver=False)
try:
    config = dataclasses.replace(test_pretrain.CONFIG, epochs={epochs})
    test_pretrain.train(FramesDataset.open({data!r}), Path({folder!r}), config, resume={resume})
except KeyboardInterrupt:
    ray.shutdown()
    sys.exit(130)
"""


def _start(dataset, folder, *, resume=False, epochs=CONFIG.epochs) -> subprocess.Popen:
    places = {"tests": str(Path(__file__).parent), "data": dataset.uri, "folder": str(folder)}
    script = SCRIPT.format(**places, resume=resume, epochs=epochs)
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _wait_for(driver: subprocess.Popen, file: Path) -> None:
    limit = time.monotonic() + 300
    while not file.is_file():
        assert driver.poll() is None, "training ended before it could be stopped"
        assert time.monotonic() < limit, "no checkpoint came"
        time.sleep(0.01)


def _kill(driver: subprocess.Popen) -> None:
    """SIGKILL to the driver and all of its Ray processes."""
    family = [psutil.Process(driver.pid), *psutil.Process(driver.pid).children(recursive=True)]
    for process in family:
        try:
            os.kill(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    driver.wait()
    psutil.wait_procs(family, timeout=10)


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(trained, dataset, tmp_path):
    result, _, _ = trained
    driver = _start(dataset, tmp_path)
    _wait_for(driver, tmp_path / "checkpoints" / "step-000000020" / "progress.json")
    _kill(driver)
    assert not (tmp_path / "bundle").exists()
    resumed = _start(dataset, tmp_path, resume=True)
    assert resumed.wait(timeout=300) == 0
    ours, theirs = load_model(tmp_path / "bundle").state_dict(), load_model(result.bundle_path).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    optimizers = [path / "checkpoints" / "step-000000080" / "optimizer.safetensors" for path in (tmp_path, trained[1])]
    assert optimizers[0].read_bytes() == optimizers[1].read_bytes()
    assert (tmp_path / "bundle" / "SHA256SUMS").read_text() == (result.bundle_path / "SHA256SUMS").read_text()


def test_asked_to_stop_it_keeps_its_place_within_an_epoch_and_goes_on_bit_for_bit(dataset, tmp_path):
    config, heard = replace(CONFIG, epochs=2, frames_per_epoch=16_000), []
    whole = train(dataset, tmp_path / "whole", config)
    with pytest.raises(Terminated, match=r"kept at ([\d,]+) updates: go on with --resume") as caught:
        train(
            dataset,
            tmp_path / "cut",
            config,
            on_metrics=lambda values, step: heard.append(step),
            is_asked_to_stop=lambda: heard[-1:] > [200],
        )
    (checkpoint,) = (tmp_path / "cut" / "checkpoints").glob("step-*")
    kept_at = int(checkpoint.name.removeprefix("step-"))
    assert f"{kept_at:,}" in caught.value.line
    assert 200 < kept_at < 1_000, "it did not wait for the end of the epoch"
    assert kept_at % CONFIG.log_every_steps == 0
    resumed = train(dataset, tmp_path / "cut", config, resume=True)
    assert resumed.steps == whole.steps == 2_000
    assert resumed.steps_per_worker == (2_000 - kept_at,)
    assert resumed.sha256 == whole.sha256


def test_a_training_whose_every_row_is_sent_at_once_hears_the_wish(monkeypatch):
    """As where a row takes longer than the time between two messages: no answer is there right after its question."""
    monkeypatch.setattr(board, "SECONDS_BETWEEN_POSTS", 0.0)
    mailbox = Mailbox.remote()
    ray.get(mailbox.ask_to_stop.remote())
    figures = board.Board(mailbox, CONFIG, MODEL.for_frames(84, 84), is_silent=False)
    for step in range(60):
        figures.post(Progress(step, 0, 0, 0.0, 0.0, 1), {"loss": 1.0})
        if figures.is_asked_to_stop():
            return
        time.sleep(0.5)
    pytest.fail("nobody has read the answers")


def spoil(checkpoint: Path, how: str) -> None:
    file = checkpoint / "model.safetensors"
    if how == "a bit":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif how == "half":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:  # as a kill leaves it while it is copied
        (checkpoint / "SHA256SUMS").unlink()


DAMAGE = {
    "a bit": "bit flipped in a checkpoint of pretrain",
    "half": "checkpoint of pretrain cut in half",
    "unsealed": "killed while a checkpoint of pretrain is stored",
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    trained, dataset, tmp_path, how, caplog, record_property
):
    config = replace(CONFIG, epochs=4)
    shutil.copytree(trained[1], tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [path.name for path in sorted(checkpoints.glob("step-*"))] == ["step-000000060", "step-000000080"]
    spoil(checkpoints / "step-000000080", how)
    (checkpoints / "checkpoint_manager_snapshot.json").write_text('{"ray_version": "2.60')  # as a full disk leaves it
    heard: list[int] = []
    resumed = train(dataset, tmp_path / "run", config, resume=True, on_metrics=lambda values, step: heard.append(step))
    assert min(heard) == 65
    assert resumed.sha256 == trained[0].sha256
    lines = [record.getMessage() for record in caplog.records]
    (line,) = {line for line in lines if line.startswith("a checkpoint is not used")}
    assert "step-000000080" in line
    assert "training goes on from its checkpoint after 60 updates" in lines
    measured(record_property, DAMAGE[how], lost="20 updates, made again; no bit of the encoder", read=line)


def test_an_interrupt_ends_it_and_leaves_no_process(dataset, tmp_path):
    driver = _start(dataset, tmp_path, epochs=5000)
    _wait_for(driver, tmp_path / "checkpoints" / "step-000000020" / "progress.json")
    family = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGINT)
    assert driver.wait(timeout=60) == 130
    _, alive = psutil.wait_procs(family, timeout=20)
    assert alive == []


def test_two_workers_do_the_same_number_of_steps_and_reach_the_same_loss(trained, dataset, tmp_path):
    alone, _, _ = trained
    both = train(dataset, tmp_path, replace(CONFIG, num_workers=2))
    assert both.steps_per_worker == (80, 80)
    assert both.steps == alone.steps
    assert both.elbo_nats == pytest.approx(alone.elbo_nats, rel=0.01)


def test_a_damaged_file_ends_training_in_one_clear_error(tmp_path, record_property):
    dataset = toy_dataset(tmp_path / "d", [60] * 6, num_files=2)
    victim = Path(dataset.root) / dataset.files[1].name
    victim.write_bytes(victim.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"data/part-1\.parquet .* damaged") as caught:
        train(dataset, tmp_path / "run")
    what = "Parquet file damaged in the midst of a training"
    measured(record_property, what, lost="what came after the last checkpoint", read=f"error: {caught.value}")


def test_one_episode_alone_trains_without_held_out_frames_until_its_time_is_up(tmp_path):
    config = replace(CONFIG, frames_per_epoch=0, epochs=500, max_seconds=0.01)
    result = train(toy_dataset(tmp_path / "d", [9]), tmp_path / "run", config)
    assert not result.has_heldout
    assert result.steps == 1


def test_a_training_without_epochs_keeps_what_the_model_takes_from_data(dataset, tmp_path):
    """It ends with a checkpoint like any other, from which its bundle can still be made."""
    model = PCASettings(z_dim=4)
    result = train(dataset, tmp_path, replace(CONFIG, epochs=0), model)
    assert (result.steps, result.images_per_s) == (0, 0.0)
    torch.manual_seed(CONFIG.seed)
    torch.set_num_threads(1)
    expected = models.build(model.for_frames(12, 10))
    order = ReadingOrder.plan(dataset, "train", batch_size=16, num_workers=1, epoch_frames=320, seed=CONFIG.seed)
    expected.initialise(sample_frames(dataset, order, CONFIG.monitor_frames))
    for name, value in load_model(result.bundle_path).state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-4, atol=1e-4)
    again = train(dataset, tmp_path, replace(CONFIG, epochs=0), model, resume=True)
    assert again.sha256 == result.sha256


def test_the_learning_rate_rises_stays_and_falls():
    config = replace(CONFIG, lr=1.0, warmup_steps=10, decay_fraction=0.5, final_lr_fraction=0.1)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10:50] == [1.0] * 40
    assert rates[99] == pytest.approx(0.1)
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[10:]))


@pytest.mark.parametrize(
    "wrong", [{"epochs": -1}, {"batch_size": -1}, {"lr": 0.0}, {"precision": "fp8"}, {"num_gpus_per_worker": 2}]
)
def test_settings_that_make_no_training_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(CONFIG, **wrong)


def test_the_job_leaves_a_registered_model_pictures_and_a_record(dataset, tmp_path):
    from jobs import pretrain as job
    from jobs.recipes import PretrainRecipe
    from jobs.resuming import Earlier, earlier_run
    from jobs.settings import to_dict
    from jobs.workspace import Workspace
    from pipeline.registry import resolve
    from pipeline.server import Address, connect

    workspace = Workspace.at(str(tmp_path / "home"))
    recipe = PretrainRecipe("toy", MODEL, replace(CONFIG, epochs=1))
    result = job.run(workspace, recipe, dataset.uri, "toy-encoder")
    folder = Path(result["run_folder"])
    assert json.loads((folder / "result.json").read_text()) == result
    assert len(list((folder / "pictures").glob("*.png"))) == 7
    client = connect(Address.parse(workspace.tracking_uri))
    there = {file.path for file in client.list_artifacts(result["run_id"], "pictures")}
    assert {"pictures/figures.json", "pictures/looks.png", "pictures/units.png", "pictures/strips"} <= there
    card = client.get_model_version("toy-encoder", result["version"]).description
    assert card.startswith((folder / "bundle" / "README.md").read_text().rstrip()[:200])
    assert "Not probed yet" in card
    assert client.get_run(result["run_id"]).data.tags["mlflow.note.content"] == card
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 4 + 1
    assert resolve(result["model_uri"], workspace.tracking_uri, workspace.cache).sha256 == result["sha256"]
    assert result["num_train_workers"] == 1
    assert result["train_worker_steps"] == {"0": 20}
    with pytest.raises(UserError, match="has finished"):
        job.run(workspace, recipe, dataset.uri, "toy-encoder", resume=True)
    on_gpu = replace(recipe, train=replace(recipe.train, num_gpus_per_worker=1))
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="need 1 GPUs, Ray has 0"):
            job.run(workspace, on_gpu, dataset.uri, "toy-encoder")
    (folder / "result.json").unlink()  # as if it had been cut off before its end
    resumed = job.run(workspace, recipe, dataset.uri, "toy-encoder", resume_if_any=True)
    assert (resumed["run_id"], resumed["sha256"]) == (result["run_id"], result["sha256"])
    (folder / "result.json").unlink()
    changed = replace(recipe, train=replace(recipe.train, lr=0.5))
    with pytest.raises(UserError, match="other settings"):
        job.run(workspace, changed, dataset.uri, "toy-encoder", resume_if_any=True)
    shutil.rmtree(folder / job.CHECKPOINTS_FOLDER)  # cut off before there was anything to go on with
    name, settings = "pretrain-toy-encoder", to_dict(recipe)
    assert earlier_run(workspace, name, settings, job._has_started, is_required=False) == Earlier()


@pytest.mark.parametrize(
    ("differs", "is_noted", "encoder"),
    [
        ({"aliases": ["latest", "champion"], "has_heldout": True}, False, "models:/toy/1"),
        ({"aliases": ["latest"], "has_heldout": False}, True, "models:/toy/1"),
        ({"model_uri": None, "aliases": [], "has_heldout": False}, False, "/runs/pretrain-toy-001/bundle"),  # no server
    ],
)
def test_what_is_printed_names_an_encoder_that_there_is(
    differs: dict[str, object], is_noted: bool, encoder: str
) -> None:
    options = parser().parse_args(["pretrain", "--data", "frames", "--register", "toy"])
    made = {"model_uri": "models:/toy/1", "bundle": "/runs/pretrain-toy-001/bundle", "game": "pong", "protocol": "own"}
    said = options.present({**made, **differs})
    assert ("note: not champion" in said) == is_noted
    assert f"--encoder {encoder} " in said.splitlines()[-1]
