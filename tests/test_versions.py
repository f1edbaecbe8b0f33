"""Versions, aliases and addresses on a real sqlite store."""

from __future__ import annotations

import logging
import shutil
import threading
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from registry_toys import PREPROCESS, Z_DIM, make_policy, register

from pipeline.artifact import load_encoder
from pipeline.delivery import beats
from pipeline.errors import UserError
from pipeline.registry import (
    Registered,
    Run,
    Tracking,
    check_model_name,
    register_encoder,
    register_policy,
    resolve,
)

pytest_plugins = ["registry_fixtures"]


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
    run.log_model_input("encoder", encoder)
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
    run.log_folder(shutil.copytree(bundle, run.folder / "copy"), "model/encoder")
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
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [sha256]


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
    run.log_file(Path(shutil.copy(bundle / "config.json", run.folder)))
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


@pytest.mark.parametrize("bad", ["", "a/b", "a:b", "a b", "-a", "a'b", "x" * 101])
def test_a_name_that_no_address_can_hold(bad: str) -> None:
    with pytest.raises(UserError, match="not usable"):
        check_model_name(bad)
