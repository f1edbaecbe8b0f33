"""Small bundles and a real MLflow server to register them with."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pipeline import bundle, models
from pipeline.artifact import LatentStats, save_encoder
from pipeline.models.vae import VAESettings
from pipeline.registry import Registered, Run, register_encoder
from pipeline.schema import Preprocess

Z_DIM = 6
PREPROCESS = Preprocess(
    game="pong",
    protocol="atari100k",
    ale_version="0.12.1",
    rom_md5="60e0ea3cbe0913d39803477945e9e5ec",
    frame_skip=4,
    sticky_probability=0.0,
    max_pool=True,
    height=24,
    width=24,
    grayscale=True,
    resize="area",
    action_set=("NOOP", "RIGHT"),
    noop_max=30,
    fire_reset=False,
)


def make_encoder(path: Path, seed: int = 0) -> Path:
    """An untrained encoder bundle."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    settings = VAESettings(z_dim=Z_DIM, patch=6, widths=(4,))
    model = models.build(settings.for_frames(PREPROCESS.height, PREPROCESS.width))
    save_encoder(path, model, LatentStats.identity(Z_DIM), PREPROCESS, {})
    return path


def make_policy(path: Path) -> Path:
    """A sealed folder with the file that marks a policy."""
    with bundle.writing(path) as draft:
        (draft / "config.json").write_text("{}")
        (draft / "q.safetensors").write_bytes(b"weights")
        make_encoder(draft / "encoder")
    return path


def free_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class MlflowServer:
    """`mlflow server` as its own process group, to be killed and started again on the same port and store."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it and waits until it answers."""
        command = [
            *(str(Path(sys.executable).parent / "mlflow"), "server", "--workers", "1"),
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *("--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"),
            *("--artifacts-destination", str(self.folder / "artifacts")),
        ]
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, env={**os.environ, **quiet}
            )
        until = time.monotonic() + 120
        while time.monotonic() < until:
            try:
                urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{self.uri}/health", timeout=1)
                return
            except OSError:
                time.sleep(0.1)
        raise AssertionError((self.folder / "server.log").read_text())

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the server and its workers."""
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """Ends it as a power cut would."""
        if self.process is not None:
            self.signal(signal.SIGKILL)
            self.process.wait()
            self.process = None


@contextlib.contextmanager
def running_server(folder: Path) -> Iterator[MlflowServer]:
    """One that answers, with its database and artifacts in a folder that is made for them; killed at the end."""
    folder.mkdir()
    server = MlflowServer(folder)
    try:
        server.start()
        yield server
    finally:
        server.kill()


def register(run: Run, bundle: Path, name: str, bits: float = 1.0, active: float = 1.0, **more: Any) -> Registered:
    """A version of an encoder with these figures."""
    registered = register_encoder(
        run, bundle, name, bits_per_dim=bits, active_fraction=active, **{"has_heldout": True, **more}
    )
    assert registered is not None
    return registered
