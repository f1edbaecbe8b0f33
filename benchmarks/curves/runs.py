"""`python -m curves.runs CELL FOLDER`: one run in this process, as one JSON line.

A run gives `games` (agent steps by then, raw return, seconds of training), `seconds` of training, `updates`, and for
Atari games `greedy`: whole games of the trained policy without exploration.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers.measuring import ray_here

from curves.arms import Cell
from curves.rally import GymRally, rally_factory, rally_preprocess
from jobs import collect, evaluate, pretrain, train
from jobs.metrics import METRICS_FILE
from jobs.workspace import Workspace
from pipeline.errors import UserError
from pipeline.registry import resolve
from rllib_ext.algorithm import LatentDQN
from rllib_ext.config import LatentDQNConfig

PONG = "PongNoFrameskip-v4"  # as Stable-Baselines3's wrappers want it
GREEDY_EPISODES = 20
BUFFER = 50_000  # of Stable-Baselines3, which holds four frames for every transition


def run(cell: Cell, folder: Path) -> dict[str, Any]:
    """Trains as the cell says; `folder` keeps encoders and run folders between cells."""
    if cell.settings["mode"] == "sb3":
        return sb3(cell)
    return rally(cell) if cell.is_rally else atari(cell, folder)


def rally(cell: Cell) -> dict[str, Any]:
    """The small game, through the algorithm's own interface."""
    recipe = cell.recipe
    config = LatentDQNConfig().latent(
        preprocess=rally_preprocess(),
        mode=cell.settings["mode"],
        encoder_config=recipe.model,
        q=recipe.q,
        env_factory=rally_factory,
    )
    num_workers = cell.settings["num_workers"]
    config = config.training(recipe.train).env_runners(num_env_runners=num_workers).debugging(seed=cell.seed)
    return learn(config, cell.agent_steps)


def learn(
    config: LatentDQNConfig, agent_steps: int, finish: Callable[[LatentDQN], dict[str, Any]] = lambda algorithm: {}
) -> dict[str, Any]:
    """Trains through the algorithm's own interface; `finish` adds to the result what it reads off the algorithm."""
    games: list[list[float]] = []
    with ray_here(max(2, config.num_env_runners)):
        algorithm = config.build_algo()
        started = time.monotonic()
        while algorithm.agent_steps < agent_steps:
            algorithm.train()
            seconds = time.monotonic() - started
            games += [[steps, value, seconds] for steps, value in algorithm.take_finished_games()]
        result = {"games": games, "seconds": time.monotonic() - started, "updates": algorithm.updates}
        result |= finish(algorithm)
        algorithm.stop()
    return result


def atari(cell: Cell, folder: Path) -> dict[str, Any]:
    """A game through the same functions as the command line: prior frames, encoder, Q-learning, whole greedy games."""
    workspace = Workspace.at(str(folder))
    result = train.run(
        workspace,
        cell.recipe,
        game=cell.game,
        encoder=prior_encoder(workspace, cell),
        mode=cell.settings["mode"],
        agent_steps=cell.agent_steps,
        num_env_runners=cell.settings["num_workers"],
        seed=cell.seed,
        register=f"{cell.game}-{cell.arm}-{cell.seed}",
    )
    games, seconds = read_games(Path(result["run_folder"]) / METRICS_FILE)
    greedy = evaluate.run(workspace, result["policy"], episodes=GREEDY_EPISODES, seed=cell.seed)
    return {"games": games, "seconds": seconds, "updates": result["updates"], "greedy": greedy["returns"]}


def prior_encoder(workspace: Workspace, cell: Cell) -> str | None:
    """Address of the encoder of a random agent's frames, made where there is none yet; None where none is used."""
    recipe, num_frames = cell.encoder, cell.settings["prior_frames"]
    if recipe is None:
        return None
    data = f"{cell.game}-prior-{num_frames}-{cell.seed}"
    name = f"{data}-{recipe.name}"
    address = f"models:/{name}@champion"
    try:
        resolve(address, workspace.tracking_uri, workspace.cache)
    except UserError:
        frames = workspace.home / "frames" / data
        if not frames.exists():
            collect.run(workspace, game=cell.game, frames=num_frames, out=str(frames), seed=cell.seed, num_workers=2)
        pretrain.run(workspace, replace(recipe, train=replace(recipe.train, seed=cell.seed)), str(frames), name)
    return address


