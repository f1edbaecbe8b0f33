"""`latentrl demo`: the whole pipeline on a real game, in order. Read it as the tour of the project."""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jobs import collect, evaluate, pretrain, report, train
from jobs.cluster import ray_session
from jobs.recipes import PRETRAIN_RECIPES, TRAIN_RECIPES, PretrainRecipe, TrainRecipe
from jobs.workspace import Workspace
from pipeline.errors import UserError
from pipeline.registry import Run, Tracking, ui_command

DEMO_FOLDERS = {"artifacts", "cache", "frames", "runs"}


@dataclass(frozen=True)
class Plan:
    """How large a demo is.

    Attributes:
        game: Which one.
        frames: Frames to collect.
        agent_steps: Of Q-learning.
        episodes: Whole games of each agent in the comparison.
        num_workers: CPUs that Ray must have: collecting workers, or a Train worker and its data stream.
        num_env_runners: Remote rollout workers.
        encoder: Recipe of the encoder.
        agent: Recipe of the Q-learning.
    """

    game: str = "pong"
    frames: int = 30_000
    agent_steps: int = 120_000
    episodes: int = 20
    num_workers: int = 2
    num_env_runners: int = 1
    encoder: PretrainRecipe = PRETRAIN_RECIPES["demo"]
    agent: TrainRecipe = TRAIN_RECIPES["demo"]


def run(
    out: str,
    plan: Plan = Plan(),
    *,
    tracking_uri: str | None = None,
    ray_address: str | None = None,
    wait_s: float | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Runs every stage and compares the trained agent with a random one.

    Args:
        out: Folder for everything: data, runs, tracking database, artifacts.
        plan: How large it is.
        tracking_uri: MLflow server instead of a sqlite file in `out`.
        ray_address: Running cluster instead of a local one.
        wait_s: How long to wait for the cluster's room; see `room.require`.
        seed: Of data, encoder, agent and evaluation.
        overwrite: Replaces an earlier demo at `out`.

    Returns:
        The keys that `latentrl demo --json` prints.
    """
    started = time.monotonic()
    workspace = Workspace.at(out, tracking_uri, ray_address, wait_s=wait_s)
    _require_replaceable(workspace.home, overwrite=overwrite)
    tracking = Tracking(workspace.tracking_uri)
    if tracking_uri is not None:
        tracking.check()  # a server that does not answer leaves an earlier demo as it is, as a missing cluster does
    with (
        ray_session(workspace, needs={"CPU": plan.num_workers}, what="the demo's workers"),
        _fresh_run(workspace, tracking) as parent,
    ):
        # 1. Prior frames: a random agent plays, Ray workers write Parquet.
        _say(1, f"{plan.frames:,} frames of a random agent playing {plan.game}")
        frames = collect.run(
            workspace,
            game=plan.game,
            frames=plan.frames,
            out=str(workspace.home / "frames"),
            seed=seed,
            num_workers=plan.num_workers,
        )
        # 2. A latent-variable model of them: Ray Data -> Ray Train -> a version in MLflow.
        _say(2, "a variational autoencoder of those frames")
        encoder = pretrain.run(
            workspace,
            replace(plan.encoder, train=replace(plan.encoder.train, seed=seed)),
            frames["dataset"],
            f"{plan.game}-encoder",
            parent_run_id=parent.run_id,
        )
        # 3. Q-learning on its frozen latents, which rollout workers make.
        _say(3, f"Q-learning on frozen latents, {plan.agent_steps:,} agent steps")
        agent = train.run(
            workspace,
            plan.agent,
            game=plan.game,
            encoder=encoder["model_uri"],
            mode="frozen",
            agent_steps=plan.agent_steps,
            num_env_runners=plan.num_env_runners,
            seed=seed,
            parent_run_id=parent.run_id,
        )
        # 4. What is it worth? Whole games, raw points, beside a random agent.
        _say(4, f"{plan.episodes} whole games each, of a random agent and of the trained one")
        random = evaluate.run(
            workspace, f"random:{plan.game}", episodes=plan.episodes, seed=seed, parent_run_id=parent.run_id
        )
        trained = evaluate.run(
            workspace, agent["policy"], episodes=plan.episodes, seed=seed, video=True, parent_run_id=parent.run_id
        )
    # 5. A page to look at.
    page = report.run(workspace, agent["run_folder"])
    result = {
        "random": _score(random),
        "trained": _score(trained),
        "model_uri": encoder["model_uri"],
        "policy": agent["policy"],
        "report": page["path"],
        "steps_per_worker": agent["steps_per_worker"],
        "num_train_workers": encoder["num_train_workers"],
        "num_remote_env_runners": agent["num_remote_env_runners"],
        "seconds": round(time.monotonic() - started, 1),
    }
    return parent.delivered({**result, "table": _table(plan.game, result, ui_command(workspace.tracking_uri))})


def _require_replaceable(home: Path, *, overwrite: bool) -> None:
    """--overwrite replaces an earlier demo, finished or not, and never anything else."""
    names = {path.name for path in home.iterdir()} if home.is_dir() else set()
    if not names:
        return
    if not overwrite:
        raise UserError(f"{home} exists and is not empty; add --overwrite or name another --out")
    other = sorted(name for name in names - DEMO_FOLDERS if not name.startswith("mlflow."))
    if other or not any(home.glob("runs/demo-*/run.json")):
        raise UserError(f"{home} holds other things than a demo ({other[:3] or 'no demo run'}); name another --out")


def _fresh_run(workspace: Workspace, tracking: Tracking) -> Run:
    """The parent of all stages' runs, in an empty home."""
    if workspace.home.is_dir():
        shutil.rmtree(workspace.home)
    tracking.check()
    folder = workspace.new_run_folder("demo")
    return tracking.start_run(folder.name, stage="demo", folder=folder)


def _say(number: int, text: str) -> None:
    print(f"\n[{number}/5] {text}", file=sys.stderr, flush=True)


def _score(evaluation: dict[str, Any]) -> dict[str, Any]:
    return {key: evaluation[key] for key in ("mean_return", "ci95_low", "ci95_high", "episodes", "human_normalised")}


def _table(game: str, result: dict[str, Any], ui: str) -> str:
    rows = [f"\n{game:<16}  mean greedy return   95% interval       episodes"]
    for name in ("random", "trained"):
        score = result[name]
        interval = f"[{score['ci95_low']:.2f}, {score['ci95_high']:.2f}]"
        rows.append(f"{name + ' agent':<16}  {score['mean_return']:>18.2f}   {interval:<18} {score['episodes']:>8}")
    minutes = result["seconds"] / 60
    rows.append(f"\n{minutes:.1f} minutes in all; the report: {result['report']}")
    rows.append(f"the runs, models and pictures in MLflow: {ui}")
    return "\n".join(rows)
