"""A tiny real run on a tracking server, with an artifact in its store, that leaves nothing to be seen behind.

MLflow's servers delete softly: the run's row stays in the database, in no list, until an administrator's `mlflow gc`.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import url2pathname

from pipeline import server
from pipeline.errors import UserError
from pipeline.outbox import Refused
from pipeline.server import Address, mask

if TYPE_CHECKING:
    from pipeline.server import MlflowClient

NAME = "latentrl-doctor"
FILE = "doctor.txt"


@dataclass(frozen=True)
class TrialRun:
    """A run that exists for the length of a trial.

    Attributes:
        address: Its server.
        run_id: Its id.
        experiment: Name of the experiment that it is in.
        artifact_uri: Where its artifacts go.
    """

    address: Address
    run_id: str
    experiment: str
    artifact_uri: str

    def try_artifact(self) -> None:
        """Writes an artifact and reads it back.

        Raises:
            UserError: The store does not do it, or gives back something else.
        """
        where, content = mask(self.artifact_uri), secrets.token_hex(8)
        try:
            found = self._there_and_back(content)
        except Exception as error:  # each kind of store has errors of its own
            reason = str(error).rpartition("; ")[0] if isinstance(error, UserError) else str(error)
            reason = " ".join(mask(reason).split())[:300] or type(error).__name__
            raise UserError(
                f"artifacts cannot be written to {where} ({reason}); check the store, its keys and the server's "
                "--artifacts-destination"
            ) from None
        if found != content:
            raise UserError(
                f"an artifact written to {where} came back as something else; look at what lies between here and there"
            )

    def _there_and_back(self, content: str) -> str:
        client, patience_s = server.connect(self.address), server.STORE_ANSWERS_WITHIN_S
        with tempfile.TemporaryDirectory() as folder:
            file, source = Path(folder, FILE), f"runs:/{self.run_id}/{FILE}"
            file.write_text(content)
            server.ask(self.address, lambda: client.log_artifact(self.run_id, str(file)), patience_s)
            back = Path(folder, "back")
            return server.ask(self.address, lambda: server.download(source, back, self.address).read_text(), patience_s)


@contextlib.contextmanager
def trial_run(tracking_uri: str, experiment: str = "latentrl") -> Iterator[TrialRun]:
    """Creates a run, logs a figure, and deletes the run again.

    A sqlite file that does not exist yet is made in a folder beside its place, and removed.

    Args:
        tracking_uri: Server or sqlite file.
        experiment: Used where it exists; otherwise one with a name of its own is made and deleted, since a deleted
            experiment blocks its name.

    Raises:
        UserError: The server does not answer, does not take the credentials, or refuses.
    """
    with _existing(Address.parse(tracking_uri)) as address:
        client = server.check(address, may_create=True)
        try:
            experiment_id, name, is_new = server.ask(address, lambda: _experiment(client, experiment, address))
            try:
                yield from _run(client, address, experiment_id, name)
            finally:
                if is_new:
                    server.ask(address, lambda: client.delete_experiment(experiment_id))
        except Refused as error:
            raise UserError(
                f"{address.uri} answers and refuses a run ({error}); ask who runs it for the right to write"
            ) from None


@contextlib.contextmanager
def _existing(address: Address) -> Iterator[Address]:
    """The address; instead of a sqlite file that is not there, one in a folder that is removed."""
    if address.database is None or address.database.exists():
        yield address
        return
    nearest = next(folder for folder in address.database.parents if folder.exists())
    try:
        scratch = Path(tempfile.mkdtemp(prefix=f".{NAME}-", dir=nearest))
    except OSError as error:
        raise UserError(
            f"no tracking database can be made at {address.database} ({nearest}: {error.strerror}); "
            "give a writable sqlite:////path/mlflow.db"
        ) from None
    try:
        yield Address.parse(f"sqlite:///{scratch}/mlflow.db")
    finally:
        shutil.rmtree(scratch)


def _experiment(client: MlflowClient, name: str, address: Address) -> tuple[str, str, bool]:
    """Id and name of the experiment to use, and whether it was made for this."""
    found = client.get_experiment_by_name(name)
    is_new = found is None
    if is_new:
        name = f"{NAME}-{secrets.token_hex(4)}"
    return server.experiment_id(client, name, address), name, is_new


def _run(client: MlflowClient, address: Address, experiment_id: str, experiment: str) -> Iterator[TrialRun]:
    run = server.ask(address, lambda: client.create_run(experiment_id, run_name=NAME))
    try:
        server.ask(address, lambda: client.log_metric(run.info.run_id, NAME, 1.0))
        yield TrialRun(address, run.info.run_id, experiment, run.info.artifact_uri)
    finally:
        server.ask(address, lambda: client.delete_run(run.info.run_id))
        _forget_artifacts(address, run.info.artifact_uri.removesuffix("/artifacts"))


def _forget_artifacts(address: Address, uri: str) -> None:
    """Removes the run's place in the store; one that cannot be written has nothing to remove."""
    with contextlib.suppress(Exception):  # each kind of store has errors of its own
        server.ask(address, lambda: server.delete_artifacts(uri, address), server.STORE_ANSWERS_WITHIN_S)
    if uri.startswith("file:"):
        with contextlib.suppress(OSError):  # others' artifacts lie in it
            Path(url2pathname(urlsplit(uri).path)).parent.rmdir()
