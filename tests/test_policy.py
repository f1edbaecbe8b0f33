"""The policy bundle: sealed, loadable without Ray, greedy, and honest about what it is."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from catch import catch_preprocess
from rl_toys import TOY_VAE, make_encoder

from pipeline import artifact, models
from pipeline.artifact import weights_sha256
from pipeline.errors import UserError
from pipeline.models.vae import VAESettings
from rllib_ext.networks import QHead, QNetwork
from rllib_ext.policy import PolicyConfig, load_policy, save_policy
from rllib_ext.settings import QConfig
from rllib_ext.stacking import RollingStack

GRID = replace(TOY_VAE, latent_channels=2)  # 4x4 cells of catch
ACTIONS = ("LEFT", "NOOP", "RIGHT")


def write(tmp_path, mode: str = "frozen", vae: VAESettings = TOY_VAE, q: QConfig = QConfig((8,))):  # noqa: B008
    torch.manual_seed(1)
    encoder_path = make_encoder(tmp_path / "encoder", settings=vae)
    encoder = artifact.load_encoder(encoder_path)
    if mode == "pixels":
        encoder = artifact.from_scratch(vae, catch_preprocess())
    if mode == "finetune":
        for p in encoder.parameters():
            p.data += 0.01
    network = QNetwork(QHead(2, encoder.z_shape, 3, q), None if mode == "frozen" else encoder)
    origin = {"address": "models:/toy/1", "version": "1", "sha256": artifact.load_encoder(encoder_path).sha256}
    config = PolicyConfig(
        mode, 2, encoder.z_shape, q, ACTIONS, None if mode == "pixels" else origin, models.to_record(encoder.config)
    )
    weights = {name: value.numpy() for name, value in network.state_dict().items()}
    bundle = None if mode == "pixels" else encoder_path
    save_policy(tmp_path / "policy", config, catch_preprocess(), weights, encoder_bundle=bundle, card={"Steps": 7})
    return tmp_path / "policy", network, encoder


@pytest.mark.parametrize("mode", ["frozen", "finetune", "pixels"])
@pytest.mark.parametrize(("vae", "q"), [(TOY_VAE, QConfig((8,))), (GRID, QConfig((8,), grid_channels=3))])
def test_a_loaded_policy_has_the_values_of_the_network_that_was_saved(tmp_path, mode, vae, q):
    path, network, encoder = write(tmp_path, mode, vae, q)
    policy = load_policy(path)
    rng, rolling = np.random.default_rng(0), RollingStack(2)
    policy.reset(5)
    for t in range(4):
        frames = rng.integers(0, 255, (5, 12, 12), dtype=np.uint8)
        is_first = np.full(5, t == 0) | (rng.random(5) < 0.3)
        if mode == "frozen":
            z = encoder.encode(torch.from_numpy(frames)).half().numpy()
            expected = network(torch.from_numpy(rolling.push(z, is_first)))
        else:
            expected = network(torch.from_numpy(rolling.push(frames, is_first)))
        torch.testing.assert_close(policy.values(frames, is_first), expected.detach(), rtol=1e-4, atol=1e-5)
    assert policy.mode == mode
    assert weights_sha256(policy.encoder) == weights_sha256(encoder)
    assert policy.preprocess == catch_preprocess()
    assert policy.bundle_path == path
    assert len(policy.sha256) == 64


def test_a_policy_starts_its_stack_anew_after_reset(tmp_path):
    policy = load_policy(write(tmp_path)[0])
    frames = np.random.default_rng(0).integers(0, 255, (3, 12, 12), dtype=np.uint8)
    fresh = policy.values(frames, np.ones(3, bool))
    policy.values(frames[::-1].copy(), np.zeros(3, bool))
    policy.reset(3)
    torch.testing.assert_close(policy.values(frames, np.zeros(3, bool)), fresh)


def test_it_loads_and_plays_without_ray_mlflow_or_pickle(tmp_path):
    path, _, _ = write(tmp_path)
    script = (
        "import sys, numpy as np; from rllib_ext.policy import load_policy; "
        f"p = load_policy({str(path)!r}); a = p.act(np.zeros((2, 12, 12), np.uint8), np.ones(2, bool)); "
        "assert a.shape == (2,) and a.dtype == np.int64; "
        "assert not {'ray', 'mlflow'} & {name.split('.')[0] for name in sys.modules}"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert {file.suffix for file in path.rglob("*") if file.is_file()} <= {".json", ".safetensors", ".md", ""}


def test_a_changed_byte_is_refused_by_name(tmp_path):
    path, _, _ = write(tmp_path)
    weights = path / "q.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(UserError, match=r"q\.safetensors"):
        load_policy(path)


def test_an_encoder_is_not_a_policy_and_a_bundle_is_not_overwritten(tmp_path):
    path, _, _ = write(tmp_path)
    with pytest.raises(UserError, match="not a policy bundle"):
        load_policy(tmp_path / "encoder")
    with pytest.raises(UserError, match="exists already"):
        save_policy(path, load_policy(path).config, catch_preprocess(), {}, encoder_bundle=None, card={})


def test_the_config_refuses_unknown_and_missing_keys(tmp_path):
    config = load_policy(write(tmp_path)[0]).config
    record = json.loads(config.to_json())
    assert PolicyConfig.from_record(record, "it") == config
    with pytest.raises(UserError, match="colour"):
        PolicyConfig.from_record({**record, "colour": 1}, "it")
    del record["stack"]
    with pytest.raises(UserError, match="stack"):
        PolicyConfig.from_record(record, "it")
