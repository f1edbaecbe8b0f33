"""The benchmark of learning: its real entry point at toy size, and what it keeps between calls."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import learning  # noqa: E402
from curves import keep, page  # noqa: E402
from curves.arms import ENCODER_TASKS, TASKS, Arm, Cell, Task, plain  # noqa: E402
from curves.rally import CELL_PIXELS, CELLS, rally_factory, rally_preprocess  # noqa: E402
from peers.running import CellFailed  # noqa: E402

TINY = {"warmup_agent_steps": 100, "epsilon_decay_agent_steps": 200, "batch_size": 8, "envs_per_runner": 4}


def test_arms_are_run_once_and_make_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = {"sb3": TASKS["rally"].arms["sb3"], "pixels": TASKS["rally"].arms["pixels"]}
    tiny = {name: Arm(arm.what, arm.mode, {**arm.train, **TINY}, arm.q) for name, arm in arms.items()}
    monkeypatch.setitem(TASKS, "rally", Task(900, 1, tiny, window=3, game="rally"))
    arguments = ["--task", "rally", "--results", str(tmp_path / "kept"), "--work", str(tmp_path / "work"), "--json"]
    arguments += ["--write", str(tmp_path / "page")]
    assert learning.main(arguments) == 0
    out = capsys.readouterr().out
    figures = json.loads(out.splitlines()[-1])["rally"]
    assert set(figures) == {"sb3", "pixels"}
    for figure in figures.values():
        assert figure["seeds"] == 1
        assert figure["agent_steps_per_s"] > 0
    for path in (tmp_path / "kept").iterdir():
        result = json.loads(path.read_text())["result"]
        assert 150 < result["updates"] < 250  # 200, and what a loop has gone beyond its 900 steps
        steps, _, seconds = np.array(result["games"]).T
        assert (np.diff(steps) >= 0).all()
        assert (np.diff(seconds) >= 0).all()
    assert {path.name for path in (tmp_path / "page").iterdir()} == {
        "learning-tables.md",
        "learning.json",
        "learning-rally.png",
    }
    assert learning.main(arguments) == 0
    assert capsys.readouterr().err.count("kept") == 2


def test_a_failed_run_is_said_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise CellFailed("no")

    monkeypatch.setattr(keep, "run_apart", fail)
    arguments = ["--task", "rally", "--arm", "sb3", "--seed", "0", "--results", str(tmp_path), "--work", str(tmp_path)]
    assert learning.main(arguments) == 1
    assert not list(tmp_path.iterdir())


def test_a_cell_is_found_by_all_that_decides_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keep, "run_apart", lambda *arguments: {"games": [[10, 1.0, 2.0]], "seconds": 3.0, "updates": 4})
    kept, cell = keep.Kept(tmp_path, tmp_path), Cell.of("rally", "pixels", 0)
    assert kept.run(cell)
    assert kept.find(cell) == {"games": [[10, 1.0, 2.0]], "seconds": 3.0, "updates": 4}
    for other in (Cell.of("rally", "pixels", 1), Cell.of("rally", "sb3", 0), Cell.of("pong", "frozen", 0)):
        assert kept.find(other) is None
    assert page.summary(page.gather(kept))["rally"]["pixels"]["last_games"]["by_seed"] == [1.0]


def test_a_run_kept_before_a_setting_was_added_is_found_unless_the_setting_was_changed(tmp_path: Path) -> None:
    kept, cell = keep.Kept(tmp_path, tmp_path), Cell.of("pong", "efficient", 0)

    def write(changes: dict[str, Any], dropped: str) -> None:
        configuration = plain(cell.configuration)
        configuration["recipe"]["train"].pop(dropped)
        configuration["recipe"]["train"] |= changes
        record = {"configuration": configuration, "result": {"updates": 4}}
        (tmp_path / "pong-efficient-0-old.json").write_text(json.dumps(record))

    write({}, "priority_alpha")  # at its default
    assert kept.find(cell) == {"updates": 4}
    for changes, dropped in (({"lr": 0.5}, "priority_alpha"), ({}, "n_step"), ({"gone": 1}, "priority_alpha")):
        write(changes, dropped)
        assert kept.find(cell) is None


def test_the_gain_of_an_encoder_is_that_of_pairs_in_human_scores() -> None:
    def run(score: float) -> dict[str, Any]:
        return {"greedy": [score - 1, score + 1]}

    runs = {
        "encoders-pong": {"axial": {0: run(14.6), 1: run(-20.7)}, "grid": {0: run(-20.7), 1: run(-20.7), 2: run(9.0)}},
        "encoders-breakout": {"axial": {0: run(16.1)}, "grid": {0: run(1.7)}},
    }
    found = page.gain(runs, "axial", "grid", ENCODER_TASKS)  # 1, 0 and 0.5
    assert (found["pairs"], found["mean"]) == (3, 0.5)
    assert found["high"] - 0.5 == pytest.approx(0.5 / np.sqrt(3) * 4.303, abs=2e-3)  # t of 2 degrees of freedom
    assert found["low"] + found["high"] == pytest.approx(1.0)


@pytest.mark.parametrize("name", list(TASKS))
def test_every_arm_is_a_recipe_with_known_settings(name: str) -> None:
    digests = set()
    for arm in TASKS[name].arms:
        cell = Cell.of(name, arm, 0)
        assert 0.25 <= cell.recipe.train.updates_per_agent_step <= 1
        digests.add(cell.digest)
    assert len(digests) == len(TASKS[name].arms)


def cell(frame: np.ndarray, value: int) -> np.ndarray:
    """Row and column of the first cell of that brightness."""
    return np.argwhere(frame == value)[0] // CELL_PIXELS


def meeting(before: np.ndarray, frame: np.ndarray) -> int:
    """The move towards where the ball will come down; none while not both frames show it on its way."""
    if not ((before == 255).any() and (frame == 255).any()):
        return 1
    row, column = cell(frame, 255)
    drift = column - cell(before, 255)[1]
    if row == 0 or abs(drift) != 1:
        return 1
    last = CELLS - 1
    reach = (column + drift * (last - row)) % (2 * last)
    return 1 + int(np.sign(min(reach, 2 * last - reach) - cell(frame, 160)[1]))


def test_rally_is_won_by_whoever_sees_where_the_ball_will_come_down() -> None:
    """And lost by a paddle that does not move."""
    vector, means = rally_factory(rally_preprocess(), 8, 1), []
    for meets in (True, False):
        before = step = vector.reset(np.arange(8))
        rewards, games = 0.0, 0
        for _ in range(600):
            pairs = zip(before.frames, step.frames, strict=True)
            actions = np.array([meeting(*pair) for pair in pairs]) if meets else np.ones(8, np.int64)
            before, step = step, vector.step(actions)
            rewards, games = rewards + step.rewards.sum(), games + step.terminated.sum()
        means.append(rewards / games)
    assert means[0] > 8 > 1 > means[1]


def test_the_mean_of_all_games_weighs_each_by_the_agent_steps_until_the_next() -> None:
    games = np.array([[10.0, 2.0], [40.0, 4.0], [110.0, 8.0]])  # the last one ended after the run's 100 agent steps
    assert page._area(games, 100) == pytest.approx((10 * 2 + 30 * 2 + 60 * 4) / 100)
