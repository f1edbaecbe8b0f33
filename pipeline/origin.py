"""What an encoder learned from, as its bundle says it: so that nobody measures it on the same games."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError
from pipeline.store import FramesDataset
from pipeline.untrusted import from_record, read_json

DATA_FILE = "data.json"


@dataclass(frozen=True)
class Origin:
    """The dataset of a pretraining.

    Attributes:
        digest: Its digest.
        game: ALE's id.
        protocol: Under which it was collected.
        frames: It holds.
        policy: That played.
        part: Of a benchmark's data, where it is one.
        emulator_seeds: Of all its emulators.
    """

    digest: str
    game: str
    protocol: str
    frames: int
    policy: str | None
    part: str | None
    emulator_seeds: tuple[int, ...]

    @classmethod
    def of(cls, dataset: FramesDataset) -> Origin:
        """What is recorded of a dataset."""
        facts = {name: dataset.facts()[name] for name in ("digest", "game", "protocol", "frames", "policy", "part")}
        return cls(**facts, emulator_seeds=tuple(sorted(set(dataset.episodes["seed"].to_pylist()))))


def load_origin(bundle: str | Path) -> Origin | None:
    """What the encoder of a bundle learned from; None where it does not say (older bundles, untrained ones).

    Raises:
        UserError: The record is damaged.
    """
    path = Path(bundle) / DATA_FILE
    what = f"the {DATA_FILE} of {bundle}"
    return from_record(Origin, read_json(path, what), what) if path.is_file() else None


def require_unseen(dataset: FramesDataset, origin: Origin | None) -> str | None:
    """Refuses a dataset that holds games which an encoder learned from.

    Two emulators of a game that start from one seed show the same frames until their players differ.

    Returns:
        A sentence where that cannot be known.

    Raises:
        UserError: The same dataset, or an emulator's seed in common.
    """
    if origin is None:
        return "The encoder's bundle does not say what it learned from: that it has seen these games is not excluded."
    if origin.digest == dataset.digest:
        raise UserError(f"the encoder learned from {dataset.uri} itself; collect another dataset with --part probe")
    common = set(origin.emulator_seeds) & set(dataset.episodes["seed"].to_pylist())
    if common and origin.game == dataset.preprocess.game:
        raise UserError(
            f"the encoder learned from games of {dataset.uri} ({len(common)} emulators' seeds in common); collect what "
            "encoders learn from with --part pretrain, and what they are probed on with --part probe"
        )
    return None
