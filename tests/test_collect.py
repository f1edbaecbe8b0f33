"""Frames datasets: what goes in comes out, whatever the sizes and the number of workers; damage is named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from fault_rows import Record, measured

from pipeline import crew
from pipeline.atari import make_vector, preprocess_for
from pipeline.collect import LANE_ROWS, collect, plan_shards
from pipeline.errors import UserError
from pipeline.lanes import Lane, LaneWriter, play_lanes
from pipeline.policies import random_policy
from pipeline.schema import MANIFEST_FILE
from pipeline.storage import locate
from pipeline.store import FramesDataset, assign_splits, write_manifest

BREAKOUT = preprocess_for("breakout")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=100_000_000, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def dataset(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> FramesDataset:
    """Two lanes of 2,100 rows, many short games."""
    return gather(tmp_path_factory.mktemp("data") / "breakout", frames=2 * LANE_ROWS + 104)


def gather(out: Path, frames: int, **settings: object) -> FramesDataset:
    options = {
        "behaviour": random_policy("random"),
        "played_by": {"policy": "random"},
        "seed": 3,
        "num_workers": 1,
    } | settings
    collected = collect(str(out), BREAKOUT, frames=frames, **options)  # type: ignore[arg-type]
    assert sum(collected.rows_per_worker.values()) == frames  # the last shard's too
    return collected.dataset


def rows_of(dataset: FramesDataset) -> list[dict[str, object]]:
    return [row for file in dataset.files for row in pq.read_table(dataset.path(file)).to_pylist()]


def test_dataset_is_sound_and_has_exactly_the_rows(dataset: FramesDataset) -> None:
    assert dataset.num_frames == 2 * LANE_ROWS + 104
    assert sum(file.rows for file in dataset.files) == dataset.num_frames
    assert dataset.verify() == []
    assert set(dataset.episodes["split"].to_pylist()) == {"train", "val"}


def test_rows_replay_the_game(dataset: FramesDataset) -> None:
    """A lane's stored actions, played again from its seed, give the stored frames, rewards and ends."""
    table = pq.read_table(dataset.path(dataset.files[0])).slice(0, 600).to_pylist()
    env = make_vector(BREAKOUT, 1)
    step = env.reset(np.array([dataset.episodes["seed"][0].as_py()]))
    for row in table:
        assert row["obs"] == step.frames[0].tobytes()
        assert row["lives"] == step.lives[0]
        assert (row["action"] is None) == (row["terminated"] or row["truncated"])
        assert row["terminated"] == step.terminated[0]
        step = env.step(np.array([row["action"] or 0]))
        assert row["reward"] == step.rewards[0]


@pytest.mark.parametrize("num_workers", [2])
def test_digest_does_not_depend_on_workers(dataset: FramesDataset, tmp_path: Path, num_workers: int) -> None:
    again = gather(tmp_path / "again", frames=dataset.num_frames, num_workers=num_workers)
    assert again.digest == dataset.digest
    assert gather(tmp_path / "other", frames=50, seed=4).digest != gather(tmp_path / "same", frames=50).digest


@pytest.mark.parametrize("frames", [1, 2, 7, 333])
def test_odd_sizes(cluster: None, tmp_path: Path, frames: int) -> None:
    small = gather(tmp_path / "small", frames=frames)
    rows = rows_of(small)
    assert len(rows) == frames
    assert rows[-1]["terminated"] or rows[-1]["truncated"]
    assert small.verify() == []


def test_plan_deals_every_row_once() -> None:
    for frames in (1, LANE_ROWS, 20_000, 1_000_001):
        lanes = [lane for shard in plan_shards(frames, seed=0) for lane in shard]
        assert sum(lane.rows for lane in lanes) == frames
        assert [lane.index for lane in lanes] == list(range(len(lanes)))
        assert len({lane.seed for lane in lanes}) == len(lanes)


def test_splits_have_no_leak_and_are_never_empty() -> None:
    assert assign_splits([0.5]) == ["train"]
    assert assign_splits([0.5, 0.7]) == ["val", "train"]
    assert assign_splits([0.01, 0.02]) == ["val", "train"]
    shares = np.random.default_rng(0).random(5_000).tolist()
    assert 0.08 < assign_splits(shares).count("val") / 5_000 < 0.12


def test_ram_comes_with_the_same_frames(cluster: None, tmp_path: Path) -> None:
    with_ram, without = gather(tmp_path / "ram", frames=120, with_ram=True), gather(tmp_path / "plain", frames=120)
    ram_rows, rows = rows_of(with_ram), rows_of(without)
    assert [len(row.pop("ram")) for row in ram_rows] == [128] * 120  # type: ignore[arg-type]
    assert ram_rows == rows


def test_sticky_random_repeats_three_quarters(tmp_path: Path) -> None:
    policy = random_policy("sticky-random")(BREAKOUT, [1, 2])
    actions = np.stack([policy.act(np.zeros((2, 84, 84), np.uint8), np.zeros(2, bool)) for _ in range(3_000)])
    repeats = (actions[1:] == actions[:-1]).mean()
    assert abs(repeats - (0.75 + 0.25 / 4)) < 0.02


