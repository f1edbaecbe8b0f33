"""SIGTERM by what a process does when it comes: it ends with 143, and keeps its state where it can."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import sys, time
from jobs import termination
from pipeline.errors import Terminated

doing, termination.REACH_S = sys.argv[1], float(sys.argv[2])
termination.install()
try:
    if doing == "nothing to keep":
        print("ready", flush=True)
        time.sleep(60)
    with termination.deferred() as request:
        print("ready", flush=True)
        while not (doing == "listening" and request.is_heard()):
            time.sleep(0.02)
        time.sleep(2 * termination.REACH_S)  # writing takes its time, and nobody cuts it short
        raise Terminated("kept")
except Terminated as ended:
    print(ended.line, flush=True)
    raise
"""


@pytest.mark.parametrize(
    ("doing", "reach_s", "signals", "line"),
    [
        ("listening", 0.3, 1, "kept"),
        ("deaf", 0.3, 1, "the state could not be kept"),
        ("deaf", 60.0, 2, "at once, on the second SIGTERM"),
        ("nothing to keep", 60.0, 1, "terminated"),
    ],
)
def test_a_process_ends_with_143(doing: str, reach_s: float, signals: int, line: str) -> None:
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-c", SCRIPT, doing, str(reach_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        for _ in range(signals):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 143, err
    assert line in out
    assert ("SIGTERM: the state is kept within" in err) == (doing != "nothing to keep")
    assert "Traceback" not in err
