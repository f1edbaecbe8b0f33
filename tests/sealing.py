"""Sums and manifests as an attacker would write them, who can count too."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from random import Random

from mutations import TRAVERSALS, WORDS, mutate_bytes

from pipeline import bundle


def reseal(folder: Path) -> None:
    """SHA256SUMS as an attacker would write it, who can count too."""
    lines = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name != bundle.SUMS_FILE and path.is_file() and not str(path.resolve()).startswith(("/dev", "/proc")):
            lines.append(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {name}\n")
    (folder / bundle.SUMS_FILE).write_text("".join(lines), errors="surrogateescape")


def mutate_sums(random: Random, content: bytes) -> bytes:
    """SHA256SUMS with other lines."""
    lines = content.decode().splitlines()
    extra = f"{'0' * 64}  {random.choice((*TRAVERSALS, *WORDS))}"
    return random.choice(
        (
            mutate_bytes(random, content),
            "\n".join([*lines, extra]).encode("utf-8", "surrogatepass"),
            "\n".join(line.upper() for line in lines).encode(),
            "\n".join([*lines, lines[0]]).encode(),
            b"\n" * 100_000,
            base64.b64encode(content),
        )
    )


def sha256(path: Path) -> str:
    """Of a plain file; an error for anything else, which could be read for ever."""
    if path.is_symlink() or not path.is_file():
        raise OSError("not a plain file")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def reseal_dataset(root: Path) -> None:
    """The manifest of a dataset with the sizes and hashes of what is there, where it can still be read."""
    path = root / "meta/manifest.json"
    if path.is_symlink() or not path.is_file():  # a pipe would be read for ever
        return
    try:
        manifest = json.loads(path.read_text())
        for file in manifest["files"]:
            found = root / file["name"]
            file |= {"bytes": found.stat().st_size, "sha256": sha256(found)}
        sums = "".join(f"{file['name']} {file['sha256']}\n" for file in manifest["files"])
        manifest["digest"] = hashlib.sha256(sums.encode(errors="replace")).hexdigest()
        manifest["episodes_sha256"] = sha256(root / "meta/episodes.parquet")
    except (ValueError, KeyError, TypeError, OSError, RecursionError):
        return
    path.write_text(json.dumps(manifest))
