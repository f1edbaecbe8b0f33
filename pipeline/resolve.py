"""From an address to a bundle on the local disk, every byte verified. Runs once a stage, in the driver."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline import bundle, server, trust
from pipeline.delivery import BUNDLE_DIRECTORY, LATEST, SHA256_TAG, is_collapsed
from pipeline.errors import UserError
from pipeline.names import listed, suggestion
from pipeline.outbox import Refused, Unreachable
from pipeline.server import Address, mask
from pipeline.untrusted import require_inside, short

if TYPE_CHECKING:
    from pipeline.server import MlflowClient, ModelVersion

Kind = Literal["encoder", "policy"]

FETCH_PREFIX = "fetch-"  # in the cache: what is being downloaded
CACHE_LOCK = ".lock"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resolved:
    """A bundle on the local disk whose every byte agrees with its checksums.

    Attributes:
        path: The bundle's folder.
        address: As it was asked for.
        uri: `models:/NAME/3` with the alias resolved, or `runs:/...`; None for a folder.
        version: The version number as text; None when it is not a registered version.
        sha256: Of the bundle.
        kind: "encoder" or "policy".
    """

    path: Path
    address: str
    uri: str | None
    version: str | None
    sha256: str
    kind: Kind


def resolve(address: str, tracking_uri: str, cache: Path) -> Resolved:
    """Turns an address into a verified bundle on the local disk, downloading what is not in the cache.

    Args:
        address: `models:/NAME@alias`, `models:/NAME/3`, `runs:/ID/path`, or a folder.
        tracking_uri: Where models and runs are looked up. A sqlite file is not created by looking.
        cache: Folder of downloaded bundles, one sub-folder for each sha256.

    Raises:
        UserError: Nothing is there, bytes have changed, or the server does not answer within 20 s. Says what exists.
    """
    if not address.startswith(("models:", "runs:")):
        return _resolve_folder(address)
    where = Address.parse(tracking_uri)
    client = server.check(where, may_create=False)
    try:
        if address.startswith("models:"):
            return _resolve_version(address, client, where, cache)
        return _resolve_artifact(address, client, where, cache)
    except (Refused, Unreachable) as error:
        raise UserError(f"{address} cannot be fetched from {where.uri}: {error}") from None


def _resolve_folder(address: str) -> Resolved:
    path = Path(address).absolute()
    if "://" in address or not _is_folder(path):
        raise UserError(
            f"{short(mask(address))} is neither a folder nor an address; give models:/NAME@alias, models:/NAME/3, "
            "runs:/RUN_ID/path or a bundle's folder"
        )
    return Resolved(path, address, None, None, bundle.verify(path), kind_of(path, address))


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # of a name too long to be one
        return False


def _resolve_version(address: str, client: MlflowClient, where: Address, cache: Path) -> Resolved:
    version = find_version(address, client, where)
    trust.require_own_store(_store(str(version.source), client, where), where)
    uri = f"models:/{version.name}/{version.version}"
    path, sha256 = _fetch(f"{uri}/{BUNDLE_DIRECTORY}", uri, where, cache)
    recorded = version.tags.get(SHA256_TAG)
    if recorded not in (None, sha256):
        raise UserError(f"{uri} has changed in the store: registered with sha256 {recorded}, now {sha256}")
    return Resolved(path, address, uri, str(version.version), sha256, kind_of(path, address))


def _resolve_artifact(address: str, client: MlflowClient, where: Address, cache: Path) -> Resolved:
    match = re.fullmatch(r"runs:/+([0-9a-zA-Z]+)/(.+?)/*", address)
    if match is None:
        raise UserError(f"{short(address)} is malformed; give runs:/RUN_ID/path")
    run_id, inside = match.groups()
    require_inside(inside, "the address")
    try:
        trust.require_own_store(server.ask(where, lambda: client.get_run(run_id)).info.artifact_uri, where)
        found = server.ask(where, lambda: [file.path for file in client.list_artifacts(run_id)])
    except Refused:
        raise UserError(f"there is no run {run_id!r} at {where.uri}; look it up in the UI") from None
    if not any(inside == path or inside.startswith(f"{path}/") for path in found):
        raise UserError(f"run {run_id} has no artifact {inside!r}; it has {listed(found)}")
    path, sha256 = _fetch(f"runs:/{run_id}/{inside}", address, where, cache)
    return Resolved(path, address, f"runs:/{run_id}/{inside}", None, sha256, kind_of(path, address))


def _store(source: str, client: MlflowClient, where: Address, depth: int = 0) -> str:
    """Where the files of a version really lie, behind the addresses that its source may name in turn."""
    kind, _, rest = source.partition(":/")
    head, _, tail = rest.lstrip("/").partition("/")
    if kind == "runs":
        return str(server.ask(where, lambda: client.get_run(head)).info.artifact_uri)
    if kind != "models":
        return source
    if not tail:
        return str(server.ask(where, lambda: client.get_logged_model(head)).artifact_location)
    if depth > 9:
        raise UserError(f"the source {short(source)} of a version goes round in circles")
    version = server.ask(where, lambda: client.get_model_version(head, tail))
    return _store(str(version.source), client, where, depth + 1)


def find_version(address: str, client: MlflowClient, where: Address) -> ModelVersion:
    """The registered version that `models:/NAME@alias` or `models:/NAME/3` means now.

    Raises:
        UserError: There is none; says what there is.
    """
    match = re.fullmatch(r"models:/+([^/@]+)(?:@([^/@]+)|/(\d+))", address)
    if match is None:
        raise UserError(f"{short(address)} is malformed; give models:/NAME@alias or models:/NAME/3")
    name, alias, number = match.groups()
    require_inside(name, "the address")
    try:
        model = server.ask(where, lambda: client.get_registered_model(name))
    except Refused:
        known = [model.name for model in server.ask(where, lambda: client.search_registered_models(max_results=200))]
        raise UserError(f"no model {name!r} is registered at {where.uri}; {suggestion(name, sorted(known))}") from None
    if alias == LATEST:
        return _latest(name, client, where)
    if alias is not None and alias not in model.aliases:
        raise UserError(f"model {name!r} has no alias {alias!r}; it has {listed([LATEST, *sorted(model.aliases)])}")
    wanted = number or str(model.aliases[alias])
    try:
        return server.ask(where, lambda: client.get_model_version(name, wanted))
    except Refused:
        numbers = sorted(int(version.version) for version in _versions(name, client, where))
        raise UserError(f"model {name!r} has no version {wanted}; it has {listed(map(str, numbers))}") from None


def _latest(name: str, client: MlflowClient, where: Address) -> ModelVersion:
    """The newest version that has not collapsed.

    MLflow reserves the alias `latest` and answers it with the highest version number, a collapsed one included.
    """
    usable = [version for version in _versions(name, client, where) if not is_collapsed(version.tags)]
    if not usable:
        raise UserError(f"every version of model {name!r} has collapsed; give one by number if you mean it")
    return max(usable, key=lambda version: int(version.version))


def _versions(name: str, client: MlflowClient, where: Address) -> list[ModelVersion]:
    quoted = name.replace("'", "")
    return list(server.ask(where, lambda: client.search_model_versions(f"name='{quoted}'")))


def _fetch(source: str, shown: str, where: Address, cache: Path) -> tuple[Path, str]:
    """A bundle from the store into the cache; its sums are fetched first, and all when the cache has them already."""
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=FETCH_PREFIX, dir=cache) as scratch:
        sums = _download(f"{source}/{bundle.SUMS_FILE}", Path(scratch), shown, where)
        target = cache / bundle.sha256_of(sums.parent)
        with locked_cache(cache):
            if target.is_dir():
                try:
                    os.utime(target)  # in use: `latentrl gc` leaves it alone until a run's folder says so
                    return target, bundle.verify(target)
                except UserError as error:
                    log.warning("the cached copy of %s is damaged (%s); fetched again", shown, error)
        path = _download(source, Path(scratch, "bundle"), shown, where)
        sha256 = bundle.verify(path)
        with locked_cache(cache):
            _put(path, target)
    return target, sha256


@contextlib.contextmanager
def locked_cache(cache: Path, *, alone: bool = False) -> Iterator[None]:
    """Keeps `latentrl gc` from removing bundles for a moment; with `alone`, others from using them."""
    with (cache / CACHE_LOCK).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield


def _put(path: Path, target: Path) -> None:
    """Moves a verified folder into its place; another process may do the same at the same moment."""
    if target.exists():
        target.rename(path.parent / f"old-{time.time_ns()}")
    try:
        path.rename(target)
    except OSError:
        bundle.verify(target)


def _download(source: str, into: Path, shown: str, where: Address) -> Path:
    try:
        return server.download(source, into, where)
    except (Refused, Unreachable) as error:
        raise UserError(f"the files of {shown} are not in the store ({error}); it cannot be used") from None


def kind_of(path: Path, shown: str) -> Kind:
    """What a bundle is, by its files.

    Raises:
        UserError: Neither an encoder nor a policy.
    """
    if (path / "q.safetensors").is_file():
        return "policy"
    if (path / "preprocess.json").is_file() and (path / "model.safetensors").is_file():
        return "encoder"
    raise UserError(f"{shown} is neither an encoder bundle nor a policy bundle; name a folder that training wrote")
