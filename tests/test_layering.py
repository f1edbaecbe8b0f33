"""The dependency rule: jobs -> rllib_ext -> pipeline -> pipeline.models, and who may import what."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("pipeline", "rllib_ext", "jobs")
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
MLFLOW_MODULES = {"server", "delivery", "serving"}


def imports_of(path: Path) -> set[str]:
    """Every absolute module name that a file imports, at any depth."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def local_graph(paths: list[Path]) -> dict[str, set[str]]:
    names = {module_name(path) for path in paths}
    return {module_name(path): (imports_of(path) & names) - {module_name(path)} for path in paths}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_one_way(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    allowed = ROOMS[: ROOMS.index(room) + 1]
    for name in imports_of(path):
        top = name.split(".")[0]
        assert top not in ROOMS or top in allowed, f"{module_name(path)} imports {name}"


def test_models_are_torch_only() -> None:
    for path in (ROOT / "pipeline" / "models").glob("*.py"):
        tops = {name.split(".")[0] for name in imports_of(path)} - {"__future__"} - set(sys.stdlib_module_names)
        assert tops <= {"torch", "numpy", "pipeline"}, f"{path.name}: {tops}"
        local = {name for name in imports_of(path) if name.startswith("pipeline.")}
        assert all(name.startswith("pipeline.models") for name in local), f"{path.name}: {local}"


def test_only_the_registry_imports_mlflow() -> None:
    users = {path.stem for path in FILES if any(name.split(".")[0] == "mlflow" for name in imports_of(path))}
    assert users == MLFLOW_MODULES


def test_rollout_workers_do_not_ask_for_ray_data() -> None:
    """`import ray.rllib` itself loads ray.data (2.60); our own code on the worker must not."""
    for path in (ROOT / "rllib_ext").glob("*.py"):
        assert not any(name.startswith("ray.data") for name in imports_of(path)), path.name


def test_the_rooms_hold_no_import_cycle() -> None:
    """RLlib's own pattern apart, in which a configuration and its algorithm name each other."""
    graph = local_graph(FILES)
    graph["rllib_ext.config"].discard("rllib_ext.algorithm")
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"cycle: {' -> '.join([*path[path.index(name) :], name])}"
        if name in done:
            return
        for other in graph[name]:
            visit(other, (*path, name))
        done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize(
    ("module", "barred"),
    [
        ("rllib_ext.runner", ("mlflow", "pipeline.stream", "jobs")),
        ("pipeline.artifact", ("mlflow", "ray")),
        ("rllib_ext.policy", ("mlflow", "ray")),
        ("pipeline.collect", ("mlflow", "ray.data", "ray.rllib", "torch")),
        ("jobs.cli", ("torch", "ray", "mlflow", "ale_py")),
    ],
)
def test_what_an_import_drags_in(module: str, barred: tuple[str, ...]) -> None:
    """In a fresh interpreter, since what counts is what is really loaded."""
    code = f"import sys, {module}; print([m for m in {barred!r} if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert shown.stdout.strip().splitlines()[-1] == "[]"


def test_files_stay_readable() -> None:
    long = {module_name(path): n for path in FILES if (n := len(path.read_text().splitlines())) > 400}
    assert not long
