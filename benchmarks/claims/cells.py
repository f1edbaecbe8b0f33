"""Cells: one arm of a claim with one seed, measured once and kept under the digest of its configuration."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from peers.results import machine
from scipy import stats

from claims.fixed import ruler_digest
from jobs.settings import to_dict

Figures = dict[str, Any]
Results = Mapping[str, Mapping[int, Figures]]  # arm, seed


@dataclass(frozen=True)
class Cell:
    """What is measured.

    Attributes:
        claim: Name of the claim.
        arm: Which of the things that are compared.
        seed: Decides all that is random.
        plan: A frozen dataclass of plain values: everything else that decides the figures.
    """

    claim: str
    arm: str
    seed: int
    plan: Any

    @property
    def configuration(self) -> dict[str, Any]:
        """All that decides the figures, the rulers included, as plain values."""
        names = {"claim": self.claim, "arm": self.arm, "seed": self.seed}
        return {**names, "plan": to_dict(self.plan), "rulers": ruler_digest()}

    @property
    def digest(self) -> str:
        """Of the configuration, 12 hex digits."""
        return hashlib.sha256(json.dumps(self.configuration, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Judged:
    """One line of the verdict.

    Attributes:
        what: Is claimed.
        figure: Was measured, in words.
        bar: It is held to; empty for figures that stand beside the claim.
        is_met: Whether it is; None without a bar, or where a cell is missing.
    """

    what: str
    figure: str
    bar: str = ""
    is_met: bool | None = None


@dataclass(frozen=True)
class Scope:
    """What is asked for: toy sizes, which leave Montezuma's Revenge out, and the recipe for it."""

    is_short: bool = False
    montezuma_recipe: str = "probe"


@dataclass(frozen=True)
class Claim:
    """A claim: its cells, how one is measured, what they come to."""

    title: str
    about: str
    cells: Callable[[Scope], list[Cell]]
    measure: Callable[[Cell], Figures]
    judge: Callable[[Results], list[Judged]]


class Kept:
    """Measured cells in a folder, one small JSON file each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, cell: Cell) -> Path:
        """The cell's file."""
        return self._folder / f"{cell.claim}-{cell.arm}-{cell.seed}-{cell.digest}.json"

    def find(self, cell: Cell) -> Figures | None:
        """What was measured, if it was."""
        path = self.path(cell)
        return json.loads(path.read_text())["figures"] if path.is_file() else None

    def results(self, cells: list[Cell]) -> Results:
        """The figures of those cells that have been measured."""
        results: dict[str, dict[int, Figures]] = defaultdict(dict)
        for cell in cells:
            if (figures := self.find(cell)) is not None:
                results[cell.arm][cell.seed] = figures
        return results

    def measure(self, cell: Cell, measure: Callable[[Cell], Figures]) -> Figures:
        """Measures the cell unless it is kept; says so on stderr."""
        name = f"{cell.claim} {cell.arm} seed {cell.seed}"
        if (figures := self.find(cell)) is not None:
            print(f"{name}: kept", file=sys.stderr, flush=True)
            return figures
        started, used = time.perf_counter(), time.process_time()
        figures = rounded(measure(cell))
        figures["seconds"] = round(time.perf_counter() - started, 1)
        figures["cpu_s"] = round(time.process_time() - used, 1)
        record = {"cell": cell.configuration, "figures": figures}
        record |= {"torch": metadata.version("torch"), "machine": machine()}
        path = self.path(cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(record, separators=(",", ":")) + "\n")
        draft.replace(path)
        print(f"{name}: {figures['seconds']:.0f} s", file=sys.stderr, flush=True)
        return figures


def rounded(value: Any) -> Any:
    """Five digits of every number: more says nothing."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float | np.floating) else value


def by_seed(results: Results, arm: str, key: str) -> np.ndarray:
    """A figure of an arm, by seed; empty where nothing was measured."""
    return np.array([figures[key] for _, figures in sorted(results.get(arm, {}).items())])


def paired(results: Results, arm: str, other: str, key: str) -> np.ndarray:
    """Differences of a figure between two arms, of the seeds that both have."""
    first, second = results.get(arm, {}), results.get(other, {})
    return np.array([first[seed][key] - second[seed][key] for seed in sorted(first.keys() & second.keys())])


def t_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Student's interval of the mean of independent values; infinite for fewer than two."""
    if len(values) < 2:
        return -np.inf, np.inf
    spread = float(stats.t.ppf(0.5 + level / 2, len(values) - 1)) * float(values.std(ddof=1)) / np.sqrt(len(values))
    return float(values.mean()) - spread, float(values.mean()) + spread
