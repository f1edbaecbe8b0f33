"""What may go from a home: checkpoints that nothing resumes, leftovers of killed processes, bundles fetched long ago.

Looking changes nothing. What goes is first set aside by a rename, in a run's folder under the run's own lock, so that a
run that starts meanwhile sees all of a thing or nothing of it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from jobs import kept_encoders
from jobs.settings import CONFIG_FILE, load_resolved
from jobs.workspace import BUNDLE_FOLDER, CHECKPOINT_FOLDER, CHECKPOINTS_FOLDER, POLICY_FOLDER, RESULT_FILE
from pipeline import bundle
from pipeline.errors import UserError
from pipeline.journal import num_undelivered
from pipeline.outbox import held
from pipeline.resolve import FETCH_PREFIX, locked_cache
from pipeline.tracking import RUN_FILE, RunRecord
from pipeline.untrusted import read_json, short
from pipeline.unused import Registry
from rllib_ext.checkpoint import find_checkpoint, leftovers

Kind = Literal["checkpoint", "leftover", "bundle"]

ASIDE_PREFIX = ".gc-"
REMOVED_FILE = "checkpoint.removed"  # in a run's folder: when its checkpoint was
AT_WORK = "a process is writing this run"
USED_JUST_NOW = "it was used within the last hour"
UNUSED_S = 3600.0  # since a bundle in the cache was used, or a download was written to
TEMPORARY_FILES = (
    *("run.json.tmp", "result.json.tmp", "metrics.jsonl.tmp", "start.json.tmp", "episodes.json.tmp"),
    "outbox.done.tmp",
)
RAY_TRAIN_FILES = re.compile(
    r"pretrain\.json(\.tmp)?|checkpoint_manager_snapshot\.json|\.validate_storage_marker"
    r"|step-\d{9}/((model|optimizer)\.safetensors|progress\.json|SHA256SUMS|\.metadata\.json)"
)
SHA256 = re.compile(r"\b[0-9a-f]{64}\b")


@dataclass(frozen=True)
class Item:
    """Something that may go: what it is, where, and why nothing needs it."""

    kind: Kind
    path: Path
    why: str


@dataclass(frozen=True)
class Kept:
    """Something of size that stays, and why."""

    path: Path
    why: str


@dataclass
class Findings:
    """What may go and what stays of a part of a home; after a removal, what went and what failed."""

    items: list[Item] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def __add__(self, other: Findings) -> Findings:
        """Both."""
        return Findings(self.items + other.items, self.kept + other.kept, self.errors + other.errors)

    def keep_all(self, why: str) -> Findings:
        """The same with nothing to remove."""
        return Findings([], [*self.kept, *(Kept(item.path, why) for item in self.items)], self.errors)


def removal_note(folder: Path) -> str:
    """For the message that a run cannot be resumed: that its checkpoint was removed, if so."""
    try:
        at = short(read_json(folder / REMOVED_FILE, REMOVED_FILE)["at"]).strip("'")
    except (UserError, KeyError):
        return ""
    return f" (that of {folder.name} was removed by `latentrl gc` at {at})"


def sweep_run(folder: Path, newest: Callable[[Path], bool], *, with_finished: bool, delete: bool) -> Findings:
    """Looks through a run's folder, and with `delete` removes what may go.

    Args:
        folder: Of a run.
        newest: Whether a folder is the newest run of its name, which is the one that `--resume` takes.
        with_finished: Also the checkpoint of a finished training that could still be made longer.
        delete: Remove.
    """
    try:
        findings = _examine_run(folder, newest, with_finished=with_finished)
    except FileNotFoundError:  # what was there a moment ago has been replaced
        return Findings(kept=[Kept(folder, AT_WORK)])
    if not findings.items:
        return findings
    try:
        with held(folder, may_create=delete) as is_mine:
            if not is_mine:
                return findings.keep_all(AT_WORK)
            if not delete:
                return findings
            findings = _examine_run(folder, newest, with_finished=with_finished)  # nobody writes it now
            aside = _set_aside(findings, folder)
    except OSError as error:
        return findings.keep_all(f"its folder cannot be locked ({error.strerror})")
    _discard(findings, aside)
    return findings


def _examine_run(folder: Path, newest: Callable[[Path], bool], *, with_finished: bool) -> Findings:
    try:
        stage = RunRecord.read(folder).stage
    except UserError as error:
        return Findings(kept=[Kept(folder, str(error))])
    findings = Findings()
    for path in _run_leftovers(folder):
        _judge(findings, Item("leftover", path, "a killed process left it"), lambda: _any_name)
    if stage == "train":
        _examine_training(findings, folder, newest, with_finished=with_finished)
    elif (path := folder / CHECKPOINTS_FOLDER).is_dir():
        _examine_pretraining(findings, folder, path)
    if findings.items and (pending := num_undelivered(folder)):
        return findings.keep_all(f"{pending} entries of the run are not delivered yet: latentrl sync {folder.name}")
    return findings


def _run_leftovers(folder: Path) -> Iterator[Path]:
    yield from sorted(folder.glob(f"{ASIDE_PREFIX}*"))
    yield from leftovers(folder / CHECKPOINT_FOLDER)
    for name in (BUNDLE_FOLDER, POLICY_FOLDER):
        yield from bundle.drafts(folder / name)
    yield from kept_encoders.leftovers(folder)
    yield from sorted((folder / "staged").glob("*"))
    yield from (folder / name for name in TEMPORARY_FILES if (folder / name).is_file())


def _examine_training(findings: Findings, folder: Path, newest: Callable[[Path], bool], *, with_finished: bool) -> None:
    path = find_checkpoint(folder / CHECKPOINT_FOLDER)
    if path is None:
        return
    if not _training_has_finished(folder):
        findings.kept.append(Kept(path, "the training has not finished: --resume goes on from it"))
    elif (is_newest := newest(folder)) and not with_finished:
        why = "the newest training of its name could be made longer by --resume: --finished takes this too"
        findings.kept.append(Kept(path, why))
    else:
        why = "the training has finished" + ("" if is_newest else ", and --resume takes a newer one of its name")
        _judge(findings, Item("checkpoint", path, why), lambda: bundle.listed_names(path).__contains__)


def _training_has_finished(folder: Path) -> bool:
    """Whether a training has made all the steps that it was last started for."""
    try:
        done = read_json(folder / RESULT_FILE, RESULT_FILE)["agent_steps"]
        return bool(done >= load_resolved(folder)["agent_steps"])
    except (UserError, KeyError, TypeError):
        return False


def _examine_pretraining(findings: Findings, folder: Path, path: Path) -> None:
    if (folder / RESULT_FILE).is_file():
        item = Item("checkpoint", path, "the pretraining has finished, and its encoder is kept as a bundle")
        _judge(findings, item, lambda: lambda name: RAY_TRAIN_FILES.fullmatch(name) is not None)
    else:
        findings.kept.append(Kept(path, "the pretraining has not finished: --resume goes on from it"))


def sweep_cache(cache: Path, used: set[str], registry: Registry | None, *, delete: bool) -> Findings:
    """Looks through the cache of bundles, and with `delete` removes what may go.

    Args:
        cache: Its folder.
        used: sha256 of the bundles that runs in this home use.
        registry: What can be fetched again and what an alias means; None when that is not known.
        delete: Remove.
    """
    findings = Findings()
    for path in _folders(cache, findings):
        if path.name.startswith((FETCH_PREFIX, ASIDE_PREFIX)):
            if is_unused(path):
                _judge(findings, Item("leftover", path, "a killed process left it"), lambda: _any_name)
        elif SHA256.fullmatch(path.name) and path.name not in used:
            _examine_bundle(findings, path, registry)
    if not (delete and findings.items):
        return findings
    with locked_cache(cache, alone=True):
        kept = [item for item in findings.items if not is_unused(item.path)]
        findings.items = [item for item in findings.items if item not in kept]
        findings.kept += [Kept(item.path, USED_JUST_NOW) for item in kept]
        aside = _set_aside(findings, cache)
    _discard(findings, aside)
    return findings


def _examine_bundle(findings: Findings, path: Path, registry: Registry | None) -> None:
    if registry is None:
        findings.kept.append(Kept(path, "the tracking server did not say whether an alias means it"))
    elif path.name in registry.aliased:
        findings.kept.append(Kept(path, "an alias means it"))
    elif path.name not in registry.addresses:
        findings.kept.append(Kept(path, "no registered version has it: this may be the last copy"))
    elif not is_unused(path):
        findings.kept.append(Kept(path, USED_JUST_NOW))
    else:
        why = f"no run here uses it and no alias means it; it can be fetched again as {registry.addresses[path.name]}"
        _judge(findings, Item("bundle", path, why), lambda: bundle.listed_names(path).__contains__)


def is_unused(path: Path) -> bool:
    """Whether nothing in a folder of the cache has been written for a while, nor the folder marked as in use."""
    try:
        times = [path.lstat().st_mtime, *(inside.lstat().st_mtime for inside in path.rglob("*"))]
    except FileNotFoundError:  # its process is at work
        return False
    return time.time() - max(times) > UNUSED_S


def run_folders(runs: Path, findings: Findings) -> list[Path]:
    """The folders of runs; what else lies beside them is somebody else's."""
    return [folder for folder in _folders(runs, findings) if (folder / RUN_FILE).is_file()]


