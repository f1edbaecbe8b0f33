"""Stages as a user of a cluster runs them: by `latentrl submit`, addresses in the command, keys by reference."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nodes import BIN, ROOT, RayCluster
from services import Mlflow, ObjectStore

STAGE_WITHIN_S = 400.0


@dataclass(frozen=True)
class Job:
    """A stage that was submitted: its id, and how it was asked for."""

    name: str
    cluster: RayCluster

    @property
    def driver_node(self) -> str:
        """Where its driver runs or ran."""
        return self.cluster.name_of(self._record()["driver_node_id"])

    @property
    def status(self) -> str:
        """As Ray has it."""
        return str(self._record()["status"])

    def actors(self, class_name: str) -> Counter[str]:
        """Nodes on which its actors of a class are or were, with their number."""
        return self._nodes("actors", lambda row: class_name in row["class_name"])

    def tasks(self, name: str) -> Counter[str]:
        """Nodes on which its tasks whose name holds `name` have run, with their number."""
        return self._nodes("tasks", lambda row: name in row["name"])

    def log(self) -> str:
        """All that it has printed."""
        return latentrl(self.cluster, "jobs", "logs", self.name)

    @functools.cached_property
    def result(self) -> dict[str, Any]:
        """The stage's own result, the last JSON object in its log, once it has ended."""
        lines = [line for line in self.log().splitlines() if line.startswith("{")]
        return dict(json.loads(lines[-1]))

    def _record(self) -> dict[str, Any]:
        return next(row for row in self.cluster.state("jobs") if row["submission_id"] == self.name)

    def _nodes(self, what: str, is_meant: Any) -> Counter[str]:
        ray_job = self._record()["job_id"]
        rows = [row for row in self.cluster.state(what) if row["job_id"] == ray_job and is_meant(row)]
        return Counter(self.cluster.name_of(row["node_id"]) for row in rows if row["node_id"])


class Stages:
    """Submits stages that use a store and a tracking server; the runs' home is the folder that all nodes share."""

    def __init__(self, cluster: RayCluster, store: ObjectStore, tracking: Mlflow) -> None:
        self.cluster, self.store, self.tracking = cluster, store, tracking
        self.home = cluster.shared / "latentrl"

    def run(self, *words: object) -> Job:
        """Runs a stage to its end."""
        job = self._submit(*words, is_watched=True)
        assert job.status == "SUCCEEDED", job.log()
        return job

    def start(self, *words: object) -> Job:
        """Starts a stage."""
        return self._submit(*words, is_watched=False)

    def refused(self, *words: object) -> str:
        """The one line that a stage complains with."""
        job = self.start(*words)
        self.cluster.wait_for(lambda: job.status in ("FAILED", "SUCCEEDED"), STAGE_WITHIN_S)
        (line,) = (line for line in job.log().splitlines() if line.startswith("error: "))
        return line

    def _submit(self, *words: object, is_watched: bool) -> Job:
        places = [] if words[0] == "data" else ["--tracking-uri", self.tracking.address]
        places += [] if words[0] == "data" or "--home" in words else ["--home", self.home]
        options = ["--json", "--secrets-file", self.cluster.secrets_file, *(["--watch"] if is_watched else [])]
        command = ["submit", *options, "--address", self.cluster.dashboard, "--", *words, *places, "--json"]
        printed = latentrl(self.cluster, *command)
        return Job(json.loads(printed.splitlines()[-1])["job"], self.cluster)


def latentrl(cluster: RayCluster, *words: object) -> str:
    """The command line on the user's own machine, which has the cluster's token and nothing else; what it prints."""
    extra = ["--address", cluster.dashboard] if words[0] == "jobs" else []
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    done = subprocess.run(
        [str(BIN / "latentrl"), *map(str, words), *extra],
        env={**kept, "PYTHONPATH": str(ROOT), **cluster.variables()},
        cwd=Path("/"),
        capture_output=True,
        text=True,
        timeout=STAGE_WITHIN_S,
    )
    assert done.returncode == 0, f"{words}: exit code {done.returncode}\n{done.stderr[-4000:]}\n{done.stdout[-4000:]}"
    return done.stdout
