"""What a probe of an encoder has found, as a record: in a file, in MLflow, and beside the published figures."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import atariari
from pipeline.disk import write_text
from pipeline.tracking import tagged
from pipeline.untrusted import from_record, read_json, short

PROBE_FOLDER = "probe"  # in the encoder's folder, and among its run's artifacts
PROTOCOL = "atariari"  # of the frames, and of those that the published encoders learned from
AS_THEY_ARE = "posterior mean"  # the features that the protocol asks for
SHOWN_METHODS = ("random-cnn", "vae", "st-dim", "supervised")


@dataclass(frozen=True)
class Probed:
    """A probe's figures.

    Attributes:
        game: ALE's id.
        resolution: Of the frames, "210x160"; published figures are of that one.
        features: What was probed; `AS_THEY_ARE`, or the same standardised.
        digest: Of the dataset.
        seed: Of the probes.
        f1, f1_by_category, f1_by_variable: Weighted F1 on the test part.
        accuracy: As `f1` is of F1.
        test_frames: So many.
        velocity_r2: Of the ball, from stacked latents; None where it was not measured.
    """

    game: str
    resolution: str
    features: str
    digest: str
    seed: int
    f1: float
    f1_by_category: Mapping[str, float]
    f1_by_variable: Mapping[str, float]
    accuracy: float
    test_frames: int
    velocity_r2: Mapping[str, float] | None = None

    @classmethod
    def of(cls, result: Mapping[str, Any], what: str = "the result of a probe") -> Probed:
        """The figures in what `latentrl probe --json` prints.

        Raises:
            UserError: They are not all there, or no numbers, or of no game that is known.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        probed = from_record(
            cls, {name: result[name] for name in names if name in result}, what, may_lack="velocity_r2"
        )
        atariari.variables(probed.game)
        return probed

    @classmethod
    def read_all(cls, folder: Path) -> list[Probed]:
        """The figures of all files in a folder, the oldest first; errors as above."""
        files = sorted(folder.glob("*.json"), key=lambda path: (path.stat().st_mtime_ns, path.name))
        return [cls.of(read_json(path, str(path)), f"the probe's record {short(path.name)}") for path in files]

    @property
    def is_standardised(self) -> bool:
        """Whether other features than the protocol's were probed."""
        return self.features != AS_THEY_ARE

    @property
    def file_name(self) -> str:
        """Of its record: what was probed, on which data, with which seed."""
        return f"{'standardised' if self.is_standardised else 'posterior-mean'}-{self.digest[:12]}-{self.seed}.json"

    def published(self, variable: str = "") -> dict[str, float]:
        """The published F1 of a variable, or of the game, by method, as far as there are such."""
        row = atariari.published(self.game).get(variable, {})
        return {method: f1 for method in SHOWN_METHODS if (f1 := row.get(method)) is not None}

    def metrics(self) -> dict[str, float]:
        """The figures as MLflow's metrics."""
        at = "probe_standardised" if self.is_standardised else "probe"
        by_variable = {f"{at}/f1.{name}": f1 for name, f1 in self.f1_by_variable.items()}
        moving = {f"{at}/velocity_r2.{name}": r2 for name, r2 in (self.velocity_r2 or {}).items()}
        return {f"{at}/f1": self.f1, f"{at}/accuracy": self.accuracy, **by_variable, **moving}

    def tags(self) -> dict[str, str]:
        """What an encoder's run and versions are tagged with; nothing where other features were probed."""
        if self.is_standardised:
            return {}
        facts = {"f1": round(self.f1, 4), "resolution": self.resolution, "digest": self.digest, "seed": self.seed}
        return tagged("probe", facts)


def learned_elsewhere(protocol: str) -> str | None:
    """What to read beside published figures where an encoder learned under another protocol; None under the same."""
    if protocol == PROTOCOL:
        return None
    return (
        f"The encoder learned under protocol {protocol}; the published ones learned from a random agent's games under "
        f"{PROTOCOL}."
    )


def write_probe(folder: Path, result: Mapping[str, Any]) -> Path:
    """Writes a probe's whole result into a folder, over an earlier one of the same features, data and seed."""
    path = folder / PROBE_FOLDER / Probed.of(result).file_name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(result, indent=1) + "\n")
    return path


def latest(probes: list[Probed], *, is_standardised: bool) -> Probed | None:
    """The last one of a kind."""
    return next((probed for probed in reversed(probes) if probed.is_standardised == is_standardised), None)
