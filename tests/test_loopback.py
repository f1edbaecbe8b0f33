"""A local session listens on loopback only, and its token is its user's alone."""

from __future__ import annotations

import ipaddress
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from jobs.loopback import TOKEN_FILE, make_token_private

ROOT = Path(__file__).resolve().parent.parent


def listening(process: psutil.Process) -> set[tuple[str, str]]:
    """(program, address) of every socket that a process or one below it listens on."""
    found = set()
    for member in [process, *process.children(recursive=True)]:
        try:
            name = member.name()
            sockets = member.net_connections(kind="inet")
        except psutil.Error:  # it has just ended
            continue
        found |= {(name, each.laddr.ip) for each in sockets if each.status == psutil.CONN_LISTEN}
    return found


def is_loopback(address: str) -> bool:
    """Of IPv4, IPv6, or IPv4 in IPv6."""
    parsed = ipaddress.ip_address(address)
    inner = getattr(parsed, "ipv4_mapped", None) or parsed
    return inner.is_loopback


def test_no_process_of_a_stage_listens_for_other_machines(tmp_path: Path) -> None:
    """Looked at from the start of the command to its end, with all that Ray starts."""
    command = [sys.executable, "-m", "jobs.cli", "collect", "--game", "pong", "--frames", "400", "--num-workers", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        environment.pop(name, None)
    seen: set[tuple[str, str]] = set()
    with subprocess.Popen([*command, "--out", str(tmp_path / "data")], env=environment, cwd=tmp_path) as stage:
        process = psutil.Process(stage.pid)
        while stage.poll() is None:
            seen |= listening(process)
            time.sleep(0.2)
    assert stage.returncode == 0
    assert {"gcs_server", "raylet"} <= {program for program, _ in seen}
    assert [(program, address) for program, address in seen if not is_loopback(address)] == []
    assert stat.S_IMODE((tmp_path / TOKEN_FILE).stat().st_mode) == 0o600


def test_a_token_that_others_can_read_is_taken_from_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    make_token_private()
    path = tmp_path / TOKEN_FILE
    token = path.read_text()
    assert len(token) == 64
    path.chmod(0o644)  # as Ray 2.60 writes it
    make_token_private()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text() == token
    assert [file.name for file in path.parent.iterdir()] == ["auth_token"]
