"""Plain torch Q networks: a head on stacked features, and an encoder with a head on stacked frames. No Ray.

Shapes: B batch, K stacked observations, Z latent units, H x W frame, A actions.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from rllib_ext.settings import QConfig


class QHead(nn.Module):
    """An MLP from stacked latents to one value per action."""

    def __init__(self, stack: int, z_dim: int, num_actions: int, config: QConfig) -> None:
        """Builds `stack * z_dim -> hidden -> num_actions`."""
        super().__init__()
        widths = [stack * z_dim, *config.hidden]
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers.append(nn.Linear(width_in, width_out))
            if config.layer_norm:
                layers.append(nn.LayerNorm(width_out))
            layers.append(nn.ReLU())
        layers.append(nn.Linear(widths[-1], num_actions))
        self.layers = nn.Sequential(*layers)

    def forward(self, z_BKZ: Tensor) -> Tensor:
        """(B, K, Z) float16 or float32 -> (B, A) float32."""
        q_BA: Tensor = self.layers(z_BKZ.flatten(1).float())
        return q_BA


class QNetwork(nn.Module):
    """The whole way from what the replay holds to values; the encoder is absent where latents are given."""

    def __init__(self, head: QHead, encoder: nn.Module | None = None) -> None:
        """`encoder` maps (N, H, W) uint8 to (N, Z) float32."""
        super().__init__()
        self.head = head
        self.encoder = encoder

    def forward(self, obs: Tensor) -> Tensor:
        """(B, K, Z) latents, or (B, K, H, W) uint8 frames where there is an encoder -> (B, A) float32."""
        if self.encoder is None:
            values: Tensor = self.head(obs)
            return values
        z_NZ = self.encoder(obs.flatten(0, 1))
        values = self.head(z_NZ.unflatten(0, obs.shape[:2]))
        return values


@torch.no_grad()
def blend(target: nn.Module, online: nn.Module, tau: float) -> None:
    """Moves a target network towards the online one: target += tau * (online - target); tau 1 copies."""
    for target_value, online_value in zip(target.state_dict().values(), online.state_dict().values(), strict=True):
        if tau == 1.0 or not target_value.is_floating_point():
            target_value.copy_(online_value)
        else:
            target_value.lerp_(online_value, tau)
