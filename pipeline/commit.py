"""The git commit of the code that runs: of its checkout, or of the one that it was sent from."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

COMMIT_VARIABLE = "LATENTRL_COMMIT"


def code_commit() -> str | None:
    """The commit's full hash, with `-dirty` where files differ from it; None where nobody knows."""
    if sent := os.environ.get(COMMIT_VARIABLE):
        return sent
    root = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
