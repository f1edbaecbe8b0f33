"""What was made from what: data -> encoder -> agent -> evaluation, and on to the data that the agent played.

Read from the tracking server alone. Every run and every registered version carries its own sha256 and that of what it
was made from, so a link holds as long as either of the two is left.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pipeline.delivery import KIND_TAG, SHA256_TAG
from pipeline.records import Records
from pipeline.tracking import PARENT_TAG

if TYPE_CHECKING:
    from pipeline.server import MlflowRun, ModelVersion

Kind = Literal["data", "encoder", "agent", "evaluation"]

KIND_OF_STAGE: dict[str, Kind] = {"pretrain": "encoder", "train": "agent", "evaluate": "evaluation"}
KIND_OF_VERSION: dict[str, Kind] = {"encoder": "encoder", "policy": "agent"}
ORIGIN_TAG: dict[Kind, str] = {
    "data": "dataset.policy_sha256",
    "encoder": "dataset.digest",
    "agent": "encoder.sha256",
    "evaluation": "policy.sha256",
}
MADE_FROM: dict[Kind, tuple[Kind, ...]] = {
    "data": ("encoder",),
    "encoder": ("agent",),
    "agent": ("evaluation", "data"),
    "evaluation": (),
}
DATASET = "dataset."
SHOWN_METRICS = (
    *("bits_per_dim", "active_units", "agent_steps", "episode_return_mean"),
    *("mean_return", "ci95_low", "ci95_high"),
)
SHOWN_TAGS = (
    *("game", "mode", "agent_steps", "bits_per_dim"),
    *("encoder.uri", "encoder.address", "policy.uri", "policy.address"),
)
SHOWN_PARAMS = ("game", "mode", "episodes")
NUMBERS = ("frames", "episodes", "seed", "epsilon", "agent_steps", "bits_per_dim")


@dataclass(frozen=True)
class RunFacts:
    """A run as it stands on the server: its id, its name, its status, and whether it is deleted there."""

    run_id: str
    name: str
    status: str
    is_deleted: bool


@dataclass
class Node:
    """One thing that was made.

    Attributes:
        kind: What it is.
        key: Digest of the data, sha256 of the bundle, or the run's id where there is no bundle (yet).
        origin: Key of what it was made from; None where it was made from nothing or that is not recorded.
        facts: What is known of it.
        runs: That made it. None for data, which is collected without a run.
        versions: Its addresses in the registry, `models:/NAME/3`, with the aliases of each.
        remarks: Links that are missing, in words.
    """

    kind: Kind
    key: str
    origin: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    runs: list[RunFacts] = field(default_factory=list)
    versions: dict[str, list[str]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


class Lineage:
    """The things around those asked for, found link by link.

    Args:
        records: Of the tracking server.

    Attributes:
        nodes: By key, in the order in which they were found.
    """

    def __init__(self, records: Records) -> None:
        self.records = records
        self.nodes: dict[str, Node] = {}
        self._made: dict[str, list[Node]] = {}

    def add_run(self, run: MlflowRun) -> Node | None:
        """Adds what a run made, and the data that it learned from; None for a run that makes nothing of its own."""
        tags = run.data.tags
        kind = KIND_OF_STAGE.get(tags.get("stage", ""))
        if kind is None:
            return None
        node = self._add(kind, tags.get(SHA256_TAG) or run.info.run_id, tags)
        facts = RunFacts(run.info.run_id, run.info.run_name, run.info.status, run.info.lifecycle_stage == "deleted")
        if facts not in node.runs:
            node.runs.append(facts)
        figures = _facts(run.data.metrics, SHOWN_METRICS)
        node.facts = {**_facts(run.data.params, SHOWN_PARAMS), **node.facts, **figures}
        return node

    def add_version(self, version: ModelVersion) -> Node | None:
        """Adds what was registered, and the data that it learned from; None for a model that is not one of ours."""
        kind = KIND_OF_VERSION.get(version.tags.get(KIND_TAG, ""))
        if kind is None or SHA256_TAG not in version.tags:
            return None
        node = self._add(kind, version.tags[SHA256_TAG], version.tags)
        node.versions.setdefault(f"models:/{version.name}/{version.version}", [])
        return node

    def add_data(self, facts: Mapping[str, Any]) -> Node:
        """Adds a dataset, by what `FramesDataset.facts` gives or by the same as tags."""
        played_by = facts.get("policy_sha256") or None
        node = self.nodes.setdefault(facts["digest"], Node("data", facts["digest"], played_by))
        node.facts = {**_facts(facts, facts), **node.facts}
        return node

    def add_bundles(self, sha256s: set[str]) -> list[Node]:
        """Adds what made these bundles and what they are registered as, as far as the server knows."""
        for run in self.records.runs_tagged(SHA256_TAG, sha256s):
            self.add_run(run)
        for version in self.records.versions_tagged(SHA256_TAG, sha256s):
            self.add_version(version)
        return [self.nodes[sha256] for sha256 in sha256s & self.nodes.keys()]

    def ascend(self, nodes: Iterable[Node]) -> None:
        """Follows things to all that they were made from, generation by generation."""
        old, seen = {node.key: node for node in nodes}, set[str]()
        while old:
            seen |= old.keys()
            origins = {node.origin: node for node in old.values() if node.origin is not None}
            models = {key for key, node in old.items() if node.kind in ("encoder", "agent")}
            self.add_bundles(models | (origins.keys() - self.nodes.keys()))
            for key in origins.keys() - self.nodes.keys():
                self._add_unknown(key, origins[key])
            old = {key: self.nodes[key] for key in origins.keys() - seen}

    def descend(self, nodes: Iterable[Node]) -> None:
        """Follows things to all that was made from them, generation by generation."""
        young, seen = list(nodes), set[str]()
        while young:
            seen |= {node.key for node in young}
            for kind, tag in ORIGIN_TAG.items():
                parents = {node.key for node in young if kind in MADE_FROM[node.kind]}
                if parents:
                    self._add_made_from(tag, parents)
            young = [node for key, node in self.nodes.items() if key not in seen and node.origin in seen]

    def add_children(self, run_id: str) -> list[Node]:
        """Adds what the runs nested under a run made, at any depth."""
        found, parents, seen = list[Node](), {run_id}, set[str]()
        while parents:
            seen |= parents
            runs = list(self.records.runs_tagged(PARENT_TAG, parents))
            found += [node for node in map(self.add_run, runs) if node is not None]
            parents = {run.info.run_id for run in runs} - seen
        return found

    def finish(self) -> None:
        """Once all is added: fills in aliases, says of each thing what is missing, and sorts them by origin."""
        names = {
            uri.removeprefix("models:/").rpartition("/")[0] for node in self.nodes.values() for uri in node.versions
        }
        for name in sorted(names):
            for alias, number in self.records.aliases(name).items():
                for node in self.nodes.values():
                    if (uri := f"models:/{name}/{number}") in node.versions:
                        node.versions[uri].append(alias)
        for node in self.nodes.values():
            node.remarks += _missing(node)
            if node.origin is not None:
                self._made.setdefault(node.origin, []).append(node)

    def made_from(self, key: str) -> list[Node]:
        """The things that were made directly from one, the newest first."""
        return self._made.get(key, [])

    def line(self, key: str) -> list[str]:
        """The keys of a thing and of all that it was made from, back to the first."""
        keys = list[str]()
        at: str | None = key
        while at in self.nodes and at not in keys:
            keys.append(at)
            at = self.nodes[at].origin
        return keys

    def _add_made_from(self, tag: str, parents: set[str]) -> None:
        for run in self.records.runs_tagged(tag, parents):
            self.add_run(run)
        for version in self.records.versions_tagged(tag, parents):
            self.add_version(version)

    def _add(self, kind: Kind, key: str, tags: Mapping[str, str]) -> Node:
        node = self.nodes.setdefault(key, Node(kind, key))
        node.origin = node.origin or tags.get(ORIGIN_TAG[kind])
        node.facts = {**node.facts, **_facts(tags, SHOWN_TAGS)}
        data = {name.removeprefix(DATASET): value for name, value in tags.items() if name.startswith(DATASET)}
        if kind == "encoder" and "digest" in data:
            self.add_data(data)
        return node

    def _add_unknown(self, key: str, made: Node) -> None:
        """What `made` was made from, where the server knows nothing of it but its hash."""
        kind: Kind = "encoder" if made.kind == "agent" else "agent"
        names = {"agent": ("encoder.uri", "encoder.address"), "evaluation": ("policy.uri", "policy.address")}
        addresses = (made.facts.get(name) for name in names.get(made.kind, ("policy_uri", "policy")))
        address = next((address for address in addresses if address), None)
        self.nodes[key] = Node(kind, key, facts={"address": address} if address else {})


def _facts(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Some of a run's or version's values, all of which are text there, the numbers among them as numbers."""
    known = {name: values[name] for name in names if values.get(name) is not None}
    return {name: _number(value) if name in NUMBERS else value for name, value in known.items()}


