"""What does each step of the design buy? Rungs of a ladder, pretrained and probed by the commands that users run.

A cell is a rung, a game and a seed. It is kept under the digest of its configuration in `--results`, so that a call
that was cut off goes on where it was. Labels are read of the five games that may be looked at, and of no other.

    python benchmarks/representation.py --data DIR [--rungs probe untrained] [--games pong] [--seeds 1] [--json]

DIR holds GAME-pretrain and GAME-probe (see benchmarks/ruler.py); for rungs named `small`, GAME-pretrain-84x84 and
GAME-probe-84x84, made with `--resolution 84x84`. `--write docs/results` writes the page of all that is
kept. Nothing else should run beside it: the time of a pretraining is limited, not its frames.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from atariari import ladder
from atariari.keeping import exit_code, kept, measured_once
from ruler import GAMES

from jobs.recipes import pretrain_recipe
from jobs.settings import to_dict
from pipeline.store import FramesDataset

VERSION = 1  # what was measured by another is measured again
KEPT = Path(__file__).resolve().parent.parent / "docs" / "results" / "representation"
# One update with a learning rate of nearly nothing: what the architecture knows before it has learned.
UNTRAINED = ("train.epochs=1", "train.frames_per_epoch=64", "train.lr=1e-12")
SMALL = "-84x84"  # what Q-learning sees


class Rung(NamedTuple):
    """A recipe of `latentrl pretrain`, what is changed in it, and how the folders of its frames end."""

    changes: tuple[str, ...] = ()
    recipe: str = "probe"
    suffix: str = ""


RUNGS = {
    "flat": Rung(("model.is_axial=false", "model.rarity=0")),
    "no-rarity": Rung(("model.rarity=0",)),
    "probe": Rung(),
    "untrained": Rung(UNTRAINED),
    "untrained-flat": Rung(("model.is_axial=false", *UNTRAINED)),
    "patch-10": Rung(("model.patch=10", "model.widths=[64]", "model.num_blocks=2")),
    "patch-3": Rung(("model.patch=3",)),
    "global-variance": Rung(("model.variance=global",)),
    "fast-encoder": Rung(("train.encoder_lr_scale=1",)),
    "small": Rung(recipe="axial", suffix=SMALL),
    "small-untrained": Rung(UNTRAINED, recipe="axial", suffix=SMALL),
    "small-grid": Rung(recipe="vae", suffix=SMALL),
}
SAID = ("bits_per_dim", "active_units", "z_dim", "images_per_s", "seconds")


@dataclass(frozen=True)
class Cell:
    """A rung for one game and seed.

    Attributes:
        rung: Its name.
        game: The benchmark's name.
        seed: Of weights, order of the frames and posterior draws; the probes' is 0.
        data: Folder of the datasets.
    """

    rung: str
    game: str
    seed: int
    data: Path

    @property
    def overrides(self) -> tuple[str, ...]:
        """What `--set` is given."""
        return (*RUNGS[self.rung].changes, f"train.seed={self.seed}")

    @property
    def record(self) -> dict[str, Any]:
        """All that the figures depend on but the code and the machine."""
        recipe = pretrain_recipe(RUNGS[self.rung].recipe, overrides=self.overrides)
        datasets = {part: FramesDataset.open(str(self.folder(part))).digest for part in ("pretrain", "probe")}
        record: dict[str, Any] = json.loads(json.dumps(to_dict(recipe)))
        return {"version": VERSION, "game": self.game, "datasets": datasets, "recipe": record}

    def folder(self, part: str) -> Path:
        """Of a dataset."""
        return self.data / f"{self.game}-{part}{RUNGS[self.rung].suffix}"

    @property
    def name(self) -> str:
        """Of the kept file."""
        digest = hashlib.sha256(json.dumps(self.record, sort_keys=True).encode()).hexdigest()[:12]
        return f"{self.rung}-{self.game}-{self.seed}-{digest}"


def measure(cell: Cell, home: Path) -> dict[str, Any]:
    """Pretrains and probes; `home` takes runs and bundles."""
    model = f"{cell.rung}-{cell.game}-{cell.seed}"
    sets = [argument for override in cell.overrides for argument in ("--set", override)]
    places = ["--home", str(home), "--json"]
    data = ["--data", str(cell.folder("pretrain"))]
    trained = _said("pretrain", RUNGS[cell.rung].recipe, *data, "--register", model, *sets, *places)
    probe = ["probe", f"models:/{model}@latest", "--data", str(cell.folder("probe")), *places]
    raw = _said(*probe)
    return {
        "rung": cell.rung,
        "game": cell.game,
        "seed": cell.seed,
        "overrides": list(cell.overrides),
        "pretraining": {key: trained[key] for key in SAID},
        "f1": raw["f1"],
        "f1_by_category": raw["f1_by_category"],
        "f1_by_variable": raw["f1_by_variable"],
    }


def run(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """The cell's record, measured unless it is kept."""
    return measured_once(options.results / f"{cell.name}.json", lambda: measure(cell, options.home), "wall_s")


def _said(*arguments: str) -> dict[str, Any]:
    """What a command of ours says in JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", *arguments], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"latentrl {' '.join(arguments)} ended with code {done.returncode}")
    said: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return said


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of GAME-pretrain and GAME-probe")
    parser.add_argument("--rungs", nargs="+", choices=list(RUNGS), default=["untrained", "probe"])
    parser.add_argument("--games", nargs="+", choices=GAMES, default=list(GAMES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--results", type=Path, default=KEPT, help="kept cells, a small JSON file each")
    parser.add_argument("--home", type=Path, default=Path("latentrl-runs/representation"), help="runs and bundles")
    parser.add_argument("--json", action="store_true", help="ends with one JSON object")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="page of all that is kept")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measures what is not kept yet, game by game, then writes the page of all that is."""
    options = parse(arguments)
    for seed in options.seeds:
        for game in options.games:
            for rung in options.rungs:
                found = run(Cell(rung, game, seed, options.data), options)
                print(f"{rung} {game} {seed}: F1 {found['f1']:.3f}", file=sys.stderr, flush=True)
    everything = kept(options.results)
    if options.write:
        ladder.write(options.write, everything)
    if options.json:
        print(json.dumps(ladder.summary(everything)))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
