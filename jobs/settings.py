"""Recipes changed from outside: typed overrides, configuration files, and the record of what a run really used."""

from __future__ import annotations

import contextlib
import dataclasses
import typing
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import yaml

from pipeline.commit import code_commit
from pipeline.errors import UserError
from pipeline.names import suggestion
from pipeline.untrusted import converted, read_bytes, short

Recipe = TypeVar("Recipe")
CONFIG_FILE = "config.yaml"
RUN_SECTION = "run"
_MOST_YAML_BYTES = 2**20
RECORDED_PACKAGES = ("ray", "torch", "mlflow", "gymnasium", "ale-py", "numpy", "pyarrow", "latentrl")


def to_dict(recipe: Any) -> dict[str, Any]:
    """A recipe as nested plain values, ready for YAML or JSON (tuples become lists)."""
    return {f.name: _plain(getattr(recipe, f.name)) for f in dataclasses.fields(recipe)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def resolve(recipe: Recipe, *, config: str | None = None, overrides: typing.Sequence[str] = ()) -> Recipe:
    """A recipe with a configuration file's values and then `key=value` overrides put in.

    Args:
        recipe: Any frozen dataclass of dataclasses.
        config: Path of a YAML file in the shape that `save_resolved` writes.
        overrides: Dotted keys with YAML values, for example "train.lr=1e-4".

    Raises:
        UserError: An unknown key (those like it are named), or a value of the wrong type.
    """
    if config is not None:
        tree = read_yaml(Path(config), f"--config {config}")
        tree.pop(RUN_SECTION, None)
        for key, value in _settings(tree, recipe):
            recipe = _replaced(recipe, recipe, key, value, shown=value)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise UserError(f"--set {override!r} has no '='; write it as key=value, for example train.lr=1e-4")
        recipe = _replaced(recipe, recipe, key.strip(), _parsed(text), shown=text)
    return recipe


def save_resolved(folder: Path, settings: Any, stage: str) -> None:
    """Writes `config.yaml` (the settings as they ran) and `versions.yaml` (commit and packages) into a run's folder.

    What belongs to the run alone (game, seed, ...) stands in a section `run`, which `--config` passes over, so that a
    run's config.yaml is also a recipe for the next one.
    """
    tree = to_dict(settings)
    sections = {key: value for key, value in tree.items() if isinstance(value, dict)}
    run = {"stage": stage} | {key: value for key, value in tree.items() if key not in sections}
    (folder / CONFIG_FILE).write_text(yaml.safe_dump({RUN_SECTION: run, **sections}, sort_keys=False))
    (folder / "versions.yaml").write_text(yaml.safe_dump(provenance(), sort_keys=False))


def load_resolved(folder: Path) -> dict[str, Any]:
    """What `save_resolved` wrote, as `to_dict` had it."""
    path = folder / CONFIG_FILE
    advice = f"{path} does not hold the settings of a run; restore it or start the run anew"
    try:
        tree = read_yaml(path, str(path))
    except UserError as error:
        raise UserError(f"{advice} ({error})") from None
    run = tree.pop(RUN_SECTION, None)
    if not isinstance(run, dict):
        raise UserError(advice)
    return {**run, **tree}


class _PlainLoader(yaml.SafeLoader):
    """Refuses aliases too, by which a few lines can stand for more than memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """PyYAML's hook for each node."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it repeats a part of itself by an alias")
        return super().compose_node(parent, index)


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """The keys and values of a YAML file, as plain values: tags that would make objects are refused.

    Raises:
        UserError: No plain file, not YAML, or no keys and values.
    """
    content = read_bytes(path, what, _MOST_YAML_BYTES)
    try:
        tree = yaml.load(content, _PlainLoader)
    except Exception as error:  # its constructors raise whatever a number or a date raises that is none
        raise UserError(f"{what} is not YAML ({(str(error).splitlines() or [type(error).__name__])[0]})") from None
    if not isinstance(tree, dict):
        raise UserError(f"{what} holds a {type(tree).__name__}, not keys and values")
    return {str(key): value for key, value in tree.items()}


def provenance() -> dict[str, str]:
    """The git commit of this code, where it is a checkout, and the versions of the packages that matter."""
    versions = {}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {"git_commit": code_commit() or "unknown", **versions}


def _settings(tree: dict[Any, Any], node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a tree, as deep as the recipe has sections."""
    sections = {f.name: getattr(node, f.name) for f in dataclasses.fields(node)}
    for key, value in tree.items():
        section = sections.get(str(key))
        if isinstance(value, dict) and dataclasses.is_dataclass(section):
            yield from _settings(value, section, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _parsed(text: str) -> Any:
    try:
        return yaml.load(text, _PlainLoader)
    except Exception:  # as above; then it is a word, and is judged as one
        return text


def known_keys(recipe: Any, prefix: str = "") -> list[str]:
    """Every dotted key of a recipe."""
    keys = []
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        nested = known_keys(value, f"{prefix}{field.name}.") if dataclasses.is_dataclass(value) else []
        keys += nested or [f"{prefix}{field.name}"]
    return keys


def _replaced(node: Any, root: Any, key: str, value: Any, *, shown: Any, path: str = "") -> Any:
    name, _, rest = key.partition(".")
    full = f"{path}{key}"
    present = getattr(node, name, None) if name in {f.name for f in dataclasses.fields(node)} else dataclasses.MISSING
    if present is dataclasses.MISSING or bool(rest) != dataclasses.is_dataclass(present):
        raise UserError(
            f"unknown setting {short(full)}; {suggestion(full, known_keys(root))} (`latentrl recipes` shows all)"
        )
    if rest:
        inner = _replaced(present, root, rest, value, shown=shown, path=f"{path}{name}.")
    else:
        expected = typing.get_type_hints(type(node))[name]
        inner = _converted(value, expected, full, shown)
    try:
        return dataclasses.replace(node, **{name: inner})
    except ValueError as error:
        raise UserError(f"setting {full} = {short(shown)}: {error}") from None


def _converted(value: Any, expected: Any, key: str, shown: Any) -> Any:
    """`value` as a field's type, or a UserError; one item is a list of one, and 1e-4, a word to YAML, is a number."""
    if typing.get_origin(expected) is tuple and not isinstance(value, list | tuple):
        value = [value]
    if expected is float and isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    try:
        return converted(value, expected, f"setting {key}")
    except ValueError as error:
        raise UserError(f"setting {key} = {short(shown)} {error}") from None
