"""How each kind of journalled operation reaches MLflow. Every one may safely be delivered twice."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pipeline.journal import Body, Operation
from pipeline.outbox import Refused, Unreachable
from pipeline.server import Address, connect, prepare, translated
from pipeline.untrusted import short

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

BATCHED = frozenset({"metrics", "param", "tag"})
SLOW = frozenset({"file", "folder", "register"})

SERVED_WITH = ("mlflow", "torch", "numpy", "safetensors")
_PAIR: dict[str, type] = {"key": str, "value": str}
_PATH: dict[str, type] = {"path": str, "directory": str}
_FIELDS: dict[str, dict[str, type]] = {
    "metrics": {"step": int, "values": dict},
    "param": _PAIR,
    "tag": _PAIR,
    "file": _PATH,
    "folder": _PATH,
    "dataset": {"uri": str, "name": str, "digest": str, "context": str},
    "model_input": {"name": str, "version": str},
    "register": {"name": str, "path": str, "tags": dict, "promote": bool},
    "describe": {"sha256": str, "description": str, "tags": dict},
    "status": {"status": str},
}
MAX_PARAM_CHARS = 6000
MAX_TAG_CHARS = 5000
MAX_DATASET_DIGEST_CHARS = 36
MAX_DESCRIPTION_CHARS = 5000
DESCRIBED = "probe."  # what a version is tagged with after it was registered begins so

OPERATION_TAG = "latentrl.operation"
SHA256_TAG = "bundle_sha256"
BYTES_TAG = "bundle_bytes"
KIND_TAG = "kind"
BUNDLE_DIRECTORY = "artifacts/bundle"
CHAMPION, LATEST = "champion", "latest"


class Delivery:
    """Carries operations of one run to its server; the `deliver` of an `Outbox`.

    Args:
        address: Server or sqlite file of the run.
        experiment_id: The run's experiment.
        run_id: The run.
        folder: The run's own; nothing outside of it is ever sent or removed, whatever the journal says.
    """

    def __init__(self, address: Address, experiment_id: str, run_id: str, folder: Path) -> None:
        self.address, self.experiment_id, self.run_id, self.folder = address, experiment_id, run_id, folder
        self._known_client: MlflowClient | None = None
        self._deliver_one: dict[str, Callable[[Operation], Body | None]] = {
            "file": self._file,
            "folder": self._folder,
            "dataset": self._dataset,
            "model_input": self._model_input,
            "register": self._register,
            "describe": self._describe,
            "status": self._status,
        }

    def __call__(self, operations: Sequence[Operation]) -> Body | None:
        """Delivers operations: any number of batched kinds, or a single other one.

        Raises:
            Unreachable: The server is away, busy or does not know the run.
            Refused: The server will never take this.
        """
        for operation in operations:
            _require_whole(operation)
        try:
            with translated(self.address):
                if operations[0].kind in BATCHED:
                    self._batch(operations)
                    return None
                return self._deliver_one[operations[0].kind](operations[0])
        except Refused as error:
            if not error.is_missing or operations[0].kind == "model_input":
                raise
            # A server that came back with an empty store: keep the journal rather than drop everything one by one.
            raise Unreachable(f"{self.address.uri} does not know run {self.run_id} ({error})") from error

    @property
    def _client(self) -> MlflowClient:
        if self._known_client is None:
            self._known_client = connect(self.address)
        return self._known_client

    def _batch(self, operations: Sequence[Operation]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        metrics = [
            Metric(key, value, operation.time_ms, operation.body["step"])
            for operation in operations
            if operation.kind == "metrics"
            for key, value in operation.body["values"].items()
        ]
        pairs = [(op.kind, op.body["key"], op.body["value"]) for op in operations if op.kind != "metrics"]
        params = [Param(key, value[:MAX_PARAM_CHARS]) for kind, key, value in pairs if kind == "param"]
        tags = [RunTag(key, value[:MAX_TAG_CHARS]) for kind, key, value in pairs if kind == "tag"]
        self._client.log_batch(self.run_id, metrics=metrics, params=params, tags=tags)

    def _file(self, operation: Operation) -> None:
        path = self._own(operation.body["path"])
        self._client.log_artifact(self.run_id, str(path), operation.body["directory"] or None)

    def _folder(self, operation: Operation) -> None:
        path = self._own(operation.body["path"])
        self._client.log_artifacts(self.run_id, str(path), operation.body["directory"] or None)

    def _own(self, path: str, *, is_there: bool = True) -> Path:
        """A path of the journal, which must lie in the run's folder, links followed."""
        own, asked = self.folder.resolve(), Path(path).resolve()
        if own not in asked.parents:
            raise Refused(f"{path} lies outside of the run's folder {self.folder}")
        if is_there and not os.access(asked, os.R_OK):
            raise Refused(f"{path} is no longer there, or not readable")
        return asked

    def _dataset(self, operation: Operation) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        body = operation.body
        dataset = Dataset(
            name=body["name"],
            digest=body["digest"][:MAX_DATASET_DIGEST_CHARS],
            source_type="s3" if body["uri"].startswith("s3://") else "local",
            source=json.dumps({"uri": body["uri"]}),
            profile=json.dumps({"digest": body["digest"], **body.get("facts", {})}),
        )
        tags = [InputTag("mlflow.data.context", body["context"])]
        self._client.log_inputs(self.run_id, datasets=[DatasetInput(dataset, tags)])

    def _model_input(self, operation: Operation) -> None:
        from mlflow.entities import LoggedModelInput

        version = self._client.get_model_version(operation.body["name"], operation.body["version"])
        model_id = logged_model_id(version)
        if model_id is None:
            raise Refused(f"version {version.version} of {version.name} was not registered from a logged model")
        self._client.log_inputs(self.run_id, models=[LoggedModelInput(model_id)])

    def _status(self, operation: Operation) -> None:
        status = operation.body["status"]
        if status == "RUNNING":
            self._client.update_run(self.run_id, status=status)
        else:
            self._client.set_terminated(self.run_id, status, operation.time_ms)

    def _register(self, operation: Operation) -> Body:
        """Makes a model version, at most one however often it is tried, and moves the aliases."""
        body = operation.body
        mark = f"{self.run_id}:{operation.seq}"
        version = self._version_made_by(mark) or self._make_version(body, mark)
        aliases = self._move_aliases(version, promote=body["promote"])
        shutil.rmtree(self._own(body["path"], is_there=False), ignore_errors=True)
        return {
            "name": version.name,
            "version": str(version.version),
            "aliases": aliases,
            "sha256": body["tags"][SHA256_TAG],
            "collapsed": is_collapsed(version.tags),
            "kind": body["tags"][KIND_TAG],
        }

    def _describe(self, operation: Operation) -> None:
        """Replaces the description of a bundle's versions, those that this very run has made."""
        body = operation.body
        if not all(key.startswith(DESCRIBED) and isinstance(value, str) for key, value in body["tags"].items()):
            raise Refused(f"entry {operation.seq} would set tags of a version that are not {DESCRIBED}*")
        for version in self._client.search_model_versions(f"run_id='{self.run_id}'"):
            if version.tags.get(SHA256_TAG) != body["sha256"]:
                continue
            self._client.update_model_version(
                version.name, version.version, body["description"][:MAX_DESCRIPTION_CHARS]
            )
            for key, value in body["tags"].items():
                self._client.set_model_version_tag(version.name, version.version, key, value[:MAX_TAG_CHARS])

    def _version_made_by(self, mark: str) -> ModelVersion | None:
        found = self._client.search_model_versions(f"run_id='{self.run_id}'")
        return next((version for version in found if version.tags.get(OPERATION_TAG) == mark), None)

    def _make_version(self, body: Body, mark: str) -> ModelVersion:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(body["name"])
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        tags = {**body["tags"], OPERATION_TAG: mark}
        model = self._logged_model(body, mark)
        return self._client.create_model_version(
            body["name"], model.model_uri, self.run_id, tags, model_id=model.model_id
        )

    def _logged_model(self, body: Body, mark: str) -> LoggedModel:
        """The run's logged model with these artifacts; one that an interrupted attempt left is used again."""
        found = self._client.search_logged_models([self.experiment_id], f"source_run_id = '{self.run_id}'")
        model = next((model for model in found if model.tags.get(OPERATION_TAG) == mark), None)
        if model is None:
            kind = body["tags"][KIND_TAG]
            tags = {**body["tags"], OPERATION_TAG: mark}
            model = self._client.create_logged_model(self.experiment_id, kind, self.run_id, tags, model_type=kind)
        self._client.log_model_artifacts(model.model_id, str(self._own(body["path"])))
        return self._client.finalize_logged_model(model.model_id, "READY")

    def _move_aliases(self, version: ModelVersion, *, promote: bool) -> list[str]:
        """Gives the version the aliases that it has earned.

        `latest` needs no setting: MLflow reserves the name and answers it with the highest version.
        """
        if is_collapsed(version.tags):
            return []
        aliases = [LATEST]
        if version.tags[KIND_TAG] == "encoder":
            with self.address.alone():
                if promote or beats(version.tags, self._champion_tags(version)):
                    self._client.set_registered_model_alias(version.name, CHAMPION, str(version.version))
                    aliases.append(CHAMPION)
        return aliases

    def _champion_tags(self, version: ModelVersion) -> Mapping[str, str] | None:
        """Tags of the champion that `version` would replace; None when there is none or it is `version` itself."""
        champion = self._client.get_registered_model(version.name).aliases.get(CHAMPION)
        if champion is None or str(champion) == str(version.version):
            return None
        tags: Mapping[str, str] = self._client.get_model_version(version.name, str(champion)).tags
        return tags