def _number(value: Any) -> Any:
    try:
        number = float(value)
    except ValueError:
        return value
    return int(number) if number.is_integer() else number


def _missing(node: Node) -> list[str]:
    """What should be known of a thing and is not."""
    if node.kind == "data":
        return []
    remarks = []
    if not node.runs and not node.versions:
        remarks.append("no run and no registered version here made these bytes: deleted for good, or tracked elsewhere")
    elif not node.runs:
        remarks.append("the run that made it is deleted for good, or was tracked elsewhere")
    elif all(run.is_deleted for run in node.runs):
        remarks.append("the run that made it is deleted (mlflow can restore it)")
    if node.kind != "evaluation" and node.runs and not node.versions:
        remarks.append(_unregistered(node))
    is_from_nothing = node.facts.get("mode") in ("pixels", "online") or node.facts.get("policy.address", "").startswith(
        "random:"
    )
    if node.origin is None and (node.runs or node.versions) and not is_from_nothing:
        what = {"encoder": "the data", "agent": "the encoder", "evaluation": "the policy"}[node.kind]
        remarks.append(f"{what} it was made from is not recorded")
    return remarks


def _unregistered(node: Node) -> str:
    if node.key not in {run.run_id for run in node.runs}:
        return "not registered, or its version is deleted"
    return f"no bundle: the run is {node.runs[0].status.lower()}"
