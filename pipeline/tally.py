"""What a model makes of many frames: the bound, and the moments of its posteriors.

Shapes: B batch, Z latent dimensions, H x W frame.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.artifact import LatentStats
from pipeline.models.distributions import bits_per_dim
from pipeline.models.latent import LatentModel, ModelConfig


class Tally:
    """Sums over frames of the ELBO and of the posterior's moments, float64."""

    def __init__(self, z_dim: int, device: torch.device) -> None:
        self._sums = torch.zeros(2 + 3 * z_dim, dtype=torch.float64, device=device)

    @torch.inference_mode()
    def add(self, model: LatentModel, batch_BHW: Tensor) -> None:
        """Adds a batch of frames."""
        model.eval()
        terms, mean_BZ = model.elbo(batch_BHW), model.features(batch_BHW).double()
        parts = [terms.value.double().sum()[None], self._sums.new_tensor([float(len(batch_BHW))])]
        parts += [mean_BZ.sum(0), mean_BZ.square().sum(0), terms.kl.double().sum(0)]
        self._sums += torch.cat(parts)

    def reduce(self, num_workers: int) -> None:
        """Adds up what all workers have."""
        if num_workers > 1:
            dist.all_reduce(self._sums)

    @property
    def elbo(self) -> float:
        """Nats per frame."""
        return float(self._sums[0] / self._sums[1])

    def stats(self, model: ModelConfig) -> LatentStats:
        """Mean and scale of the posterior means."""
        mean, square, kl = (self._sums[2:] / self._sums[1]).cpu().view(3, -1)
        return LatentStats.from_moments(mean, (square - mean.square()).clamp(min=0), kl, model.latent_shape)

    def figures(self, model: ModelConfig, prefix: str) -> dict[str, float]:
        """ELBO, bits/dim and active units, by name."""
        return {
            f"{prefix}elbo_nats": self.elbo,
            f"{prefix}bits_per_dim": bits_per_dim(self.elbo, model.height * model.width),
            f"{prefix}active_units": float(self.stats(model).num_active),
        }
