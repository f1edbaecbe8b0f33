"""A bundle: a folder sealed by SHA256SUMS, so that one hash names its whole content and no byte changes unnoticed."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import io
import os
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from pipeline.disk import full_disk_told
from pipeline.errors import UserError, reading
from pipeline.untrusted import read_bytes, require_inside, short

SUMS_FILE = "SHA256SUMS"
_MOST_SUMS_BYTES = 1 << 20
_ZIP_DATE = (1980, 1, 1, 0, 0, 0)


@contextlib.contextmanager
def writing(path: Path, earlier: Path | None = None) -> Iterator[Path]:
    """A temporary folder to fill; on success it is sealed and renamed to `path`, otherwise removed.

    Args:
        path: The bundle's folder, which must not exist.
        earlier: A bundle some of whose files may be hard-linked into the new one, at the same places. Their hashes
            are those of when they were written, so that bytes that have changed since do not pass for sound.

    Raises:
        UserError: `path` exists, or cannot be written, or the disk is full.
    """
    if path.exists():
        raise UserError(f"{path} exists already; name another folder or remove it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=_draft_prefix(path), dir=path.parent))
    except OSError as error:
        raise UserError(f"cannot write the bundle {path} ({error.strerror}); choose another folder") from None
    try:
        with full_disk_told(path.parent):
            yield draft
            (draft / SUMS_FILE).write_text(_sums(draft, earlier))
            _reach_disk(draft)
        draft.chmod(0o755)
        os.replace(draft, path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _reach_disk(draft: Path) -> None:
    """Files that are linked from an earlier bundle have reached it then, and cost nothing here."""
    for name in [*_file_names(draft), SUMS_FILE]:
        with (draft / name).open("rb") as file:
            os.fsync(file.fileno())


def drafts(path: Path) -> list[Path]:
    """What writers of `path` have not sealed (yet)."""
    return sorted(path.parent.glob(f"{glob.escape(_draft_prefix(path))}*"))


def discard_drafts(path: Path) -> None:
    """Removes what killed writers of `path` left unsealed; only for a path that no other process writes."""
    for draft in drafts(path):
        shutil.rmtree(draft, ignore_errors=True)


def _draft_prefix(path: Path) -> str:
    return f".{path.name}-"


def sha256_of(path: Path) -> str:
    """The bundle's own hash: sha256 of its SHA256SUMS file, 64 hex digits.

    Raises:
        UserError: Not a bundle.
    """
    return hashlib.sha256(_read_sums(path)).hexdigest()


def listed_names(path: Path) -> set[str]:
    """The files that a bundle consists of, SHA256SUMS included, as POSIX paths relative to it.

    Raises:
        UserError: Not a bundle.
    """
    lines = _read_sums(path).decode(errors="replace").splitlines()
    return {SUMS_FILE, *(_parse(line, path)[0] for line in lines)}


def verify(path: Path, expect_sha256: str | None = None) -> str:
    """Checks every file of a bundle against its SHA256SUMS.

    Args:
        path: The bundle's folder.
        expect_sha256: What the bundle must hash to, if known.

    Returns:
        The bundle's sha256.

    Raises:
        UserError: Not a bundle, a file is missing, added or changed (named), or the bundle is not the expected one.
    """
    sums = _read_sums(path)
    listed = dict(_parse(line, path) for line in sums.decode(errors="replace").splitlines())
    with reading(f"bundle {path}", "fetch it again"):
        present = set(_file_names(path))
    for name in sorted(listed.keys() | present):
        if name not in listed or name not in present:
            what = "missing" if name in listed else f"not listed in {SUMS_FILE}"
            raise UserError(f"bundle {path}: {_named(name)} is {what}")
        if _hash(path / name) != listed[name]:
            raise UserError(
                f"bundle {path}: the bytes of {_named(name)} have changed; restore it or write the bundle again"
            )
    sha256 = hashlib.sha256(sums).hexdigest()
    if expect_sha256 is not None and sha256 != expect_sha256:
        raise UserError(f"bundle {path} has sha256 {sha256}, not {expect_sha256} as expected; fetch it again")
    return sha256


def _named(name: str) -> str:
    return name if name.isprintable() and len(name) < 200 else short(name)


def pack(path: Path) -> bytes:
    """The bundle as one zip archive, uncompressed, the same bytes for the same bundle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in [*_file_names(path), SUMS_FILE]:
            archive.writestr(zipfile.ZipInfo(name, _ZIP_DATE), (path / name).read_bytes())
    return buffer.getvalue()


def unpack(blob: bytes, directory: Path, expect_sha256: str) -> Path:
    """Writes a packed bundle to `directory`, which must not exist, and verifies it.

    Raises:
        UserError: The bytes are not the expected bundle; nothing is left behind then.
    """
    draft = Path(tempfile.mkdtemp(prefix=_draft_prefix(directory), dir=_made(directory.parent)))
    try:
        with full_disk_told(directory), reading(f"a packed bundle on its way to {directory}", "send it again"):
            _extract(blob, draft)
            verify(draft, expect_sha256)
            os.replace(draft, directory)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return directory


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _extract(blob: bytes, root: Path) -> None:
    """Writes the files of an archive; names that lead out of the root are refused, and whatever `pack` never makes."""
    with zipfile.ZipFile(io.BytesIO(blob)) as archive:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > len(blob):
                raise ValueError(f"{short(info.filename)} is compressed, or larger than the archive")
            target = root / require_inside(info.filename, "a packed bundle")
            _made(target.parent)
            target.write_bytes(archive.read(info))


def _file_names(root: Path) -> list[str]:
    """All files but the top SHA256SUMS, as sorted POSIX paths relative to the root.

    Raises:
        UserError: Something in it is neither a plain file nor a folder: a link leads out of what the hash names.
    """
    entries = {entry.relative_to(root).as_posix(): entry.lstat().st_mode for entry in root.rglob("*")}
    for name, mode in sorted(entries.items()):
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise UserError(f"bundle {root}: {short(name)} is neither a file nor a folder; do not trust its maker")
    return sorted(name for name, mode in entries.items() if stat.S_ISREG(mode) and name != SUMS_FILE)


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sums(root: Path, earlier: Path | None) -> str:
    known = _linked_hashes(root, earlier) if earlier is not None else {}
    return "".join(f"{known.get(name) or _hash(root / name)}  {name}\n" for name in _file_names(root))


def _linked_hashes(root: Path, earlier: Path) -> dict[str, str]:
    """Hashes that an earlier bundle lists of the files that are still the same ones under `root`, by name."""
    lines = (_parse(line, earlier) for line in _read_sums(earlier).decode(errors="replace").splitlines())
    return {name: digest for name, digest in lines if _is_same_file(root / name, earlier / name)}


def _is_same_file(one: Path, other: Path) -> bool:
    return one.is_file() and other.is_file() and one.samefile(other)


def _read_sums(path: Path) -> bytes:
    if not (path / SUMS_FILE).is_file():
        what = "is not a bundle (no SHA256SUMS)" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {what}; name the folder of an encoder or a policy")
    return read_bytes(path / SUMS_FILE, f"the {SUMS_FILE} of {path}", _MOST_SUMS_BYTES)


def _parse(line: str, path: Path) -> tuple[str, str]:
    digest, separator, name = line.partition("  ")
    if not separator or len(digest) != 64:
        raise UserError(f"bundle {path}: a line of {SUMS_FILE} is {short(line)}; restore it or write the bundle again")
    return name, digest
