"""Commands whose output nobody reads any more end without a word; where it cannot be written, in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import readers

ROOT = Path(__file__).resolve().parent.parent


def python(*arguments: object, cwd: Path, cut: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs Python, with one of its outputs a pipe that is closed at the other end."""
    reader, writer = os.pipe()
    os.close(reader)
    outputs = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | ({cut: writer} if cut else {})
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, arguments)]
    try:
        return subprocess.run(command, text=True, cwd=cwd, env=environment, timeout=120, **outputs)
    finally:
        os.close(writer)


@pytest.mark.parametrize("arguments", ["recipes", "recipes --json", "--help", "train --help"])  # argparse does not mind
def test_nobody_reads_the_result(tmp_path: Path, arguments: str) -> None:
    done = python("-m", "jobs.cli", *arguments.split(), cwd=tmp_path, cut="stdout")
    assert done.returncode in ([0, readers.EXIT_CODE] if "--help" in arguments else [readers.EXIT_CODE])
    assert "Error" not in done.stderr
    assert "Traceback" not in done.stderr


def test_nobody_reads_the_complaint(tmp_path: Path) -> None:
    done = python("-m", "jobs.cli", "data", "info", "nowhere", cwd=tmp_path, cut="stderr")
    assert (done.returncode, done.stdout) == (readers.EXIT_CODE, "")


@pytest.mark.parametrize("cut", ["stdout", "stderr"])
def test_what_it_prints_does_not_fit_on_the_disk(tmp_path: Path, cut: str) -> None:
    arguments = ["recipes"] if cut == "stdout" else ["data", "info", "nowhere"]
    with open("/dev/full", "w") as full:
        outputs = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, cut: full}
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "jobs.cli", *arguments]
        done = subprocess.run(command, text=True, cwd=tmp_path, env=environment, timeout=120, **outputs)
    assert done.returncode == 2
    if cut == "stdout":
        assert done.stderr == "error: the output cannot be written (No space left on device); send it elsewhere\n"
    else:
        assert done.stdout == ""


def test_there_never_was_a_reader(tmp_path: Path) -> None:
    shell = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-m", "jobs.cli", "recipes"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(shell, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_another_broken_pipe_is_not_taken_for_one(tmp_path: Path) -> None:
    program = (
        "import jobs.recipes, jobs.cli\n"
        "def described(): raise BrokenPipeError(32, 'of a socket')\n"
        "jobs.recipes.described = described\n"
        "raise SystemExit(jobs.cli.main(['recipes']))"
    )
    done = python("-c", program, cwd=tmp_path)
    assert done.returncode == 1
    assert "of a socket" in done.stderr
