"""Replays on disk: what was saved goes on exactly alike, and a checkpoint costs what has changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_replay import ALPHAS, CUT_SHORT, GO, LIFE, OVER, FakeGame, histories, play, played

from pipeline import bundle
from pipeline.errors import UserError
from rllib_ext import replay_files
from rllib_ext.checkpoint import verify_checkpoint, write_checkpoint
from rllib_ext.replay import ColumnarReplay
from rllib_ext.replay_files import load_replay, save_replay
from rllib_ext.replay_spec import ReplaySpec

SPEC = ReplaySpec(2, 64, (2,), "uint8", 2, 3, 0.9, priority_alpha=0.6)
SEGMENT_ROWS = 4  # 16 segments


@pytest.fixture(autouse=True)
def small_segments(monkeypatch):
    monkeypatch.setattr(replay_files, "_segment_rows", lambda spec: SEGMENT_ROWS)


def assert_equal(mine: ColumnarReplay, theirs: ColumnarReplay) -> None:
    filled = min(mine.written.max(), mine.spec.lane_rows)
    for name, column in mine.columns.items():
        for lane, rows in enumerate(np.minimum(mine.written, filled)):
            np.testing.assert_array_equal(column[lane, :rows], theirs.columns[name][lane, :rows])
    np.testing.assert_array_equal(mine.written, theirs.written)
    assert (mine.max_priority, mine.num_cut_episodes) == (theirs.max_priority, theirs.num_cut_episodes)
    assert mine.rng.bit_generator.state == theirs.rng.bit_generator.state
    if mine.tree is not None:
        np.testing.assert_array_equal(mine.tree.weights, theirs.tree.weights)


def assert_go_on_alike(replays: list[ColumnarReplay]) -> None:
    """Draws, priorities, a cut and draws again."""
    width = replays[0].spec.num_lanes
    rows = FakeGame(width).fragment([[GO] * width] * 5)
    rng = np.random.default_rng(0)
    td_errors = rng.normal(size=64).astype(np.float32)
    for _ in range(3):
        for replay in replays:
            replay.add(rows, 0)
        drawn = [replay.sample(64, beta=0.4) for replay in replays]
        for name, *columns in zip(drawn[0]._fields, *drawn, strict=True):
            for column in columns[1:]:
                np.testing.assert_array_equal(columns[0], column, err_msg=name)
        for replay, batch in zip(replays, drawn, strict=True):
            replay.update_priorities(batch.ids, td_errors)


@settings(max_examples=40, deadline=None)
@given(histories(priority_alpha=ALPHAS))
def test_a_loaded_replay_is_the_saved_one_and_goes_on_alike(tmp_path_factory, history):
    folder = tmp_path_factory.mktemp("replay")
    replay, _ = played(*history)
    save_replay(replay, folder / "a")
    loaded = load_replay(folder / "a", replay.spec)
    assert_equal(replay, loaded)
    assert_go_on_alike([replay, loaded])
    shutil.rmtree(folder)


@settings(max_examples=40, deadline=None)
@given(histories(priority_alpha=ALPHAS), st.lists(st.booleans(), min_size=12, max_size=12))
def test_checkpoints_on_top_of_each_other_hold_what_whole_ones_hold(tmp_path_factory, history, is_saved):
    """Whatever happens between them: uneven lanes, cuts, wraps, late priorities; each stands alone."""
    folder, previous = tmp_path_factory.mktemp("replay"), None
    for i, (replay, _) in enumerate(play(*history)):
        if is_saved[i]:
            save_replay(replay, folder / str(i), previous)
            if previous is not None:
                shutil.rmtree(previous)
            previous = folder / str(i)
            assert_equal(replay, load_replay(previous, replay.spec))
    shutil.rmtree(folder)


def test_a_replay_saved_before_the_spec_had_all_its_fields_is_read(tmp_path):
    replay, _ = filled(30)
    save_replay(replay, tmp_path / "a")
    record = json.loads((tmp_path / "a" / "replay.json").read_text())
    for name in ("z_dim", "is_double"):
        del record["spec"][name]
    (tmp_path / "a" / "replay.json").write_text(json.dumps(record))
    assert_equal(replay, load_replay(tmp_path / "a", replay.spec))


def filled(num_rows: int) -> tuple[ColumnarReplay, FakeGame]:
    replay, game = ColumnarReplay(SPEC, seed=3), FakeGame(SPEC.num_lanes)
    add(replay, game, num_rows)
    return replay, game


def add(replay: ColumnarReplay, game: FakeGame, num_rows: int) -> None:
    rng, events = np.random.default_rng(num_rows), [GO, GO, GO, LIFE, OVER, CUT_SHORT]
    for _ in range(num_rows):
        replay.add(game.fragment([[events[i] for i in rng.integers(0, len(events), 2)]]), 0)


def inodes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.glob("obs-*.npy")}


def shared_segments(folder: Path, previous: Path) -> list[int]:
    """Numbers of the segments that are the same file in both."""
    mine, theirs = inodes(folder), inodes(previous)
    return [int(name[4:9]) for name in sorted(mine) if mine[name] == theirs.get(name)]


def test_only_segments_that_rows_were_written_to_are_written_again(tmp_path):
    replay, game = filled(20)
    save_replay(replay, tmp_path / "a")
    add(replay, game, 5)  # rows 20 to 24: segments 5 and 6
    save_replay(replay, tmp_path / "b", tmp_path / "a")
    assert shared_segments(tmp_path / "b", tmp_path / "a") == [0, 1, 2, 3, 4]
    add(replay, game, 64 - 25 + 5)  # to slot 4 after the wrap: 6 to the end, 0, and one row of 1
    save_replay(replay, tmp_path / "c", tmp_path / "b")
    assert shared_segments(tmp_path / "c", tmp_path / "b") == [2, 3, 4, 5]
    add(replay, game, 64)
    save_replay(replay, tmp_path / "d", tmp_path / "c")
    assert shared_segments(tmp_path / "d", tmp_path / "c") == []


def test_a_checkpoint_of_a_resumed_run_goes_on_from_the_one_it_was_loaded_from(tmp_path):
    replay, game = filled(40)
    save_replay(replay, tmp_path / "a")
    resumed = load_replay(tmp_path / "a", SPEC)
    add(resumed, game, 4)
    save_replay(resumed, tmp_path / "b", tmp_path / "a")
    assert shared_segments(tmp_path / "b", tmp_path / "a") == list(range(10))
    assert_go_on_alike([resumed, load_replay(tmp_path / "b", SPEC)])


def test_segments_of_another_past_are_never_used(tmp_path):
    replay, game = filled(40)
    save_replay(replay, tmp_path / "a")
    other = load_replay(tmp_path / "a", SPEC)
    add(replay, game, 8)
    save_replay(replay, tmp_path / "b", tmp_path / "a")
    add(other, FakeGame(2, count=5_000), 12)  # as many rows and more, but not the same ones
    save_replay(other, tmp_path / "c", tmp_path / "b")
    assert shared_segments(tmp_path / "c", tmp_path / "b") == []
    assert_equal(other, load_replay(tmp_path / "c", SPEC))


def corrupt(file: Path) -> None:
    """Turns one bit over in place, as a disk would; every link to the file sees it."""
    with file.open("r+b") as stream:
        stream.seek(-1, 2)
        (last,) = stream.read(1)
        stream.seek(-1, 2)
        stream.write(bytes([last ^ 1]))


def test_where_links_are_impossible_segments_are_written_anew_from_memory(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError("no links here")

    monkeypatch.setattr(replay_files.os, "link", refuse)
    replay, game = filled(70)
    save_replay(replay, tmp_path / "a")
    for segment in (tmp_path / "a").glob("obs-*.npy"):
        corrupt(segment)
    add(replay, game, 3)
    save_replay(replay, tmp_path / "b", tmp_path / "a")
    assert shared_segments(tmp_path / "b", tmp_path / "a") == []
    assert_equal(replay, load_replay(tmp_path / "b", SPEC))


def checkpointed(replay: ColumnarReplay, path: Path) -> None:
    write_checkpoint(path, "run", lambda folder, old: save_replay(replay, folder / "replay", old and old / "replay"))


def test_a_checkpoint_does_not_hash_again_what_it_links(tmp_path, monkeypatch):
    replay, game = filled(64)
    checkpointed(replay, tmp_path / "checkpoint")
    hashed = []
    hash_file = bundle._hash
    monkeypatch.setattr(bundle, "_hash", lambda file: (hashed.append(file.name), hash_file(file))[1])
    checkpointed(replay, tmp_path / "checkpoint")
    assert "replay.json" in hashed
    assert not [name for name in hashed if name.startswith("obs-")]
    add(replay, game, 1)  # the ring begins anew: segment 0
    checkpointed(replay, tmp_path / "checkpoint")
    assert [name for name in hashed if name.startswith("obs-")] == ["obs-00000.npy"]
    verify_checkpoint(tmp_path / "checkpoint", "run")


def test_bytes_that_changed_after_a_checkpoint_do_not_pass_for_sound_in_the_next(tmp_path):
    replay, game = filled(40)
    path = tmp_path / "checkpoint"
    checkpointed(replay, path)
    corrupt(path / "replay" / "obs-00003.npy")
    add(replay, game, 4)
    checkpointed(replay, path)
    with pytest.raises(UserError, match=r"the bytes of replay/obs-00003.npy have changed"):
        verify_checkpoint(path, "run")


@pytest.mark.parametrize("num_actions", [300, 2**16])
def test_actions_come_back_as_they_went_in_however_many_there_are(tmp_path, num_actions):
    replay, rng = ColumnarReplay(SPEC), np.random.default_rng(0)
    rows = FakeGame(2).fragment([[GO, GO]] * 60)
    actions = rng.integers(0, num_actions, (60, 2))
    actions[:2] = [[255, 256], [257, num_actions - 1]]
    replay.add(rows._replace(action=actions), 0)
    save_replay(replay, tmp_path / "replay")
    for held in (replay, load_replay(tmp_path / "replay", SPEC)):
        drawn = held.sample(500)
        np.testing.assert_array_equal(drawn.action, actions[drawn.ids // 2, drawn.ids % 2])
        assert drawn.action.max() > 255


def test_a_previous_folder_that_is_not_there_is_no_obstacle(tmp_path):
    replay, _ = filled(10)
    save_replay(replay, tmp_path / "a", tmp_path / "gone")
    assert_equal(replay, load_replay(tmp_path / "a", SPEC))


def test_all_files_are_plain(tmp_path):
    replay, _ = filled(10)
    save_replay(replay, tmp_path / "a")
    for path in (tmp_path / "a").iterdir():
        assert path.suffix in (".npy", ".json")
        if path.suffix == ".npy":
            np.load(path, allow_pickle=False)


def test_a_replay_of_other_settings_or_another_format_is_refused(tmp_path):
    save_replay(ColumnarReplay(SPEC), tmp_path / "replay")
    with pytest.raises(UserError, match=r"stack=2.*stack=4"):
        load_replay(tmp_path / "replay", ReplaySpec(**{**SPEC.__dict__, "stack": 4}))
    record = json.loads((tmp_path / "replay" / "replay.json").read_text())
    (tmp_path / "replay" / "replay.json").write_text(json.dumps({**record, "format": 1}))
    with pytest.raises(UserError, match="has format 1, this version reads format 3"):
        load_replay(tmp_path / "replay", SPEC)
