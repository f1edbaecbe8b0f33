"""Full disks, told in one line wherever they are met, and files that are replaced as a whole."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import UserError

_CODES = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# What Arrow and safetensors say instead of a code, and numpy of a file that took only a part of an array.
_SIGNS = re.compile(r"No space left|Disk quota exceeded|File too large|\d+ requested and \d+ written")


@contextlib.contextmanager
def full_disk_told(place: str | Path) -> Iterator[None]:
    """Turns what a full disk raises into one line.

    Args:
        place: A path on the disk, or an address; what is written lies there or will.

    Raises:
        UserError: The disk was full.
    """
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        raise full(place) from None


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk, a quota or the size allowed to a file is used up."""
    cause = getattr(error, "cause", None) or error  # Ray's wrappers hold what the worker raised
    return getattr(cause, "errno", None) in _CODES or bool(_SIGNS.search(str(cause)))


def full(place: str | Path) -> UserError:
    """The line about a full disk: the place, and the space that is free now."""
    return UserError(f"the disk of {place} is full ({_free(str(place))}); free space or name another folder")


def write_text(path: Path, text: str) -> None:
    """Replaces a file as a whole: a reader, a crash or a full disk finds the old content or the new."""
    draft = path.with_name(f"{path.name}.tmp")
    try:
        with draft.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def _free(place: str) -> str:
    if "://" in place:
        return "its store says so"
    path = Path(place).absolute()
    nearest = next((folder for folder in (path, *path.parents) if folder.exists()), Path("/"))
    usage = shutil.disk_usage(nearest)
    return f"{usage.free / 2**20:,.1f} of {usage.total / 2**20:,.1f} MiB free"