def used_bundles(folders: Iterable[Path]) -> set[str]:
    """sha256 of the bundles that runs say they use.

    Raises:
        UserError: A run's settings cannot be read.
    """
    used = set[str]()
    for folder in folders:
        path = folder / CONFIG_FILE
        try:
            used |= set(SHA256.findall(path.read_text(errors="replace"))) if path.is_file() else set()
        except OSError as error:
            raise UserError(f"cannot read {path} ({error.strerror}), so what its run needs is not known") from None
    return used


def used_just_now(cache: Path) -> set[str]:
    """sha256 of the bundles that some process may be about to start a run with."""
    return {path.name for path in cache.glob("*") if SHA256.fullmatch(path.name) and not is_unused(path)}


def bytes_on_disk(paths: Iterable[Path]) -> list[int]:
    """What the removal of each frees: a file with other names elsewhere frees nothing, one with several here once."""
    names_seen = Counter[tuple[int, int]]()
    return [sum(_freed(file, names_seen) for file in _files(path)) for path in paths]


def _freed(file: Path, names_seen: Counter[tuple[int, int]]) -> int:
    try:
        status = file.lstat()
    except FileNotFoundError:  # a run at work has replaced it since
        return 0
    identity = (status.st_dev, status.st_ino)
    names_seen[identity] += 1
    return 512 * status.st_blocks if names_seen[identity] == status.st_nlink else 0


