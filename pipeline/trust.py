"""To whom this user's MLflow password goes: MLflow itself sends it to whatever host it is pointed at.

Where a run is tracked stands in its folder, and where a model's files lie stands in the registry: other people may have
written both.
"""

from __future__ import annotations

import os
import urllib.parse
from pathlib import Path

from pipeline.errors import UserError
from pipeline.server import Address

_VARIABLES = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")


def has_credentials() -> bool:
    """Whether MLflow has a user and password, or a token, to send."""
    return any(os.environ.get(name) for name in _VARIABLES) or (Path.home() / ".mlflow" / "credentials").exists()


def address_of_run(recorded: str, given: str | None, name: str) -> Address:
    """A run's own address; taken from `given` when that is the same one, for the credentials it may carry.

    Args:
        recorded: What stands in the run's folder.
        given: What the user gave, or the default.
        name: The run's.

    Raises:
        UserError: They differ, and there is a password, which would be sent to the recorded one.
    """
    own = Address.parse(recorded)
    other = Address.parse(given) if given else own
    if other == own:
        return other
    if own.database is None and has_credentials():
        raise UserError(
            f"run {name} says that it is tracked at {own.uri}, and your MLflow user and password would be sent there; "
            f"if that server is yours, add --tracking-uri {own.uri}"
        )
    return own


def require_own_store(uri: str, address: Address) -> None:
    """For the place of an artifact, which whoever registered it chose.

    Raises:
        UserError: It is another host than the tracking server's, and there is a password to send.
    """
    parts = urllib.parse.urlsplit(uri)
    host, own = parts.netloc.rpartition("@")[2], urllib.parse.urlsplit(address.uri).netloc
    if parts.scheme in ("http", "https", "mlflow-artifacts") and host not in ("", own) and has_credentials():
        raise UserError(
            f"the files lie at {host}, and your MLflow user and password for {address.uri} would be sent there; do not "
            "trust whoever registered them, or unset MLFLOW_TRACKING_PASSWORD"
        )
