"""The variational autoencoder of single frames (Kingma & Welling 2014), and beta-VAE as a field of its settings."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.distributions import DEQUANTISATION_MEAN, DEQUANTISATION_VARIANCE, PixelGaussian
from pipeline.models.latent import LatentModel, ModelConfig, ModelSettings
from pipeline.models.nets import LEVELS, Body, ConvDecoder, ConvEncoder, grid_size, mean_and_logvar

# Beyond these is a slip or an attack. The z_dim of a grid follows from its cells and has no limit of its own.
MOST = {"patch": 256, "num_blocks": 64, "latent_channels": 4096}
MOST_Z_DIM, MOST_WIDTH, MOST_RESOLUTIONS, MOST_SIDE = 65_536, 4096, 8, 1024
MOST_RARITY = 1.0
VARIANCES = ("pixel_map", "pixel", "global")
LOGVAR_RATE = 10.0  # log-variances travel far: this many times the optimizer's step


@dataclass(frozen=True)
class VAESettings(ModelSettings):
    """What a recipe says about a VAE.

    Attributes:
        patch: Side of the square patches that the stem flattens, pixels.
        widths: Channels at each resolution; every further entry halves the resolution once more.
        num_blocks: Residual blocks per resolution.
        latent_channels: 0 for a flat z of `z_dim`; otherwise z is a grid of so many channels over the cells of the
            last feature map, and `z_dim` follows from the size of the frames. What is small and moves, such as a ball,
            is then encoded where it is, after minutes of training instead of hours.
        is_axial: z is read off the sums over rows and columns of cells (nets.profiles); not with `latent_channels`.
        rarity: Training weighs the squared error of a pixel by (1 + d^2) ** rarity, d its distance from that pixel's
            mean in standard deviations. 0 weighs all alike; 0.5 gives a pixel that is lit in a share f of the frames
            about 1 / sqrt(f) there, so that a small thing is not drowned by what is large. The bound that is reported
            is never weighted.
        variance: Variance of the pixels: "pixel_map" (the decoder gives one per pixel and frame), "pixel" (one learned
            per pixel position, shared by all frames) or "global" (one number).
        min_std: Floor of the pixels' standard deviation, levels. Dequantisation noise alone has 0.289, so a floor
            below that never binds at the optimum; a higher one spends less of the bound on pixels that never change.
    """

    model: ClassVar[str] = "VAE"

    patch: int = 6
    widths: tuple[int, ...] = (32, 32)
    num_blocks: int = 1
    latent_channels: int = 0
    is_axial: bool = False
    rarity: float = 0.0
    variance: str = "global"
    min_std: float = 0.5

    def __post_init__(self) -> None:
        """Refuses values that no model can be built from.

        Raises:
            ValueError: Names the field and its value.
        """
        if self.variance not in VARIANCES:
            raise ValueError(f"variance is {self.variance!r}; choose one of {', '.join(VARIANCES)}")
        if min(self.z_dim, self.patch, self.num_blocks + 1, *self.widths, len(self.widths)) < 1:
            raise ValueError(f"z_dim, patch and widths must be positive, num_blocks 0 or more: {self}")
        too_large = [name for name, most in MOST.items() if getattr(self, name) > most]
        too_large += ["z_dim"] * (not self.latent_channels and self.z_dim > MOST_Z_DIM)
        too_large += ["widths"] * (len(self.widths) > MOST_RESOLUTIONS or max(self.widths) > MOST_WIDTH)
        if too_large:
            raise ValueError(f"{', '.join(too_large)} too large: {self}")
        if self.is_axial and self.latent_channels:
            raise ValueError(f"is_axial goes with latent_channels 0: {self}")
        if not 0 <= self.rarity <= MOST_RARITY:
            raise ValueError(f"rarity is {self.rarity}; it must be 0 to {MOST_RARITY:g}")
        if self.beta < 0 or self.latent_channels < 0 or self.min_std < math.sqrt(DEQUANTISATION_VARIANCE):
            raise ValueError(f"beta and latent_channels must not be negative, nor min_std below 0.289 levels: {self}")

    def for_frames(self, height: int, width: int) -> VAEConfig:
        """The complete configuration for frames of this size."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(VAESettings)}
        if self.latent_channels:
            cells = math.prod(grid_size(height, width, self.patch, len(self.widths) - 1))
            fields["z_dim"] = self.latent_channels * cells
        return VAEConfig(**fields, height=height, width=width)


