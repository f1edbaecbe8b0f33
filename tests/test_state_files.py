"""States and checkpoints on disk: exact round trips, no pickle, whole or not at all."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fault_rows import measured

from pipeline.errors import UserError
from rllib_ext.checkpoint import find_checkpoint, verify_checkpoint, write_checkpoint
from rllib_ext.state_files import load_state, save_state

ROOT = Path(__file__).resolve().parent.parent


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
    return lambda folder, earlier: (folder / "content").write_text(text)


def test_a_checkpoint_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "checkpoint"
    assert find_checkpoint(path) is None
    write_checkpoint(path, "run", fill("one"))
    write_checkpoint(path, "run", fill("two"))
    assert (path / "content").read_text() == "two"
    assert [folder.name for folder in tmp_path.iterdir()] == ["checkpoint"]

    def dies(folder, earlier):
        (folder / "content").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(path, "run", dies)
    verify_checkpoint(path, "run")
    assert (path / "content").read_text() == "two"


KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
from rllib_ext.checkpoint import write_checkpoint

def dying(moment, call):
    def wrapped(*arguments):
        if moments.pop(0) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments)
    return wrapped

path, text, moment = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
moments = list(range(9))
os.replace, Path.rename = dying(moment, os.replace), dying(moment, Path.rename)
write_checkpoint(path, "run", dying(moment, lambda folder, earlier: (folder / "content").write_text(text)))
"""


def write_and_be_killed(path: Path, text: str, moment: int) -> None:
    """SIGKILL in front of one of the steps: the writing itself, the sealed draft's renaming, two more renamings."""
    done = subprocess.run([sys.executable, "-c", KILLED_WRITER, str(path), text, str(moment)], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize("first", range(4))
@pytest.mark.parametrize("second", range(4))
def test_a_run_killed_twice_at_any_moment_has_a_checkpoint_and_leaves_nothing(tmp_path, first, second, record_property):
    path = tmp_path / "checkpoint"
    write_checkpoint(path, "run", fill("0"))
    newest = 0
    for text, moment in (("1", first), ("2", second)):
        write_and_be_killed(path, text, moment)
        found = find_checkpoint(path)
        assert found is not None
        verify_checkpoint(found, "run")
        assert newest <= int((found / "content").read_text()) <= int(text)
        newest = int((found / "content").read_text())
    write_checkpoint(path, "run", fill("3"))
    assert (path / "content").read_text() == "3"
    assert list(tmp_path.iterdir()) == [path]
    what = "killed at any moment of a checkpoint of train"
    measured(record_property, what, lost="what came after the newest whole checkpoint", read="nothing: it is silent")


def test_the_first_checkpoint_of_all_is_kept_until_the_next_is_whole(tmp_path):
    path = tmp_path / "checkpoint"
    write_and_be_killed(path, "1", 2)  # sealed, and not yet in its place
    write_and_be_killed(path, "2", 1)  # it is put into its place, the next one dies while it is written
    assert (path / "content").read_text() == "1"
    verify_checkpoint(path, "run")


def test_changed_bytes_and_other_runs_are_refused(tmp_path):
    path = tmp_path / "checkpoint"
    write_checkpoint(path, "mine", fill("one"))
    with pytest.raises(UserError, match="written by run 'mine', not by 'theirs'"):
        verify_checkpoint(path, "theirs")
    (path / "content").write_text("another")
    with pytest.raises(UserError, match="content"):
        verify_checkpoint(path, "mine")
