"""The claim about Montezuma's Revenge at toy size: plays its scripts, pretrains by a recipe, fits its linear maps."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from claims import montezuma  # noqa: E402
from claims.fixed import montezuma as rules  # noqa: E402

from jobs.recipes import pretrain_recipe  # noqa: E402


def test_it_runs_from_the_scripts_to_the_linear_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{BENCHMARKS}:{BENCHMARKS.parent}")  # collecting workers load the scripts
    recipe = pretrain_recipe("flat")
    tiny = replace(
        recipe,
        model=replace(recipe.model, z_dim=16, widths=(8,), patch=10),
        train=replace(recipe.train, epochs=1, frames_per_epoch=640),
    )
    figures = montezuma.measure(montezuma.Plan(tiny, num_frames=1_500, num_probe_frames=4_000), 0, tmp_path / "home")
    assert figures["z_dim"] == 16
    assert min(figures["label_std"]) > 5  # the labels vary
    assert figures["episodes"] > 10
    assert set(figures["encoder"]) == set(figures["pca"]) == set(rules.LABELS)
    results = {"flat": {0: figures}}
    assert len([row for row in montezuma.CLAIM.judge(results) if row.bar]) == 6
