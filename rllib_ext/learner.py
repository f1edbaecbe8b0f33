"""The temporal-difference learner: double Q-learning on n-step returns that the replay has already summed.

References:
    van Hasselt, Guez & Silver (2016), Deep Reinforcement Learning with Double Q-learning, eq. 4. arXiv:1509.06461.

Shapes: U updates of one call, B batch, A actions.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from ray.rllib.core.learner.training_data import TrainingData
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch
from torch import Tensor, nn
from torch.nn import functional

from rllib_ext import compat
from rllib_ext.module import QF_NEXT_PREDS, QF_PREDS, QF_TARGET_NEXT_PREDS, LatentQModule
from rllib_ext.networks import blend
from rllib_ext.replay import Transitions
from rllib_ext.settings import DQNSettings

RETURNS = "n_step_returns"
DISCOUNT = "bootstrap_discount"
HEAD = "head"
ENCODER = "encoder"
LEARNER_FIGURES = ("td_loss", "q_mean", "update_s")
UPDATES_KEY = "updates"  # of the `timesteps` that the algorithm passes: updates made before the call


def to_training_data(transitions: Transitions) -> TrainingData:
    """Wraps drawn arrays for `LearnerGroup.update`, on the path that skips episodes and learner connectors."""
    columns = {
        Columns.OBS: transitions.obs,
        Columns.ACTIONS: transitions.action,
        Columns.NEXT_OBS: transitions.next_obs,
        RETURNS: transitions.returns,
        DISCOUNT: transitions.discount,
    }
    batch = SampleBatch({name: torch.from_numpy(column) for name, column in columns.items()})
    return TrainingData(batch=MultiAgentBatch({DEFAULT_MODULE_ID: batch}, env_steps=len(transitions.action)))


def double_q_targets(returns_B: Tensor, discount_B: Tensor, next_BA: Tensor, target_next_BA: Tensor) -> Tensor:
    """What the values of the taken actions should be: the online network chooses, the target network values.

    Args:
        returns_B: (B,) float32, discounted reward sums up to the bootstrap.
        discount_B: (B,) float32, gamma^m, or 0 after a termination.
        next_BA: (B, A) online values at the bootstrap.
        target_next_BA: (B, A) target network's values there.

    Returns:
        (B,) float32.
    """
    chosen_B1 = next_BA.argmax(1, keepdim=True)
    return returns_B + discount_B * target_next_BA.gather(1, chosen_B1).squeeze(1)


class LatentDQNLearner(TorchLearner):
    """Several minibatch updates per call, so that RLlib's fixed cost of a call is paid once for all of them."""

    def build(self) -> None:
        """Builds module and optimizers, then the target networks."""
        super().build()
        for module in self.module.values():
            module.unwrapped().make_target_networks()

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        """One named Adam per learning rate: "head", and "encoder" where the module holds one."""
        settings: DQNSettings = self.config.settings
        network = self.module[module_id].unwrapped().network
        self._register_adam(module_id, HEAD, network.head, settings.lr)
        if network.encoder is not None:
            self._register_adam(module_id, ENCODER, network.encoder, settings.encoder_lr)

    def _register_adam(self, module_id: str, name: str, part: nn.Module, lr: float) -> None:
        params = [param for param in part.parameters() if param.requires_grad]
        optimizer = torch.optim.Adam(params, lr=lr, eps=self.config.settings.adam_epsilon, fused=True)
        self.register_optimizer(
            module_id=module_id, optimizer_name=name, optimizer=optimizer, params=params, lr_or_lr_schedule=lr
        )

    def compute_loss_for_module(
        self, *, module_id: str, config: Any, batch: dict[str, Any], fwd_out: dict[str, Any]
    ) -> Tensor:
        """Huber loss (delta 1) between the taken actions' values and their double-Q targets, averaged over B."""
        predicted_B = fwd_out[QF_PREDS].gather(1, batch[Columns.ACTIONS][:, None]).squeeze(1)
        target_B = double_q_targets(
            batch[RETURNS], batch[DISCOUNT], fwd_out[QF_NEXT_PREDS], fwd_out[QF_TARGET_NEXT_PREDS]
        )
        return functional.smooth_l1_loss(predicted_B, target_B)

    def postprocess_gradients_for_module(
        self, *, module_id: str, config: Any = None, module_gradients_dict: dict[Any, Any]
    ) -> dict[Any, Any]:
        """Clips the norm of the gradients of each optimizer in place, in one pass over all of its parameters."""
        bound = self.config.settings.grad_clip
        if bound:
            for _, optimizer in self.get_optimizers_for_module(module_id):
                nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], bound, foreach=True)
        return module_gradients_dict

    def update(
        self,
        *,
        training_data: TrainingData,
        minibatch_size: int,
        timesteps: dict[str, Any] | None = None,
    ) -> Any:
        """Makes U = rows / minibatch_size updates, in the order of the rows.

        Args:
            training_data: Made by `to_training_data`.
            minibatch_size: B.
            timesteps: {"updates": updates made before this call}, which times the copies to the target network.

        Returns:
            RLlib's metrics: mean TD loss and value, seconds in the gradient steps and around them.
        """
        started = time.perf_counter()
        updates_before = (timesteps or {}).get(UPDATES_KEY, 0)
        rows = training_data.batch.policy_batches[DEFAULT_MODULE_ID]
        losses, values = [], []
        num_updates = len(rows[Columns.ACTIONS]) // minibatch_size
        for u in range(num_updates):
            at = slice(u * minibatch_size, (u + 1) * minibatch_size)
            outputs, loss = compat.gradient_step(self, {name: column[at] for name, column in rows.items()})
            self._move_targets(updates_before + u + 1)
            losses.append(loss)
            values.append(outputs[QF_PREDS].detach().mean())
        compat.count_call(self)
        self._log(losses, values, num_updates, time.perf_counter() - started)
        return self.metrics.reduce()

    def _move_targets(self, updates: int) -> None:
        settings: DQNSettings = self.config.settings
        is_due = settings.target_tau > 0 or updates % settings.target_update_updates == 0
        if not is_due:
            return
        for module in self.module.values():
            for online, target in module.unwrapped().get_target_network_pairs():
                blend(target, online, settings.target_tau or 1.0)

    def _log(self, losses: list[Tensor], values: list[Tensor], num_updates: int, seconds: float) -> None:
        figures = (float(torch.stack(losses).mean()), float(torch.stack(values).mean()), seconds / num_updates)
        for name, value in zip(LEARNER_FIGURES, figures, strict=True):
            self.metrics.log_value((DEFAULT_MODULE_ID, name), value, window=1)

    def weights_sha256(self) -> str | None:
        """Hash of the encoder's parameters inside the module; None where it holds no encoder."""
        module: LatentQModule = self.module[DEFAULT_MODULE_ID].unwrapped()
        return None if module.network.encoder is None else module.network.encoder.weights_sha256()
