"""What Q-learning minimises: targets, losses and TD errors, of expected returns and of their distributions. No Ray.

References:
    van Hasselt, Guez & Silver (2016), Deep Reinforcement Learning with Double Q-learning, eq. 4. arXiv:1509.06461.
    Bellemare, Dabney & Munos (2017), A Distributional Perspective on Reinforcement Learning. arXiv:1707.06887.
    Hessel et al. (2018), Rainbow. arXiv:1710.02298.

Shapes: B batch, A actions, N atoms.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class TDLoss(NamedTuple):
    """`loss` (), weighted and averaged over B, with gradient; `errors` (B,) float32, never below 0, without."""

    loss: Tensor
    errors: Tensor


def expected_values(logits_BAN: Tensor, atoms_N: Tensor) -> Tensor:
    """Expected returns (B, A) float32 of the distributions softmax(logits) on the atoms."""
    return (logits_BAN.softmax(-1) * atoms_N).sum(-1)


def q_targets(returns_B: Tensor, discount_B: Tensor, chooser_BA: Tensor, target_BA: Tensor) -> Tensor:
    """What the values of the taken actions should be: one network chooses the next action, the target values it.

    Args:
        returns_B: (B,) float32, discounted reward sums up to the bootstrap.
        discount_B: (B,) float32, gamma^m, or 0 after a termination.
        chooser_BA: (B, A) values at the bootstrap by which the action is chosen: the online network's in double
            Q-learning, else the target network's own.
        target_BA: (B, A) target network's values there.

    Returns:
        (B,) float32.
    """
    return returns_B + discount_B * _of_actions(target_BA, chooser_BA.argmax(1))


def distribution_targets(
    returns_B: Tensor, discount_B: Tensor, chooser_BA: Tensor, target_BAN: Tensor, atoms_N: Tensor
) -> Tensor:
    """As `q_targets` for distributions: probabilities (B, N) that those of the taken actions should be.

    Args:
        returns_B: (B,) float32.
        discount_B: (B,) float32.
        chooser_BA: (B, A) expected values by which the next action is chosen.
        target_BAN: (B, A, N) target network's logits at the bootstrap.
        atoms_N: (N,) float32, evenly spaced, rising.
    """
    next_BN = _of_actions(target_BAN, chooser_BA.argmax(1)).softmax(-1)
    return project_distribution(next_BN, returns_B, discount_B, atoms_N)


def project_distribution(probs_BN: Tensor, returns_B: Tensor, discount_B: Tensor, atoms_N: Tensor) -> Tensor:
    """Moves every atom to `return + discount * atom`, then shares its mass between the two atoms next to it.

    What falls outside the support counts as its nearest end (Bellemare et al. 2017, algorithm 1). Mass is conserved,
    and so is the mean where nothing falls outside.

    Args:
        probs_BN: (B, N) float32, each row sums to 1.
        returns_B: (B,) float32.
        discount_B: (B,) float32, one per row.
        atoms_N: (N,) float32, evenly spaced, rising; N at least 2.

    Returns:
        (B, N) float32.
    """
    moved_BN = returns_B[:, None] + discount_B[:, None] * atoms_N
    num_gaps = len(atoms_N) - 1
    position_BN = ((moved_BN - atoms_N[0]) * (num_gaps / (atoms_N[-1] - atoms_N[0]))).clamp(0, num_gaps)
    below_BN = position_BN.long().clamp(0, num_gaps - 1)  # no number: mass of none, not an index
    mass_above_BN = probs_BN * (position_BN - below_BN)
    projected_BN = torch.zeros_like(probs_BN)
    projected_BN.scatter_add_(1, below_BN, probs_BN - mass_above_BN)
    return projected_BN.scatter_add_(1, below_BN + 1, mass_above_BN)


def huber_loss(values_BA: Tensor, actions_B: Tensor, target_B: Tensor, weights_B: Tensor) -> TDLoss:
    """Huber loss (delta 1) of the taken actions' values; errors are absolute TD errors."""
    taken_B = _of_actions(values_BA, actions_B)
    loss_B = functional.smooth_l1_loss(taken_B, target_B, reduction="none")
    return TDLoss((weights_B * loss_B).mean(), (taken_B.detach() - target_B).abs())


def cross_entropy_loss(logits_BAN: Tensor, actions_B: Tensor, target_BN: Tensor, weights_B: Tensor) -> TDLoss:
    """Cross entropy between target and taken actions' distributions, nats; errors are the KL divergence, as in Rainbow.

    The two differ by the target's entropy, which has no gradient and which no learning can remove.
    """
    log_probs_BN = _of_actions(logits_BAN, actions_B).log_softmax(-1)
    loss_B = -(target_BN * log_probs_BN).sum(-1)
    entropy_B = -torch.xlogy(target_BN, target_BN).sum(-1)
    return TDLoss((weights_B * loss_B).mean(), (loss_B.detach() - entropy_B).clamp(min=0))


def _of_actions(values: Tensor, actions_B: Tensor) -> Tensor:
    """(B, A, ...) -> (B, ...)."""
    index = actions_B.view(-1, 1, *[1] * (values.dim() - 2)).expand(-1, 1, *values.shape[2:])
    return values.gather(1, index).squeeze(1)