def beats(candidate: Mapping[str, str], champion: Mapping[str, str] | None) -> bool:
    """Whether held-out bits/dim makes the candidate the new champion.

    Args:
        candidate: Tags of a version that has not collapsed.
        champion: Tags of the present champion; None when there is none.

    Returns:
        False when either figure was not measured on held-out episodes: they cannot be compared.
    """
    mine, theirs = _heldout_bits(candidate), _heldout_bits(champion or {})
    if mine is None:
        return False
    return champion is None or (theirs is not None and mine < theirs)


def _heldout_bits(tags: Mapping[str, str]) -> float | None:
    """Held-out bits/dim by a version's tags, which anyone who may write to the server can set; None without."""
    try:
        bits = float(tags["bits_per_dim"]) if tags.get("has_heldout") == "true" else math.nan
    except (KeyError, ValueError):
        return None
    return bits if math.isfinite(bits) else None


def is_collapsed(tags: Mapping[str, str]) -> bool:
    """Whether a version is tagged as an encoder whose latents carry nothing."""
    return tags.get("collapsed") == "true"


def logged_model_id(version: ModelVersion) -> str | None:
    """The MLflow logged model that a version was made from."""
    source = str(version.source)
    return source.removeprefix("models:/") if source.startswith("models:/m-") else None


