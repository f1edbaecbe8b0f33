"""The train stage's real entry point at toy size: Pong, a tiny untrained encoder, one remote rollout worker."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import numpy as np
import pytest
import ray
import torch
from rl_toys import make_encoder

from jobs import gc, train, watch
from jobs.recipes import TrainRecipe
from jobs.workspace import Workspace
from pipeline.atari import preprocess_for
from pipeline.errors import UserError
from pipeline.models.vae import VAESettings
from pipeline.registry import sync
from pipeline.tracking import RunRecord, open_outbox
from rllib_ext import workers
from rllib_ext.algorithm import LatentDQN
from rllib_ext.policy import load_policy
from rllib_ext.settings import DQNSettings, QConfig

TINY = VAESettings(z_dim=8, patch=12, widths=(8,), num_blocks=0)


RECIPE = TrainRecipe(
    name="toy",
    q=QConfig(hidden=(16,)),
    train=DQNSettings(envs_per_runner=4, fragment_length=8, warmup_agent_steps=64, replay_capacity=2_000, batch_size=8),
    model=TINY,
)


@pytest.fixture(scope="module", autouse=True)
def _ray_session():
    ray.init("local", num_cpus=2, object_store_memory=200 * 2**20, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    return Workspace.at(str(tmp_path / "home"))


def make_pong_encoder(tmp_path):
    return str(make_encoder(tmp_path / "encoder", preprocess_for("pong"), TINY, standardise=False))


def run(workspace, encoder, **changes):
    settings = {"game": "Pong", "encoder": encoder, "mode": "frozen", "agent_steps": 150, "num_env_runners": 1}
    return train.run(workspace, changes.pop("recipe", RECIPE), **{**settings, **changes})


def test_train_then_resume(workspace, tmp_path, capfd):
    torch.set_num_threads(1)
    encoder = make_pong_encoder(tmp_path)
    result = run(workspace, encoder, resume_if_any=True)  # there is none
    assert "warm-up" not in capfd.readouterr().err
    assert result["encoder_sha256_before"] == result["encoder_sha256_after"]
    assert sum(result["steps_per_worker"].values()) == result["agent_steps"] >= 150
    assert len(result["steps_per_worker"]) == result["num_remote_env_runners"] == 1
    assert result["updates"] == RECIPE.train.due_updates(result["agent_steps"])
    folder = workspace.find_run(result["run_id"])
    assert json.loads((folder / "result.json").read_text()) == result
    policy = load_policy(result["policy"])
    assert policy.preprocess == preprocess_for("pong")
    assert policy.act(np.zeros((2, 84, 84), np.uint8), np.ones(2, bool)).shape == (2,)
    (kept,) = gc.run(workspace, delete=True)["kept"]
    assert (kept["what"], kept["bytes"] > 1000) == ("runs/train-pong-frozen-001/checkpoint", True)
    again = run(workspace, encoder, agent_steps=250, resume=True)
    assert again["run_id"] == result["run_id"]
    assert again["agent_steps"] >= 250
    assert again["updates"] == RECIPE.train.due_updates(again["agent_steps"])
    assert again["encoder_sha256_before"] == result["encoder_sha256_before"]
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert steps[-1] == again["agent_steps"]
    with pytest.raises(UserError, match=r"started with other settings \(seed: 0 then, 5 now\)"):
        run(workspace, encoder, seed=5, resume=True)
    with pytest.raises(UserError, match="has finished"):
        run(workspace, encoder, agent_steps=250, resume=True)
    leave_undelivered(folder)
    assert run(workspace, encoder, agent_steps=250, resume_if_any=True) == again  # delivered, not trained again
    assert sync(folder) == 0
    (folder / "result.json").unlink()  # as if it had been cut off
    with pytest.raises(UserError, match=r"started with other settings \(seed: 0 then, 5 now\)"):
        run(workspace, encoder, seed=5, resume_if_any=True)
    further = run(workspace, encoder, agent_steps=300, resume_if_any=True)
    assert further["run_id"] == result["run_id"]
    assert further["agent_steps"] >= 300
    assert [path.name for path in workspace.runs.iterdir()] == [folder.name]
    (gone,) = gc.run(workspace, delete=True, finished=True)["items"]
    assert (gone["what"], gone["bytes"]) == (kept["what"], pytest.approx(kept["bytes"], rel=1))
    with pytest.raises(UserError, match=r"that of train-pong-frozen-001 was removed by `latentrl gc` at .* UTC"):
        run(workspace, encoder, agent_steps=350, resume=True)
    load_policy(result["policy"])


def leave_undelivered(folder):
    """One entry that the tracking server has not heard of."""
    record = RunRecord.read(folder)
    outbox = open_outbox(folder, record, record.address())
    outbox.append("tag", {"key": "late", "value": "yes"})
    assert outbox.close(0.0) == 1


def test_a_run_whose_workers_are_gone_for_good_is_kept_and_goes_on_later(workspace, tmp_path, monkeypatch):
    encoder, train_once = make_pong_encoder(tmp_path), LatentDQN.train

    def train_and_lose_the_worker(algorithm):
        figures = train_once(algorithm)
        for actor in algorithm.env_runner_group._worker_manager.actors().values():
            ray.kill(actor)
        return figures

    with monkeypatch.context() as patch:
        patch.setattr(workers, "_REVIVAL_LIMIT_S", 1.0)
        patch.setattr(LatentDQN, "train", train_and_lose_the_worker)
        with pytest.raises(
            UserError, match=r"all 1 rollout workers are lost .* kept at ([\d,]+) agent steps"
        ) as caught:
            run(workspace, encoder, agent_steps=10**6)
    assert "go on with --resume" in str(caught.value)
    again = run(workspace, encoder, agent_steps=300, resume=True)
    assert again["agent_steps"] >= 300


ROOMY = replace(RECIPE, train=RECIPE.train.replace(replay_capacity=100_000, warmup_agent_steps=100_000))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"game": "pongg"}, "did you mean pong"),
        ({"game": "breakout"}, "game: the encoder .* has 'pong', the environment 'breakout'"),
        ({"mode": "thawed"}, "unknown mode 'thawed'; choose one of frozen, finetune, online, pixels"),
        ({"encoder": None}, "mode frozen needs a pretrained encoder; give --encoder"),
        ({"mode": "pixels"}, "leave out --encoder"),
        ({"encoder": "models:/nobody@champion"}, "there is no tracking database"),
        ({"encoder": "no/such/folder"}, "no/such/folder"),
        ({"num_env_runners": 1000, "recipe": ROOMY}, "1000 rollout workers need 1000 CPUs"),
        ({"agent_steps": 0}, "--agent-steps is 0"),
        ({"resume": True}, "no train-pong-frozen run under .* to go on with; leave out --resume"),
        ({"recipe": replace(RECIPE, train=DQNSettings(replay_capacity=8))}, "replay_capacity is 8"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(workspace, tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        run(workspace, **{"encoder": make_pong_encoder(tmp_path), **changes})
    assert "\n" not in str(caught.value)
    assert not list(workspace.runs.glob("*"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "does not go beyond the warm-up of 100000"),
        ({"lr_decay_agent_steps": 149}, "goes beyond 149 (train.lr_decay_agent_steps), from which on all rates are 0"),
    ],
)
def test_a_run_that_learns_nothing_for_a_time_says_so(workspace, tmp_path, capfd, changes, words):
    recipe = replace(ROOMY, train=ROOMY.train.replace(**changes))
    with pytest.raises(UserError, match="need 1000 CPUs"):
        run(workspace, make_pong_encoder(tmp_path), num_env_runners=1000, recipe=recipe)
    assert f"note: --agent-steps 150 {words}" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("needs", "words"),
    [
        ({"CPU": 2}, "2 of 2 CPUs idle; 2 learners take 2 CPUs, those that they hold already included"),
        ({"GPU": 2}, "0 of 0 GPUs idle; 2 learners take 2 GPUs, waiting for a node with GPUs"),
    ],
)
def test_a_stage_that_makes_no_progress_says_what_it_has_and_takes(needs, words, capfd, monkeypatch):
    monkeypatch.setattr(watch, "SAY_EVERY_S", 0.5)
    said = ""
    with watch.watched("2 learners", needs):
        until = time.monotonic() + 30
        while "no progress" not in said and time.monotonic() < until:
            time.sleep(0.1)
            said += capfd.readouterr().err
    assert f"Ray has 1 node (0 lost), {words}" in said
