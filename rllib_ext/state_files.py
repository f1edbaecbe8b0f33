"""A nested state (dicts, lists, tuples, numbers, arrays) on disk: one .safetensors and one JSON file; no pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from pipeline.errors import reading
from pipeline.untrusted import read_bytes

_ARRAY, _MAP, _TUPLE = "__array__", "__map__", "__tuple__"


def save_state(state: Any, folder: Path, name: str) -> None:
    """Writes `folder/name.json` and `folder/name.safetensors`.

    Raises:
        TypeError: The state holds something other than the types named above.
    """
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    (folder / f"{name}.json").write_text(json.dumps(_encode(state, arrays)))
    save_file(arrays, folder / f"{name}.safetensors")


def load_state(folder: Path, name: str) -> Any:
    """Reads what `save_state` wrote.

    Raises:
        UserError: A file is missing or damaged.
    """
    with reading(f"the state {name} in {folder}", "restore it, or start the run anew"):
        arrays = load_file(folder / f"{name}.safetensors")
        return _decode(json.loads(read_bytes(folder / f"{name}.json", f"{name}.json")), arrays)


def _encode(state: Any, arrays: dict[str, np.ndarray[Any, Any]]) -> Any:
    if isinstance(state, np.ndarray | np.generic):
        key = str(len(arrays))
        arrays[key] = np.ascontiguousarray(state).reshape(np.shape(state))
        return {_ARRAY: key}
    if isinstance(state, dict):
        return {_MAP: [[_encode(k, arrays), _encode(v, arrays)] for k, v in state.items()]}
    if isinstance(state, tuple):
        return {_TUPLE: [_encode(item, arrays) for item in state]}
    if isinstance(state, list):
        return [_encode(item, arrays) for item in state]
    if state is None or isinstance(state, bool | int | float | str):
        return state
    raise TypeError(f"cannot write a {type(state).__name__} without pickle")


def _decode(node: Any, arrays: dict[str, np.ndarray[Any, Any]]) -> Any:
    if isinstance(node, list):
        return [_decode(item, arrays) for item in node]
    if not isinstance(node, dict):
        return node
    if _ARRAY in node:
        return arrays[node[_ARRAY]]
    if _TUPLE in node:
        return tuple(_decode(item, arrays) for item in node[_TUPLE])
    return {_decode(key, arrays): _decode(value, arrays) for key, value in node[_MAP]}
