"""The whole pipeline through its real entry points, at toy size: what `make demo` runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs import collect, data, demo, encode, gc, lineage, report
from jobs.cluster import ray_session
from jobs.recipes import PRETRAIN_RECIPES, TRAIN_RECIPES
from jobs.workspace import Workspace
from pipeline.artifact import load_encoder
from pipeline.errors import UserError
from pipeline.gauges import GAUGES
from pipeline.records import Records
from pipeline.registry import resolve
from pipeline.store import FramesDataset
from rllib_ext.policy import load_policy

ENCODER, AGENT = PRETRAIN_RECIPES["demo"], TRAIN_RECIPES["demo"]
TOY = demo.Plan(
    frames=1_200,
    agent_steps=400,
    episodes=2,
    encoder=replace(
        ENCODER,
        model=replace(ENCODER.model, latent_channels=1, widths=(4, 4)),
        train=replace(ENCODER.train, epochs=1, stats_frames=256),
    ),
    agent=replace(AGENT, train=replace(AGENT.train, warmup_agent_steps=128, replay_capacity=4_000)),
)


def test_the_whole_pipeline(tmp_path: Path) -> None:
    result = demo.run(str(tmp_path / "demo"), TOY)
    for agent in ("random", "trained"):
        score = result[agent]
        assert score["ci95_low"] <= score["mean_return"] <= score["ci95_high"]
        assert score["episodes"] == 2
    assert result["num_train_workers"] >= 1
    assert sum(result["steps_per_worker"].values()) >= 400
    assert Path(result["report"]).stat().st_size > 10_000
    assert "mlflow" in result["table"]
    lines = [line for path in tmp_path.glob("demo/runs/*/metrics.jsonl") for line in path.read_text().splitlines()]
    assert {key for line in lines for key in json.loads(line)} - {"step"} <= GAUGES.keys()
    tracking = f"sqlite:///{tmp_path}/demo/mlflow.db"
    found = resolve(result["model_uri"], tracking, tmp_path / "cache")
    assert load_policy(result["policy"]).encoder.sha256 == found.sha256 == load_encoder(found.path).sha256
    with pytest.raises(UserError, match="--overwrite"):
        demo.run(str(tmp_path / "demo"), TOY)
    with pytest.raises(UserError, match="no Ray cluster answers"):
        demo.run(str(tmp_path / "demo"), TOY, overwrite=True, ray_address="127.0.0.1:9")
    assert Path(result["report"]).is_file()  # an earlier demo goes only when the next one can start
    what_a_policy_and_an_encoder_are_for(tmp_path, result)
    it_is_one_tree_and_what_is_needed_of_it_stays(Workspace.at(str(tmp_path / "demo")), result)


def what_a_policy_and_an_encoder_are_for(tmp_path: Path, result: dict[str, Any]) -> None:
    """The agent collects the next dataset, the encoder turns it into latents."""
    workspace = Workspace.at(str(tmp_path / "demo"))
    frames, latents = str(tmp_path / "again"), str(tmp_path / "latents")
    with ray_session(workspace, needs={"CPU": 2}, what="two stages"):
        collected = collect.run(workspace, game="pong", frames=90, out=frames, policy=result["policy"], num_workers=1)
        encoded = encode.run(workspace, frames, result["model_uri"], latents)
    assert data.check(frames)["errors"] == []
    assert collected["frames"] == 90
    made_by = FramesDataset.open(frames).collection
    assert made_by["policy_sha256"] == load_policy(result["policy"]).sha256
    assert made_by["epsilon"] == 0.05
    assert encoded["frames"] > 0
    with pytest.raises(UserError, match="breakout"):
        collect.run(workspace, game="breakout", frames=90, out=f"{frames}2", policy=result["policy"], num_workers=1)


def it_is_one_tree_and_what_is_needed_of_it_stays(workspace: Workspace, result: dict[str, Any]) -> None:
    """In MLflow and in `latentrl lineage`, after `latentrl gc` has taken all that it takes."""
    removed = gc.run(workspace, delete=True, finished=True)
    assert {item["what"] for item in removed["items"]} >= {
        "runs/pretrain-pong-encoder-001/checkpoints",
        "runs/train-pong-frozen-001/checkpoint",
    }
    assert removed["errors"] == []
    assert resolve(result["model_uri"], workspace.tracking_uri, workspace.cache).kind == "encoder"
    assert Path(report.run(workspace, "train-pong-frozen-001")["path"]).is_file()
    by_policy = lineage.run(workspace, result["policy"])
    assert by_policy["missing"] == 0
    (data_tree,) = by_policy["trees"]
    kinds = []
    while data_tree is not None:
        kinds.append(data_tree["kind"])
        data_tree = next(iter(data_tree["made"]), None)
    assert kinds == ["data", "encoder", "agent", "evaluation"]
    frames = FramesDataset.open(str(workspace.home / "frames"))
    (used,) = by_policy["data"]
    assert (used["key"], used["facts"]["frames"], used["facts"]["policy"]) == (frames.digest, TOY.frames, "random")
    whole = lineage.run(workspace, "demo-001")
    assert sorted(tree["kind"] for tree in whole["trees"]) == ["data", "evaluation"]  # of the agent, of a random one
    runs = list(Records(workspace.tracking_uri).runs("tags.stage LIKE '%'"))
    (top,) = (run.info.run_id for run in runs if run.data.tags["stage"] == "demo")
    assert {run.data.tags.get("mlflow.parentRunId", top) for run in runs} == {top}
    assert sorted(run.data.tags["stage"] for run in runs) == ["demo", "evaluate", "evaluate", "pretrain", "train"]
    (judged,) = (run for run in runs if "policy.sha256" in run.data.tags)
    assert judged.data.tags["policy.sha256"] == load_policy(result["policy"]).sha256


@pytest.mark.parametrize("place", ["thesis.tex", "runs/thesis.tex"])
def test_a_folder_that_is_no_demo_is_never_replaced(tmp_path: Path, place: str) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / place).write_text("mine")
    with pytest.raises(UserError, match="holds other things"):
        demo.run(str(tmp_path), TOY, overwrite=True)
    assert (tmp_path / place).read_text() == "mine"
