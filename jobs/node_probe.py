"""What `latentrl doctor` asks on a node. Sent there by value, so that a node without latentrl can say so.

For the same reason nothing but the standard library is imported before a question needs it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PACKAGES = ("latentrl", "ray", "torch", "mlflow", "numpy", "pyarrow")
ROOMS = ("pipeline", "rllib_ext", "jobs")
SHARED_MEMORY = "/dev/shm"
DRIVERS_FILE = "driver"
SEEN_WITHIN_S = 5.0  # how long a network file system may take to show another machine's file
CUDA_ANSWERS_WITHIN_S = 60.0

_COUNT_CUDA = "import torch; print(torch.cuda.device_count())"


class NodeProbe:
    """Answers about the node that it is on; the driver holds one too. Everything returned is plain values."""

    def versions(self) -> dict[str, str]:
        """Version of Python and of each package, "none" where it is not installed; a hash of latentrl's own code."""
        found = {"python": platform.python_version()}
        for package in PACKAGES:
            try:
                found[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                found[package] = "none"
        return {**found, "code": _code()}

    def clock(self) -> float:
        """Seconds since the epoch."""
        return time.time()

    def shared_memory_bytes(self) -> int | None:
        """Size of /dev/shm; None where there is none."""
        return shutil.disk_usage(SHARED_MEMORY).total if os.path.isdir(SHARED_MEMORY) else None

    def num_cuda_devices(self) -> int | str:
        """GPUs that torch sees, counted by a process from which Ray hides none; or why they cannot be counted."""
        environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
        command = [sys.executable, "-c", _COUNT_CUDA]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=CUDA_ANSWERS_WITHIN_S, env=environment, check=False
            )
        except subprocess.TimeoutExpired:
            return f"torch did not answer within {CUDA_ANSWERS_WITHIN_S:.0f} s"
        return int(done.stdout) if done.returncode == 0 else (done.stderr.splitlines() or ["torch failed"])[-1]

    def place(self, address: str, folder: str, secret: str, name: str) -> dict[str, str | bool]:
        """Looks for the driver's file in a folder and writes one beside it.

        Args:
            address: Of the place, as the user gave it.
            folder: Name of the driver's folder there.
            secret: What the driver's file holds.
            name: Of this node's file.

        Returns:
            `is_there` (the place itself), `is_seen` (the driver's file), and `error` ("" if all went well).
        """
        from pipeline.storage import locate

        seen: dict[str, str | bool] = {"is_there": False, "is_seen": False, "error": ""}
        try:
            filesystem, root = locate(address)
            until = time.monotonic() + SEEN_WITHIN_S
            while not seen["is_seen"]:
                seen["is_there"] = is_there(filesystem, root)
                seen["is_seen"] = content_of(filesystem, f"{root}/{folder}/{DRIVERS_FILE}") == secret
                if time.monotonic() > until:
                    return seen
                time.sleep(0.0 if seen["is_seen"] else 0.2)
            write_twice(filesystem, f"{root}/{folder}/{name}", secret)
        except Exception as error:  # each kind of store has errors of its own
            seen["error"] = first_line(error)
        return seen

    def tracking(self, uri: str, writes: bool) -> str:
        """Whether a tracking server takes this node's credentials, and a run and an artifact where it `writes`.

        Returns:
            "" or what is wrong.
        """
        from pipeline import server
        from pipeline.errors import UserError
        from pipeline.trial import trial_run

        try:
            if not writes:
                server.check(server.Address.parse(uri), may_create=False)
                return ""
            with trial_run(uri) as run:
                run.try_artifact()
        except UserError as error:
            return str(error)
        return ""


def write_twice(filesystem: Any, path: str, content: str) -> None:
    """The second time it replaces what is there, as manifests and checkpoints are replaced."""
    from pipeline.storage import write_atomically

    for text in ("", content):
        write_atomically(filesystem, path, text.encode())


def content_of(filesystem: Any, path: str) -> str | None:
    """A small file's text; None where there is none."""
    if not is_there(filesystem, path):
        return None
    with filesystem.open_input_stream(path) as stream:
        return str(stream.read().decode())


def is_there(filesystem: Any, path: str) -> bool:
    """Whether there is a file or folder of that name."""
    return bool(filesystem.get_file_info(path).type.value)  # FileType.NotFound is 0


def first_line(error: BaseException) -> str:
    """Of an error's text."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _code() -> str:
    """Eight digits of a hash over latentrl's source files as this process would import them; "none" without any."""
    digest, num_files = hashlib.sha256(), 0
    for room in ROOMS:
        spec = importlib.util.find_spec(room)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for file in sorted(Path(folder).rglob("*.py")):
                digest.update(f"{room}/{file.relative_to(folder)}\n".encode() + file.read_bytes())
                num_files += 1
    return digest.hexdigest()[:8] if num_files else "none"
