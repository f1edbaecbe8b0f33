"""The ladder's benchmark: its real commands at toy size, what it keeps, and the page of several rungs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from probe_toys import ball_dataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import representation
from atariari import ladder


def test_a_cell_is_measured_once_by_the_commands_that_users_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ball_dataset(tmp_path / "data" / "pong-probe", [90] * 20)
    ball_dataset(tmp_path / "data" / "pong-pretrain", [90] * 5, emulator_seed=2)
    arguments = [
        "--data",
        str(tmp_path / "data"),
        "--results",
        str(tmp_path / "kept"),
        "--home",
        str(tmp_path / "home"),
    ]
    arguments += ["--rungs", "untrained", "--games", "pong", "--json"]
    assert representation.main([*arguments, "--write", str(tmp_path)]) == 0
    cell = json.loads(capsys.readouterr().out.splitlines()[-1])["untrained"]["pong"]
    assert cell["seeds"] == [0]
    assert cell["f1_by_variable"]["ball_x"] > 0.3  # that of a random patch layer, which sees the pixel
    assert "| untrained | " in (tmp_path / "representation.md").read_text()
    monkeypatch.setattr(representation, "measure", lambda *_: pytest.fail("measured again"))
    assert representation.main(arguments) == 0


def test_cells_differ_by_what_their_figures_depend_on(tmp_path: Path) -> None:
    for size in ("", representation.SMALL):
        ball_dataset(tmp_path / f"pong-probe{size}", [90] * 5)
        ball_dataset(tmp_path / f"pong-pretrain{size}", [90] * 5, emulator_seed=2)
    cells = [representation.Cell(rung, "pong", seed, tmp_path) for rung in representation.RUNGS for seed in (0, 1)]
    digests = {cell.name.rsplit("-", 1)[1] for cell in cells}
    assert len(digests) == len(cells)


def test_games_that_are_held_out_are_not_probed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        representation.main(["--data", "nowhere", "--games", "freeway"])
    assert "invalid choice: 'freeway'" in capsys.readouterr().err


def test_the_page_has_means_over_seeds_and_a_mean_only_of_all_games() -> None:
    said = {"bits_per_dim": 2.0, "active_units": 4, "z_dim": 4, "images_per_s": 100.0, "seconds": 60.0}
    cells = [
        {"rung": rung, "game": game, "seed": seed, "f1": f1, "f1_by_variable": {"ball_x": f1}, "pretraining": said}
        for rung, game, seed, f1 in (
            ("a", "pong", 0, 0.5),
            ("a", "pong", 1, 0.7),
            ("a", "boxing", 0, 0.2),
            ("b", "pong", 0, 0.1),
        )
    ]
    found = ladder.summary(cells)
    assert found["a"]["pong"]["f1"] == pytest.approx(0.6)

    text = ladder.tables(found)
    assert "| a | 0.200 | 0.600 (2) | 0.400 | 2.00 | 100 | 60 |" in text
    assert "| b |  | 0.100 |  | 2.00 | 100 | 60 |" in text
    assert "| *st-dim, published* | " in text
