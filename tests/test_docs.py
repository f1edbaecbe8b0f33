"""The documentation against the project: every command that it names is understood, every path that it names exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from jobs.cli import parser

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "infra" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
STAGES = (
    "collect",
    "data info",
    "data check",
    "pretrain",
    "encode",
    "train",
    "evaluate",
    "report",
    "demo",
    "submit",
    "jobs list",
    "jobs logs",
    "jobs stop",
    "probe",
    "lineage",
    "gc",
    "sync",
    "doctor",
    "recipes",
)


def commands() -> list[str]:
    found = {line for page in PAGES for line in re.findall(r"`(latentrl [^`\n]+)`", page.read_text())}
    bare = {f"latentrl {stage}" for stage in STAGES}  # the stage is spoken of, not called
    return sorted(line for line in found - bare if "STAGE" not in line and "..." not in line)


@pytest.mark.parametrize("command", commands())
def test_every_command_in_the_docs_is_understood(command: str) -> None:
    options = parser().parse_args(shlex.split(command)[1:])
    if command.startswith("latentrl submit "):
        parser().parse_args(options.command[1:])


def test_the_docs_name_every_stage() -> None:
    text = (ROOT / "README.md").read_text()
    assert [stage for stage in STAGES if f"latentrl {stage}" not in text] == []


@pytest.mark.parametrize("stage", STAGES)
def test_help_of_every_stage(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parser().parse_args([*stage.split(), "--help"])
    assert stop.value.code == 0
    assert "--json" in capsys.readouterr().out


def test_links_and_the_file_tree_are_true() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"
    tree = re.findall(r"^ {2}([a-z_]+\.py|[a-z_]+/) ", (ROOT / "README.md").read_text(), re.MULTILINE)
    rooms = [ROOT / "pipeline", ROOT / "rllib_ext", ROOT / "jobs"]
    missing = [name for name in tree if not any((room / name).exists() for room in rooms)]
    assert len(tree) > 15
    assert not missing


def test_make_targets_in_the_docs_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for target in re.findall(r"^make ([a-z]+)", page.read_text(), re.MULTILINE):
            assert f"\n{target}:" in makefile, f"{page.name}: make {target}"
