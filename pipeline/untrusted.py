"""Records in files that another person may have written: plain files, strict JSON, fields of the declared types, and
names that stay in their folder.

Nothing here runs code that a file brings, follows a name out of a folder, or takes memory for what a file merely
declares.
"""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
import stat
import types
import typing
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from pipeline.errors import UserError, reason

T = TypeVar("T")

MAX_RECORD_BYTES = 64 * 2**20
_MOST_JSON_BYTES = 16 * 2**20  # of "[],[],..." Python makes 24 times as much

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 80


def short(value: Any) -> str:
    """A value as an error shows it: at most about a line of it."""
    return _repr.repr(value)


def read_bytes(path: Path, what: str, max_bytes: int = MAX_RECORD_BYTES) -> bytes:
    """The content of a plain file. Opening a pipe or a device could wait for ever.

    Raises:
        UserError: There is no such file, it is of another kind, or too large to be what it should be.
    """
    size = require_plain_file(path, what)
    if size > max_bytes:
        raise UserError(f"{what} has {size} bytes, more than the {max_bytes} that it may have: {path}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {what} ({error.strerror}): {path}") from None


def require_plain_file(path: Path, what: str) -> int:
    """Its size in bytes.

    Raises:
        UserError: There is no such file, or it is a folder, a pipe or a device.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {what} ({reason(error)})") from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{what} is no plain file: {path}")
    return status.st_size


def require_plain_entries(folder: Path, what: str) -> None:
    """Refuses a folder of another person in which a link or a pipe would take what is written elsewhere.

    Raises:
        UserError: Names it.
    """
    for entry in folder.iterdir():
        if stat.S_IFMT(entry.lstat().st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
            raise UserError(f"{what} holds {short(entry.name)}, neither a file nor a folder; do not trust its maker")


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file; errors as of `read_bytes` and `parse_object`."""
    return parse_object(read_bytes(path, what), what)


def parse_object(content: str | bytes, what: str) -> dict[str, Any]:
    """A JSON object in which no key stands twice: two readers could each see another value.

    Raises:
        UserError: Not JSON, or no object, or more than 16 MiB of it.
    """
    if len(content) > _MOST_JSON_BYTES:
        raise UserError(f"{what} has {len(content)} bytes, more than the {_MOST_JSON_BYTES} that JSON may have here")
    try:
        value = json.loads(content, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is not JSON ({reason(error)})") from None
    if not isinstance(value, dict):
        raise UserError(f"{what} holds a {type(value).__name__}, not an object with keys and values")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands there twice")
    return found


def from_record(cls: type[T], record: Any, what: str, *, may_lack: str | None = None) -> T:
    """A dataclass from the plain values of a file.

    Args:
        cls: The dataclass, whose fields are numbers, words, tuples, mappings and dataclasses.
        record: Must have exactly its keys, with values of the declared types. Numbers must be finite.
        what: Whose record it is, for the message.
        may_lack: A field that records of earlier versions do not have; its default holds then.

    Raises:
        UserError: Says which key is wrong, or what the class itself refuses (a ValueError in its `__post_init__`).
    """
    if not isinstance(record, Mapping):
        raise UserError(f"{what} holds a {type(record).__name__}, not an object with keys and values")
    names = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    names -= {may_lack} - set(record)
    if wrong := sorted(set(record) ^ names):
        raise UserError(f"{what} has unknown or missing keys {short(wrong)}; it needs {', '.join(sorted(names))}")
    hints = typing.get_type_hints(cls)
    values = {}
    for name in sorted(names):
        try:
            values[name] = converted(record[name], hints[name], f"{what}: {name}")
        except ValueError as error:
            raise UserError(f"{what}: {name} is {short(record[name])}, which {error}") from None
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(f"{what}: {error}") from None


def converted(value: Any, expected: Any, what: str) -> Any:
    """A plain value as a declared type: lists become tuples, whole numbers may stand for others.

    Raises:
        ValueError: "is not ..." or "is none of ...", to be put after the value.
        UserError: From a dataclass inside.
    """
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        inner = next(kind for kind in arguments if kind is not type(None))
        return None if value is None and type(None) in arguments else converted(value, inner, what)
    if origin is typing.Literal:
        if type(value) not in map(type, arguments) or value not in arguments:
            raise ValueError(f"is none of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError("is not a list")
        return tuple(converted(item, arguments[0], what) for item in value)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError("is not an object with keys and values")
        return {key: converted(item, arguments[1], what) for key, item in value.items()}
    if dataclasses.is_dataclass(expected):
        return from_record(typing.cast(type, expected), value, what)
    return value if expected is Any else _scalar(value, expected)


def _scalar(value: Any, expected: type) -> Any:
    if expected is float and type(value) is int:
        value = float(value) if abs(value) < 2**1000 else math.inf
    if type(value) is not expected:
        raise ValueError(f"is not of type {expected.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("is not a finite number")
    return value


def require_inside(name: str, what: str) -> str:
    """The name of a file inside a folder, as it stands in an archive, a manifest or an address.

    Raises:
        UserError: It leads, or could be read to lead, out of the folder: absolute, with `..`, a backslash, a percent
            sign, a control character.
    """
    path = PurePosixPath(name)
    is_odd = not name.isprintable() or any(sign in name for sign in "\\%:") or len(name) > 1000
    if is_odd or path.is_absolute() or not path.parts or ".." in path.parts or name.startswith("~"):
        raise UserError(f"{what} holds the file name {short(name)}, which leads elsewhere; do not trust its sender")
    return name
