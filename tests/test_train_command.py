"""`latentrl train` as a command: killed with all its processes and resumed; learners as actors."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from mlflow import MlflowClient
from rl_toys import make_encoder

from jobs import gc
from jobs.workspace import Workspace
from pipeline.atari import preprocess_for
from pipeline.models.vae import VAESettings
from rllib_ext.checkpoint import find_checkpoint
from rllib_ext.state_files import load_state

ROOT = Path(__file__).resolve().parent.parent
TINY = VAESettings(z_dim=8, patch=12, widths=(8,), num_blocks=0)
NUM_LANES, WARMUP, RATIO, N_STEP = 4, 64, 0.25, 3
SETTINGS = {
    **{"envs_per_runner": NUM_LANES, "batch_size": 8, "replay_capacity": 40_000, "warmup_agent_steps": WARMUP},
    **{"updates_per_agent_step": RATIO, "checkpoint_agent_steps": 300, "priority_alpha": 0.6, "n_step": N_STEP},
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoder") / "bundle", preprocess_for("pong"), TINY, standardise=False)


def command(home: Path, encoder: Path, agent_steps: int, *more: str) -> list[str]:
    sets = [part for name, value in SETTINGS.items() for part in ("--set", f"train.{name}={value}")]
    given = ["--game", "pong", "--encoder", str(encoder), "--mode", "frozen", "--agent-steps", str(agent_steps)]
    return [sys.executable, "-m", "jobs.cli", "train", *given, *sets, "--home", str(home), "--json", *more]


def finish(*arguments: str) -> dict:
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def wait_for(condition: Callable[[], bool], seconds: float = 300.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


@contextlib.contextmanager
def killed_with_its_family(*arguments: str) -> Iterator[subprocess.Popen]:
    """A command under way; at the end, whatever has come of it, all goes as in a power cut: driver, Ray and workers."""
    running = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        yield running
    finally:
        family = psutil.Process(running.pid).children(recursive=True) if running.poll() is None else []
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        running.wait()
        psutil.wait_procs(family, timeout=30)


def replay_rows(checkpoint: Path) -> dict[str, np.ndarray]:
    """Column: (L, rows held, ...)."""
    columns = {path.stem: np.load(path) for path in (checkpoint / "replay").glob("*.npy")}
    return {name: column for name, column in columns.items() if name != "priorities"}


def figures_of(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "agent_steps" in line]


def test_a_killed_run_with_a_learner_of_its_own_goes_on_from_its_last_checkpoint(tmp_path, encoder):
    folder = tmp_path / "runs" / "train-pong-frozen-001"
    state = folder / "checkpoint" / "state.json"
    with killed_with_its_family(*command(tmp_path, encoder, 10**6, "--num-learners", "1")) as running:
        wait_for(state.is_file)
        first = state.stat().st_mtime_ns
        wait_for(lambda: state.is_file() and state.stat().st_mtime_ns > first)
        wait_for(lambda: (folder / "metrics.jsonl").is_file())
        assert any("gcs_server" in process.name() for process in psutil.Process(running.pid).children(recursive=True))
    checkpoint = find_checkpoint(folder / "checkpoint")
    assert checkpoint is not None
    at_kill, rows_at_kill = load_state(checkpoint, "state"), replay_rows(checkpoint)
    last = max(at_kill["agent_steps"], *(line["step"] for line in figures_of(folder)))
    (folder / ".checkpoint.new-half").mkdir(exist_ok=True)  # as a kill within a checkpoint leaves it
    gc.run(Workspace.at(str(tmp_path)), delete=True, finished=True, versions=True)
    run_id = json.loads((folder / "run.json").read_text())["run_id"]

    result = finish(*command(tmp_path, encoder, last + 200, "--num-learners", "1", "--resume"))
    assert result["run_id"] == run_id
    runs = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").search_runs(["0", "1"])
    assert [(run.info.run_id, run.info.status) for run in runs] == [(run_id, "FINISHED")]

    after = load_state(folder / "checkpoint", "state")
    assert last + 200 <= after["agent_steps"] == result["agent_steps"]
    backlog = (after["agent_steps"] - WARMUP) * RATIO - after["updates"]
    assert at_kill["updates"] < after["updates"] == result["updates"]
    assert 0 <= backlog <= 2 * 32
    assert (after["seed"], after["num_restores"]) == (at_kill["seed"], 1)
    rows = replay_rows(folder / "checkpoint")
    for name, held in rows_at_kill.items():  # what was played is there still; only the last rows have become cuts
        decided = held.shape[1] - 1 - N_STEP  # and the returns that waited for what came next are known
        np.testing.assert_array_equal(rows[name][:, :decided], held[:, :decided], err_msg=name)
    assert rows["action"].size >= after["agent_steps"]
    steps = [line["step"] for line in figures_of(folder)]
    assert steps == sorted(set(steps))
    assert steps[-1] == after["agent_steps"]
    assert figures_of(folder)[-1]["cut_episodes"] == NUM_LANES  # the games that were open when it was killed
    assert not list(folder.glob(".checkpoint*"))
    assert result["encoder_sha256_before"] == result["encoder_sha256_after"]
    priorities = np.load(folder / "checkpoint" / "replay" / "priorities.npy")
    assert len(np.unique(priorities)) > 20  # TD errors of the learner's, not the one value that new rows get
