"""What is fuzzed of configurations, the folders of runs, addresses, and what a server says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

import mutations as m
import numpy as np
import sealing
from fuzz_files import make_policy
from rl_toys import make_encoder
from spoiling import Target, spoiler

from jobs import encoder_place, figures, recipes, relatives, report, settings
from jobs.workspace import Workspace
from pipeline import bundle, registry
from pipeline.artifact import load_preprocess
from pipeline.delivery import beats, is_collapsed
from pipeline.errors import UserError
from pipeline.journal import Journal, Operation
from pipeline.outbox import Outbox
from pipeline.probed import write_probe
from pipeline.resolve import resolve
from pipeline.server import Address
from pipeline.storage import locate
from pipeline.tracking import RunRecord


def _make_config(folder: Path) -> None:
    settings.save_resolved(folder, recipes.TRAIN_RECIPES["demo"], "train")


def _load_config(folder: Path) -> None:
    for load in (recipes.pretrain_recipe, recipes.train_recipe):
        try:
            recipe = load("demo", config=str(folder / "config.yaml"))
            recipe.model.for_frames(84, 84)
        except UserError:
            continue
    settings.load_resolved(folder)


def _make_override(folder: Path) -> None:
    (folder / "override").write_text("train.lr=1e-3")


def _spoil_override(random: Random, folder: Path, outside: Path) -> None:
    keys = settings.known_keys(recipes.TRAIN_RECIPES["demo"]) + settings.known_keys(recipes.PRETRAIN_RECIPES["vae"])
    key = random.choice((random.choice(keys), random.choice(m.WORDS), random.choice(m.TRAVERSALS), "train", "name"))
    value = m.yaml_text(random, "a: [1, 2]", outside / "marker").decode("utf-8", "surrogateescape")
    value = random.choice((value, json.dumps(m.hostile(random))))
    (folder / "override").write_text(f"{key}={value}", encoding="utf-8", errors="surrogatepass")


def _load_override(folder: Path) -> None:
    override = (folder / "override").read_text(encoding="utf-8", errors="surrogatepass")
    for load in (recipes.pretrain_recipe, recipes.train_recipe):
        try:
            recipe = load("demo", overrides=[override])
            recipe.model.for_frames(84, 84)
        except UserError:
            continue


def _make_home(folder: Path) -> None:
    """Runs of all stages as they lie in a home, without a server that knows them."""
    runs, z = folder / "home/runs", {"sha256": ""}
    made = {"pretrain-enc-001": "pretrain", "train-toy-frozen-001": "train", "evaluate-001": "evaluate"}
    for number, (name, stage) in enumerate(made.items()):
        (runs / name).mkdir(parents=True)
        RunRecord(f"{number}" * 32, "1", "sqlite:////nowhere/mlflow.db", name, stage, number + 1).write(runs / name)
        settings.save_resolved(runs / name, recipes.TRAIN_RECIPES["demo"], stage)
    make_encoder(runs / "pretrain-enc-001/bundle")
    _make_figures(runs / "pretrain-enc-001")
    z["sha256"] = bundle.sha256_of(runs / "pretrain-enc-001/bundle")
    make_policy(runs / "train-toy-frozen-001")
    (runs / "train-toy-frozen-001/it").rename(runs / "train-toy-frozen-001/policy")
    policy = bundle.sha256_of(runs / "train-toy-frozen-001/policy")
    results = {
        "pretrain-enc-001": {
            "model_uri": "models:/enc/1", "version": "1", "aliases": ["latest"], "elbo_nats": -1.5, "bits_per_dim": 1.0,
            "images_per_s": 3.0, "frames": 90, "dataset": "frames", "digest": "0" * 64, **z,
        },
        "train-toy-frozen-001": {
            "policy": "policy", "model_uri": None, "agent_steps": 10, "steps_per_worker": {"in-process": 10},
        },
        "evaluate-001": {
            "policy": "policy", "policy_sha256": policy, "game": "toy", "protocol": "atari100k", "mean_return": 1.0,
            "ci95_low": 0.5, "ci95_high": 1.5, "episodes": 3, "human_normalised": None,
            "video": {
                "file": "gameplay.gif", "episode": 0, "return": 1.0, "agent_steps": 9, "first_agent_step": 0,
                "shown_agent_steps": 9, "has_reconstruction": True, "mode": "frozen",
            },
        },
    }  # fmt: skip
    for name, result in results.items():
        (runs / name / "result.json").write_text(json.dumps(result))
        lines = [{"step": step, "episode_return": 1.0, "bits_per_dim": 2.0} for step in range(3)]
        (runs / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _make_figures(run: Path) -> None:
    preprocess = load_preprocess(run / "bundle")
    frames = np.random.default_rng(0).integers(0, 256, (4, preprocess.height, preprocess.width), np.uint8)
    figures.draw_figures(run / "bundle", frames, "4 frames", run / figures.PICTURES_FOLDER)
    scores = {"f1": 0.5, "accuracy": 0.5, "f1_by_category": {"misc": 0.5}, "f1_by_variable": {"ball_x": 0.5}}
    of = {"game": "pong", "resolution": "210x160", "features": "posterior mean", "digest": "0" * 64, "seed": 0}
    write_probe(run, {**of, **scores, "test_frames": 9, "velocity_r2": {"dx": 0.5}})


def _spoil_home(random: Random, folder: Path, outside: Path) -> None:
    spoil = spoiler("home/runs/*/*.json", "home/runs/*/*.yaml", "home/runs/*/*.jsonl", "home/runs/*/*/*.json")
    spoil(random, folder, outside)
    for sealed in (*folder.glob("home/runs/*/bundle"), *folder.glob("home/runs/*/policy")):
        sealing.reseal(sealed)


def _load_home(folder: Path) -> None:
    workspace = Workspace.at(str(folder / "home"))
    for name in ("train-toy-frozen-001", "evaluate-001", "pretrain-enc-001", "2" * 32, "../runs/evaluate-001"):
        try:
            run = relatives.RunFolder.read(workspace.find_run(name))
            if run.record.stage == encoder_place.STAGE:
                place = encoder_place.place_of_run(run)
                report.make_encoder_page(place, run.path / figures.PICTURES_FOLDER, place.own_probes(), {}, workspace)
            else:
                report.make_page(run, workspace)
        except UserError:
            continue


def _make_journal(folder: Path) -> None:
    journal = Journal(folder)
    for number in range(4):
        journal.append("metrics", {"step": number, "values": {"a": 1.0}})
    journal.append("param", {"key": "a", "value": "b"})
    journal.mark(Operation(1, 0, "metrics", {}, 0))
    journal.close()
    answer = {
        "name": "enc", "version": "1", "aliases": ["latest"], "sha256": "0" * 64, "collapsed": False, "kind": "encoder",
    }  # fmt: skip
    (folder / "outbox.results.jsonl").write_text(json.dumps({"seq": 1, "result": answer}) + "\n")
    refused = {"seq": 2, "kind": "param", "body": {}, "reason": "no"}
    (folder / "outbox.refused.jsonl").write_text(json.dumps(refused) + "\n")
    (folder / "outbox.done").rename(folder / "done.json")
    RunRecord("0" * 32, "1", "sqlite:////nowhere/mlflow.db", "toy", "train", 1).write(folder)


def _spoil_journal(random: Random, folder: Path, outside: Path) -> None:
    spoiler("*.jsonl", "done.json")(random, folder, outside)


def _load_journal(folder: Path) -> None:
    if (folder / "done.json").exists():
        (folder / "done.json").rename(folder / "outbox.done")
    RunRecord.read(folder)  # as every command begins that opens a run's folder
    outbox = Outbox(folder, lambda operations: None, batched=frozenset({"metrics", "param", "tag"}))
    try:
        outbox.drain()
        outbox.result(1)
        outbox.refusal(2)
        registry.registrations(folder)
    finally:
        outbox.close(0.0)


ADDRESSES = (
    "models:/enc@champion", "models:/enc/3", "runs:/0123abc/bundle", "s3://bucket/key?scheme=http&region=x", "sqlite:////x/y.db",
    "http://me:secret@host:5000/path", "train-pong-001", "frames", "file:///x/y",
)  # fmt: skip


def _make_text(folder: Path) -> None:
    (folder / "text").write_text(ADDRESSES[0])


def _spoil_text(random: Random, folder: Path, outside: Path) -> None:
    good = random.choice(ADDRESSES)
    bits = (*m.TRAVERSALS, *m.WORDS, "%2e%2e%2f", "..", "//", "@", ":", "#", "?x=", "[::1", "99999999")
    at = random.randrange(len(good) + 1)
    text = random.choice(
        (good[:at] + random.choice(bits) + good[at:], m.mutate_bytes(random, good.encode()).decode("latin-1")[:3000])
    )
    (folder / "text").write_text(text, encoding="utf-8", errors="surrogatepass")


def _load_text(folder: Path) -> None:
    text = (folder / "text").read_text(encoding="utf-8", errors="surrogatepass")
    readers: tuple[Callable[[], object], ...] = (
        lambda: resolve(text, f"sqlite:///{folder}/none.db", folder / "cache"),
        lambda: Address.parse(text),
        lambda: locate(text.replace("s3", "file")),  # S3 would ask the network for a region
        lambda: registry.check_model_name(text),
        lambda: Workspace.at(str(folder)).find_run(text),
    )
    for read in readers:
        try:
            read()
        except UserError:
            continue


def _make_tags(folder: Path) -> None:
    tags = {"kind": "encoder", "bits_per_dim": "1.5", "has_heldout": "true", "collapsed": "false", "bundle_sha256": "0"}
    (folder / "tags.json").write_text(json.dumps([tags, tags]))


def _spoil_tags(random: Random, folder: Path, outside: Path) -> None:
    """As they can come from a server: text under whatever keys."""
    tags = json.loads((folder / "tags.json").read_bytes())
    for _ in range(random.randrange(1, 4)):
        chosen = random.choice(tags)
        chosen[random.choice((*chosen, "", "champion"))] = str(m.hostile(random))
    (folder / "tags.json").write_text(json.dumps(tags))


def _load_tags(folder: Path) -> None:
    candidate, champion = json.loads((folder / "tags.json").read_bytes())
    beats(candidate, champion)
    is_collapsed(candidate)


TARGETS = (
    Target("config", _make_config, spoiler("config.yaml"), _load_config),
    Target("override", _make_override, _spoil_override, _load_override),
    Target("runs", _make_home, _spoil_home, _load_home),
    Target("journal", _make_journal, _spoil_journal, _load_journal),
    Target("addresses", _make_text, _spoil_text, _load_text),
    Target("tags", _make_tags, _spoil_tags, _load_tags),
)
