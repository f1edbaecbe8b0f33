"""A stage's command line made fit to run elsewhere: checked before anything is sent, completed, given a name."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.options import Options
from jobs.package import Package, pinned_environment
from jobs.room import DRIVER_CPUS_VARIABLE
from jobs.workspace import HOME_VARIABLE, JOB_VARIABLE
from pipeline.commit import COMMIT_VARIABLE
from pipeline.errors import UserError
from pipeline.names import suggestion
from pipeline.secrets import SECRETS_FILE_VARIABLE, is_secret_name, secret_in

NOT_SUBMITTED = ("submit", "jobs")
# How long a stopped job may take to write its checkpoint before Ray kills it; Ray's own default is 3 s.
GRACE_S = 60
BY_REFERENCE = (
    "everyone who reaches the cluster can read what a job is started with; put it as a line NAME=VALUE into a file on "
    "the nodes that only its owner can read, and name that with --secrets-file"
)
ELSEWHERE = "the job runs elsewhere; give the full path of a folder that every node sees"


@dataclass(frozen=True)
class Stage:
    """A stage's command, understood.

    Attributes:
        name: "train", "data check".
        words: The command, from the stage's name on.
        options: The same, parsed.
    """

    name: str
    words: tuple[str, ...]
    options: Options

    @property
    def subject(self) -> str | None:
        """What it is about, for a name that people recognise."""
        return next((v for key in ("register", "game") if (v := getattr(self.options, key, None))), None)


@dataclass(frozen=True)
class Submission:
    """All that decides what a job does.

    Attributes:
        stage: The command.
        package: The code that goes with it; None runs the cluster's own.
        variables: Of the environment of all the job's processes.
        secrets_file: On the nodes.
        is_pinned: Whether Ray installs the project's pinned dependencies for it.
    """

    stage: Stage
    package: Package | None
    variables: Mapping[str, str]
    secrets_file: str | None
    is_pinned: bool

    @property
    def name(self) -> str:
        """The same for the same command, code, variables and environment, and for no others."""
        what = [
            self.stage.words,
            self.package and self.package.digest,
            sorted(self.variables.items()),
            self.secrets_file,
            self.is_pinned,
        ]
        digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()
        parts = (self.stage.name, self.stage.subject, digest[:10])
        return "-".join(re.sub(r"[^A-Za-z0-9]+", "-", part).strip("-").lower() for part in parts if part)

    def entrypoint(self, job_id: str, num_cpus: float, commit: str | None) -> str:
        """The shell command that the job's driver is. What only the driver needs to know stands before it.

        The shell must give way: Ray ends it with the driver, and in a container, whose first process buries nobody,
        then waits out the whole grace time for the driver that the shell has left behind (2.60).
        """
        own = {
            JOB_VARIABLE: job_id,
            DRIVER_CPUS_VARIABLE: f"{num_cpus:g}",
            COMMIT_VARIABLE: commit,
            SECRETS_FILE_VARIABLE: self.secrets_file,
        }
        settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in own.items() if value)
        return f"exec env {settings} python -m jobs.cli {shlex.join(self.stage.words)}"

    def runtime_env(self) -> dict[str, Any]:
        """Ray's description of the job's environment."""
        environment: dict[str, Any] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(GRACE_S), **self.variables}}
        if self.package is not None:
            environment["working_dir"] = str(self.package.archive)
        if self.is_pinned:
            environment["pip"] = pinned_environment(self.package)
        return environment


def understood(words: Sequence[str], parsers: Mapping[str, argparse.ArgumentParser]) -> Stage:
    """A stage's command as this machine's own command line reads it.

    Raises:
        UserError: No stage, one that cannot be submitted, or settings that it cannot have.
        SystemExit: Its options are wrong; the parser has said so.
    """
    given = [*words[1:]] if words[:1] == ["--"] else [*words]
    submitted = [name for name in parsers if name not in NOT_SUBMITTED]
    if not given or given[0].startswith("-"):
        raise UserError("name the stage to run, behind --: latentrl submit -- collect --game pong ...")
    if given[0] not in submitted:
        raise UserError(f"{given[0]!r} is no stage that can be submitted; {suggestion(given[0], submitted)}")
    options = parsers[given[0]].parse_args(given[1:])
    options.check(options)
    has_verb = len(given) > 1 and given[0] == "data"
    return Stage(" ".join(given[: 1 + has_verb]), tuple(given), options)


def ready_for_a_cluster(stage: Stage, package: Package | None) -> Stage:
    """The command with what it needs elsewhere: it joins the cluster, and its --config is the package's.

    Raises:
        UserError: A path that means nothing there, or something that looks like a secret.
    """
    for word in stage.words:
        if (what := secret_in(word)) is not None:
            raise UserError(f"the {stage.name} command holds a secret ({what}); {BY_REFERENCE}")
    options = stage.options
    for name in ("home", "data", "out"):
        value = getattr(options, name, None)
        if value is not None and "://" not in value and not value.startswith("/"):
            raise UserError(f"--{name} {value} is relative, and {ELSEWHERE}, or an address such as s3://BUCKET/NAME")
    for name in ("encoder", "policy"):
        value = getattr(options, name, None)
        if value is not None and not value.startswith("/") and Path(value).exists():
            raise UserError(f"{name} {value} is a folder of this machine, and {ELSEWHERE}, or a model's address")
    tracking = getattr(options, "tracking_uri", None) or ""
    if tracking.startswith("sqlite:") and not tracking.startswith("sqlite:////"):
        raise UserError(f"--tracking-uri {tracking} is relative, and {ELSEWHERE}, or a server's address")
    words = list(stage.words)
    if getattr(options, "config", None) is not None:
        words += ["--config", _config_there(options.config, package)]
    if getattr(options, "ray_address", "") is None:
        words += ["--ray-address", "auto"]
    return Stage(stage.name, tuple(words), options)


def variables(settings: Sequence[str]) -> dict[str, str]:
    """The environment variables of `--env NAME=VALUE`.

    Raises:
        UserError: One is malformed, or looks like a secret.
    """
    found = {}
    for setting in settings:
        name, separator, value = setting.partition("=")
        if not separator or not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise UserError(f"--env {name}: write it as NAME=VALUE")
        if is_secret_name(name) or (what := secret_in(value)) is not None:
            what = f"{name} is the name of a secret" if is_secret_name(name) else what
            raise UserError(f"--env {name} holds a secret ({what}); {BY_REFERENCE}")
        found[name] = value
    return found


def notes(stage: Stage, given: Mapping[str, str]) -> list[str]:
    """What is no error, and a surprise on a cluster."""
    found, options = [], stage.options
    if hasattr(options, "home") and options.home is None and HOME_VARIABLE not in given:
        found.append(
            f"no --home: the job takes the nodes' {HOME_VARIABLE}, and ends with an error where they have none"
        )
    if getattr(options, "tracking_uri", "") is None:
        found.append(
            "no --tracking-uri: runs are recorded in a sqlite file under the home, for one job at a time and on "
            "storage that has file locks"
        )
    if re.match(r"https?://(localhost|127\.|\[::1\])", getattr(options, "tracking_uri", None) or ""):
        found.append(f"{options.tracking_uri} is looked for on the node that the job's driver runs on")
    return found


def _config_there(config: str, package: Package | None) -> str:
    path = Path(config)
    if path.is_absolute():
        return config
    if package is None:
        raise UserError(f"--config {config} is not sent with the job; give --working-dir, or a full path on the nodes")
    name = path.resolve().relative_to(package.root).as_posix() if path.resolve().is_relative_to(package.root) else None
    if name not in package.files:
        raise UserError(
            f"--config {config} is not in what is sent of {package.root}; put it there, or give a full path"
        )
    return str(name)
