"""`python -m experiment.runs CELL FOLDER`: one cell in this process, as one JSON line.

A cell gives `games` (agent steps by then, raw return, seconds of training), `seconds` of training, `updates`, `greedy`
(whole games of the final policy without exploration), `prior` (frames, and seconds of collecting and of pretraining),
where the time to a score is asked for `goal`, and off Atari `q_divergences` (updates with values that no return can
have). `seconds`, `updates` and `greedy` are those after the cell's agent
steps, however far the run has then gone on for that score.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from curves.runs import learn, read_games

from experiment.arms import Cell
from experiment.prior import Prior, prior_of
from experiment.worlds import World
from jobs import evaluate, train
from jobs.evaluate import GreedyPlayer
from jobs.metrics import METRICS_FILE
from jobs.training import Training
from jobs.workspace import CHECKPOINT_FOLDER, Workspace
from pipeline import models
from pipeline.play import play
from pipeline.registry import Resolved, resolve
from rllib_ext.algorithm import LatentDQN
from rllib_ext.policy import PolicyConfig, load_policy, save_policy

WINDOW = 10  # training games whose mean must reach a goal


def run(cell: Cell, folder: Path) -> dict[str, Any]:
    """Makes the encoder that the cell starts from, trains and plays; `folder` keeps encoders between cells."""
    prior = prior_of(cell, folder)
    known = cell.world
    result = atari(cell, folder, prior) if known is None else elsewhere(cell, known, prior)
    made = None if prior is None else {key: value for key, value in asdict(prior).items() if key != "bundle"}
    return {**result, "prior": made}


def atari(cell: Cell, folder: Path, prior: Prior | None) -> dict[str, Any]:
    """A game on the screen through the same functions as the command line, in a home of its own."""
    home = folder / "cells" / f"{cell.task}-{cell.arm}-{cell.seed}-{cell.digest}"
    shutil.rmtree(home, ignore_errors=True)  # of a call that was cut off
    workspace = Workspace.at(str(home))

    def sit(agent_steps: int, *, resume: bool) -> tuple[dict[str, Any], list[list[float]], float]:
        result = train.run(
            workspace,
            cell.recipe,
            game=cell.game,
            encoder=prior.bundle if prior else None,
            mode=cell.settings["mode"],
            agent_steps=agent_steps,
            num_env_runners=cell.settings["num_workers"],
            seed=cell.seed,
            resume=resume,
        )
        return result, *read_games(Path(result["run_folder"]) / METRICS_FILE)

    result, games, seconds = sit(cell.agent_steps, resume=False)
    greedy = evaluate.run(workspace, result["policy"], episodes=cell.settings["greedy_episodes"], seed=cell.seed)
    found = {"games": games, "seconds": seconds, "updates": result["updates"], "greedy": greedy["returns"]}
    score, limit_s = cell.settings["goal"], cell.settings["limit_s"]
    if score is not None:
        spent_s, agent_steps = seconds, result["agent_steps"]
        while reached_s(games, score) is None and spent_s < limit_s:
            fitting = int((limit_s - spent_s) * agent_steps / spent_s) + 1
            result, games, spent_s = sit(agent_steps + min(cell.agent_steps, fitting), resume=True)
            agent_steps = result["agent_steps"]
        goal = {"score": score, "reached_s": reached_s(games, score), "spent_s": round(spent_s, 1)}
        found |= {"games": games, "goal": goal}
    shutil.rmtree(Path(result["run_folder"]) / CHECKPOINT_FOLDER, ignore_errors=True)  # the replay, up to a gigabyte
    return found


def reached_s(games: Sequence[Sequence[float]], score: float) -> float | None:
    """Seconds of training after which the mean of the last 10 games first was `score` or more; None: it never was."""
    returns = np.array([game[1] for game in games])
    if len(returns) < WINDOW:
        return None
    means = np.convolve(returns, np.full(WINDOW, 1 / WINDOW), "valid")
    there = np.flatnonzero(means >= score - 1e-9)
    return float(games[there[0] + WINDOW - 1][2]) if len(there) else None


def elsewhere(cell: Cell, known: World, prior: Prior | None) -> dict[str, Any]:
    """A game of these benchmarks, through the algorithm's own interface and with the same configuration."""
    resolved = resolve(prior.bundle, "", Path()) if prior else None
    config = train.build_config(plan_of(cell, known, resolved), known.preprocess, resolved, known.factory)

    def play_greedily(algorithm: LatentDQN) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            policy = write_policy(Path(folder) / "policy", algorithm, known, resolved)
            player, episodes = GreedyPlayer(load_policy(policy)), cell.settings["greedy_episodes"]
            results = play(player, known.preprocess, episodes, cell.seed, make_env=known.factory)
        return {"greedy": results.returns.tolist(), "q_divergences": algorithm.q_divergences}

    return learn(config, cell.agent_steps, play_greedily)


def plan_of(cell: Cell, known: World, resolved: Resolved | None) -> Training:
    """The run as `latentrl train` would describe it."""
    recipe, shared = cell.recipe, {field.name for field in dataclasses.fields(Training)}
    parts = {f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe) if f.name in shared}
    return Training(
        recipe=recipe.name,
        game=cell.game,
        protocol=known.preprocess.protocol,
        mode=cell.settings["mode"],
        encoder=resolved.address if resolved else None,
        encoder_uri=None,
        encoder_sha256=resolved.sha256 if resolved else None,
        agent_steps=cell.agent_steps,
        num_env_runners=cell.settings["num_workers"],
        num_learners=0,
        num_gpus_per_learner=0,
        seed=cell.seed,
        **parts,
    )


def write_policy(path: Path, algorithm: LatentDQN, known: World, resolved: Resolved | None) -> Path:
    """The agent as a policy bundle."""
    settings = algorithm.config.encoder_config
    built = None if settings is None else settings.for_frames(known.preprocess.height, known.preprocess.width)
    config = PolicyConfig(
        mode=algorithm.config.mode,
        stack=algorithm.settings.stack,
        z_shape=algorithm.config.z_shape,
        q=algorithm.config.q,
        action_names=known.preprocess.action_set,
        encoder={"address": resolved.address, "version": None, "sha256": resolved.sha256} if resolved else None,
        encoder_config=None if built is None else models.to_record(built),
    )
    bundle = resolved.path if resolved else None
    save_policy(path, config, known.preprocess, algorithm.network_state(), encoder_bundle=bundle, card={})
    return path


if __name__ == "__main__":
    given = Cell(**json.loads(sys.argv[1]))
    print(json.dumps(run(given, Path(sys.argv[2]))), flush=True)
