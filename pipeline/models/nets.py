"""Convolutional encoder and decoder for grey frames of any size.

Shapes: B batch, Z latent dimensions, H height, W width, C channels, P patch side. Frames are padded at the bottom and
the right to whole patches and whole strides; the decoder crops the padding off again.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.distributions import DEQUANTISATION_MEAN, DiagonalGaussian

LEVELS = 256
INITIAL_LOGVAR, INITIAL_LOGVAR_SPREAD = -2.0, 0.1
INITIAL_BATCH = 256
OVERSAMPLING, POWER_ITERATIONS = 64, 4  # of the randomised principal components (Halko et al. 2011, arXiv:0909.4061)
LEAST_SPREAD = 1e-3  # of a component, as a share of the greatest: less is rounding
MIN_POSTERIOR_LOGVAR, MAX_POSTERIOR_LOGVAR = -12.0, 4.0


@dataclass(frozen=True)
class Body:
    """What an encoder and its decoder are built from.

    Attributes:
        height: H.
        width: W.
        z_dim: Z.
        patch: P.
        widths: C at each resolution, which halves from one to the next.
        num_blocks: Residual blocks per resolution.
        latent_channels: Latents a cell where z is a grid over the last feature map, else 0.
        is_axial: z is read off that map's `profiles`.
    """

    height: int
    width: int
    z_dim: int
    patch: int
    widths: tuple[int, ...]
    num_blocks: int
    latent_channels: int
    is_axial: bool

    @property
    def grid(self) -> tuple[int, int]:
        """Size of the last feature map."""
        return grid_size(self.height, self.width, self.patch, len(self.widths) - 1)


class ResidualBlock(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x)))), the identity at the start of training."""

    def __init__(self, width: int) -> None:
        """`width` is C."""
        super().__init__()
        self.spatial = nn.Conv2d(width, width, 3, padding=1)
        self.mix = nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.mix.weight)
        nn.init.zeros_(self.mix.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to the same shape."""
        out: Tensor = self.mix(F.relu_(self.spatial(F.relu(x)))).add_(x)
        return out


def padded_size(height: int, width: int, patch: int, num_halvings: int) -> tuple[int, int]:
    """The smallest size that holds (height, width) and divides into patches that halve `num_halvings` times."""
    unit = patch * 2**num_halvings
    return -(-height // unit) * unit, -(-width // unit) * unit


def grid_size(height: int, width: int, patch: int, num_halvings: int) -> tuple[int, int]:
    """Size of the smallest feature map."""
    padded_height, padded_width = padded_size(height, width, patch, num_halvings)
    unit = patch * 2**num_halvings
    return padded_height // unit, padded_width // unit


def profiles(cells: Tensor) -> Tensor:
    """(B, C, h, w) to (B, C (h + w)): what lies in each row, whatever the column, and in each column, whatever the row.

    Where something is down and where it is across are then read apart, each wherever the other is: that takes far fewer
    frames to learn than one layer from all cells. Sums are divided by the square root of their number.
    """
    rows, columns = cells.sum(3) / cells.shape[3] ** 0.5, cells.sum(2) / cells.shape[2] ** 0.5
    return torch.cat([rows.flatten(1), columns.flatten(1)], 1)


class Cross(nn.Module):
    """The mirror of `profiles`: (B, C (h + w)) to (B, C, h, w), every cell its row's entry plus its column's."""

    def __init__(self, width: int, grid: tuple[int, int]) -> None:
        """`width` is C."""
        super().__init__()
        self._width, self._grid = width, grid

    def forward(self, entries: Tensor) -> Tensor:
        """See the class; channels last."""
        height, width = self._grid
        rows, columns = torch.split(entries, [self._width * height, self._width * width], dim=1)
        cells = rows.view(-1, self._width, height, 1) + columns.view(-1, self._width, 1, width)
        return cells.contiguous(memory_format=torch.channels_last)


def _blocks(width: int, count: int) -> list[nn.Module]:
    return [ResidualBlock(width) for _ in range(count)]


class ConvEncoder(nn.Module):
    """Patch stem, residual blocks, strided convolutions, and a head to mean and log-variance of z.

    The mean frame is subtracted first, so that what moves is what the network sees. The stem is one matrix product on
    patches, cut while the frames are still bytes: a quarter of the traffic of cutting floats. The head is one linear
    layer from the last map, or from its `profiles`, or, where z is a grid (`latent_channels`), one shared by all cells.
    """

    mean_frame: Tensor

    def __init__(self, body: Body) -> None:
        """Builds the layers."""
        super().__init__()
        height, width, patch, widths, num_blocks = body.height, body.width, body.patch, body.widths, body.num_blocks
        padded_height, padded_width = padded_size(height, width, patch, len(widths) - 1)
        self._padding = (0, padded_width - width, 0, padded_height - height)
        self._patch = patch
        self.register_buffer("mean_frame", torch.zeros(height, width))
        self.stem = nn.Linear(patch * patch, widths[0])
        layers = _blocks(widths[0], num_blocks)
        for narrow, wide in itertools.pairwise(widths):
            layers += [nn.Conv2d(narrow, wide, 2, stride=2), *_blocks(wide, num_blocks)]
        self.layers = nn.Sequential(*layers, nn.ReLU())
        self._is_axial = body.is_axial
        self.head: nn.Linear | nn.Conv2d
        if body.latent_channels:
            self.head = nn.Conv2d(widths[-1], 2 * body.latent_channels, 1)
        elif body.is_axial:
            self.head = nn.Linear(widths[-1] * sum(body.grid), 2 * body.z_dim)
        else:
            self.head = nn.Linear(widths[-1] * math.prod(body.grid), 2 * body.z_dim)

    def forward(self, x: Tensor) -> DiagonalGaussian:
        """q(z | x) of frames (B, H, W) uint8; the log-variance is held between -12 and 4."""
        features = self.layers(self._embed(x))
        if isinstance(self.head, nn.Linear):
            features = profiles(features) if self._is_axial else features.flatten(1)
        mean, logvar = self.head(features).chunk(2, dim=1)
        logvar = logvar.flatten(1).clamp(MIN_POSTERIOR_LOGVAR, MAX_POSTERIOR_LOGVAR)
        return DiagonalGaussian(mean.flatten(1).float(), logvar.float())

    def _embed(self, x: Tensor) -> Tensor:
        """Frames (B, H, W) uint8 to the stem's maps (B, C, h, w), in the channels-last layout."""
        patches_BhwP = self._patches(x) - self._patches(self.mean_frame[None])
        maps = F.linear(patches_BhwP, self.stem.weight / LEVELS, self.stem.bias)
        return maps.permute(0, 3, 1, 2)

    def _patches(self, x: Tensor) -> Tensor:
        """(B, H, W) to the pixels of each patch, (B, h, w, P * P), of the same dtype."""
        padded = F.pad(x, self._padding) if any(self._padding) else x
        height, width = (side // self._patch for side in padded.shape[1:])
        cut = padded.view(-1, height, self._patch, width, self._patch).transpose(2, 3)
        return cut.reshape(-1, height, width, self._patch**2)

    @torch.no_grad()
    def standardise(self, frames: Tensor, mean_frame: Tensor) -> None:
        """Sets the mean frame, then scales the head so that posterior means have mean 0 and variance 1 over a sample.

        A head on profiles starts at their principal components. What a random projection has a little of in each
        latent, such as a clock beside two boxers, then has latents of its own, and training keeps most of that.

        Args:
            frames: (N, H, W) uint8.
            mean_frame: (H, W) float32, levels.
        """
        self.mean_frame.copy_(mean_frame)
        if self._is_axial:
            self._start_at_components(frames)
        mean_NZ = torch.cat([self(batch).mean for batch in torch.split(frames, INITIAL_BATCH)])
        outputs = self.head.weight.shape[0] // 2  # latent dimensions, or channels of the grid
        mean_OM = mean_NZ.view(len(frames), outputs, -1).transpose(0, 1).flatten(1)
        scale_O = mean_OM.std(1, unbiased=False).clamp(min=1e-6)
        weight, bias = self.head.weight, self.head.bias
        assert bias is not None
        weight[:outputs] /= scale_O.view(-1, *[1] * (weight.dim() - 1))
        bias[:outputs] = (bias[:outputs] - mean_OM.mean(1)) / scale_O
        weight[outputs:] *= INITIAL_LOGVAR_SPREAD
        bias[outputs:] = INITIAL_LOGVAR

    def _start_at_components(self, frames: Tensor) -> None:
        """Sets as many rows of the head as there are components worth the name; others stay random."""
        assert isinstance(self.head, nn.Linear)
        maps = (self.layers(self._embed(batch)) for batch in torch.split(frames, INITIAL_BATCH))
        entries_NF = torch.cat([profiles(batch) for batch in maps])
        count = min(len(self.head.weight) // 2, *entries_NF.shape)
        rank = min(count + OVERSAMPLING, *entries_NF.shape)
        _, spread_K, directions_FK = torch.svd_lowrank(entries_NF - entries_NF.mean(0), rank, niter=POWER_ITERATIONS)
        count = min(count, int((spread_K > LEAST_SPREAD * spread_K[0]).sum()))
        self.head.weight[:count] = (directions_FK / spread_K).T[:count]


class ConvDecoder(nn.Module):
    """The encoder mirrored: first layer, residual blocks, pixel-shuffles, one map of pixels per output."""

    def __init__(self, body: Body, num_maps: int) -> None:
        """Builds the layers; `num_maps` pixel maps come out."""
        super().__init__()
        self._size = (body.height, body.width)
        patch, widths, num_blocks, grid = body.patch, body.widths, body.num_blocks, body.grid
        self.seed: nn.Module
        if body.latent_channels:
            unflatten = nn.Unflatten(1, (body.latent_channels, *grid))
            self.seed = nn.Sequential(unflatten, nn.Conv2d(body.latent_channels, widths[-1], 1))
        elif body.is_axial:
            self.seed = nn.Sequential(nn.Linear(body.z_dim, widths[-1] * sum(grid)), Cross(widths[-1], grid))
        else:
            unflatten = nn.Unflatten(1, (widths[-1], *grid))
            self.seed = nn.Sequential(nn.Linear(body.z_dim, widths[-1] * math.prod(grid)), unflatten)
        layers: list[nn.Module] = _blocks(widths[-1], num_blocks)
        for wide, narrow in zip(widths[:0:-1], widths[-2::-1]):
            layers += [nn.Conv2d(wide, 4 * narrow, 1), nn.PixelShuffle(2), *_blocks(narrow, num_blocks)]
        to_pixels = nn.Conv2d(widths[0], num_maps * patch * patch, 1)
        nn.init.zeros_(to_pixels.weight)
        nn.init.zeros_(to_pixels.bias)  # type: ignore[arg-type]
        self.layers = nn.Sequential(*layers, nn.ReLU(), to_pixels, nn.PixelShuffle(patch))

    def forward(self, z: Tensor) -> Tensor:
        """Pixel maps (B, num_maps, H, W) of latents (B, Z); zero at the start of training."""
        height, width = self._size
        maps: Tensor = self.layers(self.seed(z)).float()
        return maps[..., :height, :width]


def mean_and_logvar(frames: Tensor, min_variance: float) -> tuple[Tensor, Tensor]:
    """Mean and log-variance (H, W) of dequantised pixels over frames (N, H, W) uint8, the variance floored."""
    levels = frames.float()
    variance = levels.var(0, unbiased=False).clamp(min=min_variance)
    return levels.mean(0) + DEQUANTISATION_MEAN, variance.log()
