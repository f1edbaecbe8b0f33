"""Probabilistic principal component analysis (Tipping & Bishop 1999): the linear latent-variable model of frames.

p(z) = N(0, I), p(y | z) = N(W z + m, s I) over dequantised frames y. Its best W, m and s have a closed form, and so has
its posterior, which is Gaussian with independent dimensions; `initialise` sets them all from a sample of frames. So it
needs no updates (`train.epochs` 0), and stands beside the VAE as what a linear encoder of the same size gives.

Shapes: B batch, N frames of the sample, Z latent dimensions, D = H W pixels.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pipeline.models.distributions import (
    DEQUANTISATION_MEAN,
    DEQUANTISATION_VARIANCE,
    DiagonalGaussian,
    PixelGaussian,
)
from pipeline.models.latent import LatentModel, ModelConfig, ModelSettings
from pipeline.models.nets import LEVELS, OVERSAMPLING, POWER_ITERATIONS

MOST_SIDE = 1024


@dataclass(frozen=True)
class PCASettings(ModelSettings):
    """What a recipe says about a probabilistic PCA: `z_dim`, the number of components."""

    model: ClassVar[str] = "PCA"

    def __post_init__(self) -> None:
        """Refuses values that no model can be built from.

        Raises:
            ValueError: Names the values.
        """
        if self.z_dim < 1 or self.beta < 0:
            raise ValueError(f"z_dim must be positive and beta not negative: {self}")

    def for_frames(self, height: int, width: int) -> PCAConfig:
        """The complete configuration for frames of this size.

        Raises:
            ValueError: There are more components than pixels.
        """
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(PCASettings)}
        return PCAConfig(**fields, height=height, width=width)


@dataclass(frozen=True)
class PCAConfig(ModelConfig, PCASettings):
    """Everything needed to build one: its settings and the size of the frames."""

    def __post_init__(self) -> None:
        """See PCASettings; also refuses frames of no or enormous size, and more components than pixels.

        Raises:
            ValueError: Names the values.
        """
        super().__post_init__()
        if not (0 < self.height <= MOST_SIDE and 0 < self.width <= MOST_SIDE):
            raise ValueError(f"frames of {self.height}x{self.width} pixels; each side must be 1 to {MOST_SIDE}")
        if self.z_dim > self.height * self.width:
            raise ValueError(f"z_dim is {self.z_dim}, more than the {self.height}x{self.width} pixels of a frame")


class LinearEncoder(nn.Module):
    """q(z | x): a matrix on the pixels without their mean, and one log-variance a dimension."""

    def __init__(self, config: PCAConfig) -> None:
        """Knows nothing until `PCA.set_components`."""
        super().__init__()
        pixels = config.height * config.width
        self.mean_frame = nn.Parameter(torch.full((pixels,), LEVELS / 2))
        self.weight = nn.Parameter(torch.zeros(config.z_dim, pixels))
        self.logvar = nn.Parameter(torch.zeros(config.z_dim))

    def forward(self, x: Tensor) -> DiagonalGaussian:
        """(B, Z) of frames (B, H, W) uint8, or of levels as floats."""
        y_BD = x.flatten(1).float() + DEQUANTISATION_MEAN
        mean_BZ = (y_BD - self.mean_frame) @ self.weight.T
        return DiagonalGaussian(mean_BZ.float(), self.logvar.float().expand_as(mean_BZ))


class PCA(LatentModel):
    """See the module. Everything is a parameter, so that the encoder can be finetuned like any other."""

    config: PCAConfig
    encoder: LinearEncoder

    def __init__(self, config: PCAConfig) -> None:
        """A model that knows nothing: all latents are 0 until `initialise`."""
        super().__init__(config)
        self.encoder = LinearEncoder(config)
        pixels = config.height * config.width
        self.mean_frame = nn.Parameter(torch.full((pixels,), LEVELS / 2))
        self.components = nn.Parameter(torch.zeros(pixels, config.z_dim))
        self.logvar = nn.Parameter(torch.zeros(()))

    def decode(self, z: Tensor, c: Tensor | None = None) -> PixelGaussian:
        """p(x | z) of latents (B, Z)."""
        mean_BD = self.mean_frame + z @ self.components.T
        return PixelGaussian(mean_BD.view(-1, self.config.height, self.config.width).float(), self.logvar)

    @torch.no_grad()
    def initialise(self, frames: Tensor) -> None:
        """Sets the maximum of the likelihood of a sample (N, H, W) uint8, dequantised.

        Uniform noise adds 1/12 to each eigenvalue of the pixels' covariance. The leading ones come from a randomised
        decomposition (Halko et al. 2011), the sum of all others from the trace.

        References:
            Tipping & Bishop (1999), equations 7 and 8.
        """
        levels_ND = frames.flatten(1).float()
        mean_D = levels_ND.mean(0)
        levels_ND -= mean_D
        count, pixels = levels_ND.shape
        rank = min(self.config.z_dim + OVERSAMPLING, count, pixels)
        _, spread_K, directions_DK = torch.svd_lowrank(levels_ND, rank, niter=POWER_ITERATIONS)
        kept = min(self.config.z_dim, rank)
        eigenvalues_Z = torch.zeros(self.config.z_dim)
        eigenvalues_Z[:kept] = spread_K[:kept].square() / count
        directions_DZ = torch.zeros(pixels, self.config.z_dim)
        directions_DZ[:, :kept] = directions_DK[:, :kept]
        left = float(levels_ND.double().square().sum() / count - eigenvalues_Z.double().sum())
        noise = DEQUANTISATION_VARIANCE + max(0.0, left) / max(1, pixels - self.config.z_dim)
        self.set_components(mean_D, directions_DZ, eigenvalues_Z + DEQUANTISATION_VARIANCE, noise)

    @torch.no_grad()
    def set_components(self, mean_D: Tensor, directions_DZ: Tensor, eigenvalues_Z: Tensor, noise: float) -> None:
        """Sets all parameters from a covariance's decomposition; its directions are left as they are.

        The covariance of the latents given a frame is `noise` times the inverse of W'W + noise I = diag(eigenvalues).

        Args:
            mean_D: (D,) mean levels of the pixels.
            directions_DZ: (D, Z), orthonormal columns, or zero ones.
            eigenvalues_Z: (Z,) variance along each, levels squared, the noise's included; less than that counts as it.
            noise: Variance of each pixel given the latents, levels squared.
        """
        eigenvalues_Z = eigenvalues_Z.clamp(min=noise)
        scale_Z = (eigenvalues_Z - noise).sqrt()
        for mean_frame in (self.mean_frame, self.encoder.mean_frame):
            mean_frame.copy_(mean_D + DEQUANTISATION_MEAN)
        self.components.copy_(directions_DZ * scale_Z)
        self.logvar.fill_(noise).log_()
        self.encoder.weight.copy_((directions_DZ * (scale_Z / eigenvalues_Z)).T)
        self.encoder.logvar.copy_((noise / eigenvalues_Z).log())
