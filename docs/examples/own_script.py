"""`LatentDQN` in a script of one's own: built, trained, saved, restored, and searched over by Ray Tune.

python docs/examples/own_script.py --encoder FOLDER [--game pong] [--agent-steps 4000]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import ray
from ray import tune

from pipeline.atari import preprocess_for
from rllib_ext.algorithm import RESULTS_KEY, LatentDQN
from rllib_ext.config import LatentDQNConfig


def configuration(game: str, encoder: Path) -> LatentDQNConfig:
    """Q-learning on the frozen latents of an encoder bundle."""
    return (
        LatentDQNConfig()
        .latent(preprocess=preprocess_for(game), mode="frozen", encoder=encoder)
        .training(lr=1e-4, n_step=3, warmup_agent_steps=500, envs_per_runner=4)
        .env_runners(num_env_runners=1)
        .debugging(seed=0)
    )


def train(config: LatentDQNConfig, agent_steps: int, folder: Path) -> None:
    """Trains, saves, and goes on in a new algorithm from what was saved."""
    algorithm = config.build_algo()
    while algorithm.agent_steps < agent_steps:
        figures = algorithm.train()[RESULTS_KEY]
    path = algorithm.save_to_path(folder / "checkpoint")
    algorithm.stop()
    print(f"{figures['agent_steps']:.0f} agent steps, {figures['updates']:.0f} updates")

    again = config.build_algo()
    again.restore_from_path(path)
    again.train()
    print(f"restored and went on to {again.agent_steps} agent steps")
    again.stop()


def search(config: LatentDQNConfig, agent_steps: int, folder: Path) -> None:
    """The same configuration under Tune, with two learning rates; each trial plays in its own process."""
    alone = config.copy(copy_frozen=False).env_runners(num_env_runners=0)
    trials = tune.Tuner(
        LatentDQN,
        param_space=alone.training(lr=tune.grid_search([1e-4, 3e-4])),
        tune_config=tune.TuneConfig(max_concurrent_trials=1),
        run_config=tune.RunConfig(
            storage_path=str(folder / "tune"), stop={f"{RESULTS_KEY}/agent_steps": agent_steps}, verbose=0
        ),
    ).fit()
    for trial in trials:
        figures = trial.metrics[RESULTS_KEY]
        print(f"lr {trial.config['lr']}: {figures['agent_steps']:.0f} agent steps, TD loss {figures['td_loss']:.4f}")


def main() -> None:
    """Both, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, required=True, help="folder of an encoder bundle")
    parser.add_argument("--game", default="pong")
    parser.add_argument("--agent-steps", type=int, default=4_000)
    options = parser.parse_args()
    ray.init(include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(options.game, options.encoder.absolute())
        train(config, options.agent_steps, Path(folder))
        search(config, options.agent_steps, Path(folder))
    ray.shutdown()


if __name__ == "__main__":
    main()
