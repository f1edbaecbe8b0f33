"""Runs, versions and addresses on a real sqlite store."""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
import threading
import time
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from registry_toys import PREPROCESS, Z_DIM, make_encoder, make_policy

from jobs import sync as sync_stage
from jobs.workspace import Workspace
from pipeline import machine
from pipeline.artifact import load_encoder
from pipeline.delivery import beats
from pipeline.errors import TrackingPending, UserError
from pipeline.registry import (
    Registered,
    Run,
    Tracking,
    check_model_name,
    register_encoder,
    register_policy,
    registrations,
    resolve,
    sync,
    ui_command,
)
from pipeline.tracking import flatten


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('a folder')}/mlflow.db"


@pytest.fixture(scope="module")
def client(uri: str) -> MlflowClient:
    Tracking(uri).check()
    return MlflowClient(uri, uri)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("bundle") / "encoder")


@pytest.fixture
def run(uri: str, client: MlflowClient, tmp_path: Path) -> Run:
    run = Tracking(uri).start_run("pretrain-001", stage="pretrain", folder=tmp_path / "pretrain-001")
    yield run
    run.close()


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A registered model's name that no other test uses."""
    return request.node.name.replace("[", "-").replace("]", "")[-90:]


def register(run: Run, bundle: Path, name: str, bits: float = 1.0, active: float = 1.0, **more: bool) -> Registered:
    registered = register_encoder(
        run, bundle, name, bits_per_dim=bits, active_fraction=active, **{"has_heldout": True, **more}
    )
    assert registered is not None
    return registered


def test_a_run_arrives_whole(run: Run, client: MlflowClient, tmp_path: Path) -> None:
    before_ms = time.time() * 1000
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"png")
    (tmp_path / "note.txt").write_text("x")
    run.log_params({"model": {"z_dim": 6, "widths": (4, 8)}, "seed": 0, "long": "x" * 9000, "none": None})
    for step in range(3):
        run.log_metrics({"loss": 1.0 / (step + 1), "epoch": step}, step)
    run.set_tags({"game": "pong"})
    run.log_file(tmp_path / "note.txt")
    run.log_folder(tmp_path / "pictures", "pictures")
    run.log_dataset("/data/pong", "pong", "ab" * 32, "pretrain")
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


def test_a_registered_encoder_loads_through_mlflow_without_pickle(
    run: Run, bundle: Path, uri: str, client: MlflowClient, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, PREPROCESS.height, PREPROCESS.width), dtype=np.uint8)
    registered = register_encoder(
        run, bundle, name, bits_per_dim=1.0, active_fraction=1.0, has_heldout=True, example_frames=frames[:1]
    )
    assert registered is not None
    assert (registered.uri, registered.aliases) == (f"models:/{name}/1", ("latest", "champion"))
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    model = mlflow.pyfunc.load_model(f"models:/{name}@champion")
    latents = model.predict(frames)
    assert latents.dtype == np.float32
    np.testing.assert_array_equal(latents, load_encoder(bundle).encode(torch.from_numpy(frames)).numpy())
    assert "uint8" in str(model.metadata.signature.inputs)
    assert model.metadata.signature.outputs.inputs[0].shape == (-1, Z_DIM)
    np.testing.assert_array_equal(model.input_example, frames[:1])
    with pytest.raises(mlflow.exceptions.MlflowException, match="schema"):
        model.predict(frames.astype(np.float32))
    root = Path(client.get_model_version_download_uri(name, "1").removeprefix("file://").replace("%20", " "))
    assert not [file for file in root.rglob("*") if file.suffix in (".pkl", ".pickle")]
    assert "torch==" in (root / "requirements.txt").read_text()


def test_champion_is_the_best_on_held_out_frames(run: Run, bundle: Path, client: MlflowClient, name: str) -> None:
    assert register(run, bundle, name, bits=2.0, has_heldout=False).aliases == ("latest",)
    assert register(run, bundle, name, bits=1.0).aliases == ("latest", "champion")
    assert register(run, bundle, name, bits=1.1).aliases == ("latest",)
    assert register(run, bundle, name, bits=0.9).aliases == ("latest", "champion")
    assert register(run, bundle, name, bits=float("nan")).aliases == ("latest",)
    assert register(run, bundle, name, bits=3.0, promote=True).aliases == ("latest", "champion")
    assert client.get_registered_model(name).aliases == {"champion": 6}
    version = client.get_model_version(name, "4")
    assert version.tags["bits_per_dim"] == "0.9"
    assert version.tags["bundle_sha256"] == load_encoder(bundle).sha256


