"""The benchmark of the online mode's speed: its real entry point for a moment, and what it counts."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import online


def test_a_turn_is_divided_by_its_updates_and_rows_take_turns() -> None:
    called: list[str] = []

    def turn(name: str, updates: int) -> online.Turn:
        def once() -> int:
            called.append(name)
            time.sleep(0.02)
            return updates

        return once

    found = online.milliseconds({"a": turn("a", 10), "b": turn("b", 1)}, 3)
    assert found["a"] >= 2
    assert found["b"] == pytest.approx(10 * found["a"], rel=0.5)
    assert called == ["a", "b"] * 4


def test_every_row_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(online, "UPDATES", 1)
    monkeypatch.setattr(online, "BOUND_UPDATES", 1)
    arguments = ["--rounds", "1", "--agent-steps", "256", "--json", "--write", str(tmp_path)]
    assert online.main(arguments) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found.keys() == {*online.MODES, "bound"}
    assert min(found.values()) > 0
    assert f"| frozen | {found['frozen']:.2f} | 1.00 |" in (tmp_path / "online.md").read_text()


@pytest.mark.parametrize("option", [["--rounds", "0"], ["--threads", "-1"], ["--write", "nowhere/at/all"]])
def test_bad_options_are_refused_before_anything_is_measured(option: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        online.main(option)
    assert ended.value.code == 2
