"""Pixels mode with the convolutions of the DQN paper: the paper's network, from the learner to the loaded policy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rl_toys import make_encoder, toy_config
from test_train_command import command, finish
from torch import nn

from pipeline.atari import preprocess_for
from pipeline.errors import UserError
from pipeline.models.vae import VAESettings
from rllib_ext.networks import NatureConvolutions, q_network
from rllib_ext.policy import load_policy
from rllib_ext.settings import QConfig
from rllib_ext.stacking import RollingStack

NATURE = QConfig(torso="nature", hidden=(512,), layer_norm=False)


def paper_network(network) -> nn.Module:
    """The same weights in the usual layout, features flattened channel by channel."""
    hidden, output = network.head.layers[0], network.head.layers[2]
    plain = nn.Linear(64 * 7 * 7, 512)
    by_place = hidden.weight.detach().view(512, 7, 7, 64)
    plain.weight.data, plain.bias.data = (
        by_place.permute(0, 3, 1, 2).reshape(512, -1).contiguous(),
        hidden.bias.detach(),
    )
    return nn.Sequential(*network.encoder.layers, nn.Flatten(), plain, nn.ReLU(), output)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_it_is_the_network_of_the_paper_in_either_layout(layout):
    torch.manual_seed(0)
    network = q_network(NATURE, 4, (64 * 7 * 7,), 6, NatureConvolutions(4, 84, 84))
    assert sum(p.numel() for p in network.parameters()) == 1_687_206  # 4 frames and 6 actions in the paper's layers
    frames = torch.randint(0, 256, (5, 4, 84, 84), dtype=torch.uint8)
    expected = paper_network(network)(frames.float() / 255)
    torch.testing.assert_close(network.to(memory_format=layout)(frames), expected, rtol=1e-4, atol=1e-5)


def test_it_learns_through_every_layer_and_sees_every_frame():
    torch.manual_seed(0)
    torso = NatureConvolutions(3, 60, 40)
    network = q_network(NATURE, 3, torso.z_shape, 2, torso)
    frames = torch.randint(0, 256, (2, 3, 60, 40), dtype=torch.uint8)
    network(frames).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in network.parameters())
    for k in range(3):
        other = frames.clone()
        other[:, k] = 255 - other[:, k]
        assert not torch.allclose(network(other), network(frames))


def test_what_it_cannot_do_is_said_before_anything_starts(tmp_path):
    with pytest.raises(ValueError, match=r"q\.torso is 'resnet'; choose one of encoder, nature"):
        QConfig(torso="resnet")
    with pytest.raises(UserError, match="at least 36x36 pixels, and these have 12x12"):
        toy_config("pixels", None).latent(q=NATURE).validate()
    for mode in ("frozen", "finetune"):
        with pytest.raises(UserError, match=f"mode {mode} reads frames with the pretrained encoder"):
            toy_config(mode, make_encoder(tmp_path / mode)).latent(q=NATURE).validate()


def test_the_command_trains_it_and_the_policy_is_what_was_learned(tmp_path):
    arguments = command(tmp_path / "home", Path(), 200)
    arguments[arguments.index("--mode") + 1] = "pixels"
    at = arguments.index("--encoder")
    del arguments[at : at + 2]
    result = finish(*arguments, "--set", "q.torso=nature", "--set", "q.hidden=[512]", "--set", "q.layer_norm=false")
    assert result["updates"] > 0
    assert result["encoder_sha256_before"] != result["encoder_sha256_after"]
    policy = load_policy(Path(result["run_folder"]) / "policy")
    record = json.loads((policy.bundle_path / "config.json").read_text())
    assert record["encoder_config"] is None
    assert record["z_shape"] == [64 * 7 * 7]
    rng, rolling = np.random.default_rng(0), RollingStack(policy.config.stack)
    for t in range(3):
        frames, is_first = rng.integers(0, 256, (2, 84, 84), dtype=np.uint8), np.full(2, t == 0)
        stacked = torch.from_numpy(rolling.push(frames, is_first))
        expected = paper_network(policy._network)(stacked.float() / 255)
        torch.testing.assert_close(policy.values(frames, is_first), expected, rtol=1e-4, atol=1e-5)
    assert policy.preprocess == preprocess_for("pong")
    assert isinstance(policy.encoder, NatureConvolutions)


def test_an_architecture_that_is_given_beside_it_is_not_used():
    config = toy_config("pixels", None).latent(preprocess=preprocess_for("pong"), q=NATURE)
    config.latent(encoder_config=VAESettings())
    config.validate()
    assert config.encoder_config is None
    assert config.z_shape == (64 * 7 * 7,)
