"""Updates of a latent-variable model on its bound, from the frames of a replay, beside the Q-learning.

Shapes: U updates of one call, B batch, b its share of one learner, N frames, H x W frame.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.models.latent import ACTIVE_VARIANCE, LatentModel
from pipeline.precision import autocast
from rllib_ext.layout import laid_out_as, own_moments
from rllib_ext.settings import ElboSettings

Frames = NDArray[np.uint8]


class BoundUpdates:
    """A model, its optimizer, and updates that learners share; all of them hold the same weights.

    Attributes:
        model: What learns.
    """

    def __init__(
        self,
        model: LatentModel,
        settings: ElboSettings,
        dtype: torch.dtype | None,
        *,
        seed: int = 0,
        rank: int = 0,
        count: int = 1,
    ) -> None:
        """Takes a model on its device; of `count` learners this one is number `rank`, and `seed` decides its noise."""
        self.model = model.train()
        self._settings, self._dtype, self._seed, self._rank, self._count = settings, dtype, seed, rank, count
        self._device = next(model.parameters()).device
        self._parameters = [value for value in model.parameters() if value.requires_grad]
        self._optimizer = torch.optim.Adam(self._parameters, settings.lr, fused=True)
        self._share_weights()

    def initialise(self, frames: Frames) -> None:
        """Sets from a sample of frames (N, H, W) what the model takes from data before training."""
        self.model.initialise(torch.from_numpy(frames).to(self._device))
        self._share_weights()

    def update(self, frames: Frames, lr: float) -> dict[str, float]:
        """Makes U = N / B updates with this learner's share of each batch.

        Args:
            frames: (N, H, W), the same for all learners.
            lr: Adam's rate.

        Returns:
            `elbo`: the bound, nats per frame, and `elbo_kl`: its KL, means over the calls' own frames.
        """
        self._optimizer.param_groups[0]["lr"] = lr
        own_UbHW = self._own_share(torch.from_numpy(frames))
        with self._own_noise():
            bounds = [self._update_once(batch.to(self._device, non_blocking=True)) for batch in own_UbHW]
        bound, kl = torch.stack(bounds).mean(0).tolist()
        return {"elbo": bound, "elbo_kl": kl}

    @contextlib.contextmanager
    def _own_noise(self) -> Iterator[None]:
        """Within it torch's noise is of the run, the learner and the update, so that a restored one makes the same."""
        moments = self._optimizer.state.get(self._parameters[0], {})
        key = (self._seed, self._rank, int(moments.get("step", 0)))
        with torch.random.fork_rng([] if self._device.type == "cpu" else [self._device]):
            torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))
            yield

    def _own_share(self, frames: Tensor) -> Tensor:
        """(N, H, W) to (U, b, H, W)."""
        size = self._settings.batch_size
        share = size // self._count
        batches = frames.view(-1, size, *frames.shape[1:])
        return batches[:, self._rank * share : (self._rank + 1) * share]

    def _update_once(self, batch_BHW: Tensor) -> Tensor:
        """One update; (bound, KL) before it."""
        with autocast(self._device.type, self._dtype):
            terms = self.model(batch_BHW)
        # Not backward(): DistributedDataParallel watches for the gradients of what the Q module shares with the model.
        gradients = torch.autograd.grad(terms.loss(), self._parameters)
        if self._count > 1:
            gradients = _averaged(gradients, self._count)
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = laid_out_as(parameter, gradient)
        if self._settings.grad_clip:
            most = self._settings.grad_clip * batch_BHW[0].numel()
            nn.utils.clip_grad_norm_(self._parameters, most, foreach=True)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return torch.stack([terms.value.detach().mean(), terms.kl.detach().sum(-1).mean()])

    @torch.no_grad()
    def look_at(self, fresh: Frames, old: Frames) -> dict[str, float]:
        """What the model makes of frames (N, H, W) that have just come, and of the oldest that are held.

        Returns:
            `elbo_fresh` and `elbo_old`, nats per frame, and `active_units` over both.
        """
        self.model.eval()
        seen = [torch.from_numpy(frames).to(self._device) for frames in (fresh, old)]
        with self._own_noise():
            bounds = [float(self.model.elbo(frames).value.mean()) for frames in seen]
        variance_Z = self.model.features(torch.cat(seen)).var(0, unbiased=False)
        self.model.train()
        active = int((variance_Z > ACTIVE_VARIANCE).sum())
        return {"elbo_fresh": bounds[0], "elbo_old": bounds[1], "active_units": active}

    def state(self) -> dict[str, Any]:
        """Weights and optimizer, as arrays."""
        weights = {name: value.detach().cpu().numpy() for name, value in self.model.state_dict().items()}
        moments = self._optimizer.state_dict()["state"]
        optimizer = [{name: value.cpu().numpy() for name, value in moments[i].items()} for i in sorted(moments)]
        return {"weights": weights, "optimizer": optimizer}

    def set_state(self, state: dict[str, Any]) -> None:
        """Takes over what `state` gave; the rates stay those of this run's settings."""
        self.model.load_state_dict({name: torch.from_numpy(value) for name, value in state["weights"].items()})
        groups = self._optimizer.state_dict()["param_groups"]
        moments = {
            i: {name: torch.tensor(value) for name, value in of_one.items()}
            for i, of_one in enumerate(state["optimizer"])
        }
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})
        own_moments(self._optimizer)

    def _share_weights(self) -> None:
        """Every learner takes the first one's weights."""
        if self._count > 1:
            for value in self.model.state_dict().values():
                dist.broadcast(value, 0)


def _averaged(gradients: tuple[Tensor, ...], count: int) -> tuple[Tensor, ...]:
    """The learners' mean, in one exchange."""
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    parts = torch.split(flat / count, [gradient.numel() for gradient in gradients])
    return tuple(part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True))
