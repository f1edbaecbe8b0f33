"""`latentrl submit -- STAGE ...`: any stage as a job of a running cluster. `latentrl jobs`: what has become of them."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.job_submission import JobDetails, JobErrorType, JobStatus

from jobs import submission
from jobs.job_log import follow
from jobs.job_server import JobServer
from jobs.package import Package, own_checkout, packed
from jobs.submission import GRACE_S, Submission
from pipeline.commit import code_commit
from pipeline.errors import UserError

REPEATED = (JobStatus.FAILED, JobStatus.STOPPED)
STOPPED_WITHIN_S = GRACE_S + 30.0
MAX_NAME = 100

Show = Callable[[str], None]


@dataclass(frozen=True)
class Wishes:
    """How a stage is submitted.

    Attributes:
        name: The job's; made of the command where None.
        is_again: Submit also what runs or has succeeded.
        num_cpus: Kept for the job's driver; what the stage says where None.
        num_gpus: The same of GPUs.
        memory_gib: The same of memory.
        working_dir: Folder whose code runs; this latentrl's checkout where None and there is one.
        is_cluster_code: Send nothing and run the latentrl of the cluster's nodes.
        excludes: Patterns of what is not sent.
        is_pinned: Have Ray install the pinned dependencies.
        variables: NAME=VALUE each.
        secrets_file: Path on the nodes.
    """

    name: str | None = None
    is_again: bool = False
    num_cpus: float | None = None
    num_gpus: float = 0
    memory_gib: float = 0
    working_dir: str | None = None
    is_cluster_code: bool = False
    excludes: Sequence[str] = ()
    is_pinned: bool = False
    variables: Sequence[str] = ()
    secrets_file: str | None = None

    def check(self) -> None:
        """Refuses what makes no job.

        Raises:
            UserError: The first problem.
        """
        for option in ("num_cpus", "num_gpus", "memory_gib"):
            if not 0 <= (getattr(self, option) or 0) < float("inf"):
                raise UserError(f"--{option.replace('_', '-')} is {getattr(self, option):g}; ask for 0 or more")
        if self.name is not None and not (self.name.replace("-", "").isalnum() and len(self.name) <= MAX_NAME):
            raise UserError(f"--name {self.name!r} is not usable; take letters, digits and '-', at most {MAX_NAME}")
        if self.secrets_file is not None and not self.secrets_file.startswith("/"):
            raise UserError(f"--secrets-file {self.secrets_file} is relative; give its full path on the nodes")
        if self.is_cluster_code and self.working_dir is not None:
            raise UserError("--cluster-code runs the nodes' own latentrl; leave out --working-dir")


def run(
    words: Sequence[str], parsers: Mapping[str, argparse.ArgumentParser], address: str | None, wishes: Wishes
) -> dict[str, Any]:
    """Submits a stage.

    Args:
        words: The stage's command.
        parsers: The command line's own, by command.
        address: Of the cluster's dashboard; see `JobServer`.
        wishes: How.

    Returns:
        job (submission id), address, entrypoint, num_cpus, package_bytes, num_files, notes, watch (a command).

    Raises:
        UserError: Before anything is sent: the stage's arguments are wrong, mean nothing elsewhere or hold a secret,
            the package is too large, the cluster does not answer, or the same job runs or is done.
    """
    wishes.check()
    stage = submission.understood(words, parsers)
    given = submission.variables(wishes.variables)
    with _package(wishes) as package:
        ready = submission.ready_for_a_cluster(stage, package)
        what = Submission(ready, package, given, wishes.secrets_file, wishes.is_pinned)
        environment = what.runtime_env()
        server = JobServer(address)
        job_id = free_id(wishes.name or what.name, server.jobs(), is_again=wishes.is_again)
        num_cpus = stage.options.driver_cpus(stage.options) if wishes.num_cpus is None else wishes.num_cpus
        is_own = package is not None and package.root == own_checkout()
        entrypoint = what.entrypoint(job_id, num_cpus, code_commit() if is_own else None)
        server.submit(
            job_id,
            entrypoint,
            runtime_env=environment,
            metadata={"stage": stage.name},
            entrypoint_num_cpus=num_cpus,
            entrypoint_num_gpus=wishes.num_gpus,
            entrypoint_memory=int(wishes.memory_gib * 2**30),
        )
        return {
            "job": job_id,
            "address": server.address,
            "entrypoint": entrypoint,
            "num_cpus": num_cpus,
            "package_bytes": package.num_bytes if package else 0,
            "num_files": len(package.files) if package else 0,
            "notes": submission.notes(stage, given),
            "watch": watch_command(job_id, server.address),
        }


def free_id(stem: str, jobs: Sequence[JobDetails], *, is_again: bool) -> str:
    """The id of the next job of that name: NAME, then NAME-2, NAME-3 ...

    Raises:
        UserError: The last of them runs, waits or has succeeded, and `is_again` is False.
    """
    status = {str(job.submission_id): job.status for job in jobs}
    number, latest = 0, None
    while (candidate := f"{stem}-{number + 1}" if number else stem) in status:
        number, latest = number + 1, candidate
    if latest is not None and not is_again and status[latest] not in REPEATED:
        state = "has succeeded" if status[latest] == JobStatus.SUCCEEDED else f"is {status[latest].value.lower()}"
        raise UserError(
            f"this job {state} already: {latest}; see it with `latentrl jobs logs {latest} --follow`, or run it once "
            "more with --again, or under another --name"
        )
    return candidate


def watch_command(job_id: str, address: str) -> str:
    """What to type to see a job's output again."""
    return f"latentrl jobs logs {job_id} --follow --address {address}"


