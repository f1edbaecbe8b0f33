"""The claims made for VAEs, as checks: measures what is not yet measured, and writes what it all comes to.

Every cell is kept under the digest of its configuration in `--results`: an interrupted run goes on where it was.

    PYTHONPATH=benchmarks python -m claims [--claim NAME ...] [--seed N ...] [--short] [--list] [--write FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from atariari.keeping import exit_code

from claims import bits, bounds, factors, montezuma, page, worlds
from claims.cells import Cell, Kept, Scope
from pipeline.machine import cores

CLAIMS = {
    "bounds": bounds.CLAIM,
    "bits": bits.CLAIM,
    "sprites": worlds.CLAIM,
    "shapes": factors.CLAIM,
    "montezuma": montezuma.CLAIM,
}
ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results" / "claims"
SHORT_RESULTS = ROOT / "latentrl-runs" / "claims-short"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="claims", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--claim", nargs="+", choices=list(CLAIMS), default=list(CLAIMS))
    parser.add_argument("--arm", nargs="+", help="see --list")
    parser.add_argument("--seed", nargs="+", type=int)
    parser.add_argument("--short", action="store_true", help="toy sizes: proves that it runs, decides nothing")
    parser.add_argument(
        "--montezuma-recipe", metavar="NAME", default="probe", help="of `latentrl pretrain`, for Montezuma's Revenge"
    )
    parser.add_argument("--results", type=Path, help="kept cells, a small JSON file each")
    parser.add_argument("--list", action="store_true", help="names the cells and whether they have been measured")
    parser.add_argument("--json", action="store_true", help="ends with the verdict as one JSON object")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="claims.md and claims.json of all that is kept")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 where something that is claimed does not hold; toy sizes decide nothing."""
    options = parse(arguments)
    scope = Scope(options.short, options.montezuma_recipe)
    kept = Kept(options.results or (SHORT_RESULTS if options.short else RESULTS))
    chosen = [(CLAIMS[name], cell) for name in options.claim for cell in CLAIMS[name].cells(scope)]
    chosen = [(claim, cell) for claim, cell in chosen if _is_wanted(cell, options)]
    if options.list:
        for _, cell in chosen:
            print(f"{cell.claim:10} {cell.arm:14} {cell.seed}  {'kept' if kept.find(cell) else 'to measure'}")
        return 0
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", cores())))
    for claim, cell in chosen:
        kept.measure(cell, claim.measure)
    told = page.verdict({name: CLAIMS[name] for name in options.claim}, kept, scope)
    if options.write:
        page.write(options.write, page.verdict(CLAIMS, kept, scope))
    if options.json:
        print(json.dumps(told))
    else:
        _print(told)
    fails = any(row["is_met"] is False for claim in told["claims"].values() for row in claim["judged"])
    return int(fails and not options.short)


def _is_wanted(cell: Cell, options: argparse.Namespace) -> bool:
    return all(not wanted or value in wanted for wanted, value in ((options.arm, cell.arm), (options.seed, cell.seed)))


def _print(told: dict[str, dict]) -> None:
    for claim in told["claims"].values():
        print(claim["title"])
        for row in claim["judged"]:
            mark = {None: " ", True: "+", False: "-"}[row["is_met"]]
            bar = f" ({row['bar']})" if row["bar"] else ""
            print(f" {mark} {row['what']}: {row['figure']}{bar}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
