"""A stage that is the entry point of a Ray job, stopped as `ray job stop` stops it."""

from __future__ import annotations

import os
import subprocess
import time

import pytest
from fault_rows import Record, measured
from nodes import BIN, RayCluster
from test_faults_train import Training, cluster, training  # noqa: F401

pytestmark = pytest.mark.long

STOP_WITHIN_S = 60  # as `latentrl submit` has it; Ray's own default is 3 s, after which it sends SIGKILL


def job(nodes: RayCluster, verb: str, *arguments: str) -> str:
    """Runs `ray job VERB` on the head; what it says."""
    command = [*nodes.head.entered(), str(BIN / "ray"), "job", verb, "--address", nodes.dashboard, *arguments]
    variables = {**os.environ, **nodes.head.environment(), "NO_COLOR": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_stopped_job_keeps_its_state(training: Training, record_property: Record) -> None:  # noqa: F811
    nodes = training.cluster
    wait = f'{{"env_vars": {{"RAY_JOB_STOP_WAIT_TIME_S": "{STOP_WITHIN_S}"}}}}'
    # exec, as `latentrl submit` has it: Ray's shell dies of SIGTERM at once, and where nobody reaps what it leaves (a
    # container's first process often does not) Ray takes the ended stage for alive and waits its whole time.
    entry = ["exec", str(BIN / "python"), "-m", "jobs.cli", *training.arguments(10**9)]
    job(nodes, "submit", "--no-wait", "--submission-id", "it", "--runtime-env-json", wait, "--", *entry)
    until = time.monotonic() + 300
    while training.recorded_steps < 500:
        assert time.monotonic() < until, job(nodes, "logs", "it")
        time.sleep(0.5)
    began = time.monotonic()
    said = job(nodes, "stop", "it")
    seconds = time.monotonic() - began
    assert "was stopped" in said
    logs = job(nodes, "logs", "it")
    (line,) = [line for line in logs.splitlines() if line.startswith("terminated")]
    assert f"kept at {training.kept_steps:,} agent steps" in line
    assert training.kept_steps == training.recorded_steps >= 500
    measured(
        record_property,
        "`ray job stop` of train",
        lost="0 agent steps that had arrived",
        read=line,
        until_stopped=seconds,
    )
