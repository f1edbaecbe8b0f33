"""The ladder's page: rungs of the design, game by game, beside published rows."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from atariari.keeping import Record, write_page
from pipeline.atariari import published

PUBLISHED = ("random-cnn", "vae", "st-dim", "supervised")


def summary(records: list[Record]) -> dict[str, Any]:
    """By rung and game: means over seeds of F1, of each variable's, and of what the pretraining said."""
    found: dict[str, Any] = {}
    for rung in sorted({record["rung"] for record in records}):
        of_rung = [record for record in records if record["rung"] == rung]
        for game in sorted({record["game"] for record in of_rung}):
            cells = sorted((r for r in of_rung if r["game"] == game), key=lambda record: record["seed"])
            found.setdefault(rung, {})[game] = {
                "seeds": [cell["seed"] for cell in cells],
                "f1_seeds": [round(cell["f1"], 4) for cell in cells],
                "f1": _mean(cells, "f1"),
                "f1_by_variable": _means([cell["f1_by_variable"] for cell in cells]),
                "pretraining": _means([cell["pretraining"] for cell in cells]),
            }
    return found


def write(folder: Path, records: list[Record]) -> None:
    """`representation.json` with the summary, and the tables between two marks of `representation.md`."""
    found = summary(records)
    write_page(folder, "representation", found, tables(found))


def tables(found: dict[str, Any]) -> str:
    """One table of rungs and games, one of variables for each game."""
    games = sorted({game for of_rung in found.values() for game in of_rung})
    lines = ["| | " + " | ".join(games) + " | mean | bits/dim | frames/s | seconds |"]
    lines += ["|---" * (len(games) + 5) + "|"]
    for name in PUBLISHED:
        scores = [published(game).get("", {}).get(name) for game in games]
        lines.append(f"| *{name}, published* | " + " | ".join(_figure(score, 2) for score in scores) + _ends(scores))
    for rung, of_rung in found.items():
        scores = [of_rung[game]["f1"] if game in of_rung else None for game in games]
        seeds = [len(of_rung[game]["seeds"]) if game in of_rung else 0 for game in games]
        cells = [_figure(score, 3) + (f" ({n})" if n > 1 else "") for score, n in zip(scores, seeds)]
        there = list(of_rung.values())
        keys = ("bits_per_dim", "images_per_s", "seconds")
        bits, rate, seconds = (fmean(game["pretraining"][key] for game in there) for key in keys)
        mean = _figure(fmean(score for score in scores if score is not None), 3) if None not in scores else ""
        lines.append(f"| {rung} | " + " | ".join(cells) + f" | {mean} | {bits:.2f} | {rate:.0f} | {seconds:.0f} |")
    for game in games:
        lines += _variables(game, found)
    return "\n".join(lines) + "\n"


def _variables(game: str, found: dict[str, Any]) -> list[str]:
    rows = {rung: of_rung[game]["f1_by_variable"] for rung, of_rung in found.items() if game in of_rung}
    names = sorted({name for row in rows.values() for name in row})
    lines = ["", f"**{game}**, F1 by variable", "", "| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for name in PUBLISHED:
        there = [published(game).get(variable, {}).get(name) for variable in names]
        lines.append(f"| *{name}, published* | " + " | ".join(_figure(value, 2) for value in there) + " |")
    for rung, row in rows.items():
        lines.append(f"| {rung} | " + " | ".join(_figure(row.get(variable), 2) for variable in names) + " |")
    return lines


def _ends(scores: list[float | None]) -> str:
    there = [score for score in scores if score is not None]
    return f" | {fmean(there):.2f} | | | |" if len(there) == len(scores) else " | | | | |"


def _mean(cells: list[Record], key: str) -> float:
    return round(fmean(cell[key] for cell in cells), 4)


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(fmean(row[key] for row in rows), 4) for key in rows[0]}


def _figure(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
