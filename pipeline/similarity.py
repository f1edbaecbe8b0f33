"""How alike are two representations of the same frames?"""

from __future__ import annotations

import torch
from torch import Tensor


def linear_cka(one_NZ: Tensor, other_NY: Tensor) -> float:
    """Linear centred kernel alignment: 1 where one is the other rotated, scaled and moved; 0 where they share nothing.

    Args:
        one_NZ: (N, Z), latents of N frames.
        other_NY: (N, Y), of the same frames. With few frames for many latents the value is too high.

    Returns:
        From 0 to 1; NaN where either is the same for all frames.

    Raises:
        ValueError: They are not of the same frames.

    References:
        Kornblith et al. (2019), Similarity of Neural Network Representations Revisited, eq. 3 and section 4.
        arXiv:1905.00414.
    """
    if one_NZ.dim() != 2 or other_NY.dim() != 2 or len(one_NZ) != len(other_NY):
        raise ValueError(f"got latents of shapes {tuple(one_NZ.shape)} and {tuple(other_NY.shape)}")
    one, other = (latents.double() - latents.double().mean(0) for latents in (one_NZ, other_NY))
    if min(one.abs().max(), other.abs().max()) < 1e-12:
        return float("nan")
    shared = (one.T @ other).square().sum()
    return float(shared / torch.linalg.norm(one.T @ one) / torch.linalg.norm(other.T @ other))
