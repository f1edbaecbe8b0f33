"""Runs: what a stage tells the tracking server, journalled first so that no failure of the server reaches training."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from pipeline import machine, server, trust
from pipeline.commit import code_commit
from pipeline.delivery import BATCHED, MAX_PARAM_CHARS, SLOW, Delivery
from pipeline.disk import write_text
from pipeline.errors import TrackingPending, UserError
from pipeline.gauges import Gauges
from pipeline.outbox import Outbox, Refused
from pipeline.server import Address
from pipeline.untrusted import from_record, read_json, require_plain_entries, short

if TYPE_CHECKING:
    from pipeline.resolve import Resolved
    from pipeline.server import MlflowClient

RUN_FILE = "run.json"
EXPERIMENT = "latentrl"
PARENT_TAG = "mlflow.parentRunId"
PIPELINE_STAGE = "pipeline"
USABLE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
NAME_RULE = "letters, digits, '-', '_' and '.', at most 100"
SYSTEM_METRICS_EVERY_S = 10.0
CLOSE_PATIENCE_S = 15.0
KILLED_PATIENCE_S = 3.0  # whoever ends the process does not wait long
LOCK_PATIENCE_S = 1.0  # `latentrl gc` holds a run's folder for as long as some renames take
REPORTED_PACKAGES = ("latentrl", "torch", "ray", "mlflow", "numpy", "pyarrow", "ale-py")

Status = Literal["FINISHED", "FAILED", "KILLED"]
Role = Literal["encoder", "policy"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunRecord:
    """What `run.json` in a run's folder holds: enough to go on with the run, or to deliver its journal.

    Attributes:
        run_id, experiment_id: MLflow's ids.
        uri: The tracking address, without credentials.
        name, stage: As given at the start.
        started_ms: Milliseconds since the epoch.
        game: ALE's id; "" where there is none.
    """

    run_id: str
    experiment_id: str
    uri: str
    name: str
    stage: str
    started_ms: int
    game: str = ""

    def __post_init__(self) -> None:
        """Refuses ids that no server gives, which become part of addresses, by a ValueError."""
        for value in (self.run_id, self.experiment_id):
            if not re.fullmatch(r"[0-9A-Za-z_-]{1,64}", value):
                raise ValueError(f"{short(value)} is no id")

    def address(self, given: str | None = None) -> Address:
        """The run's address; taken from `given` when that is the same one. Errors as of `trust.address_of_run`."""
        return trust.address_of_run(self.uri, given, short(self.name))

    def write(self, folder: Path) -> None:
        """Writes the record atomically."""
        write_text(folder / RUN_FILE, json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> RunRecord:
        """Reads a run's record.

        Raises:
            UserError: The folder is not a run's, or its record is damaged.
        """
        path = folder / RUN_FILE
        if not path.is_file():
            raise UserError(f"{folder} is not a run's folder: it has no {RUN_FILE}")
        require_plain_entries(folder, f"the run's folder {folder}")
        try:
            return from_record(cls, read_json(path, RUN_FILE), RUN_FILE, may_lack="game")
        except UserError as error:
            raise UserError(f"{path} is damaged ({error}); restore it or start a new run") from None


class Tracking:
    """A tracking server (or sqlite file) and the experiment in it.

    Args:
        uri: `sqlite:////absolute/path.db` or `http(s)://host:port`.
        experiment: Created when it does not exist.
        pipeline: Name of the run that gathers what is started here, as MLflow's UI nests runs; the first stage of that
            name makes it.

    Raises:
        UserError: The address or the name is malformed.
    """

    def __init__(self, uri: str, experiment: str = EXPERIMENT, *, pipeline: str | None = None) -> None:
        self.address = Address.parse(uri)
        self.uri = self.address.uri
        self.experiment = experiment
        self.pipeline = pipeline
        if pipeline is not None and not USABLE_NAME.fullmatch(pipeline):
            raise UserError(f"pipeline name {pipeline!r} is not usable; take {NAME_RULE}")

    def check(self) -> None:
        """Makes sure that the server answers, before any work starts. Creates a sqlite file that does not exist.

        Raises:
            UserError: It does not answer within 20 s, or cannot be used.
        """
        server.check(self.address, may_create=True)

    def start_run(
        self, name: str, *, stage: str, folder: Path, game: str = "", parent_run_id: str | None = None
    ) -> Run:
        """Creates a run on the server and its journal in `folder`.

        Args:
            name: Shown in the UI.
            stage: "pretrain", "train", ...
            folder: The run's folder; made if need be.
            game: ALE's id, where the run is about one.
            parent_run_id: The run to nest this one under, instead of the pipeline's.

        Raises:
            UserError: The server does not answer, or the folder already has a run.
        """
        folder = folder.absolute()
        if (folder / RUN_FILE).exists():
            raise UserError(f"{folder} already has a run; give --resume to go on with it, or another folder")
        _make(folder)
        client = server.check(self.address, may_create=True)
        tags = {
            "stage": stage,
            "mlflow.source.type": "LOCAL",
            "mlflow.source.name": f"latentrl {stage}",
            **({"mlflow.source.git.commit": commit.removesuffix("-dirty")} if (commit := code_commit()) else {}),
        }
        try:
            experiment = server.ask(self.address, lambda: server.experiment_id(client, self.experiment, self.address))
            if parent := parent_run_id or self._pipeline_run(client, experiment):
                tags[PARENT_TAG] = parent
            info = server.ask(self.address, lambda: client.create_run(experiment, tags=tags, run_name=name)).info
        except Refused as error:
            raise UserError(f"experiment {self.experiment!r} at {self.uri} cannot be used: {error}") from None
        record = RunRecord(info.run_id, experiment, self.uri, name, stage, info.start_time, game)
        record.write(folder)
        run = Run(folder, record, self.address)
        run.set_tags({f"version.{package}": version for package, version in _versions().items()})
        return run

    def _pipeline_run(self, client: MlflowClient, experiment: str) -> str | None:
        """The pipeline's run, the earliest where several stages have made one at the same moment."""
        if self.pipeline is None:
            return None
        by_name = f"tags.stage = '{PIPELINE_STAGE}' and attributes.run_name = '{self.pipeline}'"

        def earliest() -> str | None:
            runs = client.search_runs([experiment], by_name, order_by=["attributes.start_time ASC"], max_results=1)
            return runs[0].info.run_id if runs else None

        def find_or_make() -> str | None:
            with self.address.alone():
                if (found := earliest()) is not None:
                    return found
                made = client.create_run(experiment, tags={"stage": PIPELINE_STAGE}, run_name=self.pipeline)
                client.set_terminated(made.info.run_id)  # it gathers others, and is never at work itself
            return earliest()

        return server.ask(self.address, find_or_make)

    def resume_run(self, folder: Path) -> Run:
        """Goes on with the run that `folder` belongs to.

        Raises:
            UserError: The folder has no run, the run is another server's, or the server does not answer or know it.
        """
        folder = folder.absolute()
        record = RunRecord.read(folder)
        if record.uri != self.uri:
            raise UserError(f"run {folder.name} is tracked at {record.uri}, not {self.uri}; give --tracking-uri")
        client = server.check(self.address, may_create=False)
        try:
            server.ask(self.address, lambda: client.get_run(record.run_id))
        except Refused as error:
            raise UserError(f"run {record.run_id} of {folder} is gone from {self.uri}: {error}") from None
        run = Run(folder, record, self.address)
        run.outbox.append("status", {"status": "RUNNING"})
        return run


class Run:
    """One run being written. Nothing here contacts the server or raises for its absence: a thread delivers.

    As a context manager it closes itself: FINISHED, FAILED after an exception, KILLED after Ctrl-C.

    Args:
        folder: The run's folder.
        record: What its `run.json` holds.
        address: Of its server, with credentials if there are any.

    Raises:
        UserError: Another process is writing this run.
    """

    def __init__(self, folder: Path, record: RunRecord, address: Address) -> None:
        self.folder, self.record = folder, record
        self.run_id, self.uri = record.run_id, record.uri
        self.pending = False
        self.gauges = Gauges(record.stage, record.name, record.game)
        self.outbox = open_outbox(folder, record, address, lock_wait_s=LOCK_PATIENCE_S)
        self.outbox.start()
        self._keys_warned: set[str] = set()
        self._is_closed = False
        self._stop_meter = machine.every(SYSTEM_METRICS_EVERY_S, self._log_machine)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Logs settings; nested mappings become dotted keys. A key's value can be set once in a run's life."""
        for key, value in flatten(params).items():
            self.outbox.append("param", {"key": key, "value": str(value)[:MAX_PARAM_CHARS]})

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Logs figures of one step, with the present time; also for those who watch the cluster (pipeline.gauges).

        NaN and infinities are left out, said once a key.
        """
        finite = {key: float(value) for key, value in values.items() if math.isfinite(value)}
        for key in values.keys() - finite.keys() - self._keys_warned:
            self._keys_warned.add(key)
            log.warning("metric %s is %s at step %d: not sent to MLflow", key, values[key], step)
        self.gauges.show(finite)
        if finite:
            self.outbox.append("metrics", {"step": int(step), "values": finite})

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Sets tags; unlike parameters they can change."""
        for key, value in tags.items():
            self.outbox.append("tag", {"key": key, "value": str(value)})

    def log_file(self, path: Path, artifact_dir: str = "") -> None:
        """Uploads a file of the run's folder, as it is when its turn comes."""
        self.outbox.append("file", {"path": self._inside(path), "directory": artifact_dir})

    def log_folder(self, path: Path, artifact_dir: str) -> None:
        """Uploads the content of a folder in the run's, as it is when its turn comes."""
        self.outbox.append("folder", {"path": self._inside(path), "directory": artifact_dir})

    def _inside(self, path: Path) -> str:
        """A journal may be delivered by whoever was given the run's folder: it names nothing outside of that."""
        if self.folder.resolve() not in path.resolve().parents:
            raise ValueError(f"{path} is not in the run's folder {self.folder}; copy it there")
        return str(path.absolute())

    def log_dataset(self, facts: Mapping[str, Any], context: str) -> None:
        """Records a dataset as an input of this run, and what is known of it as tags `dataset.*`.

        Args:
            facts: What `FramesDataset.facts` gives: uri, digest, game and more. MLflow keeps 36 characters of the
                digest; the tag has all.
            context: What it was used for ("pretrain").
        """
        named = {"uri": facts["uri"], "name": facts["game"], "digest": facts["digest"]}
        self.outbox.append("dataset", {**named, "context": context, "facts": dict(facts)})
        self.set_tags(tagged("dataset", facts))

    def log_model_input(self, role: Role, model: Resolved) -> None:
        """Records a model that this run uses: tags `ROLE.*`, and a model input where it is a registered version.

        Args:
            role: What it is to the run: the encoder that it learns on, or the policy that plays.
            model: As `resolve` gave it.
        """
        known = {"address": model.address, "uri": model.uri, "version": model.version, "sha256": model.sha256}
        self.set_tags(tagged(role, known))
        if model.uri and model.version:
            name = model.uri.removeprefix("models:/").rpartition("/")[0]
            self.outbox.append("model_input", {"name": name, "version": model.version})

    def close(self, status: Status = "FINISHED") -> None:
        """Ends the run and waits for delivery while it makes progress; sets `pending` when something stays behind.

        Gives up when the server has been away for 15 s; 3 s where the run is killed.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self._stop_meter()
        self.outbox.append("status", {"status": status})
        self.pending = self.outbox.close(KILLED_PATIENCE_S if status == "KILLED" else CLOSE_PATIENCE_S) > 0

    def delivered(self, result: dict[str, Any]) -> dict[str, Any]:
        """A stage's result, passed on after `close`.

        Raises:
            TrackingPending: Operations are still in the journal; it carries the result.
        """
        if self.pending:
            raise TrackingPending(
                f"the work is done, but {pending_message(self.folder, self.uri, self.outbox)}", result
            )
        return result

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close("FINISHED")
            return
        self.close("FAILED" if issubclass(kind, Exception) else "KILLED")
        if self.pending:
            log.warning(pending_message(self.folder, self.uri, self.outbox))

    def _log_machine(self, figures: dict[str, float]) -> None:
        seconds = time.time() - self.record.started_ms / 1000
        self.log_metrics(figures, step=int(seconds / SYSTEM_METRICS_EVERY_S))


def open_outbox(folder: Path, record: RunRecord, address: Address, *, lock_wait_s: float = 0.0) -> Outbox:
    """The run's journal with its way to the server; delivery has not started.

    Raises:
        UserError: Another process is writing this run.
    """
    delivery = Delivery(address, record.experiment_id, record.run_id, folder)
    return Outbox(folder, delivery, batched=BATCHED, slow=SLOW, lock_wait_s=lock_wait_s)


def pending_message(folder: Path, uri: str, outbox: Outbox) -> str:
    """One line for the user about a journal that could not be delivered to its end."""
    where = f" --tracking-uri {uri}" if uri.startswith("http") and trust.has_credentials() else ""
    return (
        f"{outbox.num_pending} entries of run {folder.name} have not reached {uri} "
        f"({outbox.last_error or 'it is slow'}); they are safe in {folder}; "
        f"when it is back, run: latentrl sync {folder.name}{where}"
    )


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level with dotted keys: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def tagged(prefix: str, facts: Mapping[str, Any]) -> dict[str, str]:
    """Facts as tags `PREFIX.KEY`; what is not known (None) is left out."""
    return {f"{prefix}.{key}": str(value) for key, value in facts.items() if value is not None}


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the run's folder {folder} ({error.strerror}); give another --home") from None


def _versions() -> dict[str, str]:
    installed = {}
    for package in REPORTED_PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed
