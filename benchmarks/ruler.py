"""Does the ruler measure what AtariARI measured? Published rows measured again, beside the published figures.

Every cell (row, game, seed) is kept under the digest of its configuration in `--results`; long trainings go on where
they were cut off. Labels are read of the five games that may be looked at, and of no other.

    python benchmarks/ruler.py --data DIR [--rows majority ...] [--games pong ...] [--json] [--write docs/results]

DIR holds GAME-probe and, for rows that learn, GAME-pretrain, made by
`latentrl collect --protocol atariari --part probe --with-ram --resolution 210x160 --frames 50000 ...`
(`--part pretrain`, 100000). An encoder of our own is a row too: `--rows models/pong-bundle`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from atariari import page
from atariari.keeping import exit_code, kept, measured_once
from atariari.rows import STANDARDISED, Cell, measure

from pipeline import bundle
from pipeline.store import FramesDataset

GAMES = ("pong", "breakout", "boxing", "spaceinvaders", "tennis")
ROWS = ("majority", "random", "pixels", "pca", "vae", "supervised")
LEARNS = ("pca", "vae")
ROWS_HELP = f"{', '.join(ROWS)}, or bundles; {STANDARDISED} behind one scales its features"
KEPT = Path(__file__).resolve().parent.parent / "docs" / "results" / "ruler"


def run(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """The cell's record, measured unless it is kept."""
    path = options.results / f"{Path(cell.row).name}-{cell.game}-{cell.seed}-{cell.digest}.json"

    def measured() -> dict[str, Any]:
        probe = FramesDataset.open(str(options.data / f"{cell.game}-probe"))
        pretrain = FramesDataset.open(str(options.data / f"{cell.game}-pretrain")) if _learns(cell.row) else None
        found = {"row": Path(cell.row).name, "game": cell.game, "seed": cell.seed}
        found |= {"datasets": {"probe": cell.probe, "pretrain": cell.pretrain}, "torch": torch.__version__}
        return found | measure(cell, probe, pretrain, options.work)

    return measured_once(path, measured, "seconds")


def cells(options: argparse.Namespace) -> list[Cell]:
    """Those asked for."""
    found = []
    for game in options.games:
        probe = FramesDataset.open(str(options.data / f"{game}-probe")).digest
        for row in options.rows:
            found += [Cell(row, game, probe, _made_of(row, game, options), seed) for seed in range(options.seeds)]
    return found


def _learns(row: str) -> bool:
    return row.removesuffix(STANDARDISED) in LEARNS


def _made_of(row: str, game: str, options: argparse.Namespace) -> str:
    """Hash of what a row is made of besides the probed frames: what it learns from, or the bundle that it is."""
    if _learns(row):
        return FramesDataset.open(str(options.data / f"{game}-pretrain")).digest
    name = row.removesuffix(STANDARDISED)
    return "" if name in ROWS else bundle.verify(Path(name))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of GAME-probe and GAME-pretrain")
    parser.add_argument("--rows", nargs="+", default=["majority", "random"], help=ROWS_HELP)
    parser.add_argument("--games", nargs="+", choices=GAMES, default=["pong", "breakout", "boxing"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--results", type=Path, default=KEPT, help="kept cells, a small JSON file each")
    parser.add_argument("--work", type=Path, default=Path("latentrl-runs/ruler"), help="states of long trainings")
    parser.add_argument("--json", action="store_true", help="ends with one JSON object")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="page of all that is kept")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measures what is not kept yet, then writes the page of all that is."""
    options = parse(arguments)
    for cell in cells(options):
        found = run(cell, options)
        print(f"{found['row']} {found['game']} {found['seed']}: F1 {found['f1']:.3f}", file=sys.stderr, flush=True)
    everything = kept(options.results)
    if options.write:
        page.write(options.write, everything)
    if options.json:
        print(json.dumps(page.summary(everything)))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
