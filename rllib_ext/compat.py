"""Everything that latentrl uses of RLlib 2.60 without RLlib promising it. One contract test stands behind each.

RLlib is pinned to 2.60; when the pin moves, tests/test_compat.py says which of these changed.
"""

from __future__ import annotations

from typing import Any

from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.learner.learner import Learner
from torch import Tensor


def gradient_step(learner: Learner, columns: dict[str, Tensor]) -> tuple[dict[str, Any], Tensor]:
    """Forward, loss, backward, clipping and optimizer step of a built TorchLearner.

    Uses `TorchLearner._update`, which `Learner.update` calls for each minibatch.

    Returns:
        The module's training outputs and the loss.
    """
    outputs, losses, _ = learner._update({DEFAULT_MODULE_ID: columns})
    return outputs[DEFAULT_MODULE_ID], losses[DEFAULT_MODULE_ID].detach()


def count_call(learner: Learner) -> None:
    """Raises the sequence number by which RLlib tells newer weights from older ones."""
    learner._weights_seq_no += 1


def set_iteration(algorithm: Any, iteration: int) -> None:
    """Continues RLlib's count of training iterations after a restore (`Trainable._iteration`)."""
    algorithm._iteration = iteration
