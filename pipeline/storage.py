"""Where data lies: a local path or any `pyarrow.fs` address (s3://, gs://, file://), and its errors in words.

S3 takes its keys from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE, a machine's role) and a
store other than Amazon's from AWS_ENDPOINT_URL_S3 or the address (`?endpoint_override=HOST:PORT&scheme=http`). Every
process that reads or writes takes the keys from its own environment: they travel in no message.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.errors import UserError
from pipeline.server import CREDENTIALS
from pipeline.untrusted import MAX_RECORD_BYTES

CONNECT_WITHIN_S = 5.0
ANSWER_WITHIN_S = 4.0
OBJECT_STORES = frozenset({"s3", "gcs", "abfs"})

_HASH_CHUNK_BYTES = 1 << 22
_SECRET_QUERY = re.compile(r"([?&](?!(?:endpoint_override|scheme|region)=)[^=&\s]*=)[^&\s]*")

# What pyarrow and Amazon's, Google's and Microsoft's libraries say, and what it means. The first that fits.
_REASONS = {
    "AWS Error NO_SUCH_BUCKET": "there is no such bucket",
    "To create buckets, enable": "there is no such bucket",
    "AWS Error INVALID_ACCESS_KEY_ID": "the store does not know the key; check AWS_ACCESS_KEY_ID",
    "AWS Error SIGNATURE_DOES_NOT_MATCH": "the key's secret is wrong; check AWS_SECRET_ACCESS_KEY",
    "AWS Error ACCESS_DENIED": "access denied; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the key's rights",
    "curlCode: 6,": "unknown host name; check AWS_ENDPOINT_URL_S3",
    "curlCode: 7,": "the store does not answer: connection refused; check AWS_ENDPOINT_URL_S3",
    "curlCode: 28,": "the store does not answer in time; check AWS_ENDPOINT_URL_S3",
    "AWS Error NETWORK_CONNECTION": "no connection to the store; check AWS_ENDPOINT_URL_S3",
    "CURL error [6]": "unknown host name; check the address",
    "CURL error [7]": "the store does not answer: connection refused; check the address",
    "Fail to get a new connection": "no connection to the store; check the address",
    "No space left": "the disk is full",
}

# What they say of a store that may be back in a while.
_AWAY = re.compile(
    r"curlCode: (6|7|28),|AWS Error (NETWORK_CONNECTION|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|SLOW_DOWN)"
    r"|HTTP status (5|408|429)"  # of a server whose words Amazon's library does not know
    r"|cloud::Status\(UNAVAILABLE"
    r"|Azure Error: \[\w*\] (5\d\d|408|429|Fail to get a new connection)"
)


class StoreAway(UserError):
    """The address may be right, but whom it names does not answer."""


def locate(address: str) -> tuple[pafs.FileSystem, str]:
    """The file system and the path inside it of an address; a store is asked nothing but, at Amazon, its region.

    Raises:
        StoreAway: Amazon does not say where the bucket is.
        UserError: Not an address that pyarrow understands, or one without a bucket.
    """
    if "\0" in address or ("://" in address and ".." in address.partition("?")[0].split("/")):
        raise UserError(f"cannot use {shown(address)!r} as a place for data (it holds '..' or a NUL)")
    if "://" not in address:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(address)).rstrip("/")
    try:
        filesystem, path = pafs.FileSystem.from_uri(address)
    except (pa.ArrowException, ValueError) as error:
        raise UserError(f"cannot use {shown(address)!r} as a place for data ({shown(reason(error))})") from None
    except OSError as error:
        raise StoreAway(f"cannot use {shown(address)}: {shown(reason(error))}") from None
    if filesystem.type_name == "s3":
        filesystem = _impatient(filesystem)
    if not path.strip("/"):
        raise UserError(f"{shown(address)!r} names no bucket; give s3://BUCKET/PATH")
    return filesystem, path.rstrip("/")


def base_name(address: str) -> str:
    """What a dataset is called: the last part of its path."""
    return locate(address)[1].rpartition("/")[2]


def _impatient(filesystem: pafs.S3FileSystem) -> pafs.S3FileSystem:
    """The same, giving up on a store that hangs after a quarter of a minute instead of 100 s: three tries.

    An address cannot say so; what a pickle of the file system holds are the arguments of its constructor.
    """
    rebuild, (arguments,) = filesystem.__reduce__()
    return rebuild({**arguments, "connect_timeout": CONNECT_WITHIN_S, "request_timeout": ANSWER_WITHIN_S})


def shown(text: str) -> str:
    """An address, or a text with addresses in it, without the secrets that they may hold."""
    return _SECRET_QUERY.sub(r"\1***", CREDENTIALS.sub(r"\1***@", text)) if "://" in text else text


def reason(error: BaseException) -> str:
    """Why a place did not do what it was asked, in a few words where the kind is known, else the error's first line."""
    text = getattr(error, "strerror", None) or str(error)
    first_line = (text.splitlines() or [type(error).__name__])[0]
    return next((words for sign, words in _REASONS.items() if sign in text), first_line)


