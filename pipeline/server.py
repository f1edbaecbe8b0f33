"""Where runs and models are recorded: the address of an MLflow server or sqlite file, and how to reach it.

Importing this module does not import MLflow (three seconds); reaching a server does.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shlex
import sqlite3
import sys
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.errors import UserError
from pipeline.outbox import Refused, Unreachable
from pipeline.patience import within

if TYPE_CHECKING:
    from mlflow import MlflowClient as MlflowClient
    from mlflow.entities import LoggedModel as LoggedModel
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion as ModelVersion

    MlflowRun = Run

SIGN_OF_LIFE_WITHIN_S = 5.0
SERVER_ANSWERS_WITHIN_S = 12.0
STORE_ANSWERS_WITHIN_S = 30.0  # A server that passes artifacts on waits for its store.
DATABASE_LOCK_WAIT_S = 15.0
DATABASE_ANSWERS_WITHIN_S = 120.0  # Making the tables of a new file takes 2 s, on a busy machine many times that.

# Set before MLflow is imported, where the user has not. Its own retries would repeat requests that are not idempotent
# (creating a run, a version) and wait minutes for a dead server; the journal retries instead.
SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_UV_AUTO_DETECT": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # Standard output is for the JSON of --json.
}

MISSING = "RESOURCE_DOES_NOT_EXIST"
# Codes of answers that do not change when the same request is sent again.
FINAL_CODES = frozenset(
    {
        "INVALID_PARAMETER_VALUE",
        MISSING,
        "RESOURCE_ALREADY_EXISTS",
        "BAD_REQUEST",
        "INVALID_STATE",
    }
)

# Some of them are there from the first moment on: the first that are made, and what every version has.
MLFLOW_TABLES = frozenset({"alembic_version", "experiments", "budget_policies", "entity_associations"})

CREDENTIALS = re.compile(r"(://)\S*@")
QUERY = re.compile(r"(://[^\s?]*\?)\S*")

T = TypeVar("T")


@dataclass(frozen=True)
class Address:
    """A tracking address in its one canonical spelling, without credentials.

    Attributes:
        uri: `sqlite:////absolute/path.db`, or the server's `http(s)://host:port`.
        database: The sqlite file; None for a server.
        user, password: What the address carried; `connect` hands them to MLflow.
    """

    uri: str
    database: Path | None = None
    user: str | None = field(default=None, repr=False, compare=False)
    password: str | None = field(default=None, repr=False, compare=False)

    @classmethod
    def parse(cls, text: str) -> Address:
        """Reads an address; a relative sqlite path is made absolute.

        Raises:
            UserError: It is neither sqlite nor http(s), or is malformed.
        """
        scheme = text.partition(":")[0].lower()
        if scheme == "sqlite":
            return cls._parse_sqlite(text)
        if scheme in ("http", "https"):
            return cls._parse_http(text)
        raise UserError(
            f"tracking address {mask(text)!r} is not one I know; give sqlite:////absolute/path/mlflow.db "
            "or http(s)://HOST:PORT"
        )

    @classmethod
    def _parse_sqlite(cls, text: str) -> Address:
        path = text.removeprefix("sqlite:///")
        if path == text or not path.strip("/") or path.startswith(":") or "?" in path:
            raise UserError(f"tracking address {text!r} names no file; give sqlite:////absolute/path/mlflow.db")
        database = Path(os.path.abspath(path))
        return cls(f"sqlite:///{database}", database)

    @classmethod
    def _parse_http(cls, text: str) -> Address:
        try:
            parts = urllib.parse.urlsplit(text)
            port = f":{parts.port}" if parts.port else ""
        except ValueError:
            parts, port = urllib.parse.SplitResult("", "", "", "", ""), ""
        if not parts.hostname or parts.query or parts.fragment:
            raise UserError(f"tracking address {mask(text)!r} is malformed; give http(s)://HOST:PORT")
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        user, password = (urllib.parse.unquote(part) if part else None for part in (parts.username, parts.password))
        return cls(f"{parts.scheme.lower()}://{host}{port}{parts.path.rstrip('/')}", None, user, password)

    @property
    def artifact_location(self) -> str | None:
        """Where a new experiment keeps its artifacts; None leaves it to the server."""
        return (self.database.parent / "artifacts").as_uri() if self.database else None

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps other processes on this sqlite file out of a read-then-write; a server cannot be locked."""
        if self.database is None:
            yield
            return
        with self.database.with_suffix(".lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def mask(text: str) -> str:
    """The text without what may be secret in an address: user, password, query."""
    return QUERY.sub(r"\1***", CREDENTIALS.sub(r"\1***@", text))


def without_passwords(text: str) -> str:
    """The text without users and passwords in addresses; what else an address holds stays."""
    return CREDENTIALS.sub(r"\1***@", text)


def prepare() -> None:
    """Imports MLflow with our settings, and without its chatter unless MLFLOW_LOGGING_LEVEL asks for it."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    import mlflow  # noqa: F401

    if "MLFLOW_LOGGING_LEVEL" not in os.environ:
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # Tracebacks of a locked database.
        logging.getLogger("alembic").setLevel(logging.WARNING)


def connect(address: Address) -> MlflowClient:
    """A client for this address. Contacts nobody yet.

    Also makes it MLflow's process-wide address: parts of MLflow look there and would otherwise create a sqlite file
    in the working directory.
    """
    if address.user is not None:
        os.environ["MLFLOW_TRACKING_USERNAME"] = address.user
        os.environ["MLFLOW_TRACKING_PASSWORD"] = address.password or ""
    prepare()
    import mlflow

    mlflow.set_tracking_uri(address.uri)
    mlflow.set_registry_uri(address.uri)
    return mlflow.MlflowClient(tracking_uri=address.uri, registry_uri=address.uri)


def check(address: Address, *, may_create: bool) -> MlflowClient:
    """Makes sure that the address answers.

    Args:
        address: Server or sqlite file.
        may_create: Whether a sqlite file that does not exist is created.

    Returns:
        A client that has just been answered.

    Raises:
        UserError: No answer within 12 s, a refusal, not MLflow, or a file that cannot be used.
    """
    if address.database is not None:
        _check_database(address.database, may_create=may_create)
    else:
        _bounded(address, lambda: _look_for_life(address), SIGN_OF_LIFE_WITHIN_S + 2)
    prepare()

    def question() -> MlflowClient:
        with address.alone():  # The first client of a new file makes its tables, which two at once cannot.
            client = connect(address)
            client.search_experiments(max_results=1)
            return client

    return ask(address, question)


def ask(address: Address, question: Callable[[], T], within_s: float = SERVER_ANSWERS_WITHIN_S) -> T:
    """Runs one exchange with the server, bounded in time whatever the network does; a sqlite file may take longer.

    Raises:
        UserError: No answer in time, or the server could not be reached.
        Refused: The server's answer is no.
    """
    return _bounded(address, question, DATABASE_ANSWERS_WITHIN_S if address.database else within_s)


@contextlib.contextmanager
def translated(address: Address) -> Iterator[None]:
    """Turns what MLflow raises into `Refused` (final) or `Unreachable` (worth another try), in one masked line."""
    import requests

    try:
        yield
    except requests.HTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (400, 404, 413):
            raise Refused(_one_line(error)) from error
        raise Unreachable(f"{_name(address)}: {_reason(error)}") from error
    except OSError as error:  # All that requests raises is one.
        raise Unreachable(f"{_name(address)}: {_reason(error)}") from error
    except Exception as error:
        code = getattr(error, "error_code", None)  # An MlflowException, told by this so as not to import MLflow.
        if code is None:
            raise
        if code in FINAL_CODES:
            raise Refused(_one_line(error), is_missing=code == MISSING) from error
        raise Unreachable(f"{_name(address)}: {_reason(error)}") from error


def experiment_id(client: MlflowClient, name: str, address: Address) -> str:
    """Finds or creates an experiment; another process may create it at the same moment.

    Raises:
        Refused: It exists but is deleted.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=address.artifact_location))
        except MlflowException as error:
            found = client.get_experiment_by_name(name)
            if found is None:
                raise error
    if found.lifecycle_stage == "deleted":
        raise Refused("it is deleted; restore it in MLflow")
    return str(found.experiment_id)


