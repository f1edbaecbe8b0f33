"""Distributions of latents and pixels: densities, closed-form KL.

Shapes: B batch, Z latent dimensions, H height, W width. A pixel level is an integer from 0 to 255; dequantised, pixel x
becomes y = x + u with u uniform in [0, 1), so y lies in [0, 256) and has a density.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LOG_2PI = math.log(2 * math.pi)
DEQUANTISATION_MEAN = 0.5
DEQUANTISATION_VARIANCE = 1 / 12


@dataclass(frozen=True)
class DiagonalGaussian:
    """Gaussian with independent dimensions.

    Attributes:
        mean: (..., Z) float32.
        logvar: (..., Z) float32, natural log of the variance.
    """

    mean: Tensor
    logvar: Tensor

    def rsample(self) -> Tensor:
        """One reparameterised draw (..., Z), differentiable in mean and logvar (Kingma & Welling 2014, section 2.4)."""
        return self.mean + torch.randn_like(self.mean) * torch.exp(0.5 * self.logvar)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density of z (..., Z), nats, summed over Z."""
        return -0.5 * ((z - self.mean).square() * torch.exp(-self.logvar) + self.logvar + LOG_2PI).sum(-1)


def kl_divergence(q: DiagonalGaussian, p: DiagonalGaussian) -> Tensor:
    """KL(q || p) between diagonal Gaussians, per dimension.

    Closed form, so it adds no sampling noise to the gradient.

    Args:
        q: (B, Z).
        p: Broadcastable to (B, Z).

    Returns:
        (B, Z) float32, nats; the sum over Z is the divergence.

    References:
        Kingma & Welling (2014), Appendix B. arXiv:1312.6114.
    """
    spread = torch.exp(q.logvar - p.logvar) + (q.mean - p.mean).square() * torch.exp(-p.logvar)
    return 0.5 * (spread - 1 + p.logvar - q.logvar)


@dataclass(frozen=True)
class PixelGaussian:
    """Independent Gaussian for each dequantised pixel: a true density over y = x + u in [0, 256).

    Because log N is quadratic in y, its expectation over the uniform noise u has a closed form; training and
    evaluation use it instead of drawing u. It is what many draws average to, and a lower bound on the log-probability
    of the discrete frame (Theis et al. 2016, arXiv:1511.01844, section 3.1).

    Attributes:
        mean: (B, H, W) float32, in levels, of y. A frame with all pixels at level x has mean x + 0.5.
        logvar: Broadcastable to (B, H, W), natural log of the variance in levels squared.
    """

    mean: Tensor
    logvar: Tensor

    @property
    def variance(self) -> Tensor:
        """Variance in levels squared, broadcastable to (B, H, W)."""
        return self.logvar.exp()

    def log_prob(self, y_BHW: Tensor) -> Tensor:
        """Log density (B,) of dequantised frames y (B, H, W), nats, summed over pixels."""
        error = (y_BHW - self.mean).square()
        return self._normal(error)

    def expected_log_prob(self, x_BHW: Tensor) -> Tensor:
        """Expectation over u of the log density of x + u.

        Args:
            x_BHW: (B, H, W) uint8.

        Returns:
            (B,) float32, nats, summed over pixels.
        """
        return self._normal(self.squared_error(x_BHW))

    def squared_error(self, x_BHW: Tensor) -> Tensor:
        """(B, H, W) expectation over u of (x + u - mean)^2 of frames x (B, H, W) uint8, levels squared."""
        return (x_BHW + DEQUANTISATION_MEAN - self.mean).square() + DEQUANTISATION_VARIANCE

    def _normal(self, squared_error_BHW: Tensor) -> Tensor:
        logvar = self.logvar
        quadratic = squared_error_BHW * torch.exp(-logvar)
        return -0.5 * (quadratic + logvar + LOG_2PI).sum((-2, -1))


def bits_per_dim(elbo_nats: float, num_pixels: int) -> float:
    """Average code length of one pixel in bits: -ELBO / (number of pixels * ln 2)."""
    return -elbo_nats / (num_pixels * math.log(2))
