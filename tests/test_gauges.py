"""What those see who watch the cluster: toy stages run, and their figures are scraped from Ray's endpoint over HTTP."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from rl_toys import make_encoder
from toy_frames import toy_dataset

from jobs import collect, encode, evaluate, pretrain, train
from jobs.recipes import pretrain_recipe, train_recipe
from jobs.workspace import Workspace
from pipeline.atari import preprocess_for
from pipeline.gauges import COUNTERS, GAUGES, LABELS, Gauges
from pipeline.models.vae import VAESettings

ROOT = Path(__file__).resolve().parent.parent
TINY = VAESettings(z_dim=8, patch=12, widths=(8,), num_blocks=0)
SETTINGS = ("envs_per_runner=2", "fragment_length=16", "batch_size=8", "warmup_agent_steps=64", "replay_capacity=2000")

Series = dict[tuple[str, ...], float]  # (name, then the values of LABELS) -> value


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """Where a Ray of this file's own serves metrics, reported every second instead of every ten."""
    Gauges("train", "before", "pong").show({"td_loss": 1.0})  # there is no Ray yet: nothing happens
    ray.init(
        "local",
        num_cpus=2,
        object_store_memory=200 << 20,
        include_dashboard=False,
        log_to_driver=False,
        _system_config={"metrics_report_interval_ms": 1000},
    )
    (node,) = ray.nodes()
    yield f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    ray.shutdown()


def scrape(endpoint: str) -> Series:
    """Every series of latentrl that the endpoint serves now."""
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(endpoint, timeout=10) as answer:
        text = answer.read().decode()
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    ours = [s for s in samples if s.name.startswith("ray_latentrl_")]
    return {(s.name.removeprefix("ray_latentrl_"), *(s.labels[label] for label in LABELS)): s.value for s in ours}


def recorded_by(result: dict[str, Any]) -> dict[str, float]:
    """The last value of each figure in a run's folder."""
    lines = [json.loads(line) for line in Path(result["run_folder"], "metrics.jsonl").read_text().splitlines()]
    return {key: value for line in lines for key, value in line.items() if key != "step"}


def shows(series: Series, recorded: dict[str, float], labels: tuple[str, ...]) -> bool:
    """Whether all that a run has recorded is there."""
    there = {key: series.get((GAUGES[key].name, *labels)) for key in recorded}
    return None not in there.values() and there == pytest.approx(recorded)


def scraped_until(endpoint: str, has_come: Callable[[Series], bool], within_s: float = 60.0) -> Series:
    until, series = time.monotonic() + within_s, {}
    while not has_come(series):
        assert time.monotonic() < until, series
        time.sleep(0.3)
        try:
            series = scrape(endpoint)
        except OSError:  # the node's agent is still starting
            continue
    return series


def test_figures_of_toy_stages_are_scraped(endpoint: str, tmp_path: Path) -> None:
    workspace = Workspace.at(str(tmp_path / "home"))
    bundle = make_encoder(tmp_path / "bundle", preprocess_for("pong"), TINY, standardise=False)
    frames = str(tmp_path / "frames")
    collect.run(workspace, game="pong", frames=70, out=frames, num_workers=1)
    encode.run(workspace, frames, str(bundle), str(tmp_path / "latents"))
    recipe = train_recipe("dqn", overrides=[f"train.{setting}" for setting in SETTINGS])
    asked = {"game": "pong", "encoder": str(bundle), "mode": "frozen", "agent_steps": 300, "num_env_runners": 0}
    result = train.run(workspace, recipe, **asked)

    labels = ("train", "train-pong-frozen-001", "pong")
    recorded = recorded_by(result)
    series = scraped_until(endpoint, lambda now: shows(now, recorded, labels))
    assert series["frames_total", "collect", "frames", "pong"] == 70
    assert series["frames_total", "encode", "latents", "pong"] == 70
    assert series["progress_ratio", "encode", "latents", "pong"] == 1
    assert series["updates", *labels] == result["updates"]
    assert recorded.keys() <= GAUGES.keys()
    names = {figure.name for figure in (*GAUGES.values(), *COUNTERS.values())}
    assert {name for name, *_ in series} <= names
    assert {run for _, _, run, _ in series} == {"frames", "latents", labels[1]}


def test_figures_of_pretraining_and_evaluation_are_scraped(endpoint: str, tmp_path: Path) -> None:
    workspace = Workspace.at(str(tmp_path / "home"))
    frames = toy_dataset(tmp_path / "frames", [40, 30, 50]).uri
    changes = ("model.z_dim=4", "model.latent_channels=0", "model.patch=2", "model.widths=[8]", "train.epochs=2")
    changes += ("train.batch_size=8", "train.log_every_steps=2", "train.num_threads=1")
    result = pretrain.run(workspace, pretrain_recipe("vae", overrides=changes), frames, "enc")
    labels, recorded = ("pretrain", "pretrain-enc-001", "toy"), recorded_by(result)
    assert recorded.keys() >= {"loss", "elbo_nats", "heldout/bits_per_dim", "images_per_s", "epoch", "lr"}
    assert recorded.keys() <= GAUGES.keys()
    series = scraped_until(endpoint, lambda now: shows(now, recorded, labels))
    assert series["progress_ratio", *labels] == 1

    result = evaluate.run(workspace, "random:pong", episodes=1)
    labels = ("evaluate", "evaluate-001", "pong")
    recorded = {key: result[key] for key in ("mean_return", "ci95_low", "ci95_high", "human_normalised")}
    recorded |= {"episode_return": result["returns"][-1], "episode_agent_steps": result["lengths"][-1], "progress": 1.0}
    series = scraped_until(endpoint, lambda now: shows(now, recorded, labels))
    assert series["games_total", *labels] == 1


def test_names_are_unique_and_in_prometheus_style() -> None:
    names = [figure.name for figure in (*GAUGES.values(), *COUNTERS.values())]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", name) for name in names)
    endings = {"seconds": "_seconds", "share of 1": "_ratio", "points": "_points", "updates": "updates"}
    for figure in GAUGES.values():
        assert figure.name.endswith(endings.get(figure.unit, "")), figure
        assert not figure.name.endswith(("_s", "_total"))
    assert all(figure.name.endswith("_total") for figure in COUNTERS.values())


def test_the_docs_list_every_figure_with_its_unit() -> None:
    page = (ROOT / "docs" / "watching.md").read_text()
    rows = re.findall(r"^\| `ray_latentrl_(\w+)` \| (.*?) \| (.*?) \|$", page, re.MULTILINE)
    figures = [*GAUGES.values(), *COUNTERS.values()]
    assert rows == [(figure.name, figure.unit, figure.text) for figure in figures]
