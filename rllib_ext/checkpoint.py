"""A run's checkpoint folder: sealed by SHA256SUMS, marked with the run, replaced as a whole; no pickle in it.

state.json, state.safetensors   learner (weights, target, optimizers), counters, random states
replay/                         one .npy file a column
run                             the id of the run that wrote it
SHA256SUMS                      one line a file
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from pipeline import bundle
from pipeline.errors import UserError
from pipeline.untrusted import read_bytes, short

_RUN = "run"


def write_checkpoint(path: Path, run_id: str, write: Callable[[Path, Path | None], None]) -> None:
    """Replaces the checkpoint at `path` by a new one.

    Args:
        path: Its folder.
        run_id: Marks whose it is.
        write: Fills the empty folder that it is given; it may link files of the earlier checkpoint, if there is one.
    """
    fresh, old = _beside(path)
    _tidy(path)
    earlier = find_checkpoint(path)
    with bundle.writing(fresh, earlier) as draft:
        write(draft, earlier)
        (draft / _RUN).write_text(run_id)
    if path.exists():
        path.rename(old)
    fresh.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def find_checkpoint(path: Path) -> Path | None:
    """The checkpoint at `path`, also where a run was killed between two renames; None if there is none."""
    return next((folder for folder in (path, *_beside(path)) if (folder / bundle.SUMS_FILE).is_file()), None)


def leftovers(path: Path) -> list[Path]:
    """What killed writers left beside the checkpoint at `path`: all that the next one removes."""
    found = find_checkpoint(path)
    folders = [folder for folder in _beside(path) if folder != found and folder.is_dir()]
    return [*folders, *bundle.drafts(_beside(path)[0])]


def verify_checkpoint(path: Path, run_id: str) -> None:
    """Refuses a checkpoint that another run wrote, whose bytes have changed, or with a file that none of ours has.

    Whoever can write the folder can also write the run's id and the sums. What is read afterwards is therefore numbers
    only, each checked: no checkpoint, whoever made it, makes `restore_from_path` run code.

    Raises:
        UserError: Names the file, or both runs.
    """
    bundle.verify(path)
    if not (path / _RUN).is_file():
        raise UserError(f"{path} is a bundle, but no run's checkpoint; name the folder that save_to_path wrote")
    strange = sorted(file.name for file in path.rglob("*") if file.is_file() and not _is_ours(file))
    if strange:
        raise UserError(f"the checkpoint {path} holds {strange[0]}, which no run of latentrl writes; it is not read")
    writer = read_bytes(path / _RUN, f"{_RUN} of the checkpoint {path}", 1000).decode(errors="replace")
    if writer != run_id:
        raise UserError(
            f"the checkpoint {path} was written by run {short(writer)}, not by {run_id!r}; a run resumes only its own"
        )


def _is_ours(file: Path) -> bool:
    """RLlib's own checkpoints, and Tune's, keep state in pickles, which their loaders would open if they lay here."""
    return file.suffix in ("", ".json", ".safetensors", ".npy") and not file.name.startswith(".")


def _beside(path: Path) -> tuple[Path, Path]:
    """Where the next checkpoint waits to replace the one at `path`, and where that one goes meanwhile."""
    return path.with_name(f"{path.name}.new"), path.with_name(f"{path.name}.old")


def _tidy(path: Path) -> None:
    """Puts a checkpoint into place that a killed run left between two renames, and removes what else it left."""
    found = find_checkpoint(path)
    if found is not None and not path.exists():
        found.rename(path)
    fresh, old = _beside(path)
    bundle.discard_drafts(fresh)
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
