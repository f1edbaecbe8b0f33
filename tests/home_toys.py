"""Homes as some history may have left them: run folders, checkpoints, leftovers, cached bundles, files of others."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs import garbage
from pipeline import bundle
from pipeline.tracking import RunRecord
from rllib_ext.checkpoint import write_checkpoint

LONG_AGO = time.time() - 10 * garbage.UNUSED_S
URI = "sqlite:////nowhere/mlflow.db"


@dataclass
class Registry:
    """What the registry would say."""

    addresses: dict[str, str] = field(default_factory=dict)
    aliased: set[str] = field(default_factory=set)


def snapshot(root: Path) -> dict[str, tuple[Any, ...]]:
    """Every name below a folder with its content and times."""
    seen: dict[str, tuple[Any, ...]] = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        if path.is_symlink():
            content: Any = os.readlink(path)
        else:
            content = path.read_bytes() if path.is_file() else None
        seen[path.relative_to(root).as_posix()] = (content, status.st_mtime_ns, status.st_mode, status.st_nlink)
    return seen


def seal(path: Path, files: dict[str, bytes]) -> None:
    with bundle.writing(path) as draft:
        for name, content in files.items():
            (draft / name).parent.mkdir(exist_ok=True)
            (draft / name).write_bytes(content)


def checkpoint(path: Path, content: str) -> None:
    """A checkpoint as a run writes it, the replay's segments linked from the earlier one."""

    def write(draft: Path, earlier: Path | None) -> None:
        (draft / "replay").mkdir()
        (draft / "state.json").write_text(content)
        segment = draft / "replay" / "obs-00000.npy"
        if earlier is not None:
            os.link(earlier / "replay" / segment.name, segment)
        else:
            segment.write_bytes(bytes(5000))

    write_checkpoint(path, "run", write)


@dataclass(frozen=True)
class RunState:
    """A run's folder as some history may have left it.

    Attributes:
        stage, name: Of the run.
        progress: "under way", "finished", or "made longer": a training that had finished and was started for more.
        checkpoints: What lies there of a training's.
        leftovers: Of killed processes.
        is_locked: A process writes it.
        is_pending: Its journal is not delivered.
        foreign: A folder in it where somebody has put something, and what: a file, or a link out of the home.
        uses: Number of the bundle that it uses; 0 for none.
    """

    stage: str = "train"
    name: str = "train-pong"
    progress: str = "finished"
    checkpoints: tuple[str, ...] = ("checkpoint",)
    leftovers: tuple[str, ...] = ()
    is_locked: bool = False
    is_pending: bool = False
    foreign: tuple[str, str] | None = None
    uses: int = 0

    @property
    def is_resumable(self) -> bool:
        """Whether the run has not done all that it was started for."""
        return self.progress == "under way" or (self.progress == "made longer" and self.stage == "train")

    def make(self, runs: Path) -> Path:
        number = 1 + sum(1 for path in runs.glob(f"{self.name}-*"))
        folder = runs / f"{self.name}-{number:03d}"
        folder.mkdir(parents=True)
        RunRecord("0" * 32, "1", URI, folder.name, self.stage, 0).write(folder)
        sha256 = f"  encoder_sha256: {cached(self.uses)}\n" if self.uses else ""
        (folder / "config.yaml").write_text(
            f"run:\n  agent_steps: {200 if self.progress == 'made longer' else 100}\n{sha256}"
        )
        if self.progress != "under way":
            (folder / "result.json").write_text(json.dumps({"agent_steps": 104}))
        seal(folder / ("bundle" if self.stage == "pretrain" else "policy"), {"q.safetensors": b"weights"})
        if self.stage == "train":
            seal(folder / "encoders" / "agent-steps-000020000", {"model.safetensors": b"weights"})
        self._checkpoints(folder)
        for name in self.leftovers:
            path = folder / name if name.endswith(".tmp") else folder / name / "half"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"written")
        lines = "".join(json.dumps({"seq": n, "time_ms": 0, "kind": "tag", "body": {}}) + "\n" for n in (1, 2))
        (folder / "outbox.jsonl").write_text(lines)
        delivered = len(lines) // 2 if self.is_pending else len(lines)
        (folder / "outbox.done").write_text(json.dumps({"seq": 1, "offset": delivered}))
        if self.foreign:
            path = folder / self.foreign[0] / self.foreign[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(runs.parent.parent / "outside") if path.name == "link" else path.write_text("mine")
        return folder

    def _checkpoints(self, folder: Path) -> None:
        if self.stage == "pretrain":
            for epoch in ("epoch-00001", "epoch-00002"):
                (folder / "checkpoints" / epoch).mkdir(parents=True)
                (folder / "checkpoints" / epoch / "model.safetensors").write_bytes(b"model")
            (folder / "checkpoints" / "pretrain.json").write_text("{}")
        elif self.stage == "train" and self.checkpoints:
            checkpoint(folder / "checkpoint", "earlier")
            shutil.copytree(folder / "checkpoint", folder / "kept", copy_function=os.link)
            checkpoint(folder / "checkpoint", "later")
            if "checkpoint.old" in self.checkpoints:
                (folder / "kept").rename(folder / "checkpoint.old")
            else:
                shutil.rmtree(folder / "kept")
            if "checkpoint" not in self.checkpoints:
                (folder / "checkpoint").rename(folder / "checkpoint.new")


def cached(number: int) -> str:
    return f"{number:064x}"


@dataclass(frozen=True)
class BundleState:
    """A bundle in the cache."""

    number: int
    is_recent: bool
    can_be_fetched: bool
    is_aliased: bool
    foreign: bool

    def make(self, cache: Path) -> Path:
        path = cache / cached(self.number)
        seal(path, {"model.safetensors": b"model"})
        if self.foreign:
            (path / "thesis.tex").write_text("mine")
        for inside in (*path.rglob("*"), path):
            os.utime(inside, None if self.is_recent else (LONG_AGO, LONG_AGO))
        return path
