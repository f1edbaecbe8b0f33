"""What do latents buy? Arms beside each other on pixel CartPole and Atari games, at equal agent steps and equal time.

A cell is an arm, a game and a seed, run in a process of its own and kept under the digest of its configuration in
`--results`: an interrupted experiment goes on, any part of it can be run alone, and a failed cell does not stop others.

    python benchmarks/atari.py [--arms NAME ...] [--games NAME ...] [--seeds N ...]      runs what has not been run
    python benchmarks/atari.py --cell ARM GAME SEED --json                               runs one, and prints it
    python benchmarks/atari.py --list | --summary --json | --write docs/results          runs nothing
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from atariari.keeping import exit_code
from curves.keep import Kept
from experiment import page, summary
from experiment.arms import ARMS, GAMES, Cell, cells

from pipeline.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
RESULTS, SHORT_RESULTS = ROOT / "docs" / "results" / "atari", ROOT / "latentrl-runs" / "atari-short"
LIMIT_S = 10_800.0  # of a cell, its encoder included


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", nargs=3, metavar=("ARM", "GAME", "SEED"), help="this cell alone")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS))
    parser.add_argument("--games", nargs="+", choices=list(GAMES))
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--short", action="store_true", help="toy sizes: proves that it runs, decides nothing")
    parser.add_argument("--results", type=Path, help="kept cells, a small JSON file each")
    parser.add_argument("--work", type=Path, default=Path("latentrl-runs/atari"), help="frames, encoders, run folders")
    parser.add_argument("--list", action="store_true", help="names the cells and whether they have been run")
    parser.add_argument("--summary", action="store_true", help="runs nothing: what has been run, and what it comes to")
    parser.add_argument("--json", action="store_true", help="ends with one JSON object: the cell, or the summary")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="runs nothing: tables and plots of what is kept")
    options = parser.parse_args(arguments)
    options.results = options.results or (SHORT_RESULTS if options.short else RESULTS)
    return options


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 where a cell failed.

    Raises:
        UserError: There is no such cell, or none of those asked for.
    """
    options = parse(arguments)
    kept = Kept(options.results, options.work, "experiment.runs", LIMIT_S)
    chosen = [_cell(options)] if options.cell else _wanted(options)
    if not chosen:
        raise UserError("no cell has all of these: arms, games and seeds; --list names the cells that there are")
    if options.list:
        for cell in chosen:
            print(f"{cell.game:10} {cell.arm:18} {cell.seed}  {'run' if summary.find(kept, cell) else 'to run'}")
        return 0
    is_reading = bool(options.summary or options.write)
    failed = [] if is_reading else [cell for cell in chosen if not kept.run(cell)]
    if options.cell and not is_reading:
        if options.json and not failed:
            print(json.dumps(summary.described(chosen[0], kept.find(chosen[0]) or {})))
        return int(bool(failed))
    runs = summary.gather(kept, is_short=options.short)
    if options.write:
        page.write(options.write, runs)
    if options.json:
        print(json.dumps(summary.figures(runs)))
    elif options.summary:
        print(page.tables(summary.figures(runs)))
    return int(bool(failed))


def _cell(options: argparse.Namespace) -> Cell:
    arm, game, seed = options.cell
    known = {(cell.arm, cell.game, str(cell.seed)): cell for cell in cells(is_short=options.short)}
    if (arm, game, seed) not in known:
        raise UserError(f"there is no cell {arm} {game} {seed}; --list names them all")
    return known[arm, game, seed]


def _wanted(options: argparse.Namespace) -> list[Cell]:
    wanted = {"arm": options.arms, "game": options.games, "seed": options.seeds}
    every = cells(is_short=options.short)
    return [cell for cell in every if all(not names or getattr(cell, key) in names for key, names in wanted.items())]


if __name__ == "__main__":
    sys.exit(exit_code(main))
