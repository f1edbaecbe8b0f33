"""Q-learning's speed beside its peers: RLlib's and Stable-Baselines3's DQN, hand-written loops, and the bare parts.

Same game, batch 32, one update per 4 agent steps, the same algorithm in each pair. Every row is measured in a process
of its own, one at a time and in turn (A B C A B C ...); medians over turns. What has been measured is kept, so that an
interrupted run goes on.

    python benchmarks/q_learning.py [--short] [--yardstick PATH] [--rows NAME ...] [--json] [--write docs/results]
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from peers import results
from peers.rows import Cell, Row, rows
from peers.running import Bench, CellFailed, versions

from jobs.recipes import train_recipe

SHORT = {"repeats": 1, "seconds": 4.0, "settle": 1.0}
FULL = {"repeats": 3, "seconds": 20.0, "settle": 5.0}


class Turns:
    """Measures rows in turn and remembers the figures and what failed."""

    def __init__(self, bench: Bench, table: dict[str, Row], options: argparse.Namespace) -> None:
        """Nothing is measured yet."""
        self._bench, self._table, self._options = bench, table, options
        self.measured: dict[str, dict[str, list[dict[str, Any]]]] = {name: {} for name in table}
        self.failures: list[str] = []

    def run(self) -> None:
        """All turns: every variant in the first one (the first variant only in a short form), then the fastest."""
        for turn in range(self._options.repeats):
            for name in self._table:
                for variant in self._variants(name, turn):
                    self._measure(name, variant, turn)

    def best(self, name: str) -> str | None:
        """The variant whose first measurement was the fastest; None where all failed."""
        first = {variant: found[0].get("agent_steps_per_s", 0.0) for variant, found in self.measured[name].items()}
        return max(first, key=lambda variant: first[variant]) if first else None

    def _variants(self, name: str, turn: int) -> list[str]:
        if turn > 0:
            best = self.best(name)
            return [] if best is None or name == "replay" else [best]
        variants = list(self._table[name].variants)
        return variants[:1] if self._options.short else variants

    def _measure(self, name: str, variant: str, turn: int) -> None:
        row, options = self._table[name], self._options
        cell = Cell(row.loop, row.variants[variant], options.seconds, options.settle, turn)
        label = f"{row.what}{f' ({variant})' if variant else ''}"
        try:
            figures = self._bench.figures(cell)
        except CellFailed as failure:
            self.failures.append(f"{name}: {failure}")
            print(f"turn {turn + 1}  {label}: FAILED", file=sys.stderr, flush=True)
            return
        self.measured[name].setdefault(variant, []).append(figures)
        rate = figures.get("agent_steps_per_s")
        print(f"turn {turn + 1}  {label}: {f'{rate:,.1f}/s' if rate else 'done'}", file=sys.stderr, flush=True)


def summarise(turns: Turns, options: argparse.Namespace) -> dict[str, Any]:
    """The JSON object."""
    measured = {name: found[best] for name, found in turns.measured.items() if (best := turns.best(name)) is not None}
    replay = measured.pop("replay", [{}])[0]
    summary = {name: results.summarise_row(turns.best(name) or "", found) for name, found in measured.items()}
    ratio = train_recipe("dqn").train.updates_per_agent_step
    error = results.replay_ratio_error(measured.get("frozen", []), options.warmup, ratio)
    plan = {"repeats": options.repeats, "seconds": options.seconds, "settle_s": options.settle}
    return {
        **results.keys(summary, replay, error),
        "rows": summary,
        "replay": replay,
        "plan": {**plan, "warmup_agent_steps": options.warmup},
        "machine": results.machine(),
        "versions": versions(),
        "failures": turns.failures,
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; the form fills in what was not said."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="one turn of a few seconds, one way to set up each row")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help=f"only these of {', '.join(rows(0, '-'))}")
    parser.add_argument("--yardstick", metavar="PATH", help="script that prints a JSON line with agent_steps_per_s")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--seconds", type=float, help="measured window of a cell")
    parser.add_argument("--settle", type=float, help="seconds between the first update and the window")
    parser.add_argument("--warmup", type=int, help="agent steps before the first update (the recipe's)")
    parser.add_argument(
        "--results", type=Path, default=Path("latentrl-runs/bench/q_learning"), help="kept measurements"
    )
    parser.add_argument("--fresh", action="store_true", help="measures again what has been kept")
    parser.add_argument("--json", action="store_true", help="ends with one JSON object")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="page, plot and JSON")
    options = parser.parse_args(arguments)
    for name, value in (SHORT if options.short else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.warmup = train_recipe("dqn").train.warmup_agent_steps if options.warmup is None else options.warmup
    unknown = set(options.rows or ()) - set(rows(0, options.yardstick))
    if unknown:
        parser.error(f"no row {', '.join(sorted(unknown))}; there are {', '.join(rows(0, options.yardstick))}")
    if options.yardstick is not None and not Path(options.yardstick).is_file():
        parser.error(f"the yardstick {options.yardstick} is not a file")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 where a row gave no figures."""
    options = parse(arguments)
    table = rows(options.warmup, options.yardstick)
    chosen = {name: row for name, row in table.items() if not options.rows or name in options.rows}
    turns = Turns(Bench(options.results, is_fresh=options.fresh), chosen, options)
    turns.run()
    result = summarise(turns, options)
    print(results.table(result, table))
    for failure in turns.failures:
        print(f"error: {failure}", file=sys.stderr)
    if options.write is not None:
        given = sys.argv[1:] if arguments is None else arguments
        said = [Path(word).name if Path(word).is_absolute() else word for word in given]  # no machine's paths
        results.write(options.write, result, table, shlex.join(["python", "benchmarks/q_learning.py", *said]))
    if options.json:
        print(json.dumps(result))
    return 1 if turns.failures else 0


if __name__ == "__main__":
    sys.exit(main())
