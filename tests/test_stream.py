"""The stream by property: every frame once a pass, nothing from the other split, the same order for the same seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
from toy_frames import stamps, toy_dataset

from pipeline import stream
from pipeline.errors import UserError
from pipeline.order import ReadingOrder
from pipeline.store import FramesDataset
from pipeline.stream import all_batches, sample_frames, training_batches


@pytest.fixture(scope="module", autouse=True)
def _ray():
    ray.init("local", num_cpus=2, object_store_memory=200 << 20, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> FramesDataset:
    """20 episodes in 3 files, 4,210 frames."""
    return toy_dataset(tmp_path_factory.mktemp("frames") / "d", [20 * k + 1 for k in range(1, 21)], num_files=3)


def plan(dataset, batch_size=64, num_workers=1, epoch_frames=0, seed=3, split="train") -> ReadingOrder:
    return ReadingOrder.plan(
        dataset, split, batch_size=batch_size, num_workers=num_workers, epoch_frames=epoch_frames, seed=seed
    )


def read(dataset, order, epochs=range(1), worker=0) -> list[int]:
    return [s for batch in training_batches(dataset, order, epochs, worker) for s in stamps(batch.numpy())]


def numbers_of(dataset, split) -> set[int]:
    episodes, start, numbers = dataset.episodes.to_pylist(), 0, set()
    for row in episodes:
        if row["split"] == split:
            numbers |= set(range(start, start + row["length"]))
        start += row["length"]
    return numbers


def test_an_epoch_is_the_split_once_less_the_remainder(dataset):
    order = plan(dataset)
    seen = read(dataset, order)
    assert len(seen) == len(set(seen)) == order.num_frames - order.remainder
    assert set(seen) <= numbers_of(dataset, "train")
    assert order.remainder < 64


@pytest.mark.parametrize("num_batches", [0, 1, 7, 40, 58])
def test_what_was_read_before_is_skipped_and_the_rest_is_the_same(dataset, num_batches, monkeypatch):
    monkeypatch.setattr(stream, "CHUNK_BYTES", 1_000 * 120)  # several chunks an epoch
    order, epochs = plan(dataset), range(2)
    assert order.num_batches > 58
    rest = training_batches(dataset, order, epochs, 0, num_batches)
    assert [s for batch in rest for s in stamps(batch.numpy())] == read(dataset, order, epochs)[64 * num_batches :]


def test_no_episode_leaks_into_the_other_split(dataset):
    train, val = numbers_of(dataset, "train"), numbers_of(dataset, "val")
    assert train.isdisjoint(val)
    assert len(train) + len(val) == dataset.num_frames
    held_out = [s for batch in all_batches(dataset, plan(dataset, split="val"), 0) for s in stamps(batch.numpy())]
    assert sorted(held_out) == sorted(val)


def test_batches_hold_the_right_frames_of_the_right_shape(dataset):
    batch = next(training_batches(dataset, plan(dataset), range(1), 0))
    assert batch.shape == (64, 12, 10)
    assert batch.dtype == torch.uint8


def test_the_seed_and_the_epoch_decide_the_order(dataset):
    first, second = read(dataset, plan(dataset)), read(dataset, plan(dataset))
    assert first == second
    assert first != read(dataset, plan(dataset, seed=4))
    assert first != read(dataset, plan(dataset), range(1, 2))
    assert np.abs(np.diff(first)).mean() > 50  # neighbours in the dataset are not neighbours in the stream


def test_an_epoch_found_directly_equals_the_one_reached_from_the_start(dataset):
    order = plan(dataset, epoch_frames=1000)
    assert read(dataset, order, range(3))[2 * 960 :] == read(dataset, order, range(2, 3))


def test_virtual_epochs_cover_the_split_evenly(dataset):
    order = plan(dataset, batch_size=50, epoch_frames=500)
    passes = 3
    epochs = passes * order.num_frames // 500
    counts = np.bincount(read(dataset, order, range(epochs)), minlength=dataset.num_frames)
    train = sorted(numbers_of(dataset, "train"))
    assert counts[train].min() >= passes - 1
    assert counts[train].max() <= passes + 1


def test_two_workers_share_the_rows_equally(dataset):
    order = plan(dataset, num_workers=2)
    one, two = read(dataset, order, worker=0), read(dataset, order, worker=1)
    assert len(one) == len(two) == order.num_batches * 32
    assert set(one).isdisjoint(two)
    halves = [sum(len(b) for b in all_batches(dataset, order, worker)) for worker in (0, 1)]
    assert sum(halves) == order.num_frames


@pytest.mark.parametrize(("lengths", "files"), [([30], 1), ([7, 9], 2), ([3], 1)])
def test_a_dataset_smaller_than_a_batch_gives_one_smaller_batch(tmp_path, lengths, files):
    dataset = toy_dataset(tmp_path / "tiny", lengths, num_files=files, height=5, width=7)
    order = plan(dataset)
    batches = list(training_batches(dataset, order, range(2), 0))
    assert [len(batch) for batch in batches] == [order.num_frames] * 2
    assert sorted(stamps(batches[0].numpy())) == sorted(numbers_of(dataset, "train"))


def test_fewer_frames_than_workers_is_refused(tmp_path):
    with pytest.raises(UserError, match="too few for 4 workers"):
        plan(toy_dataset(tmp_path / "d", [3]), num_workers=4)


def test_a_batch_that_workers_cannot_share_is_refused(dataset):
    with pytest.raises(UserError, match="multiple of 3"):
        plan(dataset, num_workers=3)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_file_is_named_in_one_error(tmp_path, damage):
    dataset = toy_dataset(tmp_path / "d", [100] * 9, num_files=3)
    file = Path(dataset.root) / dataset.files[1].name
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[pq.ParquetFile(file).metadata.row_group(0).column(2).data_page_offset + 500] ^= 0x10
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.unlink()
    with pytest.raises(UserError, match=r"data/part-1\.parquet .* is damaged or unreadable"):
        read(dataset, plan(dataset, batch_size=8))


def test_a_sample_is_spread_over_the_split(dataset):
    frames = sample_frames(dataset, plan(dataset), 200)
    assert 150 <= len(frames) <= 200
    assert set(stamps(frames.numpy())) <= numbers_of(dataset, "train")


def test_ray_data_still_calls_the_hook_that_paces_its_scheduler(dataset, monkeypatch):
    calls = []
    monkeypatch.setattr(stream._Paced, "on_execution_step", lambda self, executor: calls.append(executor))
    read(dataset, plan(dataset, batch_size=8))
    assert calls


def test_epochs_of_several_pipelines_are_those_of_one(dataset, monkeypatch):
    order, epochs = plan(dataset), range(4)
    whole = read(dataset, order, epochs)
    monkeypatch.setattr(stream, "CHUNK_BYTES", 4_000 * 120)  # a chunk an epoch, as above
    monkeypatch.setattr(stream, "PLANNED_CHUNKS", 3)
    assert read(dataset, order, epochs) == whole
    rest = training_batches(dataset, order, epochs, 0, 7)
    assert [s for batch in rest for s in stamps(batch.numpy())] == whole[64 * 7 :]


def test_epochs_without_end_begin_at_once(dataset):
    """As of a training that is to end by time."""
    batches = training_batches(dataset, plan(dataset), range(10**12), 0)
    assert next(batches).shape == (64, 12, 10)
    batches.close()
