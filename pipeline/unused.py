"""Models in the registry and the artifact store that nothing needs any more, and how they go.

A model is a logged model of MLflow's, which holds the files, and the version that it is registered as. MLflow leaves
the files where they are when the version is deleted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline import server, trust
from pipeline.delivery import BYTES_TAG, OPERATION_TAG, SHA256_TAG, is_collapsed, logged_model_id
from pipeline.errors import UserError
from pipeline.outbox import Refused, Unreachable
from pipeline.records import Records, quoted

if TYPE_CHECKING:
    from pipeline.server import LoggedModel, MlflowRun, ModelVersion

USING_TAGS = ("encoder.sha256", "policy.sha256", "dataset.policy_sha256")
SETTLED_S = 24 * 3600.0  # a younger model may be one that is being registered, or that is about to be used


@dataclass(frozen=True)
class StoredModel:
    """A model that may go.

    Attributes:
        address: `models:/NAME/3`, or `models:/m-...` where it has no version.
        model_id: Of the logged model.
        sha256: Of the bundle.
        num_bytes: Of its files, as recorded at registration; 0 where that was not.
        why: Nothing needs it.
    """

    address: str
    model_id: str
    sha256: str
    num_bytes: int
    why: str


class Registry:
    """What latentrl has registered at a tracking address.

    Args:
        records: Of the address.

    Attributes:
        addresses: sha256 of a bundle to an address that has it.
        aliased: sha256 of the bundles that an alias means, `latest` among them.
    """

    def __init__(self, records: Records) -> None:
        self._records = records
        self._versions = list(records.versions(f"tags.`{SHA256_TAG}` LIKE '%'"))
        self.addresses = {version.tags[SHA256_TAG]: _address(version) for version in self._versions}
        self._meant = {
            address for name in {version.name for version in self._versions} for address in self._named(name)
        }
        self.aliased = {version.tags[SHA256_TAG] for version in self._versions if _address(version) in self._meant}

    def unused(self, used: set[str], *, with_versions: bool) -> Iterator[StoredModel]:
        """Models that nothing needs.

        Args:
            used: sha256 of bundles that are needed for reasons that the server does not know of.
            with_versions: Also registered ones, not only those whose version has been deleted.
        """
        used = used | set(self._used())
        versions = {model_id: version for version in self._versions if (model_id := logged_model_id(version))}
        for model in self._records.logged_models(f"tags.`{OPERATION_TAG}` LIKE '%'"):
            version = versions.get(model.model_id)
            if not _is_settled(model) or model.tags.get(SHA256_TAG, "") in {*used, ""}:
                continue
            if version is None and not self._is_source(model):
                yield _stored(model, model.model_uri, "its version has been deleted, and no run or version uses it")
            elif with_versions and version is not None and self._may_go(version, model):
                yield _stored(model, _address(version), "no alias means it, and no run or version uses it")

    def delete(self, model: StoredModel) -> None:
        """Removes a model: its version, then its files, then the logged model, so that what is left is found again.

        Raises:
            UserError: An alias means it by now, or the server does not do it.
        """
        client, address = self._records.client, self._records.address
        if any(
            run for tag in USING_TAGS for run in self._records.runs_tagged(tag, {model.sha256}) if not _is_deleted(run)
        ):
            raise UserError(f"{model.address} has been used meanwhile; it is kept")
        try:
            if not model.address.startswith("models:/m-"):
                name, _, number = model.address.removeprefix("models:/").rpartition("/")
                if number in self._records.aliases(name).values():
                    raise UserError(f"{model.address} has got an alias meanwhile; it is kept")
                server.ask(address, lambda: client.delete_model_version(name, number))
            location = server.ask(address, lambda: client.get_logged_model(model.model_id)).artifact_location
            trust.require_own_store(location, address)
            server.delete_artifacts(location, address)
            server.ask(address, lambda: client.delete_logged_model(model.model_id))
        except (Refused, Unreachable) as error:
            raise UserError(f"{model.address} cannot be removed ({error})") from None

    def _named(self, name: str) -> Iterator[str]:
        """The versions of a model that an alias means."""
        mine = [version for version in self._versions if version.name == name]
        newest = [max(mine, key=_number), *sorted((v for v in mine if not is_collapsed(v.tags)), key=_number)[-1:]]
        yield from (_address(version) for version in newest)
        yield from (f"models:/{name}/{number}" for number in self._records.aliases(name).values())

    def _used(self) -> Iterator[str]:
        """sha256 of the bundles that runs that are not deleted and other versions were made from."""
        for tag in USING_TAGS:
            for run in self._records.runs(f"tags.`{tag}` LIKE '%'"):
                if not _is_deleted(run):
                    yield run.data.tags[tag]
        yield from (version.tags[tag] for version in self._versions for tag in USING_TAGS if tag in version.tags)

    def _may_go(self, version: ModelVersion, model: LoggedModel) -> bool:
        return _address(version) not in self._meant and not self._is_source(model, but=version)

    def _is_source(self, model: LoggedModel, but: ModelVersion | None = None) -> bool:
        """Whether a version, of whosoever's, takes its files from this model."""
        sources = [model.model_uri] if but is None else [model.model_uri, _address(but)]
        found = (version for source in sources for version in self._records.versions(f"source_path = {quoted(source)}"))
        return any(but is None or _address(version) != _address(but) for version in found)


def _stored(model: LoggedModel, address: str, why: str) -> StoredModel:
    return StoredModel(address, model.model_id, model.tags[SHA256_TAG], _bytes(model), why)


def _bytes(model: LoggedModel) -> int:
    size = str(model.tags.get(BYTES_TAG, ""))
    return int(size) if size.isascii() and size.isdigit() and len(size) < 20 else 0


def _is_settled(model: LoggedModel) -> bool:
    return time.time() - model.last_updated_timestamp / 1000 > SETTLED_S


def _is_deleted(run: MlflowRun) -> bool:
    return bool(run.info.lifecycle_stage == "deleted")


def _address(version: ModelVersion) -> str:
    return f"models:/{version.name}/{version.version}"


def _number(version: ModelVersion) -> int:
    return int(version.version)