def watch(address: str | None, job_id: str, show: Show) -> dict[str, Any]:
    """Shows a job's output to its end.

    Returns:
        job, status, exit_code of the driver, and `errors` where it has not succeeded.

    Raises:
        UserError: No such job, or the cluster has been away for long.
        KeyboardInterrupt: With a line that says how to go on watching; the job goes on.
    """
    server = JobServer(address)
    try:
        job = follow(server, job_id, show)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"no longer watching; the job goes on. Watch it: {watch_command(job_id, server.address)}  "
            f"Stop it: latentrl jobs stop {job_id} --address {server.address}"
        ) from None
    ended = {"job": job_id, "status": job.status.value, "exit_code": job.driver_exit_code}
    return ended if job.status == JobStatus.SUCCEEDED else {**ended, "errors": [_why(job)]}


def listed(address: str | None) -> dict[str, Any]:
    """The jobs of a cluster, the latest last."""
    server = JobServer(address)
    return {"address": server.address, "jobs": [_row(job) for job in server.jobs()]}


def log(address: str | None, job_id: str) -> dict[str, Any]:
    """What a job has printed so far."""
    server = JobServer(address)
    return {"job": job_id, "status": server.job(job_id).status.value, "log": server.log(job_id)}


def stop(address: str | None, job_id: str) -> dict[str, Any]:
    """Ends a job and waits until it has ended: it may write its checkpoint first.

    Raises:
        UserError: No such job, or it does not end.
    """
    server = JobServer(address)
    server.stop(job_id)
    until = time.monotonic() + STOPPED_WITHIN_S
    while not (job := server.job(job_id)).status.is_terminal():
        if time.monotonic() > until:
            raise UserError(
                f"{job_id} has not ended within {STOPPED_WITHIN_S:.0f} s; look at it, and repeat the command"
            )
        time.sleep(0.5)
    return {"job": job_id, "status": job.status.value}


@contextlib.contextmanager
def _package(wishes: Wishes) -> Iterator[Package | None]:
    root = Path(wishes.working_dir).expanduser().resolve() if wishes.working_dir else own_checkout()
    if root is None or wishes.is_cluster_code:
        yield None
        return
    with packed(root, wishes.excludes) as package:
        yield package


def _why(job: JobDetails) -> str:
    """Why a job has not succeeded, in Ray's words; without the last lines of the log, which have been shown."""
    message = (job.message or "no reason given").strip()
    if job.error_type != JobErrorType.JOB_ENTRYPOINT_COMMAND_ERROR:
        return f"{job.submission_id} {job.status.value.lower()}: {message}"
    advice = ""
    if "No module named" in message:
        advice = "; the cluster lacks packages: submit with --install, or install latentrl on its nodes"
    if job.driver_exit_code == 3:
        advice = "; the stage is done, but the tracking server has not heard of all: submit `sync RUN` when it is back"
    return f"{job.submission_id} failed: the stage ended with exit code {job.driver_exit_code}{advice}"


def _row(job: JobDetails) -> dict[str, Any]:
    ended = job.end_time or int(time.time() * 1000)
    return {
        "job": job.submission_id,
        "status": job.status.value,
        "stage": (job.metadata or {}).get("stage", ""),
        "started": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((job.start_time or 0) / 1000)),
        "seconds": round((ended - (job.start_time or ended)) / 1000),
        "exit_code": job.driver_exit_code,
        "message": (job.message or "").splitlines()[0] if job.message else "",
    }


def printing(*, as_json: bool) -> Show:
    """Prints a log as it comes; beside the JSON, not before it."""
    stream = sys.stderr if as_json else sys.stdout

    def show(text: str) -> None:
        stream.write(text)
        stream.flush()

    return show
