"""The benchmark of Q-learning: its real entry point at toy size, what it keeps, and the arithmetic of its figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import q_learning  # noqa: E402
from peers import hand_loops, measuring, results, running  # noqa: E402
from peers.measuring import Counts, measure  # noqa: E402
from peers.rows import Cell, rows  # noqa: E402

ASKED_FOR = {
    *("frozen_over_rllib", "frozen_over_sb3", "frozen_over_yardstick"),
    *("pixels_over_rllib", "pixels_over_sb3", "pixels_best_over_sb3"),
    *("replay_bytes_per_step_pixels", "replay_bytes_per_step_latent", "z_dim"),
    *("replay_share_of_update", "replay_growth_cost"),
    *("scaling_16_workers", "scaling_16_workers_cpu_s_per_agent_step", "replay_ratio_error"),
}


def bench(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, the JSON object, and what was said on the way."""
    code = q_learning.main([*arguments, "--short", "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out.splitlines()[-1]), err


def test_a_short_form_measures_its_rows_once_and_says_all_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    yardstick = tmp_path / "yardstick.py"
    yardstick.write_text('print("loading"); print(\'{"agent_steps_per_s": 50.0}\')\n')
    arguments = ["--seconds", "0.2", "--settle", "0", "--warmup", "320", "--yardstick", str(yardstick)]
    arguments += ["--rows", "bare_environment", "frozen", "yardstick"]
    arguments += ["--results", str(tmp_path / "kept"), "--write", str(tmp_path / "page")]
    code, result, err = bench(capsys, *arguments)
    assert code == 0, err
    assert set(result) >= ASKED_FOR
    assert list(result["rows"]) == ["frozen", "bare_environment", "yardstick"]
    frozen = result["rows"]["frozen"]
    assert frozen["resident_mb"] > 50
    assert frozen["time_to_first_update_s"] > 0.5
    assert result["frozen_over_yardstick"] == pytest.approx(frozen["agent_steps_per_s"] / 50, abs=1e-3)
    assert result["frozen_over_rllib"] is None
    endings = {path.name for path in (tmp_path / "page").iterdir()}
    assert endings == {f"q_learning.{ending}" for ending in ("md", "png", "json")}
    assert bench(capsys, *arguments)[1]["rows"] == result["rows"]


def test_a_row_that_fails_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    yardstick = tmp_path / "yardstick.py"
    yardstick.write_text("raise SystemExit(3)\n")
    arguments = ["--rows", "yardstick", "--yardstick", str(yardstick), "--results", str(tmp_path)]
    code, result, err = bench(capsys, *arguments)
    assert code == 1
    assert "exit code 3" in err
    assert result["rows"] == {}


def test_an_unknown_row_names_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        q_learning.parse(["--rows", "frosen"])
    said = capsys.readouterr().err
    assert "frosen" in said
    assert "hand_latents" in said


@pytest.mark.parametrize("mode", ["latents", "pixels"])
def test_the_hand_written_loops_hold_the_ratio(mode: str) -> None:
    loop = hand_loops.hand(mode, warmup=80, num_envs=8)
    counts = [next(loop) for _ in range(11)]
    assert counts[9:] == [Counts(80, 0), Counts(88, 2)]


def test_the_measured_window_starts_after_the_first_update(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: float(next(clock)))
    loop = (Counts(100 * i, max(0, i - 20) * 25) for i in range(10**6))
    figures = measure(loop, seconds=50.0, settle_s=3.0)
    assert figures["updates_per_agent_step"] == 0.25
    assert figures["agent_steps_per_s"] == pytest.approx(100, rel=0.1)
    assert figures["agent_steps"] > 2_000 + 100 * 50


def test_the_figures_of_known_rows() -> None:
    runs = [{"agent_steps_per_s": rate, "resident_mb": 10.0} for rate in (80.0, 100.0, 300.0)]
    row = results.summarise_row("", runs)
    assert (row["agent_steps_per_s"], row["agent_steps_per_s_repeats"]) == (100.0, [80.0, 100.0, 300.0])
    peer = results.summarise_row("", [{"agent_steps_per_s": 20.0}])
    figures = results.keys({"frozen": row, "rllib": peer}, {"z_dim": 392}, 0.01)
    assert (figures["frozen_over_rllib"], figures["frozen_over_sb3"], figures["z_dim"]) == (5.0, None, 392)
    assert results.replay_ratio_error([{"updates": 260, "agent_steps": 3_000}], 2_000, 0.25) == pytest.approx(0.04)


def test_what_was_kept_counts_only_for_the_same_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(running, "run_apart", lambda *cell: calls.append(cell) or {"agent_steps_per_s": len(calls)})
    cell = Cell("sb3", {"num_envs": 4}, 1.0, 0.0, turn=0)
    first = running.Bench(tmp_path, is_fresh=False).figures(cell)
    assert running.Bench(tmp_path, is_fresh=False).figures(cell) == first
    other = Cell("sb3", {"num_envs": 8}, 1.0, 0.0, turn=0)
    assert running.Bench(tmp_path, is_fresh=False).figures(other) != first
    assert running.Bench(tmp_path, is_fresh=True).figures(cell) != first


def test_every_ratio_is_of_rows_that_exist() -> None:
    assert {name for pair in results.RATIOS.values() for name in pair} <= set(rows(2_000, "yardstick.py"))
    assert set(results.KEYS) >= ASKED_FOR
