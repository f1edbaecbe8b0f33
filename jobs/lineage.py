"""`latentrl lineage RUN_OR_MODEL`: which data made this agent, which agents use this encoder."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from jobs.workspace import Workspace
from pipeline import bundle
from pipeline.delivery import SHA256_TAG
from pipeline.errors import UserError
from pipeline.journal import num_undelivered
from pipeline.lineage import Lineage, Node
from pipeline.records import PAGE, Records, quoted
from pipeline.resolve import find_version, kind_of
from pipeline.schema import MANIFEST_FILE
from pipeline.server import Address
from pipeline.store import FramesDataset
from pipeline.tracking import PIPELINE_STAGE, RUN_FILE, RunRecord
from pipeline.untrusted import read_json

RUN_ID = re.compile(r"[0-9a-f]{32}")
HASH = re.compile(r"[0-9a-f]{8,64}")
MAX_SHOWN = 20


def run(workspace: Workspace, asked: str) -> dict[str, Any]:
    """Finds what a thing was made from and what was made from it.

    Args:
        workspace: Where the tracking server is, and the runs that are known by a folder's name.
        asked: An MLflow run id, a run's folder or name, a pipeline's name; `models:/NAME/3`, `models:/NAME@alias`, a
            bundle's folder; a dataset's folder, address or digest; or the beginning of a hash.

    Returns:
        asked; trees: the things at the top, each with what was made from it under `made`; data: that `asked` was made
        from, the nearest first; agents: that use it, if it is an encoder or data, as it is and not by way of data that
        an agent has played since; missing: how many links are, each told in its thing's `remarks`.

    Raises:
        UserError: Nothing of that name, or the server does not answer.
    """
    lineage = Lineage(Records(workspace.tracking_uri))
    focus = _Finder(lineage, workspace).find(asked)
    lineage.ascend(focus)
    if len(focus) == 1:  # several are the runs that one gathers, and the answer is these
        lineage.descend(focus)
    lineage.finish()
    return _answer(lineage, asked, {node.key for node in focus})


class _Finder:
    """From what the user typed to things in a lineage."""

    def __init__(self, lineage: Lineage, workspace: Workspace) -> None:
        self._lineage, self._records, self._workspace = lineage, lineage.records, workspace

    def find(self, asked: str) -> list[Node]:
        """The thing that is meant, or the things that the runs nested under a run made."""
        if asked.startswith("models:"):
            return [self._version(asked)]
        if asked.startswith("runs:/"):
            return self._run(asked.removeprefix("runs:/").strip("/").partition("/")[0])
        if "://" in asked:
            return [self._lineage.add_data(FramesDataset.open(asked).facts())]
        for folder in (Path(asked).expanduser().absolute(), self._workspace.runs / asked):
            if folder.is_dir():
                return self._folder(folder)
        if RUN_ID.fullmatch(asked) and self._records.run(asked) is not None:
            return self._run(asked)
        return self._hash(asked) if HASH.fullmatch(asked) else self._named(asked)

    def _version(self, address: str) -> Node:
        version = find_version(address, self._records.client, self._records.address)
        node = self._lineage.add_version(version)
        if node is None:
            raise UserError(f"{address} was not registered by latentrl: nothing is recorded of what it was made from")
        return node

    def _run(self, run_id: str) -> list[Node]:
        found = self._records.run(run_id)
        if found is None:
            raise UserError(
                f"there is no run {run_id} at {self._records.address.uri}; it is deleted for good or elsewhere"
            )
        node = self._lineage.add_run(found)
        things = [node] if node is not None else self._lineage.add_children(run_id)
        if not things:
            raise UserError(f"run {found.info.run_name} makes nothing itself and has no runs nested under it")
        return things

    def _folder(self, folder: Path) -> list[Node]:
        if (folder / RUN_FILE).is_file():
            record = RunRecord.read(folder)
            if Address.parse(record.uri) != self._records.address:
                raise UserError(f"run {folder.name} is tracked at {record.uri}; give --tracking-uri {record.uri}")
            things = self._run(record.run_id)
            if pending := num_undelivered(folder):
                things[0].remarks.append(f"{pending} entries of the run are not delivered: latentrl sync {folder.name}")
            return things
        if (folder / bundle.SUMS_FILE).is_file():
            return [self._bundle(bundle.sha256_of(folder), folder)]
        if (latents := _latents(folder)) is not None:
            known = self._lineage.add_bundles({latents["encoder"]})
            return known or [self._lineage.nodes.setdefault(latents["encoder"], Node("encoder", latents["encoder"]))]
        return [self._lineage.add_data(FramesDataset.open(str(folder)).facts())]

    def _bundle(self, sha256: str, folder: Path) -> Node:
        """What is on record of a bundle on this machine, or else what it says of itself."""
        known = self._lineage.add_bundles({sha256})
        return known[0] if known else self._lineage.nodes.setdefault(sha256, _unrecorded(sha256, folder))

    def _hash(self, beginning: str) -> list[Node]:
        for tag in ("dataset.digest", SHA256_TAG):
            condition = f"tags.`{tag}` LIKE '{beginning}%'"
            for run in islice(self._records.runs(condition), PAGE):
                self._lineage.add_run(run)
            for version in islice(self._records.versions(condition), PAGE):
                self._lineage.add_version(version)
        found = [node for node in self._lineage.nodes.values() if node.key.startswith(beginning)]
        if len(found) > 1:
            raise UserError(f"{beginning} begins {_listed(node.key for node in found)}; give more of it")
        return found or self._named(beginning)

    def _named(self, name: str) -> list[Node]:
        found = list(islice(self._records.runs(f"attributes.run_name = {quoted(name)}"), PAGE))
        if not found and (addresses := self._records.addresses(name)):
            raise UserError(f"{name} is a model with versions; give {' or '.join(addresses)}")
        if not found:
            raise UserError(
                f"there is no run {name!r} at {self._records.address.uri} or under {self._workspace.runs}, and no "
                f"bundle or dataset; give a run's name or id, models:/NAME/3, a folder or a hash"
            )
        if len(found) > 1 and any(run.data.tags.get("stage") != PIPELINE_STAGE for run in found):
            raise UserError(f"several runs are called {name}: {_listed(run.info.run_id for run in found)}; give an id")
        return [node for run in found for node in self._run(run.info.run_id)]


def _latents(folder: Path) -> dict[str, Any] | None:
    """The manifest of a dataset of latents; None of another folder."""
    path = folder / MANIFEST_FILE
    try:
        manifest = read_json(path, str(path)) if path.is_file() else {}
    except UserError:
        return None  # which opening it as a dataset of frames reports
    return manifest if "encoder" in manifest else None


def _unrecorded(sha256: str, folder: Path) -> Node:
    """A bundle that the server knows nothing of, by its own files."""
    facts: dict[str, Any] = {"address": str(folder)}
    if kind_of(folder, str(folder)) == "encoder":
        return Node("encoder", sha256, facts=facts)
    config = read_json(folder / "config.json", f"config.json of {folder}")
    encoder = config.get("encoder")
    made_from = encoder.get("sha256") if isinstance(encoder, dict) else None
    return Node("agent", sha256, made_from, {**facts, "mode": config.get("mode")})


def _listed(keys: Iterable[str]) -> str:
    shown = list(islice(keys, 6))
    return ", ".join(shown[:5]) + (" and others" if len(shown) > 5 else "")


def _answer(lineage: Lineage, asked: str, keys: set[str]) -> dict[str, Any]:
    nodes = lineage.nodes
    made_from = list(dict.fromkeys(key for start in keys for key in lineage.line(start)))
    trees = [_tree(lineage, node, keys) for node in nodes.values() if node.origin not in nodes]
    users = {node["key"] for tree in trees for top in _topmost(tree, keys) for node in _of_this_data(top)}
    return {
        "asked": asked,
        "trees": trees,
        "data": [_described(nodes[key], keys) for key in made_from if nodes[key].kind == "data"],
        "agents": [_described(node, keys) for key, node in nodes.items() if key in users and node.kind == "agent"],
        "missing": sum(len(node.remarks) for node in nodes.values()),
    }


def _described(node: Node, keys: set[str]) -> dict[str, Any]:
    described = dataclasses.asdict(node)
    del described["origin"]
    return {**described, "is_asked": node.key in keys}


def _tree(lineage: Lineage, node: Node, keys: set[str]) -> dict[str, Any]:
    return {**_described(node, keys), "made": [_tree(lineage, made, keys) for made in lineage.made_from(node.key)]}


def _topmost(tree: dict[str, Any], keys: set[str]) -> Iterator[dict[str, Any]]:
    """The things that were asked for in a tree, but not those below one."""
    if tree["key"] in keys:
        yield tree
        return
    for made in tree["made"]:
        yield from _topmost(made, keys)


def _of_this_data(tree: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A thing and what was made from it, but for what came of data that an agent played."""
    yield tree
    for made in tree["made"]:
        if made["kind"] != "data":
            yield from _of_this_data(made)


