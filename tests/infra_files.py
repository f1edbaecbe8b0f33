"""What the tests of infra/ read: its files as documents, and the commands that they hold."""

from __future__ import annotations

import re
import tomllib
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from jobs.cli import parser
from jobs.recipes import pretrain_recipe, train_recipe

ROOT = Path(__file__).resolve().parent.parent
INFRA = ROOT / "infra"
KUBERAY = sorted((INFRA / "kuberay").glob("*.yaml"))
DOCKERFILES = sorted((INFRA / "docker").glob("Dockerfile*"))
FILES = sorted(path for path in INFRA.rglob("*") if path.is_file() and path.name != ".env")
README = (INFRA / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = dict(line.lower().split("==") for line in (ROOT / "constraints.txt").read_text().split("\n") if "==" in line)
STAGES = "|".join(next(action.choices for action in parser()._actions if action.choices))

Manifest = dict[str, Any]


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text()))


MANIFESTS: list[Manifest] = [manifest for path in KUBERAY for manifest in documents(path)]
CORE = [manifest for manifest in MANIFESTS if not manifest["apiVersion"].startswith("ray.io/")]
CLUSTER: Manifest = documents(INFRA / "kuberay" / "raycluster.yaml")[0]
JOB: Manifest = documents(INFRA / "kuberay" / "rayjob.yaml")[0]
LAUNCHER: Manifest = documents(INFRA / "onprem" / "cluster.yaml")[0]
COMPOSE: Manifest = documents(INFRA / "compose.yaml")[0]
SERVICES: dict[str, Manifest] = COMPOSE["services"]


def named(kind: str) -> dict[str, Manifest]:
    return {manifest["metadata"]["name"]: manifest for manifest in MANIFESTS if manifest["kind"] == kind}


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every scalar of a document with the keys that lead to it."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if pairs is None:
        yield path, value
    else:
        for key, inner in pairs:
            yield from leaves(inner, (*path, str(key)))


def ray_templates() -> list[Manifest]:
    specs = (CLUSTER["spec"], JOB["spec"]["rayClusterSpec"])
    return [group["template"] for spec in specs for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def templates() -> list[Manifest]:
    own = [manifest["spec"]["template"] for kind in ("Deployment", "StatefulSet") for manifest in named(kind).values()]
    return own + ray_templates()


def containers() -> list[Manifest]:
    return [container for template in templates() for container in template["spec"]["containers"]]


def instructions(dockerfile: Path, name: str) -> list[str]:
    return re.findall(rf"^{name} (.+)$", dockerfile.read_text(), re.MULTILINE)


def joined(text: str) -> str:
    """The text with continued shell lines made one."""
    return re.sub(r"\\\n\s*", "", text)


def understood(arguments: list[str]) -> Namespace:
    options = parser().parse_args(arguments)
    if arguments[0] == "submit":
        inner = understood(options.command[1:])
        inner.driver_room = inner.driver_cpus(inner) if options.num_cpus is None else options.num_cpus
        return inner
    recipes = {"train": train_recipe, "pretrain": pretrain_recipe}
    if arguments[0] in recipes:
        options.settings = recipes[arguments[0]](options.recipe, overrides=options.set)
    return options


def commands(text: str, program: str = "latentrl") -> list[str]:
    found = re.findall(rf"(?<![\w-]){re.escape(program)} ((?:{STAGES})\b[^\"'`|;&\n]*)", joined(text))
    spoken_of = re.compile(r"\S+|(data|jobs) \S+|.*\.\.\..*")  # and not called
    return [command for command in map(str.strip, found) if not spoken_of.fullmatch(command)]
