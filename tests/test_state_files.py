"""States and checkpoints on disk: exact round trips, no pickle, whole or not at all."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.errors import UserError
from rllib_ext.checkpoint import find_checkpoint, verify_checkpoint, write_checkpoint
from rllib_ext.state_files import load_state, save_state


def test_nested_states_come_back_exactly(tmp_path):
    state = {
        "optimizer": {0: {"step": np.float32(3), "exp_avg": np.arange(6.0).reshape(2, 3)}, 1: {}},
        "groups": [{"betas": (0.9, 0.999), "amsgrad": False, "decay": None, "lr": 1e-4, "name": "head"}],
        "empty": np.zeros((0, 4), np.uint8),
    }
    save_state(state, tmp_path, "state")
    loaded = load_state(tmp_path, "state")
    assert loaded["groups"] == state["groups"]
    assert isinstance(loaded["groups"][0]["betas"], tuple)
    assert set(loaded["optimizer"]) == {0, 1}
    for name, value in state["optimizer"][0].items():
        np.testing.assert_array_equal(loaded["optimizer"][0][name], value)
        assert loaded["optimizer"][0][name].dtype == value.dtype
    assert loaded["empty"].shape == (0, 4)


def test_what_only_pickle_could_hold_is_refused(tmp_path):
    with pytest.raises(TypeError, match="cannot write a object without pickle"):
        save_state({"thing": object()}, tmp_path, "state")


def fill(text: str):
    return lambda folder: (folder / "content").write_text(text)


def test_a_checkpoint_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "checkpoint"
    assert find_checkpoint(path) is None
    write_checkpoint(path, "run", fill("one"))
    write_checkpoint(path, "run", fill("two"))
    assert (path / "content").read_text() == "two"
    assert [folder.name for folder in tmp_path.iterdir()] == ["checkpoint"]

    def dies(folder):
        (folder / "content").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(path, "run", dies)
    verify_checkpoint(path, "run")
    assert (path / "content").read_text() == "two"


@pytest.mark.parametrize("left_behind", ["checkpoint.new", "checkpoint.old"])
def test_a_run_killed_between_the_renames_still_has_its_checkpoint(tmp_path, left_behind):
    write_checkpoint(tmp_path / "checkpoint", "run", fill("one"))
    (tmp_path / "checkpoint").rename(tmp_path / left_behind)
    found = find_checkpoint(tmp_path / "checkpoint")
    assert found is not None
    verify_checkpoint(found, "run")


def test_changed_bytes_and_other_runs_are_refused(tmp_path):
    path = tmp_path / "checkpoint"
    write_checkpoint(path, "mine", fill("one"))
    with pytest.raises(UserError, match="written by run 'mine', not by 'theirs'"):
        verify_checkpoint(path, "theirs")
    (path / "content").write_text("another")
    with pytest.raises(UserError, match="content"):
        verify_checkpoint(path, "mine")