def present(result: dict[str, Any]) -> str:
    """The trees, and the two questions answered in a line each."""
    asked = [kind for tree in result["trees"] for kind in _asked_kinds(tree)]
    mark = "   <== asked for" if len(asked) == 1 else ""
    lines = [line for tree in result["trees"] for line in _lines(tree, "", "", mark)]
    lines.append("")
    if asked != ["data"]:
        lines.append(f"made from: {'; '.join(map(_words, result['data'])) or _why_no_data(result)}")
    if asked in (["data"], ["encoder"]):
        names = [_name(agent) for agent in result["agents"]]
        shown = ", ".join(names[:MAX_SHOWN]) + (f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else "")
        lines.append(f"agents that use it: {len(names)}" + (f": {shown}" if names else ""))
    if result["missing"]:
        lines.append(f"missing links: {result['missing']}, each marked with ! above")
    return "\n".join(lines)


def _asked_kinds(tree: dict[str, Any]) -> list[str]:
    below = [kind for made in tree["made"] for kind in _asked_kinds(made)]
    return [tree["kind"], *below] if tree["is_asked"] else below


def _lines(node: dict[str, Any], first: str, rest: str, mark: str) -> Iterator[str]:
    yield f"{first}{_words(node)}{mark if node['is_asked'] else ''}"
    for remark in node["remarks"]:
        yield f"{rest}   ! {remark}"
    made = node["made"]
    shown = made if len(made) <= MAX_SHOWN else made[: MAX_SHOWN - 1]
    for child in shown:
        is_last = child is made[-1]
        yield from _lines(child, rest + ("└─ " if is_last else "├─ "), rest + ("   " if is_last else "│  "), mark)
    if len(shown) < len(made):
        yield f"{rest}└─ and {len(made) - len(shown)} more; --json lists all"


