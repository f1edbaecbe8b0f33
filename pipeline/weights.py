"""Weights from a .safetensors file into a module, compared before memory is taken for what a file merely declares."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.untrusted import short

Module = TypeVar("Module", bound=nn.Module)


def load_weights(build: Callable[[], Module], path: Path) -> Module:
    """Builds a module and fills it from a file that holds exactly its parameters and buffers.

    Args:
        build: Makes the module; called twice, first without memory for its weights.
        path: The file.

    Raises:
        ValueError: The file holds other names, shapes or types.
        SafetensorError: It is not a sound .safetensors file.
    """
    with torch.device("meta"):  # where arithmetic would import a compiler, for seconds: builders do theirs on the CPU
        wanted = build().state_dict()
    held = load_file(path)
    require_same_form(held, wanted)
    module = build()
    module.load_state_dict(held)
    return module


def require_same_form(held: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Refuses tensors of other names, shapes or types than those wanted.

    Raises:
        ValueError: Names the first that differs.
    """
    for name in sorted(held.keys() | wanted.keys()):
        there, asked = held.get(name), wanted.get(name)
        if there is None or asked is None:
            raise ValueError(f"weights {short(name)} are {'missing' if there is None else 'of no use'}")
        if (there.dtype, there.shape) != (asked.dtype, asked.shape):
            forms = [f"{tensor.dtype} {list(tensor.shape)}" for tensor in (there, asked)]
            raise ValueError(f"weights {short(name)} are {forms[0]}, not {forms[1]}")
