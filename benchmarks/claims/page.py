"""The verdict as a page and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from claims.cells import Claim, Judged, Kept, Scope
from claims.fixed import ruler_digest


def verdict(claims: dict[str, Claim], kept: Kept, scope: Scope) -> dict[str, Any]:
    """What the kept cells come to, claim by claim."""
    told: dict[str, Any] = {"rulers": ruler_digest(), "claims": {}}
    for name, claim in claims.items():
        cells = claim.cells(scope)
        results = kept.results(cells)
        seconds = sum(figures["cpu_s"] for seeds in results.values() for figures in seeds.values())
        told["claims"][name] = {
            "title": claim.title,
            "about": claim.about,
            "cells": len(cells),
            "measured": sum(len(seeds) for seeds in results.values()),
            "cpu_s": round(seconds, 1),
            "judged": [_plain(row) for row in claim.judge(results)],
        }
    return told


def _plain(row: Judged) -> dict[str, Any]:
    is_met = None if row.is_met is None else bool(row.is_met)
    return {"what": row.what, "figure": row.figure, "bar": row.bar, "is_met": is_met}


def write(folder: Path, told: dict[str, Any]) -> None:
    """claims.md and claims.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "claims.json").write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    (folder / "claims.md").write_text(page(told))


def page(told: dict[str, Any]) -> str:
    """The page."""
    parts = [_HEAD.format(rulers=told["rulers"])]
    for name, claim in told["claims"].items():
        parts.append(f"\n## {claim['title']}\n\n{claim['about']}\n")
        if not claim["cells"]:
            parts.append("\nLeft out at toy sizes.\n")
            continue
        missing = claim["cells"] - claim["measured"]
        left = f"; **{missing} not yet measured**" if missing else ""
        parts.append(f"\n{claim['measured']} cells (`{name}`), {claim['cpu_s'] / 60:.1f} minutes of one core{left}.\n")
        rows = [f"| {row['what']} | {row['figure']} | {row['bar']} | {_mark(row)} |" for row in claim["judged"]]
        parts.append("\n".join(["\n| | figure | bar | met |", "|---|---|---|---|", *rows, ""]))
    return "".join(parts)


def _mark(row: dict[str, Any]) -> str:
    return {None: "", True: "yes", False: "**no**"}[row["is_met"]]


_HEAD = """# The claims made for VAEs

Made by `make claims` of the cells in [claims/](claims/), each kept under the digest of its configuration. Seeds are 0
to 4 (of bits per dimension 0 to 2) and none was left out; recipes were chosen looking at
seed 0, that of the shapes at all seeds of an earlier recipe and at 0 and 1 of its own ([log](../log.md)).
Each seed's figure stands in brackets after a mean. What
decides (renderers, checkers, pairs, metrics, bars) is `benchmarks/claims/fixed/`, committed before the first training
on it; sha256 over its files: `{rulers}`. What was tried on the way: [log](../log.md).
"""
