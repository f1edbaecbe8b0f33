"""`LatentDQN` without the command line: the example script as it stands, and trials of Ray Tune with checkpoints."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import catch
import pytest
import ray
from ray import tune
from rl_toys import make_encoder, toy_config

from pipeline.artifact import load_encoder
from pipeline.atari import preprocess_for
from pipeline.errors import UserError
from pipeline.models.vae import VAESettings
from rllib_ext.algorithm import RESULTS_KEY, LatentDQN
from rllib_ext.state_files import load_state

EXAMPLES = Path(__file__).resolve().parent.parent / "docs" / "examples"
TINY = VAESettings(z_dim=8, patch=12, widths=(8,), num_blocks=0)


def run_example(name: str, *arguments: str) -> list[str]:
    alone = {**os.environ, "RAY_ADDRESS": "local"}  # whatever else runs here
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=alone)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("has_encoder", [True, False])
def test_the_online_example_leaves_an_encoder_that_has_learned(tmp_path, has_encoder):
    out, start = tmp_path / "kept", []
    if has_encoder:
        start = ["--encoder", str(make_encoder(tmp_path / "encoder", preprocess_for("pong"), TINY, standardise=False))]
    *reports, kept = run_example("online_loop.py", "--out", str(out), "--agent-steps", "1800", *start)
    updates = [int(re.findall(r"(\d+) updates", line)[0]) for line in reports]
    assert updates == sorted(updates)
    assert updates[-1] >= 50
    assert f"(8, {load_encoder(out, preprocess=preprocess_for('pong')).z_dim})" in kept


def test_the_example_script_does_what_it_says(tmp_path):
    encoder = make_encoder(tmp_path / "encoder", preprocess_for("pong"), TINY, standardise=False)
    said = run_example("own_script.py", "--encoder", str(encoder), "--agent-steps", "700")
    trained, restored, *searched = [line for line in said if "agent steps" in line]
    steps, updates = (int(number) for number in re.findall(r"\d+", trained))
    assert steps >= 700
    assert 0 < updates <= (steps - 500) / 4
    assert int(re.findall(r"\d+", restored)[0]) > steps
    assert [float(line.split()[1].rstrip(":")) for line in searched] == [1e-4, 3e-4]


@pytest.fixture
def _ray_session() -> Iterator[None]:
    ray.cloudpickle.register_pickle_by_value(catch)  # workers do not see this folder
    ray.init("local", num_cpus=2, object_store_memory=200 * 2**20, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(catch)


def values_of(tree: Any, key: str) -> list[Any]:
    """Everything that stands under a key in nested dicts and lists."""
    if isinstance(tree, dict):
        return [x for k, v in tree.items() for x in ([v] if k == key else values_of(v, key))]
    return [x for v in tree for x in values_of(v, key)] if isinstance(tree, list | tuple) else []


@pytest.mark.usefixtures("_ray_session")
def test_trials_of_tune_learn_with_their_own_rate_and_go_on_from_their_checkpoints(tmp_path):
    config = toy_config("frozen", make_encoder(tmp_path / "encoder"))
    trials = tune.Tuner(
        LatentDQN,
        param_space=config.copy(copy_frozen=False).training(lr=tune.grid_search([1e-3, 3e-3])),
        run_config=tune.RunConfig(
            storage_path=str(tmp_path / "tune"),
            stop={f"{RESULTS_KEY}/agent_steps": 400},
            checkpoint_config=tune.CheckpointConfig(num_to_keep=1, checkpoint_frequency=5, checkpoint_at_end=True),
            verbose=0,
        ),
    ).fit()
    assert sorted(trial.config["lr"] for trial in trials) == [1e-3, 3e-3]
    for trial in trials:
        checkpoint, figures = Path(trial.checkpoint.path), trial.metrics[RESULTS_KEY]
        assert not [file for file in checkpoint.rglob("*") if file.suffix in (".pkl", ".pickle", ".pt")]
        assert {float(rate) for rate in values_of(load_state(checkpoint, "state"), "lr")} == {trial.config["lr"]}
        algorithm = config.copy(copy_frozen=False).training(lr=trial.config["lr"]).build_algo()
        algorithm.restore(trial.checkpoint)  # what Tune calls
        assert (algorithm.agent_steps, algorithm.updates) == (figures["agent_steps"], figures["updates"])
        assert algorithm.replay.written.sum() >= algorithm.agent_steps
        assert algorithm.train()[RESULTS_KEY]["agent_steps"] >= figures["agent_steps"]
        algorithm.stop()


def test_what_tune_changes_arrives_and_what_is_not_read_is_refused(tmp_path):
    config = toy_config("frozen", None)
    changed = config.copy(copy_frozen=False).update_from_dict({**config.to_dict(), "n_step": 5, "num_env_runners": 3})
    assert changed.settings == config.settings.replace(n_step=5)
    assert changed.num_env_runners == 3
    with pytest.raises(UserError, match="does not read RLlib's 'model'"):
        config.copy(copy_frozen=False).update_from_dict({"model": {"fcnet_hiddens": [4]}})
