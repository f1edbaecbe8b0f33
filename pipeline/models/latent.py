"""The one interface of every latent-variable model: prior, encoder, decoder, and one ELBO.

Shapes: B batch, Z latent dimensions, H height, W width. A frame x is (B, H, W) uint8, a single grey image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pipeline.models.distributions import DiagonalGaussian, PixelGaussian, kl_divergence

ACTIVE_VARIANCE = 0.01


@dataclass(frozen=True)
class ModelSettings:
    """What a recipe says about a model; the size of the frames comes from the dataset.

    Attributes:
        z_dim: Number of latent dimensions.
        beta: Weight of the KL term in the training loss; 1 is the ELBO (Higgins et al. 2017, beta-VAE).
    """

    model: ClassVar[str]

    z_dim: int = 256
    beta: float = 1.0

    def for_frames(self, height: int, width: int) -> ModelConfig:
        """The complete configuration for frames of this size."""
        raise NotImplementedError


@dataclass(frozen=True)
class ModelConfig(ModelSettings):
    """Everything needed to build a model.

    Attributes:
        height: Pixels.
        width: Pixels.
    """

    height: int = 84
    width: int = 84

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(Z,), or (channels, height, width) where z is a grid over the frame; its product is `z_dim`."""
        return (self.z_dim,)

    @property
    def cell_pixels(self) -> int:
        """Side of the square of the frame that a cell of a grid of latents stands for; 0 where z is flat."""
        return 0


@dataclass(frozen=True)
class ELBO:
    """The terms of the evidence lower bound, in nats per example; event dimensions are summed.

    Attributes:
        log_likelihood: (B,) expected log density of the dequantised frame given one posterior draw.
        kl: (B, Z) KL of the posterior to the prior, per latent dimension.
        beta: Weight of the KL in the loss.
        emphasis: (B,) nats that training adds to the loss beside the bound (`LatentModel.emphasis`), or 0.
    """

    log_likelihood: Tensor
    kl: Tensor
    beta: float
    emphasis: Tensor | float = 0.0

    @property
    def value(self) -> Tensor:
        """(B,) the bound itself, with weight 1 on the KL whatever beta is, and without emphasis."""
        return self.log_likelihood - self.kl.sum(-1)

    def loss(self) -> Tensor:
        """What training minimises: -(log-likelihood - beta KL) + emphasis, averaged over the batch."""
        return (self.beta * self.kl.sum(-1) - self.log_likelihood + self.emphasis).mean()


class LatentModel(nn.Module, ABC):
    """A model p(z) p(x | z, c) with approximate posterior q(z | x, c).

    A model that needs another bound overrides `elbo`; one that needs another posterior overrides `infer`. The optional
    condition c is there for conditional models; models without one ignore it.

    Attributes:
        config: What the model was built from.
        encoder: Maps frames (B, H, W) uint8 to a DiagonalGaussian over z; all that acting needs of the model.
    """

    encoder: nn.Module

    def __init__(self, config: ModelConfig) -> None:
        """Keeps the configuration; subclasses build `encoder` and their decoder."""
        super().__init__()
        self.config = config

    def prior(self, c: Tensor | None = None) -> DiagonalGaussian:
        """p(z), mean and logvar (Z,); N(0, I) unless overridden."""
        device = next(self.parameters()).device
        zeros = torch.zeros(self.config.z_dim, device=device)
        return DiagonalGaussian(zeros, zeros)

    def infer(self, x: Tensor, c: Tensor | None = None) -> DiagonalGaussian:
        """q(z | x), (B, Z), of frames (B, H, W) uint8."""
        posterior: DiagonalGaussian = self.encoder(x)
        return posterior

    @abstractmethod
    def decode(self, z: Tensor, c: Tensor | None = None) -> PixelGaussian:
        """p(x | z) of latents (B, Z)."""

    def initialise(self, frames: Tensor) -> None:
        """Sets what is best set from data before training, given a sample (N, H, W) uint8; nothing by default."""

    def elbo(self, x: Tensor, c: Tensor | None = None) -> ELBO:
        """Evidence lower bound of frames (B, H, W) uint8 with one posterior draw per frame."""
        posterior = self.infer(x, c)
        likelihood = self.decode(posterior.rsample(), c)
        return ELBO(
            likelihood.expected_log_prob(x),
            kl_divergence(posterior, self.prior(c)),
            self.config.beta,
            self.emphasis(x, likelihood) if self.training else 0.0,
        )

    def emphasis(self, x: Tensor, likelihood: PixelGaussian) -> Tensor | float:
        """(B,) nats added to the training loss for what of frames (B, H, W) must not be overlooked; 0 by default."""
        return 0.0

    def forward(self, x: Tensor, c: Tensor | None = None) -> ELBO:
        """`elbo`; distributed training hooks into forward."""
        return self.elbo(x, c)

    def features(self, x: Tensor) -> Tensor:
        """What RL sees: the posterior mean (B, Z) float32, never a sample."""
        return self.infer(x).mean

    @torch.no_grad()
    def sample(self, num_frames: int) -> PixelGaussian:
        """Draws latents from the prior and decodes them."""
        prior = self.prior()
        shape = (num_frames, self.config.z_dim)
        return self.decode(DiagonalGaussian(prior.mean.expand(shape), prior.logvar.expand(shape)).rsample())

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> PixelGaussian:
        """Decodes the posterior means of frames (B, H, W) uint8."""
        return self.decode(self.features(x))
