"""Ray's job server on a cluster's dashboard: every request bounded in time, every failure one line."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, TypeVar

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient, JobType

from pipeline.errors import UserError
from pipeline.server import mask

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # in Ray's own order
FIRST_ANSWER_WITHIN_S = 10.0
CONNECT_WITHIN_S = 5.0
ANSWER_WITHIN_S = 12.0
WORK_WITHIN_S = 120.0  # storing a package, starting a job

T = TypeVar("T")


class NoAnswer(UserError):
    """The server cannot be reached now."""


class JobServer:
    """The job server at one address.

    Args:
        address: http(s)://HOST:PORT of the dashboard; by default what RAY_API_SERVER_ADDRESS or RAY_ADDRESS says, else
            port 8265 of this machine.

    Raises:
        UserError: Not a dashboard's address, no answer within 20 s, or a token is missing or wrong.
    """

    def __init__(self, address: str | None = None) -> None:
        url = _address(address)
        self.address = mask(url)
        for name in ("dashboard_sdk", "job.sdk"):
            logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.ERROR)
        os.environ[ADDRESS_VARIABLES[0]] = url  # Ray's client lets the variables override its argument
        with self._translated():
            self._client = _within(FIRST_ANSWER_WITHIN_S, lambda: _Client(url))

    def submit(self, submission_id: str, entrypoint: str, **what: Any) -> None:
        """Starts a job; `what` is the rest of Ray's `submit_job`.

        Raises:
            UserError: The server refuses, or the id is taken.
        """
        with self._translated():
            try:
                self._client.submit_job(entrypoint=entrypoint, submission_id=submission_id, **what)
            except (TypeError, ValueError) as error:
                raise UserError(f"Ray takes no such job: {_last_line(str(error))}") from None

    def job(self, job_id: str) -> JobDetails:
        """What the server knows of a job.

        Raises:
            UserError: There is none of that id.
            NoAnswer: The server is away.
        """
        with self._translated(job_id):
            return self._client.get_job_info(job_id)

    def jobs(self) -> list[JobDetails]:
        """The jobs that were submitted to this cluster, the latest last."""
        with self._translated():
            found = [job for job in self._client.list_jobs() if job.type == JobType.SUBMISSION]
        return sorted(found, key=lambda job: job.start_time or 0)

    def stop(self, job_id: str) -> bool:
        """Asks a job to end; whether it was running."""
        with self._translated(job_id):
            return bool(self._client.stop_job(job_id))

    def log(self, job_id: str) -> str:
        """All that a job has printed."""
        with self._translated(job_id):
            return str(self._client.get_job_logs(job_id))

    def tail(self, job_id: str) -> AsyncIterator[str]:
        """What a job has printed and goes on to print, in pieces. Ends, or raises nearly anything, when the connection
        does, whether the job has ended or not."""
        pieces: AsyncIterator[str] = self._client.tail_job_logs(job_id)
        return pieces

    @contextlib.contextmanager
    def _translated(self, job_id: str | None = None) -> Iterator[None]:
        """Turns what Ray's client raises into one line for the user."""
        try:
            yield
        except AuthenticationError as error:
            raise UserError(_token_advice(self.address, str(error))) from None
        except (requests.Timeout, requests.ConnectionError, ConnectionError, TimeoutError):
            raise NoAnswer(
                f"no Ray dashboard answers at {self.address}; start the cluster with its dashboard, or give --address"
            ) from None
        except (ValueError, KeyError, requests.RequestException):
            raise UserError(f"{self.address} answers, but not as Ray's dashboard; give its address") from None
        except RuntimeError as error:
            raise self._refusal(str(error), job_id) from None

    def _refusal(self, text: str, job_id: str | None) -> UserError:
        if "Version check returned 404" in text:
            return UserError(f"{self.address} answers, but not as Ray's dashboard; give its address")
        if job_id is not None and "status code 404" in text:
            return UserError(f"there is no job {job_id!r} at {self.address}; see `latentrl jobs list`")
        if job_id is not None and re.search(r"status code 5\d\d", text):  # of a proxy on the way, or a head that starts
            return NoAnswer(f"{self.address} cannot tell now of job {job_id!r}: {_last_line(text)}")
        return UserError(f"Ray at {self.address} refuses: {_last_line(text)}")


class _Client(JobSubmissionClient):
    """Ray's client, which by itself waits for ever."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        answer_within_s = ANSWER_WITHIN_S if method == "GET" else WORK_WITHIN_S
        options.setdefault("timeout", (CONNECT_WITHIN_S, answer_within_s))
        return super()._do_request(method, endpoint, **options)


def _address(given: str | None) -> str:
    source = next((name for name in ADDRESS_VARIABLES if os.environ.get(name)), None)
    named, said_by = (
        (given, "--address") if given else (os.environ[source], source) if source else (DEFAULT_ADDRESS, "")
    )
    if not named.startswith(("http://", "https://")):
        host = named.rpartition("://")[2].partition(":")[0]
        example = "HOST" if host in ("", "auto", "local") else host
        raise UserError(
            f"{said_by} {named} is not a dashboard's address; give --address http://{example}:8265, which takes jobs"
        )
    return named.rstrip("/")


def _within(seconds: float, question: Callable[[], T]) -> T:
    """The answer to a question that may hang, also in looking up a host's name."""
    answers: list[T] = []
    failures: list[Exception] = []

    def ask() -> None:
        try:
            answers.append(question())
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=ask, name="job-server-question", daemon=True)
    thread.start()
    thread.join(seconds)
    if answers:
        return answers[0]
    raise failures[0] if failures else TimeoutError


def _token_advice(address: str, text: str) -> str:
    how = "RAY_AUTH_MODE=token and the cluster's own token in RAY_AUTH_TOKEN, or its file in RAY_AUTH_TOKEN_PATH"
    if text.startswith("Authentication failed"):
        return f"the Ray cluster at {address} refuses this token; set {how}"
    if text.startswith("Authentication required"):
        return f"the Ray cluster at {address} asks for a token, and none was sent; set {how}"
    return f"there is no token to send to {address} ({text.partition('. ')[0].rstrip('.')}); set {how}"


def _last_line(text: str) -> str:
    """The line of a server's traceback that says what was wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip(" .")]
    return lines[-1].rstrip(".") if lines else "no reason given"
