"""A loader under test, and how one of its files is spoiled: by what the file's name says of its content."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import mutations as m
import sealing

from pipeline import bundle


@dataclass(frozen=True)
class Target:
    """A loader.

    Attributes:
        name: For the test's id.
        make: Writes good files into an empty folder.
        spoil: Changes them; its third argument is a folder that nothing may touch.
        load: Reads them; may raise UserError only.
    """

    name: str
    make: Callable[[Path], None]
    spoil: Callable[[Random, Path, Path], None]
    load: Callable[[Path], None]


def spoil_one(random: Random, path: Path, outside: Path) -> None:
    """By what the file's name says of its content."""
    content, marker = path.read_bytes(), outside / "marker"
    by_suffix: dict[str, Callable[[], bytes]] = {
        ".json": lambda: m.mutate_json(random, content),
        ".jsonl": lambda: m.mutate_lines(random, content),
        ".safetensors": lambda: m.mutate_safetensors(random, content),
        ".parquet": lambda: m.mutate_parquet(random, content, marker),
        ".yaml": lambda: m.yaml_text(random, content.decode(), marker),
    }
    if path.name == bundle.SUMS_FILE:
        spoiled = sealing.mutate_sums(random, content)
    else:
        spoiled = by_suffix.get(path.suffix, lambda: m.mutate_bytes(random, content))()
    path.write_bytes(spoiled)


def spoiler(*patterns: str, seal: Callable[[Path], Sequence[Path]] = lambda folder: ()) -> Callable[..., None]:
    """Spoils one of the files that match, or the folder, and seals it again as an attacker would."""

    def spoil(random: Random, folder: Path, outside: Path) -> None:
        paths = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
        path = random.choice(paths)
        if random.random() < 0.12:
            m.mutate_folder(random, path.parent, outside, [path.name])
        else:
            spoil_one(random, path, outside)
        if path.name != bundle.SUMS_FILE and random.random() < 0.9:
            for sealed in seal(folder):
                sealing.reseal(sealed)

    return spoil
