"""Recipes changed from outside: typed overrides, configuration files, and the record of what a run really used."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import yaml

from pipeline.commit import code_commit
from pipeline.errors import UserError

Recipe = TypeVar("Recipe")
CONFIG_FILE = "config.yaml"
RUN_SECTION = "run"
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
        UserError: An unknown key (the nearest one is named), or a value of the wrong type.
    """
    if config is not None:
        for key, value in _flatten(_read_yaml(config)).items():
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
    try:
        tree = yaml.safe_load((folder / CONFIG_FILE).read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        tree = None
    if not isinstance(tree, dict) or not isinstance(tree.get(RUN_SECTION), dict):
        raise UserError(f"{folder / CONFIG_FILE} does not hold the settings of a run; restore it or start the run anew")
    return {**tree.pop(RUN_SECTION), **tree}


def provenance() -> dict[str, str]:
    """The git commit of this code, where it is a checkout, and the versions of the packages that matter."""
    versions = {}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {"git_commit": code_commit() or "unknown", **versions}


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UserError(f"cannot read --config {path} ({error.strerror}); name a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(content, dict):
        raise UserError(f"--config {path} holds a {type(content).__name__}, not keys and values")
    content.pop(RUN_SECTION, None)
    return content


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _parsed(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
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
        near = difflib.get_close_matches(full, known_keys(root), n=1, cutoff=0.0)
        raise UserError(f"unknown setting {full!r}; the nearest is {near[0]!r}")
    if rest:
        inner = _replaced(present, root, rest, value, shown=shown, path=f"{path}{name}.")
    else:
        expected = typing.get_type_hints(type(node))[name]
        inner = _converted(value, expected, full, shown)
    try:
        return dataclasses.replace(node, **{name: inner})
    except ValueError as error:
        raise UserError(f"setting {full} = {shown!r}: {error}") from None


def _converted(value: Any, expected: Any, key: str, shown: Any) -> Any:
    """`value` as the type that a field declares, or a UserError."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _converted(value, next(a for a in arguments if a is not type(None)), key, shown)
    if origin is typing.Literal:
        if value not in arguments:
            raise UserError(f"setting {key} = {shown!r} is none of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_converted(item, arguments[0], key, shown) for item in items)
    if expected is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if type(value) is not expected:
        raise UserError(f"setting {key} = {shown!r} is not of type {expected.__name__}")
    return value