def read_games(path: Path) -> tuple[list[list[float]], float]:
    """Games and seconds of training from a run's metrics; a game's seconds are those of the record it came with.

    Each sitting of a run counts its seconds from 0; here they go on.
    """
    games: list[list[float]] = []
    new: list[list[float]] = []  # since the last record
    seconds = before = 0.0
    for line in map(json.loads, path.read_text().splitlines()):
        if "episode_return" in line:
            new.append([line["step"], line["episode_return"]])
        else:
            if before + line["seconds"] < seconds:
                before = seconds
            seconds = before + line["seconds"]
            games += [[*game, seconds] for game in new]
            new = []
    return games, seconds


def sb3(cell: Cell) -> dict[str, Any]:
    """Stable-Baselines3's DQN with the cell's settings, one game at a time, as it ships."""
    import ale_py
    import gymnasium as gym
    from stable_baselines3 import DQN
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_atari_env, make_vec_env
    from stable_baselines3.common.vec_env import VecFrameStack

    class Games(BaseCallback):
        """Notes every game that ends."""

        def _on_training_start(self) -> None:
            self.games: list[list[float]] = []
            self.started = time.monotonic()

        def _on_step(self) -> bool:
            for info in self.locals["infos"]:
                if "episode" in info:
                    self.games.append([self.num_timesteps, info["episode"]["r"], time.monotonic() - self.started])
            return True

    gym.register_envs(ale_py)
    torch.set_num_threads(2)
    settings = cell.recipe.train
    games = make_vec_env(GymRally, seed=cell.seed) if cell.is_rally else make_atari_env(PONG, seed=cell.seed)
    env = VecFrameStack(games, 4)
    steps_per_update = round(1 / settings.updates_per_agent_step)
    model = DQN(
        "CnnPolicy",
        env,
        learning_rate=settings.lr,
        buffer_size=BUFFER,
        learning_starts=settings.warmup_agent_steps,
        batch_size=settings.batch_size,
        gamma=settings.gamma,
        train_freq=steps_per_update,
        gradient_steps=1,
        target_update_interval=settings.target_update_updates * steps_per_update,
        exploration_fraction=settings.epsilon_decay_agent_steps / cell.agent_steps,
        exploration_initial_eps=settings.epsilon_start,
        exploration_final_eps=settings.epsilon_end,
        max_grad_norm=settings.grad_clip,
        optimize_memory_usage=True,
        replay_buffer_kwargs={"handle_timeout_termination": False},
        policy_kwargs={"optimizer_kwargs": {"eps": settings.adam_epsilon}},
        seed=cell.seed,
    )
    noted = Games()
    model.learn(cell.agent_steps, callback=noted, log_interval=None)  # type: ignore[arg-type]
    seconds = time.monotonic() - noted.started
    result: dict[str, Any] = {"games": noted.games, "seconds": seconds, "updates": model._n_updates}
    if not cell.is_rally:
        result["greedy"] = greedy_sb3(model, cell.seed)
    return result


def greedy_sb3(model: Any, seed: int) -> list[float]:
    """Raw returns of whole games."""
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.vec_env import VecFrameStack

    env = VecFrameStack(make_atari_env(PONG, 4, seed=seed + 1_000), 4)
    returns, _ = evaluate_policy(model, env, GREEDY_EPISODES, deterministic=True, return_episode_rewards=True)
    return [float(value) for value in np.asarray(returns)]


if __name__ == "__main__":
    given = Cell(**json.loads(sys.argv[1]))
    print(json.dumps(run(given, Path(sys.argv[2]))), flush=True)
