"""AtariARI (Anand et al. 2019, arXiv:1906.08226): which RAM byte holds which variable of a game, and the published F1.

The facts stand in atariari.json, as the paper's tables and its released code have them.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from importlib import resources
from statistics import fmean
from typing import Any

from pipeline.errors import UserError


@functools.cache
def _facts() -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(resources.files("pipeline").joinpath("atariari.json").read_text())
    return facts


def games(*, only_published: bool = False) -> list[str]:
    """The games that have labels; the table's 22, or Battlezone and Skiing too."""
    return [game for game, row in _facts()["games"].items() if "published_f1" in row or not only_published]


def variables(game: str) -> dict[str, int]:
    """The variables of a game, each with its byte of RAM.

    Args:
        game: ALE's id, or the benchmark's name, which is the same without underscores.

    Raises:
        UserError: The benchmark has no labels for this game; those that have are listed.
    """
    return {name: entry[0] for name, entry in _row(game)["variables"].items()}


def categories(game: str) -> dict[str, list[str]]:
    """The categories of a game, each with its variables; a variable may be in two, or in none."""
    found: dict[str, list[str]] = {}
    for name, (_, *of_variable) in _row(game)["variables"].items():
        for category in of_variable:
            found.setdefault(category, []).append(name)
    return found


def published(game: str) -> dict[str, dict[str, float | None]]:
    """The paper's F1 by method (maj-clf, random-cnn, vae, pixel-pred, cpc, st-dim, supervised): of each variable by
    its name, and of the game under "". Empty for the two games outside of the table."""
    methods, row = _facts()["methods"], _row(game)
    if "published_f1" not in row:
        return {}
    figures = {"": row["published_f1"], **row["published_f1_by_variable"]}
    return {name: dict(zip(methods, values)) for name, values in figures.items()}


def score(game: str, by_variable: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """A game's score, the mean over categories of the mean over a category's variables; and each category's."""
    members = {category: [by_variable[n] for n in names if n in by_variable] for category, names in _ordered(game)}
    by_category = {category: fmean(values) for category, values in members.items() if values}
    return (fmean(by_category.values()) if by_category else fmean(by_variable.values())), by_category


def _ordered(game: str) -> list[tuple[str, list[str]]]:
    return sorted(categories(game).items())


def _row(game: str) -> dict[str, Any]:
    rows = _facts()["games"]
    name = re.sub("[^a-z]", "", game.lower())
    if name not in rows:
        raise UserError(f"AtariARI has no labels for {game}; it has them for {', '.join(rows)}")
    row: dict[str, Any] = rows[name]
    return row