def is_away(error: BaseException) -> bool:
    """Whether an error says that an object store does not answer, or not now."""
    return isinstance(error, OSError) and bool(_AWAY.search(str(error)))


def complaint(address: str) -> str | None:
    """Why an address cannot be looked at now, in a few words; None where it can.

    Raises:
        UserError: It is none.
    """
    filesystem, path = locate(address)
    try:
        filesystem.get_file_info(path)
    except OSError as error:
        return f"{shown(address)}: {reason(error)}"
    return None


def is_object_store(filesystem: pafs.FileSystem) -> bool:
    """Whether files appear there whole, when they are closed, and cannot be renamed."""
    return filesystem.type_name in OBJECT_STORES


def require_bucket(filesystem: pafs.FileSystem, path: str, address: str) -> None:
    """Tells a missing bucket, which looks like an empty one to those who look for files.

    Raises:
        UserError: There is no such bucket, or the store does not let us look.
    """
    if not is_object_store(filesystem):
        return
    bucket = path.partition("/")[0]
    try:
        if filesystem.get_file_info(bucket).type == pafs.FileType.Directory:
            return
    except OSError as error:
        raise UserError(f"cannot use {shown(address)} ({reason(error)})") from None
    raise UserError(f"there is no bucket {bucket!r} for {shown(address)}; make it, or name another")


@contextlib.contextmanager
def writing_told(filesystem: pafs.FileSystem, address: str) -> Iterator[None]:
    """Says in one line what kept workers from writing.

    Raises:
        UserError: A folder is not the same on all nodes, or a store refuses or does not answer.
    """
    try:
        yield
    except Exception as error:
        cause = getattr(error, "cause", None) or error  # Ray's wrappers hold what the worker raised
        if isinstance(cause, FileNotFoundError):
            raise not_shared(address, reason(cause)) from None
        if isinstance(cause, OSError) and is_object_store(filesystem):
            raise UserError(
                f"cannot write to {shown(address)} ({reason(cause)}); mend that, and run it again"
            ) from None
        raise


def not_shared(address: str, what: str) -> UserError:
    """The line about a folder that is another one on another node."""
    return UserError(
        f"{shown(address)} is not the same folder on all nodes ({what}); name one that every node sees, or for data "
        "s3://BUCKET/PATH"
    )


def read_small(filesystem: pafs.FileSystem, path: str) -> bytes:
    """A small file as a whole; opening a pipe or a device could wait for ever.

    Raises:
        OSError: There is no such file, or it is something else, or too large to be what it should be.
    """
    info = filesystem.get_file_info(path)
    if info.type != pafs.FileType.File or info.size > MAX_RECORD_BYTES:
        raise OSError(f"{path} is no plain file of at most {MAX_RECORD_BYTES} bytes")
    with filesystem.open_input_stream(path) as stream:
        return bytes(stream.read())


def write_atomically(filesystem: pafs.FileSystem, path: str, content: bytes) -> None:
    """Writes a whole file so that a reader sees either nothing or all of it."""
    target = path if is_object_store(filesystem) else f"{path}.tmp"
    with filesystem.open_output_stream(target) as stream:
        stream.write(content)
    if target != path:
        filesystem.move(target, path)


def hash_file(filesystem: pafs.FileSystem, path: str) -> str:
    """sha256 of a file's bytes (64 hex digits), read in chunks."""
    digest = hashlib.sha256()
    with filesystem.open_input_stream(path) as stream:
        while chunk := stream.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
