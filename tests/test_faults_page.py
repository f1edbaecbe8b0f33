"""The page of faults says what was measured, of faults that tests inject; the soak's arithmetic finds a slope."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import faults  # noqa: E402
import soak  # noqa: E402
from fault_rows import PROPERTY  # noqa: E402

KEPT = json.loads((faults.RESULTS / "faults.json").read_text())


def test_the_page_is_made_of_the_figures_and_of_nothing_else() -> None:
    assert (faults.RESULTS / "faults.md").read_text() == faults.page(KEPT)
    assert faults.PROPERTY == PROPERTY


def test_figures_are_of_rows_that_there_are() -> None:
    assert set(KEPT["rows"]) <= {row.name for row in faults.ROWS}


@pytest.mark.parametrize("row", faults.ROWS, ids=lambda row: row.name)
def test_every_row_has_a_test_that_names_it(row: faults.Row) -> None:
    file, _, test = row.test.partition("::")
    text = (ROOT / "tests" / file).read_text()
    assert f"def {test.partition('[')[0]}(" in text
    assert row.name in text or row.name.rpartition(" ")[0] in text


def test_what_took_longer_than_promised_or_was_never_measured_is_said() -> None:
    """By the script that measures, with its exit code: the figures are of a machine and its other work."""
    rows = {row.name: {"seconds": dict(row.limits)} for row in faults.ROWS}
    assert faults.beyond_promise({"rows": rows}) == []
    row = next(row for row in faults.ROWS if row.limits)
    what, limit = next(iter(row.limits.items()))
    rows[row.name] = {"seconds": {**row.limits, what: limit + 1}}
    (problem,) = faults.beyond_promise({"rows": rows})
    assert problem.startswith(row.name)
    del rows[row.name]
    assert faults.beyond_promise({"rows": rows}) == [f"{row.name}: not measured"]


def samples(percent_an_hour: float, seed: int, minutes: int = 60) -> list[dict[str, float]]:
    """Two sittings of other levels with the same growth, and noise that lasts."""
    rng, made, noise = np.random.default_rng(seed), [], 0.0
    for sitting, level in ((1, 1_000.0), (2, 1_300.0)):
        for second in range(0, minutes * 60, 10):
            noise = 0.9 * noise + rng.normal()
            value = level + 1_150 * percent_an_hour / 100 * second / 3_600 + noise
            made.append({"sitting": sitting, "time_s": sitting * 1e6 + second, "pss_mb": value})
    return made


@pytest.mark.parametrize("growth", [0.0, 0.5, 5.0])
def test_the_soak_finds_the_growth_and_its_uncertainty(growth: float) -> None:
    """Intervals of 95% cover the truth most of the time; growth is told of the mean, which it has moved itself."""
    truth, covered = growth / (1 + growth / 200), 0
    for seed in range(100):
        slope, low, high = soak.slope_per_hour(samples(growth, seed), "pss_mb")
        covered += low <= truth <= high
        assert slope == pytest.approx(truth, abs=0.5)
        assert 0 < high - low < 2
    assert covered >= 85
