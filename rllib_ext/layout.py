"""Fused Adam pairs parameter, gradient and moments number by number as they lie in memory, without looking at strides.

`backward()` makes gradients that lie as their parameter does. What comes from elsewhere, from `torch.autograd.grad`,
out of a flat buffer or from a file, has to be brought into that order first.
"""

from __future__ import annotations

import torch
from torch import Tensor


def laid_out_as(parameter: Tensor, value: Tensor) -> Tensor:
    """The same numbers in the memory order of a parameter of that shape; itself where they lie so already."""
    return value if value.stride() == parameter.stride() else torch.empty_like(parameter).copy_(value)


def own_moments(optimizer: torch.optim.Optimizer) -> None:
    """After an optimizer's state has been loaded: it lies as its parameters do, in memory of its own.

    What Ray hands to several learners of a machine is one memory, which each would write its moments and steps to.
    """
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if torch.is_tensor(value):
                like = parameter if value.shape == parameter.shape else value
                moments[name] = torch.empty_like(like, dtype=value.dtype, requires_grad=False).copy_(value)
