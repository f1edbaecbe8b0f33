"""Does it learn as well as it runs? Returns by agent steps and by seconds: arms beside each other, several seeds.

Every run is kept under the digest of its configuration in `--results`, so that an interrupted experiment goes on and
any part of it can be run alone; the page and its plots are made of whatever is there.

    python benchmarks/learning.py [--task NAME ...] [--arm NAME ...] [--seed N ...] [--json] [--write docs/results]
    python benchmarks/learning.py --list
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from curves import page
from curves.arms import TASKS, Cell
from curves.keep import Kept

KEPT = Path(__file__).resolve().parent.parent / "docs" / "results" / "learning"


def cells(options: argparse.Namespace) -> list[Cell]:
    """Those chosen: seeds outside, so that every arm has its first run before any has its second."""
    chosen = [
        Cell.of(task, arm, seed)
        for seed in range(max(task.seeds for task in TASKS.values()))
        for task in TASKS
        for arm in TASKS[task].arms
        if seed < TASKS[task].seeds
    ]
    wanted = {"task": options.task, "arm": options.arm, "seed": options.seed}
    return [cell for cell in chosen if all(not names or getattr(cell, key) in names for key, names in wanted.items())]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=list(TASKS))
    parser.add_argument("--arm", nargs="+", help="see --list")
    parser.add_argument("--seed", nargs="+", type=int)
    parser.add_argument("--results", type=Path, default=KEPT, help="kept runs, a small JSON file each")
    parser.add_argument("--work", type=Path, default=Path("latentrl-runs/learning"), help="encoders and run folders")
    parser.add_argument("--list", action="store_true", help="names the cells and whether they have been run")
    parser.add_argument("--json", action="store_true", help="ends with one JSON object: the summary by task and arm")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="page and plots of all that has been run")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 where a cell failed."""
    options = parse(arguments)
    kept, chosen = Kept(options.results, options.work), cells(options)
    if options.list:
        for cell in chosen:
            print(f"{cell.task:17} {cell.arm:18} {cell.seed}  {'run' if kept.find(cell) else 'to run'}")
        return 0
    failed = [cell for cell in chosen if not kept.run(cell)]
    everything = page.gather(kept)
    if options.write:
        page.write(options.write, everything)
    if options.json:
        print(json.dumps(page.summary(everything)))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
