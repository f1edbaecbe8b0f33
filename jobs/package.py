"""What a job is sent: a folder's code and settings in one archive, without data, environments and secrets."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

# Ray stores packages up to 512 MiB, but its dashboard, which takes them from us, refuses more than this (2.60).
MAX_BYTES = 100 << 20
NUM_NAMED = 5

# Patterns as in a .gitignore; what .gitignore and .rayignore files name is left out too.
EXCLUDES = (
    *(".git", ".venv", "venv", "node_modules", "__pycache__", "*.egg-info", "/build", "/dist"),
    *(".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis", ".ipynb_checkpoints"),
    *("latentrl-runs", "latentrl-demo*", "mlruns", "mlartifacts", "mlflow.db*", "checkpoints"),
    *("*.parquet", "*.safetensors", "*.npy", "*.npz", "*.pt", "*.pth", "*.ckpt", "*.mp4"),
    *(".env", ".env.*", "*.pem", "*.key", "auth_token", ".netrc", ".ssh", ".aws", ".kube"),
)
REQUIREMENTS_FILES = ("pyproject.toml", "constraints.txt")
# Ray puts the folder's place on the node in for this before pip, which itself expands it in requirements, runs.
_ON_THE_NODE = "${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}"


@dataclass(frozen=True)
class Package:
    """A folder as it is sent.

    Attributes:
        root: The folder.
        archive: The zip file.
        files: Paths in it, relative to `root`.
        digest: sha256 over the files' names and contents.
    """

    root: Path
    archive: Path
    files: frozenset[str]
    digest: str

    @property
    def num_bytes(self) -> int:
        """Size of the archive."""
        return self.archive.stat().st_size


def own_checkout() -> Path | None:
    """The checkout that this latentrl runs from; None where it is installed as a package."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "pyproject.toml").is_file() else None


@contextlib.contextmanager
def packed(root: Path, excludes: Sequence[str] = ()) -> Iterator[Package]:
    """Packs a folder for as long as it is needed.

    Args:
        root: An existing folder.
        excludes: More patterns to leave out.

    Raises:
        UserError: There is no such folder, or more in it than can be sent; the largest files are named.
    """
    if not root.is_dir():
        raise UserError(f"--working-dir {root} is not a folder; name the one that holds the code to run")
    sizes = _sizes(root, [*EXCLUDES, *excludes])
    _require_small(root, sizes)
    with tempfile.TemporaryDirectory(prefix="latentrl-package-") as folder:
        archive = Path(folder) / "package.zip"
        digest = hashlib.sha256()
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as target:
            for name in sorted(sizes):
                content = (root / name).read_bytes()
                digest.update(f"{name}\0{len(content)}\0".encode() + content)
                mode = (root / name).stat().st_mode & 0o777
                entry = zipfile.ZipInfo(name)  # of 1980: the same files make the same archive
                entry.external_attr = mode << 16
                target.writestr(entry, content, zipfile.ZIP_DEFLATED)
        yield Package(root, archive, frozenset(sizes), digest.hexdigest())


def pinned_environment(package: Package | None) -> dict[str, Any]:
    """Ray's `pip` field that installs the project's dependencies, pinned by the package's own constraints.

    The project itself is not installed: its code is the package's.

    Raises:
        UserError: There is no package, or it lacks one of the two files.
    """
    missing = [name for name in REQUIREMENTS_FILES if package is None or name not in package.files]
    if package is None or missing:
        raise UserError(f"--install needs {' and '.join(missing)} in the --working-dir; name a checkout of the project")
    project = tomllib.loads((package.root / "pyproject.toml").read_text()).get("project", {})
    pins = hashlib.sha256((package.root / "constraints.txt").read_bytes()).hexdigest()
    # Ray keeps environments by the text of this list, so the pins must be in it.
    packages = [*project.get("dependencies", []), f"-c {_ON_THE_NODE}/constraints.txt", f"# pins {pins}"]
    return {"packages": packages, "pip_check": False}


def _sizes(root: Path, excludes: list[str]) -> dict[str, int]:
    """Bytes of every file that is sent, by Ray's own reading of the patterns and ignore files."""
    from ray._private.runtime_env import packaging

    sizes: dict[str, int] = {}

    def note(path: Path) -> None:
        if path.is_file():
            sizes[path.relative_to(root).as_posix()] = path.stat().st_size

    silent = logging.getLogger(f"{__name__}.silent")
    silent.disabled = True
    packaging._dir_travel(root, [packaging._get_excludes(root, excludes)], note, include_gitignore=True, logger=silent)
    return sizes


def _require_small(root: Path, sizes: dict[str, int]) -> None:
    total = sum(sizes.values())
    if total <= MAX_BYTES:
        return
    largest = sorted(sizes, key=lambda name: -sizes[name])[:NUM_NAMED]
    named = ", ".join(f"{name} ({sizes[name] >> 20} MiB)" for name in largest)
    raise UserError(
        f"{root} holds {total >> 20} MiB to send, Ray's dashboard takes {MAX_BYTES >> 20}; the largest files: {named}; "
        "leave them out with --exclude PATTERN, a .gitignore or a .rayignore"
    )