def _words(node: dict[str, Any]) -> str:
    facts = node["facts"]
    if node["kind"] == "data":
        player = facts.get("policy_uri") or facts.get("policy") or "nobody knows whom"
        what = f"{_figure('{:,}', facts.get('frames', 0))} frames of {facts.get('game', '?')}, played by {player}"
        return f"data {node['key'][:12]}: {what}, at {facts.get('uri')}"
    figures = {
        "encoder": [("bits_per_dim", "{:.3f} bits/dim")],
        "agent": [("mode", "{}"), ("agent_steps", "{:,} agent steps")],
        "evaluation": [("mean_return", "{:.2f} points"), ("episodes", "{} games")],
    }[node["kind"]]
    known = [_figure(text, facts[key]) for key, text in figures if facts.get(key) is not None]
    runs = [f"run {run['name']} ({run['status'].lower()})" for run in node["runs"]]
    if node["kind"] == "evaluation" and str(facts.get("policy.address")).startswith("random:"):
        known.append(f"agent {facts['policy.address']}")
    name = f" {_name(node)}" if node["kind"] != "evaluation" else ""
    return f"{node['kind']}{name}: {', '.join(known + runs) or 'nothing is recorded'}"


def _figure(text: str, value: Any) -> str:
    """A value as it should be shown; as it stands where a server has something else under its name."""
    try:
        return text.format(value)
    except ValueError:
        return str(value)


def _name(node: dict[str, Any]) -> str:
    versions = [f"{uri} ({', '.join(names)})" if names else uri for uri, names in node["versions"].items()]
    return " = ".join(versions) or str(node["facts"].get("address") or node["key"][:12])


def _why_no_data(result: dict[str, Any]) -> str:
    is_pixels = any(tree["facts"].get("mode") == "pixels" for tree in result["trees"])
    return "no data: it learned from pixels" if is_pixels else "it is not known: see what is missing"
