"""Passwords and keys by reference: a file that only its owner can read, on the machine that needs them.

What goes through Ray is the file's path. No value stands in a command, a job's description or a runtime environment,
which everyone who reaches the cluster's dashboard can read.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

SECRETS_FILE_VARIABLE = "LATENTRL_SECRETS_FILE"
WORKER_HOOK = "pipeline.secrets.load_secrets"  # what Ray calls in each worker process

_SECRET_NAME = re.compile(
    r"password|passwd|passphrase|token(?!iz)|secret|credential|apikey|(?<![a-z0-9])keys?(?![a-z0-9])|signature",
    re.IGNORECASE,
)
_REFERENCE = re.compile(r"[._-](file|path|dir)$", re.IGNORECASE)
_SCHEME = r"[a-z][a-z0-9+.-]*://"
_PASSWORD_IN_ADDRESS = re.compile(rf"{_SCHEME}[^/?#\s@]*:[^/?#\s]*@|https?://[^/?#\s]+@", re.IGNORECASE)
_QUERY_NAMES = re.compile(rf"{_SCHEME}\S*?\?(\S*)", re.IGNORECASE)
_KNOWN_SHAPE = re.compile(r"\b(AKIA|ASIA)[0-9A-Z]{16}\b|\bgh[pousr]_\w{30,}|\bglpat-[\w-]{20,}|-----BEGIN ")


def load_secrets() -> None:
    """Puts the variables of the file that $LATENTRL_SECRETS_FILE names into this process; nothing where it is not set.

    Raises:
        UserError: The file is not there, is not only its owner's, or is not made of lines NAME=VALUE.
    """
    path = os.environ.get(SECRETS_FILE_VARIABLE)
    if path:
        os.environ.update(read_secrets(Path(path)))


def read_secrets(path: Path) -> dict[str, str]:
    """The variables of a secrets file: lines NAME=VALUE as in a `.env` file, nothing in them replaced.

    Raises:
        UserError: As for `load_secrets`; the message holds no value.
    """
    from dotenv import dotenv_values

    try:
        with path.open() as file:
            _require_private(path, os.fstat(file.fileno()))
            values = dotenv_values(stream=file, interpolate=False)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise UserError(
            f"cannot read the secrets file {path} on this machine ({reason}); put it on every node, or name another"
        ) from None
    bare = [name for name, value in values.items() if value is None]
    if bare or not values:
        raise UserError(f"the secrets file {path} holds a line without NAME=VALUE; mend it")
    return {name: value for name, value in values.items() if value is not None}


def for_workers() -> dict[str, Any]:
    """The runtime environment with which workers of a cluster read the same file; empty where there is none."""
    path = os.environ.get(SECRETS_FILE_VARIABLE)
    if not path:
        return {}
    return {"env_vars": {SECRETS_FILE_VARIABLE: path}, "worker_process_setup_hook": WORKER_HOOK}


def is_secret_name(name: str) -> bool:
    """Whether a variable or setting of that name holds a secret; one that names a file or path only refers to it."""
    return _SECRET_NAME.search(name) is not None and _REFERENCE.search(name) is None


def secret_in(word: str) -> str | None:
    """What makes a command's word look like a secret, in words that do not repeat it; None where nothing does."""
    name, separator, _ = word.partition("=")
    if separator and re.fullmatch(r"[\w.-]+", name) and is_secret_name(name):
        return f"{name.lstrip('-')} is the name of a secret"
    if _PASSWORD_IN_ADDRESS.search(word):
        return "an address holds a user and password"
    if (query := _QUERY_NAMES.search(word)) and any(is_secret_name(p.partition("=")[0]) for p in query[1].split("&")):
        return "an address is signed or holds a token"
    return "a key or token stands in it" if _KNOWN_SHAPE.search(word) else None


def _require_private(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"the secrets file {path} is not a file; name one with lines NAME=VALUE")
    if status.st_uid != os.geteuid():
        raise UserError(
            f"the secrets file {path} belongs to user {status.st_uid} and this process to {os.geteuid()}; "
            "the file must be the own of whoever runs the cluster"
        )
    if status.st_mode & 0o077:
        raise UserError(
            f"the secrets file {path} can be read by others (mode {status.st_mode & 0o777:o}); chmod 600 it"
        )
