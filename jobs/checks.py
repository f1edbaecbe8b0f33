"""The single checks of `latentrl doctor`: what was seen, in one line each, and what to do where it is not right."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import ray

from jobs import joining
from jobs.autoscaler import autoscaler
from jobs.needs import Needs
from jobs.node_probe import NodeProbe
from jobs.nodes import Answers, Node, Nodes
from jobs.place_trial import PlaceTrial
from pipeline.errors import UserError
from pipeline.machine import free_bytes
from pipeline.secrets import SECRETS_FILE_VARIABLE
from pipeline.server import Address
from pipeline.trial import trial_run

OK, WARN, BAD = "ok", "warn", "bad"
GIB = 1 << 30

CLOCK_WARN_S, CLOCK_BAD_S = 2.0, 60.0
FREE_BAD_BYTES, FREE_WARN_BYTES = GIB, 10 * GIB
OBJECT_STORE_WARN_BYTES = GIB // 2
KEPT_REPLAYS = 2  # a checkpoint is whole before the one that it replaces goes
SAME_EVERYWHERE = ("latentrl", "code", "ray")  # in other packages only the first two numbers have to agree

INSTALL = "install the same on every node: pip install -c constraints.txt ."
SHARE = "name a folder that every node mounts, or s3://BUCKET/PATH"


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        check: What was looked at.
        state: OK, WARN or BAD.
        seen: What was seen.
        advice: What to do; "" where all is well.
    """

    check: str
    state: str
    seen: str
    advice: str = ""

    @classmethod
    def of(cls, check: str, error: Exception, state: str = BAD) -> Finding:
        """A complaint whose last part, after a semicolon, says what to do."""
        seen, _, advice = " ".join(str(error).split()).rpartition("; ")
        return (
            cls(check, state, seen, advice)
            if seen
            else cls(check, state, advice, "mend that, and run the command again")
        )


Findings = Iterator[Finding]


def probes(nodes: Nodes) -> Findings:
    """Whether every node starts a worker."""
    secrets_file = os.environ.get(SECRETS_FILE_VARIABLE)
    first = f"see that the secrets file {secrets_file} is there, else " if secrets_file else "see "
    for node, reason in nodes.silent.items():
        advice = f"{first}raylet.err and python-core-worker-*.log in /tmp/ray/session_latest/logs there"
        yield Finding("nodes", BAD, f"{node.name} starts no worker ({reason})", advice)
    if nodes.all:
        yield Finding("nodes", OK, f"{_count(nodes.all)} started a worker: {_names(nodes.all)}")


def versions(nodes: Nodes, within_s: float) -> Findings:
    """Whether all nodes have what this process has."""
    here = NodeProbe().versions()
    answers = nodes.ask(lambda probe, node: probe.versions.remote(), within_s)
    yield from _failures("versions", answers, INSTALL)
    agree = []
    for node, there in answers.values.items():
        other = {name: version for name, version in there.items() if version != here[name]}
        if not other:
            agree.append(node)
            continue
        state = BAD if any(_is_grave(name, version, here[name]) for name, version in other.items()) else WARN
        mine = ", ".join(f"{name} {here[name]}" for name in other)
        theirs = ", ".join(f"{name} {version}" for name, version in other.items())
        yield Finding("versions", state, f"{node.name} has {theirs}; here: {mine}", INSTALL)
    if agree:
        yield Finding("versions", OK, f"{', '.join(map(' '.join, here.items()))}; the same on {_count(agree)}")


def _is_grave(name: str, there: str, here: str) -> bool:
    if name in SAME_EVERYWHERE:
        return True
    numbers = [version.partition("+")[0].split(".")[:2] for version in (there, here)]
    return numbers[0] != numbers[1]


def clocks(nodes: Nodes, within_s: float) -> Findings:
    """How far the nodes' clocks are from this machine's, less the time that asking took."""
    before = time.time()
    answers = nodes.ask(lambda probe, node: probe.clock.remote(), within_s)
    after = time.time()
    yield from _failures("clock", answers, "see that the node is not overloaded")
    skews = {node: max(before - there, there - after, 0.0) for node, there in answers.values.items()}
    for node, skew_s in skews.items():
        if skew_s > CLOCK_WARN_S:
            state = BAD if skew_s > CLOCK_BAD_S else WARN
            yield Finding("clock", state, f"{node.name} is {skew_s:.0f} s away from here", "run an NTP client on both")
    if skews:
        yield Finding(
            "clock",
            OK,
            f"{_count(skews)} asked; at most {max(skews.values()):.1f} s away, known to {after - before:.2f} s",
        )