def test_atariari_never_draws_noop_and_ends_with_a_life(tmp_path: Path) -> None:
    preprocess = preprocess_for("breakout", "atariari")
    filesystem, root = locate(str(tmp_path))
    filesystem.create_dir(f"{root}/data")
    lane = Lane(0, 5, 400)
    writer = LaneWriter(filesystem, root, preprocess, lane, False)
    list(play_lanes(preprocess, [lane], [writer], random_policy("random"), with_ram=False))
    result = writer.close()
    rows = pq.read_table(f"{root}/{result.file.name}").to_pylist()
    assert all(row["action"] != 0 for row in rows)
    ends = [row for row in rows[:-1] if row["terminated"]]
    assert any(row["lives"] > 0 for row in ends)


def damage(dataset: FramesDataset, to: Path) -> FramesDataset:
    """A copy that may be damaged."""
    shutil.copytree(dataset.root, to)
    return FramesDataset.open(str(to))


@pytest.mark.parametrize("fault", ["truncated", "flipped", "deleted", "replaced"])
def test_check_names_every_bad_file(
    dataset: FramesDataset, tmp_path: Path, fault: str, record_property: Record
) -> None:
    copy = damage(dataset, tmp_path / "copy")
    path = Path(copy.path(copy.files[1]))
    content = bytearray(path.read_bytes())
    if fault == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif fault == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif fault == "deleted":
        path.unlink()
    else:
        path.write_bytes(Path(copy.path(copy.files[0])).read_bytes())
    problems = copy.verify()
    assert problems
    assert all(copy.files[1].name in problem for problem in problems)
    with pytest.raises(UserError, match=copy.files[1].name) as caught:
        copy.require_sound_files()
    measured(
        record_property, f"Parquet file {fault}", lost="the file; the others are sound", read=f"error: {caught.value}"
    )


def test_check_finds_what_a_faulty_writer_leaves(dataset: FramesDataset, tmp_path: Path) -> None:
    """Files with right checksums whose rows do not make whole episodes."""
    copy = damage(dataset, tmp_path / "copy")
    wrong = copy.episodes.set_column(2, "first_row", [[row + 1 for row in copy.episodes["first_row"].to_pylist()]])
    write_manifest(
        copy.filesystem,
        copy.root,
        preprocess=copy.preprocess,
        files=copy.files,
        episodes=wrong,
        has_ram=False,
        collection=copy.collection,
    )
    assert FramesDataset.open(copy.uri).verify()


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda path: None, "there is no dataset"),
        (lambda path: path.mkdir(), "is empty"),
        (lambda path: (path / "data").mkdir(parents=True), "unfinished"),
        (lambda path: path.write_text(""), "is a file"),
    ],
)
def test_what_is_no_dataset(tmp_path: Path, prepare, message: str) -> None:  # type: ignore[no-untyped-def]
    prepare(tmp_path / "it")
    with pytest.raises(UserError, match=message):
        FramesDataset.open(str(tmp_path / "it"))


def test_other_schema_version_is_refused(dataset: FramesDataset, tmp_path: Path) -> None:
    copy = damage(dataset, tmp_path / "copy")
    manifest = Path(copy.root) / MANIFEST_FILE
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "schema_version": 99}))
    with pytest.raises(UserError, match="schema version 99"):
        FramesDataset.open(copy.uri)


def test_existing_output_is_kept_unless_told(cluster: None, tmp_path: Path) -> None:
    first = gather(tmp_path / "it", frames=20)
    with pytest.raises(UserError, match="--overwrite"):
        gather(tmp_path / "it", frames=30)
    assert FramesDataset.open(first.uri).digest == first.digest
    assert gather(tmp_path / "it", frames=30, overwrite=True).num_frames == 30
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="holds other things"):
        gather(tmp_path / "other", frames=30, overwrite=True)


def crew_of(tmp_path: Path, num_workers: int) -> crew.Crew:
    (tmp_path / "data").mkdir()
    return crew.Crew(locate(str(tmp_path)), BREAKOUT, num_workers, with_ram=False)


def test_a_worker_that_is_lost_before_it_has_started_is_replaced(cluster: None, tmp_path: Path) -> None:
    workers = crew_of(tmp_path, 2)
    try:
        ray.kill(workers._workers[0])
        workers.wait_until_ready()
        results = workers.play(plan_shards(60, 3), random_policy("random"), lambda rows: None)
        assert sum(result.file.rows for result in results) == 60
    finally:
        workers.stop()


@ray.remote(num_cpus=1)
class Stillborn:
    def __init__(self, *arguments: object) -> None:
        os._exit(1)

    def ready(self) -> bool:
        return True


def test_workers_that_never_start_are_told(cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "_Collector", Stillborn)
    workers = crew_of(tmp_path, 1)
    with pytest.raises(UserError, match=r"collecting worker 0 is lost .*, 3 times at the same task"):
        workers.wait_until_ready()
