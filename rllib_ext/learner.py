"""The temporal-difference learner: n-step returns that the replay has summed, in minibatches that learners share.

RLlib builds module, optimizers and, for several learners, DistributedDataParallel around the module. The update itself
is plain torch: RLlib's own costs as much again for its metrics and checks as small networks take to learn.

Shapes: U updates of one call, B batch, b its share of one learner, A actions.
"""

from __future__ import annotations

import time
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from torch import Tensor, nn

from pipeline import artifact
from pipeline.errors import UserError
from pipeline.precision import autocast, resolve_precision
from rllib_ext import compat, losses
from rllib_ext.bound import BoundUpdates
from rllib_ext.graph import GraphedUpdate
from rllib_ext.layout import own_moments
from rllib_ext.losses import TDLoss
from rllib_ext.module import QF_NEXT_CHOOSER, QF_OUTPUTS, QF_TARGET_NEXT_OUTPUTS, LatentQModule
from rllib_ext.networks import blend
from rllib_ext.replay import Transitions
from rllib_ext.settings import FINETUNE, ONLINE, DQNSettings

HEAD = "head"
ENCODER = "encoder"
_BOUND = "bound"  # in a state
_READ = {"obs", "next_obs", "next_obs_online"}  # by networks
_DDP = {"broadcast_buffers": False, "gradient_as_bucket_view": True}  # buffers never change; one copy less


class LearnerReport(NamedTuple):
    """What a learner tells of one call; plain numpy.

    `ids` (N,) int64 of its own rows, in their order; `td_errors` (N,) float32, absolute, or of distributions the KL
    divergence; `num_diverged` updates with a value beyond any return that rewards, clipped as they are, can sum to;
    `figures` means over its own rows: `td_loss`, `q_mean`, `td_error_mean`, `grad_norm` (before clipping; only where
    gradients are clipped) and `update_s`, seconds of one update.
    """

    ids: NDArray[np.int64]
    td_errors: NDArray[np.float32]
    num_diverged: int
    figures: dict[str, float]