def object_stores(nodes: Nodes, within_s: float) -> Findings:
    """Whether Ray's object store has room, and lies in memory."""
    answers = nodes.ask(lambda probe, node: probe.shared_memory_bytes.remote(), within_s)
    yield from _failures("object store", answers, "see that the node is not overloaded")
    for node, shared_bytes in answers.values.items():
        size = node.object_store_bytes
        if shared_bytes is not None and shared_bytes < size:
            yield Finding(
                "object store",
                WARN,
                f"{node.name} has {_gib(shared_bytes)} of /dev/shm, so its object store of {_gib(size)} lies on disk",
                "give it more: docker --shm-size, on Kubernetes an emptyDir of medium Memory at /dev/shm",
            )
        if size < OBJECT_STORE_WARN_BYTES:
            advice = "start Ray there with a larger --object-store-memory"
            yield Finding("object store", WARN, f"{node.name} has {_gib(size)}, little for frames under way", advice)
    sizes = [node.object_store_bytes for node in nodes.all]
    yield Finding(
        "object store", OK, f"{_gib(min(sizes))} on the node that has least" if sizes else "no node was asked"
    )


def token() -> Findings:
    """Whether the cluster turns away who has no token."""
    address = ray.get_runtime_context().gcs_address
    if joining.asks_for_token(address):
        yield Finding("token", OK, f"Ray at {address} asks for a token, and this process has it")
    else:
        yield Finding(
            "token",
            WARN,
            f"Ray at {address} asks for no token: whoever reaches it can run programs on its nodes",
            "start Ray with RAY_AUTH_MODE=token on every node (infra/README.md)",
        )


def place(name: str, trial: PlaceTrial, nodes: Nodes | None, needed_bytes: int, within_s: float) -> Findings:
    """Whether this process and every node write to one and the same place, and what is free there."""
    with trial.begun():
        others = []
        if nodes is not None:
            answers = trial.ask(nodes, within_s)
            yield from _failures(name, answers, SHARE)
            for node, seen in answers.values.items():
                if (problem := _place_problem(trial, node, seen)) is not None:
                    yield Finding(name, BAD, *problem)
                else:
                    others.append(node)
        free = trial.free_bytes
        yield from _room(name, trial, free, needed_bytes)
        room = "" if free is None else f"; {_gib(free)} free"
        yield Finding(
            name, OK, f"{trial.address}: written, replaced and read by this process and {_count(others)}{room}"
        )


def _place_problem(trial: PlaceTrial, node: Node, seen: Mapping[str, str | bool]) -> tuple[str, str] | None:
    if seen["error"]:
        return f"{node.name} cannot write to {trial.address} ({seen['error']})", "mend its access there"
    if not seen["is_there"]:
        return f"{trial.address} is not there on {node.name}", SHARE
    if not seen["is_seen"]:
        return f"{trial.address} is not shared: what this process writes is not there on {node.name}", SHARE
    if not trial.reads_back(node.id):
        return f"{trial.address} is not shared: what {node.name} writes is not seen here", SHARE
    return None


def _room(name: str, trial: PlaceTrial, free: int | None, needed: int) -> Findings:
    if free is None or free >= max(FREE_WARN_BYTES, needed):
        return
    state = BAD if free < max(FREE_BAD_BYTES, needed) else WARN
    wanted = f"{_gib(needed)} for two replays in checkpoints" if needed > FREE_WARN_BYTES else _gib(FREE_WARN_BYTES)
    yield Finding(name, state, f"{trial.address} has {_gib(free)} free, of {wanted} that are wanted", "free some space")


def tracking(uri: str) -> Findings:
    """A run and an artifact, written from here."""
    with trial_run(uri) as run:
        where = Address.parse(uri).uri
        note = "" if run.address.uri == where else " (the file is not there yet: tried on another one beside it)"
        yield Finding("tracking", OK, f"{where}: a run was written to experiment {run.experiment} and deleted{note}")
        try:
            run.try_artifact()
        except UserError as error:
            yield Finding.of("artifacts", error)
        else:
            store = run.artifact_uri.partition(run.run_id)[0]
            yield Finding("artifacts", OK, f"{store}: one was written, read back and deleted")


