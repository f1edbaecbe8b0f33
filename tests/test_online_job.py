"""Mode online through the train stage's real entry point: Pong, from a registered encoder and from nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import ray
import torch
from rl_toys import make_encoder
from test_train_job import RECIPE, TINY

from jobs import evaluate, lineage, train
from jobs.workspace import Workspace
from pipeline.artifact import load_encoder, load_model, load_stats
from pipeline.atari import preprocess_for
from pipeline.registry import Tracking, register_encoder, resolve
from rllib_ext.policy import load_policy
from rllib_ext.settings import ElboSettings

ELBO = ElboSettings(
    updates_per_agent_step=0.1, warmup_agent_steps=32, batch_size=16, publish_updates=4, scratch_updates=10
)
ONLINE = replace(RECIPE, name="online", elbo=ELBO)


@pytest.fixture(scope="module", autouse=True)
def _ray_session():
    ray.init("local", num_cpus=2, object_store_memory=200 * 2**20, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    torch.set_num_threads(1)
    return Workspace.at(str(tmp_path / "home"))


def run(workspace, encoder, **changes):
    settings = {"game": "pong", "encoder": encoder, "mode": "online", "agent_steps": 200, "num_env_runners": 1}
    return train.run(workspace, ONLINE, **{**settings, **changes})


def test_a_registered_encoder_gets_a_version_that_has_learned_on(workspace, tmp_path):
    bundle = make_encoder(tmp_path / "encoder", preprocess_for("pong"), TINY, standardise=False)
    tracking = Tracking(workspace.tracking_uri)
    with tracking.start_run("prior", stage="pretrain", folder=tmp_path / "prior", game="pong") as opened:
        register_encoder(opened, bundle, "eye", bits_per_dim=3.0, active_fraction=1.0, has_heldout=True)
    result = run(workspace, "models:/eye/1")
    assert result["encoder_uri"] == "models:/eye/2"
    assert result["encoder_sha256_before"] != result["encoder_sha256_after"]
    after = resolve("models:/eye/2", workspace.tracking_uri, workspace.cache)
    assert after.sha256 == result["encoder_bundle_sha256"]
    before = resolve("models:/eye@champion", workspace.tracking_uri, workspace.cache)
    assert before.version == "1", "its bound is of frames it has learned from"
    frames = np.random.default_rng(0).integers(0, 256, (4, 84, 84), dtype=np.uint8)
    both = [load_model(place.path).features(torch.from_numpy(frames)).detach() for place in (before, after)]
    assert not torch.equal(*both)
    policy, encoder = load_policy(result["policy"]), load_encoder(after.path)
    for name, value in policy.encoder.net.state_dict().items():
        assert value.shape == encoder.net.state_dict()[name].shape
    assert len(load_stats(after.path).mean) == 8
    told = lineage.run(workspace, "models:/eye/2")
    assert result["run_id"] in str(told)
    assert "models:/eye/1" in str(told), "what it started from"
    again = run(workspace, "models:/eye/1", agent_steps=300, resume=True)
    assert again["run_id"] == result["run_id"]
    assert again["encoder_uri"] == "models:/eye/3"


def test_from_nothing_it_plays_and_leaves_an_encoder(workspace):
    result = run(workspace, None)
    assert result["encoder_uri"] == "models:/pong-encoder/1"
    assert result["encoder_active_units"] >= 0
    assert load_encoder(result["encoder"]).preprocess == preprocess_for("pong")
    scored = evaluate.run(workspace, result["model_uri"], episodes=1)
    assert len(scored["returns"]) == 1
