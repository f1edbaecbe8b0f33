"""What is fuzzed: every loader of files that someone else may have made, with good files and a way to spoil them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import mutations as m
import numpy as np
import torch
from catch import catch_preprocess
from rl_toys import TOY_VAE, make_encoder
from toy_frames import toy_dataset

from jobs import data, recipes, relatives, report, settings
from jobs.workspace import Workspace
from pipeline import artifact, bundle, checkpoint, models, registry
from pipeline.delivery import beats, is_collapsed
from pipeline.encode import encode_dataset
from pipeline.errors import UserError
from pipeline.journal import Journal, Operation
from pipeline.order import ReadingOrder
from pipeline.outbox import Outbox
from pipeline.resolve import resolve
from pipeline.server import Address
from pipeline.storage import locate
from pipeline.store import FramesDataset
from pipeline.stream import sample_frames
from pipeline.tracking import RunRecord
from rllib_ext.checkpoint import verify_checkpoint, write_checkpoint
from rllib_ext.policy import PolicyConfig, load_policy, save_policy
from rllib_ext.replay import ColumnarReplay, ReplaySpec, Rows
from rllib_ext.replay_files import load_replay, save_replay
from rllib_ext.settings import QConfig
from rllib_ext.state_files import load_state, save_state


@dataclass(frozen=True)
class Target:
    """A loader.

    Attributes:
        name: For the test's id.
        make: Writes good files into an empty folder.
        spoil: Changes them; its third argument is a folder that nothing may touch.
        load: Reads them; may raise UserError only.
    """

    name: str
    make: Callable[[Path], None]
    spoil: Callable[[Random, Path, Path], None]
    load: Callable[[Path], None]


def _spoil_one(random: Random, path: Path, outside: Path) -> None:
    """By what the file's name says of its content."""
    content, marker = path.read_bytes(), outside / "marker"
    by_suffix: dict[str, Callable[[], bytes]] = {
        ".json": lambda: m.mutate_json(random, content),
        ".jsonl": lambda: m.mutate_lines(random, content),
        ".safetensors": lambda: m.mutate_safetensors(random, content),
        ".parquet": lambda: m.mutate_parquet(random, content, marker),
        ".yaml": lambda: m.yaml_text(random, content.decode(), marker),
    }
    if path.name == bundle.SUMS_FILE:
        spoiled = m.mutate_sums(random, content)
    else:
        spoiled = by_suffix.get(path.suffix, lambda: m.mutate_bytes(random, content))()
    path.write_bytes(spoiled)


def _spoiler(*patterns: str, seal: Callable[[Path], Sequence[Path]] = lambda folder: ()) -> Callable[..., None]:
    """Spoils one of the files that match, or the folder, and seals it again as an attacker would."""

    def spoil(random: Random, folder: Path, outside: Path) -> None:
        paths = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
        path = random.choice(paths)
        if random.random() < 0.12:
            m.mutate_folder(random, path.parent, outside, [path.name])
        else:
            _spoil_one(random, path, outside)
        if path.name != bundle.SUMS_FILE and random.random() < 0.9:
            for sealed in seal(folder):
                m.reseal(sealed)

    return spoil


def _make_encoder(folder: Path) -> None:
    make_encoder(folder / "it")


def _load_encoder(folder: Path) -> None:
    artifact.load_encoder(folder / "it").encode(torch.zeros(2, 12, 12, dtype=torch.uint8))
    artifact.load_model(folder / "it")


def _make_policy(folder: Path) -> None:
    make_encoder(folder / "encoder")
    encoder = artifact.load_encoder(folder / "encoder")
    origin = {"address": "models:/toy/1", "version": "1", "sha256": encoder.sha256}
    preprocess = catch_preprocess()
    config = PolicyConfig(
        "frozen", 2, encoder.z_shape, QConfig((8,)), preprocess.action_set, origin, models.to_record(encoder.config)
    )
    head = {"head.layers.0.weight": (8, 32), "head.layers.0.bias": (8,), "head.layers.1.weight": (8,)}
    head |= {"head.layers.1.bias": (8,), "head.layers.3.weight": (3, 8), "head.layers.3.bias": (3,)}
    weights = {name: np.full(shape, 0.1, np.float32) for name, shape in head.items()}
    save_policy(folder / "it", config, preprocess, weights, encoder_bundle=folder / "encoder", card={})
    shutil.rmtree(folder / "encoder")


def _load_policy(folder: Path) -> None:
    policy = load_policy(folder / "it")
    policy.reset(2)
    policy.act(np.zeros((2, 12, 12), np.uint8), np.ones(2, bool))


def _make_packed(folder: Path) -> None:
    make_encoder(folder / "it")
    (folder / "packed").write_bytes(bundle.pack(folder / "it"))
    (folder / "sha256").write_text(bundle.sha256_of(folder / "it"))
    shutil.rmtree(folder / "it")


def _spoil_packed(random: Random, folder: Path, outside: Path) -> None:
    (folder / "packed").write_bytes(m.mutate_zip(random, (folder / "packed").read_bytes(), folder))


def _load_packed(folder: Path) -> None:
    bundle.unpack((folder / "packed").read_bytes(), folder / "deep" / "out", (folder / "sha256").read_text())


def _make_dataset(folder: Path) -> None:
    toy_dataset(folder / "it", [40, 30, 20], num_files=2)