def tracking_from(nodes: Nodes, uri: str, within_s: float) -> Findings:
    """Whether the server takes the credentials that each node has, and from one of them a run and an artifact.

    Only for stages that the cluster itself runs (submitted ones): their drivers are there, and only drivers track.
    """
    address = Address.parse(uri)
    own = ray.get_runtime_context().get_node_id()
    writer = next((node for node in nodes.all if node.id != own), nodes.all[0])
    answers = nodes.ask(lambda probe, node: probe.tracking.remote(address.uri, node == writer), within_s)
    reasons = {**answers.failures, **{node: reason for node, reason in answers.values.items() if reason}}
    for node, reason in reasons.items():
        seen, _, advice = reason.rpartition("; ")
        advice = f"a stage that the cluster runs there (a submitted one) needs that; {advice}"
        yield Finding("tracking", WARN, f"from {node.name}: {seen or reason}", advice)
    able = [node for node in answers.values if node not in reasons]
    written = f"; {writer.name} wrote a run and an artifact, which were deleted" if writer in able else ""
    if able:
        yield Finding("tracking", OK, f"answers {_count(able)} too{written}")


def cpus(needs: Needs | None) -> Findings:
    """Whether Ray has as many CPUs as a stage takes at once."""
    has, free = (counts().get("CPU", 0.0) for counts in (ray.cluster_resources, ray.available_resources))
    if needs is None:
        yield Finding(
            "CPUs", OK, f"{has:g}, of which {free:g} are free now; name a recipe to see whether they do for it"
        )
        return
    wanted = f"{needs.what} take {needs.cpus:g} at once; Ray has {has:g}, of which {free:g} are free now"
    if needs.cpus > has and autoscaler() is not None:
        yield Finding(
            "CPUs", WARN, wanted, "the stage will ask the autoscaler for the rest; see that it may add so many"
        )
    elif needs.cpus > has:
        yield Finding("CPUs", BAD, wanted, "ask for fewer workers, or add nodes")
    elif needs.cpus > free:
        yield Finding("CPUs", WARN, wanted, "wait until others have ended, or ask for fewer workers")
    else:
        yield Finding("CPUs", OK, wanted)


def memory(needs: Needs) -> Findings:
    """Whether a full replay fits into the memory of the driver's machine."""
    free = free_bytes()
    replay = f"a full replay of {needs.replay_capacity:,} rows takes {_gib(needs.replay_bytes)}"
    seen = f"{replay}, this machine has {_gib(free)} free"
    if needs.replay_bytes > free:
        yield Finding("memory", BAD, seen, "lower train.replay_capacity, or run the driver on a larger machine")
    else:
        yield Finding("memory", OK, seen)


def gpus(num_gpus: int, nodes: Nodes, within_s: float) -> Findings:
    """Whether Ray has the GPUs that are counted on, and torch sees those that Ray counts."""
    has = sum(node.gpus for node in nodes.all)
    if num_gpus > has:
        yield Finding("GPUs", BAD, f"{num_gpus} are asked for, Ray has {has:g}", "add nodes with GPUs, or do without")
    answers = nodes.ask(lambda probe, node: probe.num_cuda_devices.remote(), within_s)
    for node, seen in {**answers.values, **answers.failures}.items():
        if node.gpus and (isinstance(seen, str) or seen < node.gpus):
            what = f"torch sees {seen}" if isinstance(seen, int) else seen
            advice = "install torch with CUDA there, and the driver's libraries (infra/docker/Dockerfile.gpu)"
            yield Finding("GPUs", BAD, f"Ray counts {node.gpus:g} on {node.name}, {what}", advice)
        elif node.gpus:
            yield Finding("GPUs", OK, f"{node.gpus:g} on {node.name}, as torch sees them")


def _failures(check: str, answers: Answers, advice: str) -> Findings:
    for node, reason in answers.failures.items():
        yield Finding(check, BAD, f"{node.name}: {reason}", advice)


def _count(nodes: object) -> str:
    count = len(nodes)  # type: ignore[arg-type]
    return f"{count} node{'s' * (count != 1)}"


def _names(nodes: list[Node]) -> str:
    shown = ", ".join(node.name for node in nodes[:4])
    return shown if len(nodes) <= 4 else f"{shown} and {len(nodes) - 4} more"


def _gib(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count < 10 * GIB else f"{count / GIB:.0f} GiB"
