"""A local Ray that only this machine's own user can reach: on loopback, with a token that nobody else can read."""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ray._private import ray_constants

from pipeline.errors import UserError

TOKEN_FILE = Path(".ray") / "auth_token"  # in the user's home; where Ray looks


@contextlib.contextmanager
def on_loopback() -> Iterator[None]:
    """Around `ray.init` of a local session: its services listen on 127.0.0.1 and nowhere else.

    Ray's services listen on all interfaces but where the node's own address is 127.0.0.1, and Ray gives a node that
    address only where it knows no clusters, on macOS and Windows; asked for it, 2.60 puts the outer address in its
    place. The constant is private; tests/test_loopback.py looks at the sockets.
    """
    make_token_private()
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def make_token_private() -> None:
    """Makes Ray's token where there is none, and takes it out of other users' reach where Ray made it (mode 0644).

    Whoever can read the token can run code as this user in every local session.

    Raises:
        UserError: The home cannot be written.
    """
    path = Path.home() / TOKEN_FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            _write_whole(path, secrets.token_hex(32))
        status = path.stat()
        if status.st_mode & 0o077 and status.st_uid == os.getuid():
            path.chmod(0o600)
    except OSError as error:
        raise UserError(
            f"cannot keep Ray's token in {path} ({error.strerror}); set HOME to a folder of yours"
        ) from None


def _write_whole(path: Path, token: str) -> None:
    """Another process may do the same at the same moment; whoever is first is right, and nobody reads half of it."""
    descriptor, draft = tempfile.mkstemp(dir=path.parent)  # mode 0600
    with os.fdopen(descriptor, "w") as file:
        file.write(token)
    try:
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        os.unlink(draft)