def _spoil_dataset(random: Random, folder: Path, outside: Path) -> None:
    _spoiler("it/meta/*", "it/data/*")(random, folder, outside)
    if random.random() < 0.9:
        m.reseal_dataset(folder / "it")


def _load_dataset(folder: Path) -> None:
    dataset = FramesDataset.open(str(folder / "it"))
    assert all(isinstance(problem, str) for problem in dataset.verify())
    data.info(str(folder / "it"))
    dataset.require_sound_files()
    order = ReadingOrder.plan(dataset, "train", batch_size=4, num_workers=2, epoch_frames=0, seed=0)
    assert len(order.epoch(1, 0)) > 0
    assert sample_frames(dataset, order, 8).shape == (8, 12, 10)


def _make_latents(folder: Path) -> None:
    """Latents all of whose files are written, but for the manifest: what a run that was cut off goes on with."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    dataset = toy_dataset(folder / "frames", [40, 30])
    encoder = make_encoder(folder / "encoder", dataset.preprocess)
    plan = {"version": 1, "dataset": dataset.digest, "encoder": bundle.sha256_of(encoder), "parts": 1}
    (folder / "it/meta").mkdir(parents=True)
    (folder / "it/data").mkdir()
    (folder / "it/meta/plan.json").write_text(json.dumps(plan))
    pq.write_table(pa.table({"obs": [[1.0]] * 68}), folder / "it/data/part-00000.parquet")


def _load_latents(folder: Path) -> None:
    if not (folder / "it/data/part-00000.parquet").is_file():
        return  # it would be made again, by Ray
    encode_dataset(FramesDataset.open(str(folder / "frames")), folder / "encoder", str(folder / "it"))


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
    z["sha256"] = bundle.sha256_of(runs / "pretrain-enc-001/bundle")
    _make_policy(runs / "train-toy-frozen-001")
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


def _spoil_home(random: Random, folder: Path, outside: Path) -> None:
    spoil = _spoiler("home/runs/*/*.json", "home/runs/*/*.yaml", "home/runs/*/*.jsonl", "home/runs/*/*/*.json")
    spoil(random, folder, outside)
    for sealed in (*folder.glob("home/runs/*/bundle"), *folder.glob("home/runs/*/policy")):
        m.reseal(sealed)


def _load_home(folder: Path) -> None:
    workspace = Workspace.at(str(folder / "home"))
    for name in ("train-toy-frozen-001", "evaluate-001", "pretrain-enc-001", "2" * 32, "../runs/evaluate-001"):
        try:
            report.make_page(relatives.RunFolder.read(workspace.find_run(name)), workspace)
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
    _spoiler("*.jsonl", "done.json")(random, folder, outside)


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


SPEC = ReplaySpec(2, 64, (2,), "uint8", 2, 3, 0.9, priority_alpha=0.6)


def _make_trainer_state(folder: Path) -> None:
    replay = ColumnarReplay(SPEC)
    no = np.zeros((20, 2), bool)
    frames, actions, rewards = np.ones((20, 2, 2), np.uint8), np.ones((20, 2), int), np.ones((20, 2), np.float32)
    replay.add(Rows(frames, actions, rewards, no, no, no, no), 0)

    def write(draft: Path, earlier: Path | None) -> None:
        save_state({"agent_steps": 3, "learner": {"w": np.ones(3, np.float32)}, "games": [(1, 2.0)]}, draft, "state")
        save_replay(replay, draft / "replay")

    write_checkpoint(folder / "it", "mine", write)


def _load_trainer_state(folder: Path) -> None:
    verify_checkpoint(folder / "it", "mine")
    load_state(folder / "it", "state")
    load_replay(folder / "it/replay", SPEC).sample(4, 0.4)


def _toy_training() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = models.build(TOY_VAE.for_frames(12, 12))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    return model, optimizer


def _make_training(folder: Path) -> None:
    checkpoint.save_checkpoint(folder / "it", *_toy_training(), checkpoint.Progress(1, 2, 3, 4.0, 5.0, 6))


def _load_training(folder: Path) -> None:
    checkpoint.load_checkpoint(folder / "it", *_toy_training())


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


def _inside(folder: Path) -> list[Path]:
    return [folder / "it/encoder", folder / "it"] if (folder / "it/encoder").is_dir() else [folder / "it"]


TARGETS = (
    Target("encoder", _make_encoder, _spoiler("it/*", seal=_inside), _load_encoder),
    Target("policy", _make_policy, _spoiler("it/*", "it/encoder/*", seal=_inside), _load_policy),
    Target("packed", _make_packed, _spoil_packed, _load_packed),
    Target("dataset", _make_dataset, _spoil_dataset, _load_dataset),
    Target("latents", _make_latents, _spoiler("it/meta/*", "it/data/*"), _load_latents),
    Target("config", _make_config, _spoiler("config.yaml"), _load_config),
    Target("override", _make_override, _spoil_override, _load_override),
    Target("runs", _make_home, _spoil_home, _load_home),
    Target("journal", _make_journal, _spoil_journal, _load_journal),
    Target("trainer-state", _make_trainer_state, _spoiler("it/*", "it/replay/*", seal=_inside), _load_trainer_state),
    Target("training", _make_training, _spoiler("it/*", seal=_inside), _load_training),
    Target("addresses", _make_text, _spoil_text, _load_text),
    Target("tags", _make_tags, _spoil_tags, _load_tags),
)