def search_runs(
    client: MlflowClient, experiments: list[str], condition: str, limit: int, token: str | None, view: str = "ALL"
) -> Any:
    """A page of runs, the newest first; its `token` asks for the next. `view` is a name of MLflow's ViewType."""
    from mlflow.entities import ViewType

    return client.search_runs(experiments, condition, getattr(ViewType, view), limit, page_token=token)


def download(source: str, into: Path, address: Address) -> Path:
    """Copies an artifact from the store.

    Args:
        source: A `runs:/...` or `models:/...` address of a file or folder.
        into: Folder to put it in; made if need be.
        address: Where the address is looked up.

    Raises:
        Refused, Unreachable: It is not there, or the store does not give it.
    """
    from mlflow.artifacts import download_artifacts

    into.mkdir(exist_ok=True)
    with translated(address):
        return Path(download_artifacts(artifact_uri=source, dst_path=str(into), tracking_uri=address.uri))


def delete_artifacts(location: str, address: Address) -> None:
    """Removes an artifact location with all that is in it.

    Args:
        location: As MLflow recorded it.
        address: Of the server that recorded it. What it says is not trusted with files of this machine: only what lies
            under a sqlite file's own artifact folder is removed here.

    Raises:
        Refused, Unreachable: It is not to be removed from here, or the store does not do it.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    parts = urllib.parse.urlsplit(location)
    if parts.scheme in ("", "file"):
        path = Path(urllib.parse.unquote(parts.path)).resolve()
        own = (address.database.parent / "artifacts").resolve() if address.database else None
        if own is None or own not in path.parents:
            raise Refused(f"{location} is no place of {address.uri} that may be written from here")
        if not path.exists():
            return
    with translated(address):
        get_artifact_repository(location, tracking_uri=address.uri).delete_artifacts()


def ui_command(tracking_uri: str) -> str:
    """What to type, or to open in a browser, to see runs and models."""
    address = Address.parse(tracking_uri)
    if address.database is None:
        return address.uri
    program = Path(sys.executable).parent / "mlflow"
    with contextlib.suppress(ValueError):
        program = program.relative_to(Path.cwd())
    return f"{shlex.quote(str(program))} ui --backend-store-uri {shlex.quote(address.uri)}"


def _bounded(address: Address, question: Callable[[], T], seconds: float) -> T:
    try:
        with translated(address):
            return within(seconds, question, "tracking-question")
    except Unreachable as error:
        raise UserError(f"{error}; {_advice(address, str(error))}") from None


def _look_for_life(address: Address) -> None:
    """Any answer at all will do. Before MLflow is imported, so that a wrong address is told at once."""
    import requests

    with contextlib.suppress(requests.exceptions.SSLError):  # MLflow has its own settings for certificates.
        requests.get(f"{address.uri}/health", timeout=SIGN_OF_LIFE_WITHIN_S, allow_redirects=False, stream=True).close()


def _check_database(database: Path, *, may_create: bool) -> None:
    """Opens the file for writing ourselves first: MLflow would retry a hopeless one for a hundred seconds."""
    if not may_create and not database.exists():
        raise UserError(
            f"there is no tracking database at {database}; check --home and --tracking-uri, or register a model first"
        )
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(database, timeout=DATABASE_LOCK_WAIT_S)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            names = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            connection.rollback()
    except (OSError, sqlite3.Error) as error:
        raise UserError(
            f"tracking database {database} cannot be used ({error}); give a writable sqlite:////path/mlflow.db"
        ) from None
    if names and not names & MLFLOW_TABLES:
        raise UserError(f"{database} is another program's database, not MLflow's; give sqlite:////path/mlflow.db")


def _name(address: Address) -> str:
    return f"tracking database {address.database}" if address.database else f"tracking server {address.uri}"


def _advice(address: Address, reason: str) -> str:
    if address.database:
        return "see that no other program holds it, or give another --tracking-uri"
    if "MLFLOW_TRACKING_PASSWORD" in reason:
        return "set them as they are on that server"
    if "denied" in reason:
        return "ask who runs it for the right to write"
    return "start it, or give another --tracking-uri"


def _reason(error: BaseException) -> str:
    """What went wrong, in a few words where the kind is known."""
    text = str(error)
    known = {
        "Connection refused": "connection refused",
        "timed out": "no answer in time",
        "out-of-date database schema": "the database was made by another MLflow version; run `mlflow db upgrade`",
        "Name or service not known": "unknown host name",
        "Temporary failure in name resolution": "the host name cannot be resolved",
        "error code 401": "needs a user and password (MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD)",
        "error code 403": "access denied (HTTP 403)",
        "error code 404": "answers, but not as an MLflow server (HTTP 404)",
        "database is locked": "locked by another process",
    }
    status = re.search(r"(?:error code|too many) (\d{3})", text)
    otherwise = f"answers with HTTP {status[1]}" if status else _one_line(error)
    return next((words for sign, words in known.items() if sign in text), otherwise)


def _one_line(error: BaseException) -> str:
    text = " ".join(mask(str(error)).split())
    return text if len(text) <= 300 else text[:297] + "..."