def _files(path: Path) -> Iterator[Path]:
    """The files in a folder, or the file itself; of links the links."""
    if path.is_symlink() or not path.is_dir():
        yield path
        return
    for root, folders, names in os.walk(path):
        yield from (Path(root, name) for name in names)
        yield from (link for name in folders if (link := Path(root, name)).is_symlink())


def _folders(parent: Path, findings: Findings) -> list[Path]:
    """The folders in one of the home's own, none by way of a link."""
    if parent.is_symlink():
        findings.kept.append(Kept(parent, "it is a link, and what it leads to may be others'"))
        return []
    return sorted(path for path in parent.glob("*") if path.is_dir() and not path.is_symlink())


def _judge(findings: Findings, item: Item, known_names: Callable[[], Callable[[str], bool]]) -> None:
    """Takes a thing to the items, unless something lies in it that is not its own."""
    try:
        strange = _strange(item.path, known_names())
    except UserError as error:
        strange = str(error)
    if strange is None:
        findings.items.append(item)
    else:
        findings.kept.append(Kept(item.path, f"what lies in it is not all its own: {strange}"))


def _strange(path: Path, is_known: Callable[[str], bool]) -> str | None:
    """The first name in a folder that is a link or is not known there."""
    names = ((file.relative_to(path).as_posix(), file.is_symlink()) for file in _files(path))
    return next((name for name, is_link in names if is_link or not is_known(name)), None)


def _any_name(name: str) -> bool:
    return True


def _set_aside(findings: Findings, parent: Path) -> Path | None:
    """Renames what goes into one new folder; what cannot be renamed becomes an error."""
    try:
        aside = Path(tempfile.mkdtemp(prefix=ASIDE_PREFIX, dir=parent))
    except OSError as error:
        findings.errors.append(f"{parent} cannot be written ({error.strerror}): nothing of it was removed")
        findings.items = []
        return None
    gone = []
    for number, item in enumerate(findings.items):
        try:
            if item.kind == "checkpoint":
                (parent / REMOVED_FILE).write_text(json.dumps({"at": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"}))
            item.path.rename(aside / f"{number}-{item.path.name}")
            gone.append(item)
        except OSError as error:
            findings.errors.append(f"{item.path} cannot be removed ({error.strerror})")
    findings.items = gone
    return aside


def _discard(findings: Findings, aside: Path | None) -> None:
    """Removes what was set aside; another gc may be at the same."""

    def note(call: Any, path: str, info: Any) -> None:
        if not isinstance(info[1], FileNotFoundError):
            findings.errors.append(f"{path} cannot be removed ({info[1]})")

    if aside is not None:
        shutil.rmtree(aside, onerror=note)
