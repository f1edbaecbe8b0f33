"""Which run folders of this home belong together, for the page of a run, which needs their files.

What was made from what, whoever made it and wherever, is the tracking server's to say: see pipeline/lineage.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

from jobs.settings import read_yaml
from jobs.workspace import BUNDLE_FOLDER, POLICY_FOLDER, RESULT_FILE, Workspace
from pipeline import bundle
from pipeline.errors import UserError
from pipeline.tracking import RunRecord
from pipeline.untrusted import parse_object, read_bytes, read_json

RANDOM_PREFIX = "random:"
_MOST_METRICS_BYTES = 2**30


@dataclass(frozen=True)
class RunFolder:
    """One run as it lies on disk.

    Attributes:
        path: The folder.
        record: Its MLflow ids, stage and start.
    """

    path: Path
    record: RunRecord

    @classmethod
    def read(cls, path: Path) -> RunFolder:
        """Reads a run's folder.

        Raises:
            UserError: Not a run's folder.
        """
        return cls(path, RunRecord.read(path))

    @property
    def name(self) -> str:
        """The folder's name, for instance train-001."""
        return self.path.name

    @cached_property
    def result(self) -> dict[str, Any]:
        """What the stage gave at its end; empty when it has not ended."""
        path = self.path / RESULT_FILE
        return read_json(path, str(path)) if path.is_file() else {}

    def yaml(self, name: str) -> dict[str, Any]:
        """A YAML file of the run; empty when there is none."""
        path = self.path / name
        return read_yaml(path, str(path)) if path.is_file() else {}

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a last line that a killed run left unfinished is dropped."""
        path = self.path / "metrics.jsonl"
        lines = read_bytes(path, str(path), _MOST_METRICS_BYTES).split(b"\n")[:-1] if path.is_file() else []
        return [parse_object(line, f"a line of {path}") for line in lines if line.strip()]

    def bundle_sha256(self, folder: str) -> str | None:
        """Hash of a bundle inside of the run, or None when it has none."""
        return _sha256_of(self.path / folder)


@dataclass(frozen=True)
class Relatives:
    """The runs that a page shows together; any may be absent.

    Attributes:
        train: Made the policy.
        evaluation: Whole games by that policy.
        random: Whole games by the random agent, on the same game under the same protocol.
        pretrain: Made the encoder.
        policy: The policy's bundle.
    """

    train: RunFolder | None = None
    evaluation: RunFolder | None = None
    random: RunFolder | None = None
    pretrain: RunFolder | None = None
    policy: Path | None = None

    @property
    def policy_config(self) -> dict[str, Any]:
        """The policy's config.json; empty without a policy."""
        return read_json(self.policy / "config.json", f"config.json of {self.policy}") if self.policy else {}

    @property
    def preprocess(self) -> dict[str, Any]:
        """The record of how frames are made, of the policy or else of the encoder; empty without either."""
        holders = [self.policy, self.pretrain.path / BUNDLE_FOLDER if self.pretrain else None]
        files = [holder / "preprocess.json" for holder in holders if holder]
        return next((read_json(file, str(file)) for file in files if file.is_file()), {})


def points(metrics: Iterable[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of the lines that hold a finite number under `key`."""
    found = [(line.get("step"), line.get(key)) for line in metrics]
    return [(step, value) for step, value in found if _is_number(step) and _is_number(value)]


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and abs(value) < 1e300


def _sha256_of(path: Path) -> str | None:
    return bundle.sha256_of(path) if (path / bundle.SUMS_FILE).is_file() else None


def find_relatives(run: RunFolder, workspace: Workspace) -> Relatives:
    """Finds what belongs to a train, evaluate or pretrain run among all run folders, by the hashes of bundles.

    Args:
        run: Where to start.
        workspace: Where the other runs are, and the bundles that came from the registry.

    Raises:
        UserError: The run is of another stage.
    """
    others = list(newest_first(workspace.runs))
    if run.record.stage == "pretrain":
        return Relatives(pretrain=run)
    if run.record.stage == "train":
        return _of_train(run, others)
    if run.record.stage == "evaluate":
        return _of_evaluation(run, others, workspace.cache)
    raise UserError(
        f"{run.name} is a run of stage {run.record.stage}; a report is made of a train, evaluate or pretrain run"
    )


def newest_first(runs: Path) -> Iterator[RunFolder]:
    """The runs of a home."""
    found = [RunFolder.read(path.parent) for path in runs.glob("*/run.json")]
    yield from sorted(found, key=lambda run: run.record.started_ms, reverse=True)


def _of_train(train: RunFolder, others: list[RunFolder]) -> Relatives:
    sha256 = train.bundle_sha256(POLICY_FOLDER)
    played = [run for run in _of_stage("evaluate", others) if sha256 and run.result.get("policy_sha256") == sha256]
    filmed = [run for run in played if run.result.get("video")]
    evaluation = next(iter(filmed + played), None)
    policy = train.path / POLICY_FOLDER if sha256 else None
    return _complete(Relatives(train=train, evaluation=evaluation, policy=policy), others)


def _of_evaluation(evaluation: RunFolder, others: list[RunFolder], cache: Path) -> Relatives:
    sha256 = evaluation.result.get("policy_sha256")
    if sha256 is None:
        return Relatives(random=evaluation)
    makers = (run for run in _of_stage("train", others) if run.bundle_sha256(POLICY_FOLDER) == sha256)
    train = next(makers, None)
    places = [train.path / POLICY_FOLDER] if train else [Path(evaluation.result["policy"]), cache / sha256]
    policy = next((path for path in places if _sha256_of(path) == sha256), None)
    return _complete(Relatives(train=train, evaluation=evaluation, policy=policy), others)


def _complete(known: Relatives, others: list[RunFolder]) -> Relatives:
    """Adds the random agent's games and the encoder's pretraining."""
    rules = {key: known.preprocess.get(key) for key in ("game", "protocol")}
    if known.evaluation:
        rules = {key: known.evaluation.result.get(key) for key in rules}
    random = (
        run
        for run in _of_stage("evaluate", others)
        if str(run.result.get("policy", "")).startswith(RANDOM_PREFIX)
        and all(run.result.get(key) == value for key, value in rules.items())
    )
    encoder = (known.policy_config.get("encoder") or {}).get("sha256")
    pretrain = (run for run in _of_stage("pretrain", others) if encoder and run.result.get("sha256") == encoder)
    return Relatives(known.train, known.evaluation, next(random, None), next(pretrain, None), known.policy)


def _of_stage(stage: str, runs: Iterable[RunFolder]) -> list[RunFolder]:
    return [run for run in runs if run.record.stage == stage]
