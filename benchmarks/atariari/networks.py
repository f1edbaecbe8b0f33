"""The networks of the published rows (Anand et al. 2019, arXiv:1906.08226), in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES = 256
FLAT = 64 * 9 * 6


def orthogonal(layer: nn.Conv2d | nn.ConvTranspose2d | nn.Linear) -> nn.Module:
    """Orthogonal weights with the gain of a ReLU, no bias."""
    nn.init.orthogonal_(layer.weight, nn.init.calculate_gain("relu"))
    nn.init.zeros_(layer.bias)
    return layer


class PublishedEncoder(nn.Module):
    """Four convolutions and a linear layer: frames (B, 210, 160) uint8 to features (B, 256)."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            orthogonal(nn.Conv2d(1, 32, 8, stride=4)),
            nn.ReLU(),
            orthogonal(nn.Conv2d(32, 64, 4, stride=2)),
            nn.ReLU(),
            orthogonal(nn.Conv2d(64, 128, 4, stride=2)),
            nn.ReLU(),
            orthogonal(nn.Conv2d(128, 64, 3, stride=1)),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.head = orthogonal(nn.Linear(FLAT, FEATURES))

    def forward(self, frames: Tensor) -> Tensor:
        features: Tensor = self.head(self.convolutions(pixels(frames)))
        return features


class PublishedVAE(nn.Module):
    """The encoder with a second head, and a mirrored decoder with a sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = PublishedEncoder()
        self.logvar = nn.Linear(FLAT, FEATURES)
        self.decoder = nn.Sequential(
            nn.Linear(FEATURES, FLAT),
            nn.ReLU(),
            nn.Unflatten(1, (64, 9, 6)),
            orthogonal(nn.ConvTranspose2d(64, 128, 3, stride=1)),
            nn.ReLU(),
            orthogonal(nn.ConvTranspose2d(128, 64, 4, stride=2)),
            nn.ReLU(),
            orthogonal(nn.ConvTranspose2d(64, 32, 4, stride=2, output_padding=1)),
            nn.ReLU(),
            orthogonal(nn.ConvTranspose2d(32, 1, 8, stride=4, output_padding=(2, 0))),
            nn.Sigmoid(),
        )

    def loss(self, frames: Tensor) -> Tensor:
        """Sum over the batch of squared errors, and of the KL with weight 1."""
        x = pixels(frames)
        flat = self.encoder.convolutions(x)
        mean, logvar = self.encoder.head(flat), self.logvar(flat)
        z = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
        divergence = -0.5 * (1 + logvar - mean.square() - logvar.exp()).sum()
        return F.mse_loss(self.decoder(z), x, reduction="sum") + divergence


class SupervisedProbe(nn.Module):
    """An encoder of its own and a linear layer for each of V variables, all trained end to end."""

    def __init__(self, num_variables: int) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(PublishedEncoder() for _ in range(num_variables))
        self.layers = nn.ModuleList(nn.Linear(FEATURES, 256) for _ in range(num_variables))

    def logits(self, frames: Tensor, variable: int) -> Tensor:
        """(B, 256) of one variable."""
        logits: Tensor = self.layers[variable](self.encoders[variable](frames))
        return logits


def pixels(frames: Tensor) -> Tensor:
    """(B, H, W) uint8 to (B, 1, H, W) in [0, 1]."""
    return frames[:, None].float() / 255
