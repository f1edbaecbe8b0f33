"""What is fuzzed of the files that people give each other: bundles, datasets; and a run's own state."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random

import mutations as m
import numpy as np
import sealing
import torch
from catch import catch_preprocess
from rl_toys import TOY_VAE, make_encoder
from spoiling import Target, spoiler
from toy_frames import toy_dataset

from jobs import data
from pipeline import artifact, bundle, checkpoint, models
from pipeline.encode import encode_dataset
from pipeline.order import ReadingOrder
from pipeline.store import FramesDataset
from pipeline.stream import sample_frames
from rllib_ext.checkpoint import verify_checkpoint, write_checkpoint
from rllib_ext.policy import PolicyConfig, load_policy, save_policy
from rllib_ext.replay import ColumnarReplay, Rows
from rllib_ext.replay_files import load_replay, save_replay
from rllib_ext.replay_spec import ReplaySpec
from rllib_ext.settings import QConfig
from rllib_ext.state_files import load_state, save_state


def _make_encoder(folder: Path) -> None:
    make_encoder(folder / "it")


def _load_encoder(folder: Path) -> None:
    artifact.load_encoder(folder / "it").encode(torch.zeros(2, 12, 12, dtype=torch.uint8))
    artifact.load_model(folder / "it")


def make_policy(folder: Path) -> None:
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
    spoiler("it/meta/*", "it/data/*")(random, folder, outside)
    if random.random() < 0.9:
        sealing.reseal_dataset(folder / "it")


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


def _inside(folder: Path) -> list[Path]:
    return [folder / "it/encoder", folder / "it"] if (folder / "it/encoder").is_dir() else [folder / "it"]


TARGETS = (
    Target("encoder", _make_encoder, spoiler("it/*", seal=_inside), _load_encoder),
    Target("policy", make_policy, spoiler("it/*", "it/encoder/*", seal=_inside), _load_policy),
    Target("packed", _make_packed, _spoil_packed, _load_packed),
    Target("dataset", _make_dataset, _spoil_dataset, _load_dataset),
    Target("latents", _make_latents, spoiler("it/meta/*", "it/data/*"), _load_latents),
    Target("trainer-state", _make_trainer_state, spoiler("it/*", "it/replay/*", seal=_inside), _load_trainer_state),
    Target("training", _make_training, spoiler("it/*", seal=_inside), _load_training),
)
