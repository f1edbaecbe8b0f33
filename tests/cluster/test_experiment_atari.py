"""The experiment's Atari cells at toy size: prior frames, encoders, Q-learning, greedy games, the way to a score."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import atari  # noqa: E402


@pytest.mark.long
def test_every_arm_runs_on_a_game(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Frozen and trained encoders, from pretrained ones and from nothing; those with a score to reach go on for it."""
    places = ["--short", "--results", str(tmp_path / "kept"), "--work", str(tmp_path / "work"), "--json"]
    arms = ["pixels", "random-encoder", "vae-frozen", "vae-finetuned", "vae-online", "vae-online-scratch", "ram"]
    assert atari.main([*places, "--games", "breakout", "--arms", *arms]) == 0
    told = capsys.readouterr()
    found = json.loads(told.out.splitlines()[-1])
    rows = {row["arm"]: row for row in found["cells"]}
    assert set(rows) == set(arms)
    for arm, row in rows.items():
        assert len(row["scores"]) == 2
        assert (row["prior_frames"] > 0) == (arm not in ("pixels", "vae-online-scratch"))
        assert (row["goal"] is not None) == (arm in ("pixels", "vae-frozen"))
    clock = found["beside"]["clock"]["runs"][0]
    assert clock["pixels_spent_s"] > 5 or clock["pixels_s"] is not None
    assert clock["prior_s"] > 0
    collected = {
        rows[arm]["collection_minutes"] for arm in ("random-encoder", "vae-frozen", "vae-finetuned", "vae-online")
    }
    assert len(collected) == 1  # the same frames
    assert not list((tmp_path / "work" / "cells").rglob("checkpoint"))