class LatentDQNLearner(TorchLearner):
    """Several minibatch updates per call; alone, or one of several that share every minibatch."""

    def build(self) -> None:
        """Builds module and optimizers, then the target network.

        Raises:
            UserError: The precision is not one of the device's.
        """
        self.settings: DQNSettings = self.config.settings
        torch.set_num_threads(self.config.learner_threads)
        self.config.torch_ddp_kwargs = _DDP
        self._rates: dict[torch.optim.Optimizer, float] = {}
        super().build()
        self._on_cpu = self.device.type == "cpu"
        self._dtype = resolve_precision(self.settings.precision, self.device.type)
        self._graphed = GraphedUpdate(self._update_once)
        self._latents = {name: torch.empty(0) for name in _READ}
        self.q_module: LatentQModule = self.module[DEFAULT_MODULE_ID].unwrapped()
        self.q_module.make_target_networks()
        self.bound = self._bound_updates() if self.config.learns_bound else None

    def _bound_updates(self) -> BoundUpdates:
        """In mode finetune the model's encoder is the one that Q trains too; in mode online Q reads copies of it."""
        model = self.q_module.spec.build_model().to(self.device)
        encoder = self.q_module.network.encoder
        if self.config.mode == FINETUNE:
            model.encoder = encoder.net
        rank, count = compat.learner_rank(self), max(1, self.config.num_learners)
        seed = self.config.seed or 0
        return BoundUpdates(model, self.config.elbo, self._dtype, seed=seed, rank=rank, count=count)

    def update_bound(self, frames: NDArray[np.uint8], lr: float) -> dict[str, float]:
        """Makes updates on the bound; see BoundUpdates.update."""
        assert self.bound is not None
        return self.bound.update(frames, lr)

    def initialise_model(self, frames: NDArray[np.uint8]) -> None:
        """Sets what a model that starts from nothing takes from frames (N, H, W)."""
        assert self.bound is not None
        self.bound.initialise(frames)

    def publish_encoder(self, fresh: NDArray[np.uint8], old: NDArray[np.uint8], tau: float) -> dict[str, float]:
        """Makes the newest encoder the one that Q reads with; see BoundUpdates.look_at for arguments and figures.

        Args:
            fresh: (N, H, W).
            old: (N, H, W).
            tau: Share of it that is blended into the target network's own; 1 copies.
        """
        assert self.bound is not None
        if self.config.mode == ONLINE:
            network, target = self.q_module.network, self.q_module.target
            blend(network.encoder.net, self.bound.model.encoder, 1.0)
            blend(target.encoder.net, network.encoder.net, tau)
            compat.count_call(self)
        return self.bound.look_at(fresh, old)

    def reading_encoders(self) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
        """Parameters of the encoders of the online and of the target network, by name."""
        both = (self.q_module.network.encoder, self.q_module.target.encoder)
        online, target = ({k: v.cpu().numpy().copy() for k, v in net.state_dict().items()} for net in both)
        return online, target

    def get_state(self, components: Any = None, **kwargs: Any) -> dict[str, Any]:
        """RLlib's, and the model that learns on its bound with its optimizer, unless some components are named."""
        state: dict[str, Any] = super().get_state(components, **kwargs)
        return {**state, _BOUND: self.bound.state()} if self.bound is not None and components is None else state

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        """One named Adam per part: "head", and "encoder" where the module holds one."""
        network, settings = self.module[module_id].unwrapped().network, self.settings
        self._register_adam(module_id, HEAD, network.head, settings.lr)
        if network.encoder is not None and self.config.mode != ONLINE:
            is_pretrained = self.config.mode == "finetune"
            self._register_adam(
                module_id, ENCODER, network.encoder, settings.encoder_lr if is_pretrained else settings.lr
            )

    def _register_adam(self, module_id: str, name: str, part: nn.Module, lr: float) -> None:
        params = [param for param in part.parameters() if param.requires_grad]
        is_on_gpu = self.device.type != "cpu"  # whose updates are recorded, with the rate where it is a number
        rate = torch.tensor(lr, device=self.device) if is_on_gpu and self.settings.lr_decay_agent_steps else lr
        optimizer = torch.optim.Adam(params, rate, eps=self.settings.adam_epsilon, fused=True, capturable=is_on_gpu)
        self.register_optimizer(module_id=module_id, optimizer_name=name, optimizer=optimizer, params=params)
        self._rates[optimizer] = lr

    def _set_rates(self, updates: int) -> None:
        """Lowers the optimizers' rates to what is left of them after so many updates."""
        share = self.settings.rate_share(self.settings.consumed_agent_steps(updates))
        for optimizer, rate in self._rates.items():
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate * share)
                else:
                    group["lr"] = rate * share

    def set_state(self, state: dict[str, Any]) -> None:
        """Takes over weights and optimizers, whose rates stay those of this run's settings.

        Raises:
            UserError: It lacks the model that learns on its bound, as those of remote learners once did.
        """
        if self.bound is not None and _BOUND not in state:
            raise UserError("the state lacks the model that learns on its bound; start the run anew")
        own = ("lr", "eps", "capturable")
        settings = [
            (optimizer, [{name: group[name] for name in own} for group in optimizer.param_groups])
            for _, optimizer in self.get_optimizers_for_module(DEFAULT_MODULE_ID)
        ]
        super().set_state(state)
        if self.bound is not None:
            self.bound.set_state(state[_BOUND])
        for optimizer, by_group in settings:
            own_moments(optimizer)
            for group, kept in zip(optimizer.param_groups, by_group, strict=True):
                group.update(kept)
        self._graphed = GraphedUpdate(self._update_once)  # the record is of moments that are no longer there

    def compute_loss_for_module(self, **kwargs: Any) -> Tensor:
        """RLlib's own update does not serve this learner.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("LatentDQNLearner learns through update_drawn(drawn, updates_before=...)")

    def update_drawn(self, drawn: Transitions, *, updates_before: int) -> LearnerReport:
        """Makes U = rows / batch_size updates, in the order of the rows, with this learner's share of each minibatch.

        Args:
            drawn: U * B rows, the same for all learners of a group.
            updates_before: Updates made before this call, which times the copies to the target network.

        Returns:
            What priorities and figures are made of.
        """
        started = time.perf_counter()
        own = self._own_share(drawn)
        columns = self._tensors(own)
        steps: list[Any] = []
        while len(steps) < len(own.action):
            first, last = len(steps), self._last_with_this_target(updates_before, len(steps), len(own.action))
            part = {name: column[first:last] for name, column in columns.items()}
            if not self._is_target_for_one:
                part[QF_TARGET_NEXT_OUTPUTS] = self._target_outputs(part["next_obs"])
            update = self._update_once if self._on_cpu or self.distributed else self._graphed
            for i in range(last - first):
                if self.settings.lr_decay_agent_steps:
                    self._set_rates(updates_before + first + i)
                steps.append(update({name: x[i] for name, x in part.items()}))
            self._move_target(updates_before + last)
        compat.count_call(self)
        td_losses, errors, outputs, grad_norms = zip(*steps, strict=True)
        td_errors, values = torch.cat(errors), self.q_module.network.head.values(torch.cat(outputs))
        figures = {"td_loss": float(torch.stack(td_losses).mean()), "q_mean": float(values.mean())}
        figures["td_error_mean"] = float(td_errors.mean())
        if self.settings.grad_clip:
            norms = grad_norms if self._on_cpu else torch.stack(grad_norms).tolist()  # waits for the GPU once
            figures["grad_norm"] = float(np.mean(norms))
        figures["update_s"] = (time.perf_counter() - started) / len(steps)
        diverged = self._num_diverged(values.reshape(len(steps), -1))
        return LearnerReport(own.ids.reshape(-1), td_errors.cpu().numpy(), diverged, figures)

    def _num_diverged(self, values: Tensor) -> int:
        """Of updates (U, ...), how many had values that are soft-divergent (van Hasselt et al. 2018, section 3.1)."""
        settings = self.settings
        if not settings.reward_clip or settings.gamma == 1.0:
            return 0
        greatest = settings.reward_clip / (1 - settings.gamma)
        return int((values.abs().amax(1) > greatest).sum())

    def _own_share(self, drawn: Transitions) -> Transitions:
        """Rows (U, b, ...) of this learner: a contiguous part of every minibatch."""
        size, num_learners = self.settings.batch_size, max(1, self.config.num_learners)
        share = size // num_learners
        assert size % num_learners == 0, f"batch_size {size} does not divide among {num_learners} learners"
        first = compat.learner_rank(self) * share
        return drawn.of_each(lambda column: column.reshape(-1, size, *column.shape[1:])[:, first : first + share])

    def _tensors(self, own: Transitions) -> dict[str, Tensor]:
        """The columns as tensors on the device, latents in float32.

        On the CPU frames and numbers stay in the same memory, which must only be read. To a GPU they go through pinned
        memory, and nobody waits for them.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            columns = {
                name: torch.from_numpy(column)
                for name, column in own._asdict().items()
                if name != "ids" and column is not None
            }
        if not self._on_cpu:
            columns = {name: x.pin_memory().to(self.device, non_blocking=True) for name, x in columns.items()}
        for name in _READ & columns.keys():  # once, for all networks that read them
            if columns[name].is_floating_point():
                columns[name] = self._in_float32(name, columns[name])
        return columns

    def _in_float32(self, name: str, latents: Tensor) -> Tensor:
        """A copy in memory that the next call uses again (see ColumnarReplay)."""
        if self._latents[name].numel() < latents.numel():
            self._latents[name] = torch.empty(latents.numel(), device=self.device)
        return self._latents[name][: latents.numel()].view(latents.shape).copy_(latents)

    def _last_with_this_target(self, updates_before: int, first: int, num_updates: int) -> int:
        """The end of the updates from `first` on whose target values are worked out in one pass.

        The target network stands still for them. One pass over many minibatches takes a third less time than one over
        each; where the encoder is in the module a minibatch is large enough already.
        """
        settings = self.settings
        if self._is_target_for_one:
            return first + 1
        until_copy = settings.target_update_updates - (updates_before + first) % settings.target_update_updates
        return min(first + until_copy, num_updates)

    @property
    def _is_target_for_one(self) -> bool:
        return self.settings.target_tau > 0 or not self.config.reads_latents

    def _target_outputs(self, next_obs: Tensor) -> Tensor:
        """(U, b, K, ...) -> the target network's outputs (U, b, A) or (U, b, A, N)."""
        with autocast(self.device.type, self._dtype):
            outputs = self.q_module.target_outputs(next_obs.flatten(0, 1))
        return outputs.view(*next_obs.shape[:2], *outputs.shape[1:])

    def _update_once(self, batch: dict[str, Tensor]) -> tuple[Any, ...]:
        """One update; its loss (), TD errors (b,), the network's outputs (b, A) or (b, A, N), and gradient norm.

        The target network's outputs are worked out here where `batch` holds none. The norm is a tensor on a GPU.
        """
        if QF_TARGET_NEXT_OUTPUTS not in batch:
            target = self._target_outputs(batch["next_obs"][None])[0]
            batch = {**batch, QF_TARGET_NEXT_OUTPUTS: target}
        outputs = self._forward(batch)
        td = self._td_loss(batch, outputs)
        optimizers = self.get_optimizers_for_module(DEFAULT_MODULE_ID)
        for _, optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        td.loss.backward()  # type: ignore[no-untyped-call]
        norms = [self._step(optimizer) for _, optimizer in optimizers]
        return td.loss.detach(), td.errors, outputs[QF_OUTPUTS].detach(), sum(norm**2 for norm in norms) ** 0.5

    def _forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The module's training outputs; DistributedDataParallel has to see this pass."""
        seen = {Columns.OBS: batch["obs"], Columns.NEXT_OBS: batch.get("next_obs_online", batch["next_obs"])}
        seen[QF_TARGET_NEXT_OUTPUTS] = batch[QF_TARGET_NEXT_OUTPUTS]
        with autocast(self.device.type, self._dtype):
            outputs: dict[str, Tensor] = self.module[DEFAULT_MODULE_ID].forward_train(seen)
        return outputs

    def _td_loss(self, batch: dict[str, Tensor], outputs: dict[str, Tensor]) -> TDLoss:
        head = self.q_module.network.head
        bootstrap = (batch["returns"], batch["discount"], outputs[QF_NEXT_CHOOSER], batch[QF_TARGET_NEXT_OUTPUTS])
        if head.is_distributional:
            target_BN = losses.distribution_targets(*bootstrap, head.atoms)
            return losses.cross_entropy_loss(outputs[QF_OUTPUTS], batch["action"], target_BN, batch["weights"])
        return losses.huber_loss(outputs[QF_OUTPUTS], batch["action"], losses.q_targets(*bootstrap), batch["weights"])

    def _step(self, optimizer: torch.optim.Optimizer) -> float | Tensor:
        """Steps one optimizer; returns its gradients' norm before clipping, 0 where gradients are not clipped.

        Gradients within the bound are left alone, which saves a pass over all of them; but a GPU is not waited for to
        know the norm.
        """
        norm: float | Tensor = 0.0
        bound = self.settings.grad_clip
        if bound:
            params = optimizer.param_groups[0]["params"]
            total = nn.utils.get_total_norm([param.grad for param in params if param.grad is not None], foreach=True)
            norm = float(total) if self._on_cpu else total
            if not self._on_cpu or norm > bound:
                nn.utils.clip_grads_with_norm_(params, bound, total, foreach=True)
        optimizer.step()
        return norm

    def _move_target(self, updates: int) -> None:
        settings, target, online = self.settings, self.q_module.target, self.q_module.network
        if settings.target_tau > 0 or updates % settings.target_update_updates == 0:
            if self.config.mode == ONLINE:  # the encoder moves when a version is published
                target, online = target.head, online.head
            blend(target, online, settings.target_tau or 1.0)

    def weights_sha256(self) -> str | None:
        """Hash of the encoder's parameters inside the module; None where it holds no encoder."""
        encoder = self.q_module.network.encoder
        return None if encoder is None else artifact.weights_sha256(encoder)