def _require_whole(operation: Operation) -> None:
    """Refuses an entry that latentrl does not write: a journal may have come with a folder of someone else."""
    body, fields = operation.body, _FIELDS.get(operation.kind)
    if fields is None or any(type(body.get(name)) is not kind for name, kind in fields.items()):
        raise Refused(f"entry {operation.seq} ({short(operation.kind)}) is not as latentrl writes them")
    if type(body.get("facts", {})) is not dict:
        raise Refused(f"entry {operation.seq} holds facts of a dataset that are none")
    values = body.get("values", {})
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in values.values()):
        raise Refused(f"entry {operation.seq} holds values that are no numbers")


def save_served_encoder(staged: Path, bundle: Path, example: npt.NDArray[np.uint8], z_dim: int, run_id: str) -> None:
    """Writes an MLflow model folder with an encoder bundle in it, from which a version is uploaded.

    Nothing is inferred by running the model, which is slow, and nothing is pickled.

    Args:
        staged: The folder to write; empty.
        bundle: The encoder bundle.
        example: (N, H, W) uint8, stored as the model's input example.
        z_dim: Width of its output.
        run_id: The run that made it.
    """
    prepare()
    from mlflow.models import Model, ModelSignature
    from mlflow.pyfunc import save_model
    from mlflow.types import Schema, TensorSpec

    inputs = Schema([TensorSpec(np.dtype(np.uint8), (-1, *example.shape[1:]))])
    outputs = Schema([TensorSpec(np.dtype(np.float32), (-1, z_dim))])
    with tempfile.TemporaryDirectory(dir=staged.parent) as scratch:
        source = Path(scratch) / Path(BUNDLE_DIRECTORY).name  # MLflow keeps the folder's own name.
        shutil.copytree(bundle, source)
        save_model(
            path=str(staged),
            mlflow_model=Model(run_id=run_id),
            python_model=str(Path(__file__).with_name("serving.py")),
            artifacts={"bundle": str(source)},
            signature=ModelSignature(inputs=inputs, outputs=outputs),
            input_example=example,
            pip_requirements=[f"{package}=={importlib.metadata.version(package)}" for package in SERVED_WITH],
        )
