"""The ruler's page: every row beside the published figure."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

from atariari.keeping import Record, write_page
from atariari.rows import PUBLISHED
from pipeline.atariari import published

ALLOWED = 0.03
ORDER = ("majority", "random", "random+std", "pixels", "pixels+std", "pca", "pca+std", "vae", "supervised")


def summary(records: list[Record]) -> dict[str, Any]:
    """By game and row: mean F1 over seeds, each variable's, and the published ones (None where there are none)."""
    seeds: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        seeds[record["game"], record["row"]].append(record)
    found: dict[str, Any] = {}
    for (game, row), members in sorted(seeds.items(), key=lambda item: (item[0][0], _rank(item[0][1]))):
        there = {name: of.get(PUBLISHED.get(row, "")) for name, of in published(game).items()}
        names = sorted({name for member in members for name in member["f1_by_variable"]})
        found.setdefault(game, {})[row] = {
            "f1": round(fmean(member["f1"] for member in members), 4),
            "f1_seeds": [round(member["f1"], 4) for member in members],
            "published_f1": there.get(""),
            "f1_by_variable": {
                name: round(fmean(m["f1_by_variable"][name] for m in members if name in m["f1_by_variable"]), 4)
                for name in names
            },
            "published_f1_by_variable": {name: there.get(name) for name in names},
            **({"curve": members[0]["curve"]} if "curve" in members[0] else {}),
        }
    return found


def write(folder: Path, records: list[Record]) -> None:
    """`ruler.json` with the summary, and `ruler.md`: its tables, between two marks of a page that is kept by hand."""
    found = summary(records)
    write_page(folder, "ruler", found, tables(found))


def tables(found: dict[str, Any]) -> str:
    """One table of games, one of variables for each game, one for each curve."""
    lines = ["| game | row | seeds | F1 | published | difference |", "|---|---|---|---|---|---|"]
    for game, rows in found.items():
        for row, facts in rows.items():
            lines.append(f"| {game} | {row} | {len(facts['f1_seeds'])} | {facts['f1']:.3f} | {_beside(facts)} |")
    for game, rows in found.items():
        names = sorted({name for facts in rows.values() for name in facts["f1_by_variable"]})
        lines += ["", f"**{game}**, F1 by variable (published in brackets)", ""]
        lines += ["| row | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for row, facts in rows.items():
            cells = [_cell(facts["f1_by_variable"].get(n), facts["published_f1_by_variable"].get(n)) for n in names]
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
        for row, facts in rows.items():
            lines += _curve(game, row, facts.get("curve", []))
    return "\n".join(lines) + "\n"


def _curve(game: str, row: str, curve: list[dict[str, Any]]) -> list[str]:
    if not curve:
        return []
    names = sorted(curve[0]["f1_by_variable"])
    lines = ["", f"{row} on {game} over its training", ""]
    lines += ["| seconds | updates | F1 | " + " | ".join(names) + " |", "|---" * (3 + len(names)) + "|"]
    for point in curve:
        figures = " | ".join(f"{point['f1_by_variable'][name]:.2f}" for name in names)
        lines.append(f"| {point['seconds']:.0f} | {point['updates']} | {point['f1']:.3f} | {figures} |")
    return lines


def _beside(facts: dict[str, Any]) -> str:
    there = facts["published_f1"]
    if there is None:
        return " | "
    difference = facts["f1"] - there
    return f"{there:.2f} | {difference:+.3f}{'' if abs(difference) <= ALLOWED else ' **beyond 0.03**'}"


def _cell(here: float | None, there: float | None) -> str:
    return "" if here is None else f"{here:.2f}" + (f" ({there:.2f})" if there is not None else "")


def _rank(row: str) -> tuple[int, str]:
    return (ORDER.index(row) if row in ORDER else len(ORDER), row)