def test_a_collapsed_encoder_gets_no_alias_and_a_loud_warning(
    run: Run, bundle: Path, uri: str, client: MlflowClient, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    collapsed = register(run, bundle, name, bits=0.1, active=0.09, promote=True)
    assert (collapsed.collapsed, collapsed.aliases) == (True, ())
    assert any(r.levelno == logging.WARNING and "HAS COLLAPSED" in r.message for r in caplog.records)
    assert client.get_model_version(name, "1").tags["collapsed"] == "true"
    with pytest.raises(UserError, match="has collapsed"):
        resolve(f"models:/{name}@latest", uri, tmp_path)
    register(run, bundle, name, active=0.1)
    assert register(run, bundle, name, active=float("nan")).collapsed
    assert resolve(f"models:/{name}@latest", uri, tmp_path).version == "2"
    assert resolve(f"models:/{name}/3", uri, tmp_path).version == "3"


@pytest.mark.parametrize(
    ("candidate", "champion", "wins"),
    [
        (("1.0", "true"), None, True),
        (("1.0", "false"), None, False),
        (("1.0", "true"), ("1.1", "true"), True),
        (("1.1", "true"), ("1.1", "true"), False),
        (("1.0", "false"), ("1.1", "true"), False),
        (("1.0", "true"), ("1.1", "false"), False),
    ],
)
def test_who_beats_the_champion(candidate: tuple[str, str], champion: tuple[str, str] | None, wins: bool) -> None:
    tags = [pair and dict(zip(("bits_per_dim", "has_heldout"), pair)) for pair in (candidate, champion)]
    assert beats(tags[0], tags[1]) is wins


def test_two_registrations_at_once(uri: str, client: MlflowClient, bundle: Path, name: str, tmp_path: Path) -> None:
    runs = [Tracking(uri).start_run(f"r{i}", stage="pretrain", folder=tmp_path / f"r{i}") for i in range(3)]
    made: list[Registered] = []
    threads = [
        threading.Thread(target=lambda i=i, run=run: made.append(register(run, bundle, name, bits=1.0 + i)))
        for i, run in enumerate(runs)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for run in runs:
        run.close()
    assert sorted(version.version for version in made) == ["1", "2", "3"]
    champion = client.get_model_version_by_alias(name, "champion")
    assert champion.tags["bits_per_dim"] == "1.0"


def test_a_policy_is_registered_with_the_encoder_it_sees_with(
    run: Run, bundle: Path, uri: str, client: MlflowClient, name: str, tmp_path: Path
) -> None:
    register(run, bundle, f"{name}-vae")
    encoder = resolve(f"models:/{name}-vae@champion", uri, tmp_path / "cache")
    run.log_encoder_input(encoder.uri, encoder.version, encoder.sha256)
    policy = register_policy(run, make_policy(tmp_path / "policy"), name, encoder=encoder, tags={"agent_steps": 100})
    assert policy is not None
    assert (policy.uri, policy.aliases, policy.kind) == (f"models:/{name}/1", ("latest",), "policy")
    tags = client.get_model_version(name, "1").tags
    assert tags["encoder.uri"] == f"models:/{name}-vae/1"
    assert tags["agent_steps"] == "100"
    run.close()
    seen = client.get_run(run.run_id)
    (model_input,) = seen.inputs.model_inputs
    assert client.get_model_version(f"{name}-vae", "1").source.endswith(model_input.model_id)
    assert seen.data.tags["encoder.sha256"] == encoder.sha256
    resolved = resolve(f"models:/{name}@latest", uri, tmp_path / "cache")
    assert (resolved.kind, resolved.sha256) == ("policy", policy.sha256)
    assert load_encoder(resolved.path / "encoder").sha256 == encoder.sha256


def test_every_kind_of_address_gives_the_same_verified_bundle(
    run: Run, bundle: Path, uri: str, name: str, tmp_path: Path
) -> None:
    register(run, bundle, name)
    run.log_folder(bundle, "model/encoder")
    run.close()
    sha256 = load_encoder(bundle).sha256
    addresses = {
        f"models:/{name}@champion": (f"models:/{name}/1", "1"),
        f"models:/{name}@latest": (f"models:/{name}/1", "1"),
        f"models:/{name}/1": (f"models:/{name}/1", "1"),
        f"runs:/{run.run_id}/model/encoder": (f"runs:/{run.run_id}/model/encoder", None),
        str(bundle): (None, None),
    }
    for address, (pinned, version) in addresses.items():
        found = resolve(address, uri, tmp_path / "cache")
        assert (found.address, found.uri, found.version, found.sha256, found.kind) == (
            *(address, pinned, version, sha256),
            "encoder",
        )
        assert load_encoder(found.path, expect_sha256=sha256).z_dim == Z_DIM
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [sha256]


def test_a_damaged_copy_in_the_cache_is_fetched_again(
    run: Run, bundle: Path, uri: str, name: str, tmp_path: Path
) -> None:
    register(run, bundle, name)
    first = resolve(f"models:/{name}/1", uri, tmp_path)
    (first.path / "config.json").write_text("{}")
    assert load_encoder(resolve(f"models:/{name}/1", uri, tmp_path).path).z_dim == Z_DIM


def test_bytes_changed_in_the_store_are_found(
    run: Run, bundle: Path, uri: str, client: MlflowClient, name: str, tmp_path: Path
) -> None:
    for _ in range(3):
        register(run, bundle, name)
    roots = [
        Path(client.get_model_version_download_uri(name, str(v)).removeprefix("file://").replace("%20", " "))
        for v in (1, 2, 3)
    ]
    weights = roots[0] / "artifacts/bundle/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(UserError, match=r"model\.safetensors have changed"):
        resolve(f"models:/{name}/1", uri, tmp_path / "cache")
    sums = roots[1] / "artifacts/bundle/SHA256SUMS"
    (sums.parent / "README.md").unlink()
    sums.write_text("".join(line + "\n" for line in sums.read_text().splitlines() if "README" not in line))
    with pytest.raises(UserError, match="has changed in the store"):
        resolve(f"models:/{name}/2", uri, tmp_path / "cache")
    (roots[2] / "artifacts/bundle/SHA256SUMS").unlink()
    with pytest.raises(UserError, match="are not in the store"):
        resolve(f"models:/{name}/3", uri, tmp_path / "cache")


def test_wrong_addresses_say_what_there_is(run: Run, bundle: Path, uri: str, name: str, tmp_path: Path) -> None:
    register(run, bundle, name)
    run.log_file(bundle / "config.json")
    run.close()
    cache = tmp_path / "cache"
    (tmp_path / "empty").mkdir()
    expected = {
        f"models:/{name}x@champion": f"did you mean .*{name}",
        "models:/zzzzz@champion": "there are: ",
        f"models:/{name}@gold": r"no alias 'gold'; it has latest, champion",
        f"models:/{name}/77": "no version 77; it has 1",
        f"models:/{name}": "malformed",
        "models:nonsense": "malformed",
        "runs:/abc": "malformed",
        "runs:/0123456789abcdef0123456789abcdef/x": "there is no run '0123",
        f"runs:/{run.run_id}/none": "no artifact 'none'; it has config.json",
        f"runs:/{run.run_id}/config.json": "cannot|not in the store",
        str(tmp_path / "nowhere"): "neither a folder nor an address",
        str(tmp_path / "empty"): "not a bundle",
        "s3://bucket/x": "neither a folder nor an address",
    }
    for address, message in expected.items():
        with pytest.raises(UserError, match=message) as caught:
            resolve(address, uri, cache)
        assert "\n" not in str(caught.value)


def test_looking_does_not_make_a_database(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tracking database at"):
        resolve("models:/x@latest", f"sqlite:///{tmp_path}/none/mlflow.db", tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", ["", "a/b", "a:b", "a b", "-a", "a'b", "x" * 101])
def test_a_name_that_no_address_can_hold(bad: str) -> None:
    with pytest.raises(UserError, match="not usable"):
        check_model_name(bad)


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
