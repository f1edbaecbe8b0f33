"""Plain torch Q networks: a head on stacked features, and an encoder with a head on stacked frames. No Ray.

References:
    Wang et al. (2016), Dueling Network Architectures for Deep Reinforcement Learning. arXiv:1511.06581.
    Hessel et al. (2018), Rainbow, section on the integrated agent. arXiv:1710.02298.

Shapes: B batch, K stacked observations, Z latent units, H x W frame, A actions, N atoms.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from rllib_ext.losses import expected_values
from rllib_ext.settings import QConfig


class QHead(nn.Module):
    """An MLP from stacked latents to one value per action, or to one distribution of returns per action.

    With dueling streams a value is added to every action's advantage over their mean (Wang et al. 2016, eq. 9); with
    distributions that happens to the logits, atom by atom, so that both streams shape every distribution (Hessel et al.
    2018).

    Attributes:
        layers: The hidden layers, then the (advantage) stream.
        value: The value stream; None without dueling.
        atoms: (N,) float32, where the distributions have their mass; a single 0 where there are none.
    """

    atoms: Tensor

    def __init__(self, stack: int, z_dim: int, num_actions: int, config: QConfig) -> None:
        """Builds `stack * z_dim -> hidden -> num_actions * num_atoms`, and `hidden -> num_atoms` where dueling."""
        super().__init__()
        widths = [stack * z_dim, *config.hidden]
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers.append(nn.Linear(width_in, width_out))
            if config.layer_norm:
                layers.append(nn.LayerNorm(width_out))
            layers.append(nn.ReLU())
        layers.append(nn.Linear(widths[-1], num_actions * config.num_atoms))
        self.layers = nn.Sequential(*layers)
        self.value = nn.Linear(widths[-1], config.num_atoms) if config.dueling else None
        self.is_distributional = config.num_atoms > 1
        support = torch.linspace(config.v_min, config.v_max, config.num_atoms)
        self.register_buffer("atoms", support if self.is_distributional else torch.zeros(1), persistent=False)

    def outputs(self, z_BKZ: Tensor) -> Tensor:
        """(B, K, Z) float16 or float32 -> values (B, A), or logits (B, A, N) of distributions; float32."""
        *trunk, stream = self.layers
        x = z_BKZ.flatten(1).float()
        for layer in trunk:
            x = layer(x)
        outputs: Tensor = stream(x).float()
        if self.is_distributional:
            outputs = outputs.view(len(outputs), -1, len(self.atoms))
        if self.value is not None:
            value = self.value(x).float()
            outputs = outputs - outputs.mean(1, keepdim=True) + (value[:, None] if self.is_distributional else value)
        return outputs

    def values(self, outputs: Tensor) -> Tensor:
        """Values (B, A) that outputs stand for; of distributions their expectations."""
        return expected_values(outputs, self.atoms) if self.is_distributional else outputs

    def forward(self, z_BKZ: Tensor) -> Tensor:
        """(B, K, Z) float16 or float32 -> values (B, A) float32."""
        return self.values(self.outputs(z_BKZ))


class QNetwork(nn.Module):
    """The whole way from what the replay holds to values; the encoder is absent where latents are given."""

    def __init__(self, head: QHead, encoder: nn.Module | None = None) -> None:
        """`encoder` maps (N, H, W) uint8 to (N, Z) float32."""
        super().__init__()
        self.head = head
        self.encoder = encoder

    def outputs(self, obs: Tensor) -> Tensor:
        """(B, K, Z) latents, or (B, K, H, W) uint8 frames where there is an encoder -> the head's outputs."""
        if self.encoder is None:
            return self.head.outputs(obs)
        z_NZ = self.encoder(obs.flatten(0, 1))
        return self.head.outputs(z_NZ.unflatten(0, obs.shape[:2]))

    def forward(self, obs: Tensor) -> Tensor:
        """As `outputs`, to values (B, A) float32."""
        return self.head.values(self.outputs(obs))


@torch.no_grad()
def blend(target: nn.Module, online: nn.Module, tau: float) -> None:
    """Moves a target network towards the online one: target += tau * (online - target); tau 1 copies."""
    for target_value, online_value in zip(target.state_dict().values(), online.state_dict().values(), strict=True):
        if tau == 1.0 or not target_value.is_floating_point():
            target_value.copy_(online_value)
        else:
            target_value.lerp_(online_value, tau)
