"""Latents on disk: one row a transition, read back by RLlib's own reader, resumable, nothing replaced by accident."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
from toy_frames import toy_dataset, toy_preprocess

from pipeline import encode, models
from pipeline.artifact import LatentStats, load_encoder, save_encoder
from pipeline.encode import encode_dataset
from pipeline.errors import UserError
from pipeline.models.vae import VAESettings

Z = 4


@pytest.fixture(scope="module", autouse=True)
def _ray():
    torch.set_num_threads(1)
    ray.init("local", num_cpus=2, object_store_memory=200 << 20, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("encoder") / "bundle", seed=0)


def make_bundle(path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    model = models.build(VAESettings(z_dim=Z, patch=2, widths=(8, 8)).for_frames(12, 10))
    save_encoder(path, model, LatentStats.identity(Z), toy_preprocess(), {})
    return path


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return toy_dataset(tmp_path_factory.mktemp("frames") / "d", [31, 7, 1, 20, 12], num_files=2)


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(encode, "PART_ROWS", 10)


def read(folder: Path):
    return pq.read_table(folder / "data").sort_by([("eps_id", "ascending"), ("t", "ascending")])


def test_one_row_a_transition_with_the_latents_of_its_two_frames(dataset, bundle, tmp_path, small_parts):
    done = encode_dataset(dataset, bundle, str(tmp_path / "z"))
    rows = read(tmp_path / "z").to_pylist()
    assert done.frames == 71
    assert done.transitions == len(rows) == 71 - 5
    frames = {(row["episode_id"], row["t"]): row for row in pq.read_table(Path(dataset.root) / "data").to_pylist()}
    encoder = load_encoder(bundle)
    for row in rows:
        here = frames[int(row["eps_id"]), row["t"]]
        following = frames[int(row["eps_id"]), row["t"] + 1]
        pixels = np.stack([np.frombuffer(frame["obs"], np.uint8).reshape(12, 10) for frame in (here, following)])
        z = encoder.encode(torch.from_numpy(pixels)).numpy()
        np.testing.assert_allclose([row["obs"], row["new_obs"]], z, rtol=1e-4, atol=1e-5)
        assert (row["actions"], row["rewards"]) == (here["action"], here["reward"])
        assert (row["terminateds"], row["truncateds"]) == (following["terminated"], following["truncated"])


def test_rllibs_offline_reader_takes_it(dataset, bundle, tmp_path):
    """From Parquet through RLlib's own reader and prelearner to the batch that its learners take."""
    import gymnasium as gym
    from ray.rllib.algorithms.bc import BCConfig
    from ray.rllib.offline.offline_data import OfflineData
    from ray.rllib.offline.offline_prelearner import OfflinePreLearner

    encode_dataset(dataset, bundle, str(tmp_path / "z"))
    spaces = (gym.spaces.Box(-np.inf, np.inf, (Z,), np.float32), gym.spaces.Discrete(2))
    config = BCConfig().environment(observation_space=spaces[0], action_space=spaces[1])
    config = config.offline_data(input_=[str(tmp_path / "z" / "data")], dataset_num_iters_per_learner=1)
    rows = OfflineData(config).data.take_batch(100, batch_format="numpy")
    module = config.get_multi_rl_module_spec(spaces={"default_policy": spaces})
    batch = OfflinePreLearner(config=config.rl_module(rl_module_spec=module), spaces=spaces)(rows)
    assert batch["default_policy/obs"].shape == batch["default_policy/new_obs"].shape == (66, Z)
    np.testing.assert_array_equal(batch["default_policy/obs"], np.stack(rows["obs"]))
    assert int(batch["default_policy/terminateds"].sum()) == 2
    assert int(batch["default_policy/truncateds"].sum()) == 2


def test_what_is_written_is_not_written_again(dataset, bundle, tmp_path, small_parts):
    encode_dataset(dataset, bundle, str(tmp_path / "z"))
    whole = {file.name: file.read_bytes() for file in (tmp_path / "z" / "data").iterdir()}
    (tmp_path / "z" / "meta" / "manifest.json").unlink()
    (tmp_path / "z" / "data" / "part-00001.parquet").unlink()
    heard = []
    done = encode_dataset(dataset, bundle, str(tmp_path / "z"), on_frames=heard.append)
    assert done.frames_now == 8
    assert sum(heard) == 71
    assert {file.name: file.read_bytes() for file in (tmp_path / "z" / "data").iterdir()} == whole


def test_the_manifest_names_dataset_encoder_and_files(dataset, bundle, tmp_path):
    encode_dataset(dataset, bundle, str(tmp_path / "z"))
    manifest = json.loads((tmp_path / "z" / "meta" / "manifest.json").read_text())
    assert manifest["dataset"] == dataset.digest
    assert manifest["encoder"] == load_encoder(bundle).sha256
    assert {file["name"] for file in manifest["files"]} == {
        f"data/{file.name}" for file in (tmp_path / "z" / "data").iterdir()
    }


def test_finished_latents_are_replaced_only_on_demand(dataset, bundle, tmp_path):
    encode_dataset(dataset, bundle, str(tmp_path / "z"))
    with pytest.raises(UserError, match="exists; add --overwrite"):
        encode_dataset(dataset, bundle, str(tmp_path / "z"))
    assert encode_dataset(dataset, bundle, str(tmp_path / "z"), overwrite=True).frames_now == 71


def test_a_folder_begun_with_another_encoder_is_refused(dataset, bundle, tmp_path):
    encode_dataset(dataset, bundle, str(tmp_path / "z"))
    (tmp_path / "z" / "meta" / "manifest.json").unlink()
    other = make_bundle(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"begun with something else .*encoder"):
        encode_dataset(dataset, other, str(tmp_path / "z"))


def test_a_folder_with_other_things_is_left_alone(dataset, bundle, tmp_path):
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(UserError, match="holds no dataset of latents"):
        encode_dataset(dataset, bundle, str(tmp_path), overwrite=True)
    assert (tmp_path / "precious.txt").read_text() == "x"


def test_a_damaged_frames_file_is_named(bundle, tmp_path):
    dataset = toy_dataset(tmp_path / "d", [30] * 4, num_files=2)
    victim = Path(dataset.root) / dataset.files[0].name
    victim.write_bytes(victim.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"data/part-0\.parquet .* damaged"):
        encode_dataset(dataset, bundle, str(tmp_path / "z"))
    assert not (tmp_path / "z" / "meta" / "manifest.json").exists()


def test_an_encoder_for_other_frames_is_refused(bundle, tmp_path):
    dataset = toy_dataset(tmp_path / "d", [9], height=14, width=10)
    with pytest.raises(UserError, match=r"height.*12.*14"):
        encode_dataset(dataset, bundle, str(tmp_path / "z"))