@dataclass(frozen=True)
class VAEConfig(ModelConfig, VAESettings):
    """Everything needed to build a VAE: its settings and the size of the frames."""

    def __post_init__(self) -> None:
        """See VAESettings; also refuses frames of no or enormous size.

        Raises:
            ValueError: Names the value.
        """
        super().__post_init__()
        if not (0 < self.height <= MOST_SIDE and 0 < self.width <= MOST_SIDE):
            raise ValueError(f"frames of {self.height}x{self.width} pixels; each side must be 1 to {MOST_SIDE}")

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """See ModelConfig."""
        if not self.latent_channels:
            return (self.z_dim,)
        return (self.latent_channels, *grid_size(self.height, self.width, self.patch, len(self.widths) - 1))

    @property
    def cell_pixels(self) -> int:
        """See ModelConfig."""
        return self.patch * 2 ** (len(self.widths) - 1) if self.latent_channels else 0


class VAE(LatentModel):
    """p(z) = N(0, I); convolutional Gaussian encoder and decoder, both with mean and variance.

    The decoder's output is added to a learned mean frame and log-variance frame. `initialise` sets them from data, and
    scales the posterior means to unit variance: training starts at the best decoder without z and with a z that already
    tells frames apart. Without that the KL wins before the decoder has learned to read z, and the posterior collapses.
    """

    config: VAEConfig
    encoder: ConvEncoder
    mean_frame: nn.Parameter
    raw_logvar: nn.Parameter

    def __init__(self, config: VAEConfig) -> None:
        """Builds the networks with torch's current random state."""
        super().__init__(config)
        size = (config.height, config.width)
        body = Body(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Body)})
        self.encoder = ConvEncoder(body)
        self.decoder = ConvDecoder(body, num_maps=2 if config.variance == "pixel_map" else 1)
        self._min_logvar = 2 * math.log(config.min_std)
        self.mean_frame = nn.Parameter(torch.full(size, LEVELS / 2))
        start = torch.tensor(2 * math.log(LEVELS / 4), device="cpu") - self._min_logvar
        self.pixel_variance: Tensor | None  # over the data, levels squared
        self.register_buffer("pixel_variance", torch.ones(size) if config.rarity else None)
        self.raw_logvar = nn.Parameter((start if config.variance == "global" else start.expand(size)) / LOGVAR_RATE)

    def decode(self, z: Tensor, c: Tensor | None = None) -> PixelGaussian:
        """p(x | z) of latents (B, Z); the standard deviation never falls below `min_std`."""
        maps = self.decoder(z)
        mean = self.mean_frame + LEVELS * maps[:, 0]
        raw = self.raw_logvar + maps[:, 1] if self.config.variance == "pixel_map" else self.raw_logvar
        return PixelGaussian(mean, self._min_logvar + F.softplus(LOGVAR_RATE * raw))

    def emphasis(self, x: Tensor, likelihood: PixelGaussian) -> Tensor | float:
        """What weighing squared errors by rarity adds to the negative log-likelihood; see VAESettings."""
        if self.pixel_variance is None:
            return 0.0
        distance = (x - self.encoder.mean_frame).square() / self.pixel_variance
        surplus = (1 + distance) ** self.config.rarity - 1
        return 0.5 * (surplus * likelihood.squared_error(x) / likelihood.variance).sum((-2, -1))

    @torch.no_grad()
    def initialise(self, frames: Tensor) -> None:
        """Sets from a sample of frames (N, H, W) uint8: mean and variance of the pixels, and the scale of z."""
        mean, logvar = mean_and_logvar(frames, 1.1 * self.config.min_std**2)
        if self.pixel_variance is not None:
            self.pixel_variance.copy_(mean_and_logvar(frames, 1.0)[1].exp())
        logvar = logvar.exp().mean().log()
        self.mean_frame.copy_(mean)
        self.raw_logvar.fill_(torch.log(torch.expm1(logvar - self._min_logvar)) / LOGVAR_RATE)
        self.encoder.standardise(frames, mean - DEQUANTISATION_MEAN)
