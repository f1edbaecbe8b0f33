"""What a replay holds: its columns, and the memory that they take.

Shapes: L lanes, C rows of a lane's ring.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from rllib_ext.sum_tree import tree_bytes

COLUMNS: dict[str, np.dtype[Any]] = {
    "action": np.dtype(np.uint16),
    "reward": np.dtype(np.float32),
    "terminated": np.dtype(np.bool_),
    "truncated": np.dtype(np.bool_),
    "is_last": np.dtype(np.bool_),
    "age": np.dtype(np.int32),
    "is_start": np.dtype(np.bool_),
    "returns": np.dtype(np.float32),
    "ahead": np.dtype(np.int16),
}
LATENTS: dict[str, np.dtype[Any]] = {
    "z": np.dtype(np.float16),
    "z_target": np.dtype(np.float16),
    "version": np.dtype(np.int32),
}


@dataclass(frozen=True)
class ReplaySpec:
    """What a replay holds and how it is read.

    Attributes:
        num_lanes: L.
        lane_rows: C.
        obs_shape: Shape of one observation.
        obs_dtype: uint8 (frames) or float16 (latents), as numpy names it.
        stack: K.
        n_step: Greatest number of rewards in a return.
        gamma: Discount per step.
        priority_alpha: A transition is drawn in proportion to |TD error| to this power; 0 draws uniformly.
        z_dim: Length of the latents that are kept beside the observations and drawn in their place; 0: none are.
        is_double: Whether next states are drawn twice, as the online network reads them too.
    """

    num_lanes: int
    lane_rows: int
    obs_shape: tuple[int, ...]
    obs_dtype: str
    stack: int
    n_step: int
    gamma: float
    priority_alpha: float = 0.0
    z_dim: int = 0
    is_double: bool = False

    @property
    def columns(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Every column's dtype and the shape of its rows."""
        found: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {name: (dtype, ()) for name, dtype in COLUMNS.items()}
        found["obs"] = np.dtype(self.obs_dtype), self.obs_shape
        if self.z_dim:
            shapes = {"version": ()}
            found |= {name: (dtype, shapes.get(name, (self.z_dim,))) for name, dtype in LATENTS.items()}
        return found


def required_bytes(spec: ReplaySpec) -> int:
    """Bytes that a full replay takes: all columns and the tree."""
    num_rows = spec.num_lanes * spec.lane_rows
    columns = num_rows * sum(dtype.itemsize * math.prod(shape) for dtype, shape in spec.columns.values())
    return columns + (tree_bytes(num_rows) if spec.priority_alpha else 0)
