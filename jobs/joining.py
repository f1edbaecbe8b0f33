"""Whether a running Ray cluster can be joined from here, tried by a process of its own.

Ray waits a minute for an address that is dead, takes 20 s over a wrong token without naming it, and aborts the whole
process where the machine is not a node of the cluster.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time

import grpc
from ray._common.tls_utils import load_certs_from_env
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from pipeline.errors import UserError

LISTEN_WITHIN_S = 5.0
START_WITHIN_S, ANSWER_WITHIN_S, JOIN_WITHIN_S = 45.0, 15.0, 30.0  # each since the last sign of life
LIMIT_S = 2 * LISTEN_WITHIN_S + START_WITHIN_S + ANSWER_WITHIN_S + JOIN_WITHIN_S

_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(
    [0, 0, 0, 4, 0, 0, 0, 0, 0]
)  # RFC 9113, 3.4: gRPC's first words

_STEP_S = 0.1
_ATTEMPT = """
import contextlib, sys, ray
from ray.scripts.scripts import cli
print("started", flush=True)
address = sys.argv[1]
with contextlib.suppress(SystemExit):  # how it says yes; a no is another exception
    cli(["health-check", *([] if address == "auto" else ["--address", address])], standalone_mode=False)
print("answered", flush=True)
ray.init(address, log_to_driver=False, logging_level="ERROR")
"""


def require_joinable(address: str) -> None:
    """Joins the cluster and leaves it again, in a process that may hang or die of it.

    Args:
        address: HOST:PORT of the cluster's head, or "auto".

    Raises:
        UserError: Nobody answers there, the token or the versions differ, or this machine is not one of its nodes.
    """
    if address != "auto":
        _require_listener(address)
    num_signs, complaint = _attempt(address)
    if complaint is not None:
        raise UserError(_in_words(complaint, address, has_answered=num_signs == 2))


def asks_for_token(address: str) -> bool:
    """Whether the cluster at HOST:PORT turns away who has no token.

    Ray's own commands cannot tell: refused, they go on asking for 40 s and then report that nobody answers (2.60).

    Raises:
        UserError: It says neither yes nor no in time.
    """
    with _channel_without_token(address) as channel:
        head = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        try:
            head.CheckAlive(gcs_service_pb2.CheckAliveRequest(), timeout=ANSWER_WITHIN_S)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                return True
            raise UserError(
                f"Ray at {address} does not say whether it asks for a token ({error.code().name.lower()}); see that "
                "the cluster's head still runs"
            ) from None
    return False


def _channel_without_token(address: str) -> grpc.Channel:
    options = [("grpc.enable_http_proxy", 0)]
    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        return grpc.insecure_channel(address, options)
    certificate, key, authority = load_certs_from_env()
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(authority, key, certificate), options)


def _require_listener(address: str) -> None:
    """Tells within seconds where nobody listens, or listens and says nothing."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise UserError(f"--ray-address {address} is not one I know; give the cluster's HOST:PORT, or auto")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), LISTEN_WITHIN_S) as connection:
            connection.sendall(_GREETING)
            with contextlib.suppress(ConnectionResetError):  # as good a sign of life as any
                connection.recv(1)
    except OSError as error:
        raise _nobody(address, error.strerror or f"not within {LISTEN_WITHIN_S:.0f} s") from None


def _attempt(address: str) -> tuple[int, str | None]:
    """How many signs of life the attempt gave, and what it complained of: "" when it hangs, None when it joined."""
    command = [sys.executable, "-c", _ATTEMPT, address]
    limits = (START_WITHIN_S, ANSWER_WITHIN_S, JOIN_WITHIN_S)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as attempt:
        num_signs, until = 0, time.monotonic() + limits[0]
        while time.monotonic() < until:
            try:
                said, complaint = attempt.communicate(timeout=_STEP_S)
            except subprocess.TimeoutExpired as error:
                if (error.stdout or b"").count(b"\n") > num_signs:
                    num_signs += 1
                    until = time.monotonic() + limits[num_signs]
                continue
            return said.count(b"\n"), None if attempt.returncode == 0 else complaint.decode(errors="replace")
        attempt.kill()
    return num_signs, ""


def _in_words(complaint: str, address: str, *, has_answered: bool) -> str:
    """What went wrong, in one line; `complaint` is what Ray printed, "" where it hung."""
    if "ersion mismatch:" in complaint:
        difference = " ".join(complaint[complaint.rindex("ersion mismatch:") :].partition(":")[2].split())
        return (
            f"the Ray cluster at {address} is of other versions than this process ({difference}); install the same "
            "everywhere: pip install -c constraints.txt ."
        )
    if any(sign in complaint for sign in ("AuthenticationError", "InvalidAuthToken", "RAY_AUTH_TOKEN_PATH is set")):
        return (
            f"the Ray cluster at {address} asks for a token and does not take this process's; set RAY_AUTH_MODE=token "
            "and give its token by RAY_AUTH_TOKEN_PATH or in ~/.ray/auth_token"
        )
    if "Failed to connect to socket" in complaint:
        return (
            f"this machine is not a node of the Ray cluster at {address}; run the command on one of its nodes, or have "
            "the cluster run it (infra/README.md)"
        )
    reason = next((line for line in reversed(complaint.splitlines()) if line.strip()), "no answer in time")
    if has_answered:
        return f"the Ray cluster at {address} answers but cannot be joined ({reason}); see that this node's Ray runs"
    return str(_nobody(address, reason))


def _nobody(address: str, reason: str) -> UserError:
    return UserError(
        f"no Ray cluster answers at {address} ({reason}); start one (`ray start --head`) or leave out --ray-address"
    )
