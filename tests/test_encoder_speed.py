"""The benchmark of encoders' speed: its real entry point for a moment, and what it counts."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import encoder_speed


def test_rates_are_frames_over_seconds_and_slices_alternate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_speed, "SLICE_S", 0.05)
    called: list[str] = []

    def step(name: str, frames: int) -> encoder_speed.Step:
        def once() -> int:
            called.append(name)
            time.sleep(0.01)
            return frames

        return once

    found = encoder_speed.rates({"a": step("a", 10), "b": step("b", 1)}, 3)
    assert 100 < found["a"] <= 1000
    assert found["a"] == pytest.approx(10 * found["b"], rel=0.5)
    turns = [name for index, name in enumerate(called) if index == 0 or called[index - 1] != name]
    assert turns == ["a", "b"] * 4


def test_every_row_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_speed, "SLICE_S", 0.001)
    arguments = ["--rounds", "1", "--threads", "1", "--json", "--write", str(tmp_path)]
    assert encoder_speed.main(arguments) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["training"].keys() == {"ours", "published"}
    assert {"ours float32", "Nature CNN float32"} <= found["encoding"].keys()
    assert "| ratio | " in (tmp_path / "encoder_speed.md").read_text()
