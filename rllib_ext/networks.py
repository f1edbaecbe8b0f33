"""Plain torch Q networks: a head on stacked features, and an encoder with a head on stacked frames. No Ray.

References:
    Mnih et al. (2015), Human-level control through deep reinforcement learning. doi:10.1038/nature14236.
    Wang et al. (2016), Dueling Network Architectures for Deep Reinforcement Learning. arXiv:1511.06581.
    Hessel et al. (2018), Rainbow, section on the integrated agent. arXiv:1710.02298.

Shapes: B batch, K stacked observations, Z latent units, H x W frame, A actions, N atoms.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import UserError
from rllib_ext.losses import expected_values
from rllib_ext.settings import NATURE, QConfig


class QHead(nn.Module):
    """An MLP from stacked latents to one value per action, or to one distribution of returns per action.

    Where latents lie on a grid, a convolution over its cells may come first.
    With dueling streams a value is added to every action's advantage over their mean (Wang et al. 2016, eq. 9); with
    distributions that happens to the logits, atom by atom, so that both streams shape every distribution (Hessel et al.
    2018).

    Attributes:
        grid: The convolution; None without it.
        layers: The hidden layers, then the (advantage) stream.
        value: The value stream; None without dueling.
        atoms: (N,) float32, where the distributions have their mass; a single 0 where there are none.
    """

    atoms: Tensor

    def __init__(self, stack: int, z_shape: tuple[int, ...], num_actions: int, config: QConfig) -> None:
        """Builds `stack * z -> hidden -> num_actions * num_atoms`, and `hidden -> num_atoms` where dueling.

        Raises:
            UserError: A convolution is asked for, and the latents lie on no grid.
        """
        super().__init__()
        self.grid = GridConvolution(stack, z_shape, config.grid_channels) if config.grid_channels else None
        num_features = (
            stack * math.prod(z_shape) if self.grid is None else config.grid_channels * math.prod(z_shape[1:])
        )
        widths = [num_features, *config.hidden]
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
        support = torch.linspace(config.v_min, config.v_max, config.num_atoms, device="cpu")
        self.register_buffer("atoms", support if self.is_distributional else torch.zeros(1), persistent=False)

    def outputs(self, z_BKZ: Tensor) -> Tensor:
        """(B, K, Z) float16 or float32 -> values (B, A), or logits (B, A, N) of distributions; float32."""
        *trunk, stream = self.layers
        x = z_BKZ.float()
        x = x.flatten(1) if self.grid is None else self.grid(x)
        for layer in trunk:
            x = layer(x)
        with torch.autocast(x.device.type, enabled=False):  # values need more digits than bf16 has
            x = x.float()
            outputs: Tensor = stream(x)
            value = None if self.value is None else self.value(x)
        if self.is_distributional:
            outputs = outputs.view(len(outputs), -1, len(self.atoms))
        if value is not None:
            outputs = outputs - outputs.mean(1, keepdim=True) + (value[:, None] if self.is_distributional else value)
        return outputs

    def values(self, outputs: Tensor) -> Tensor:
        """Values (B, A) that outputs stand for; of distributions their expectations."""
        return expected_values(outputs, self.atoms) if self.is_distributional else outputs

    def forward(self, z_BKZ: Tensor) -> Tensor:
        """(B, K, Z) float16 or float32 -> values (B, A) float32."""
        return self.values(self.outputs(z_BKZ))


class GridConvolution(nn.Module):
    """A 3x3 convolution over the cells of latents that lie on a grid: each cell means the same wherever it is."""

    def __init__(self, stack: int, z_shape: tuple[int, ...], channels: int) -> None:
        """From K latents of shape `z_shape` (C, h, w) to `channels` features a cell.

        Raises:
            UserError: The latents lie on no grid.
        """
        super().__init__()
        if len(z_shape) != 3:
            raise UserError(
                f"q.grid_channels is {channels}, and the encoder's latents lie on no grid; set it to 0, or pretrain an "
                f"encoder with model.latent_channels"
            )
        self._unflatten = nn.Unflatten(2, z_shape)
        self.conv = nn.Conv2d(stack * z_shape[0], channels, 3, padding=1)

    def forward(self, z_BKZ: Tensor) -> Tensor:
        """(B, K, Z) float32 -> (B, h * w * channels) float32, cell by cell."""
        maps = self._unflatten(z_BKZ).flatten(1, 2).contiguous(memory_format=torch.channels_last)
        return functional.relu_(self.conv(maps)).permute(0, 2, 3, 1).flatten(1)


class NatureConvolutions(nn.Module):
    """The three convolutions of Mnih et al. (2015), over the whole stack at once.

    With one hidden layer of 512 after them they are that paper's network, which Stable-Baselines3 plays Atari with too.

    Attributes:
        z_shape: (Z,), number of features.
    """

    def __init__(self, stack: int, height: int, width: int) -> None:
        """For stacks of K frames.

        Raises:
            UserError: The frames are smaller than the convolutions reach.
        """
        super().__init__()
        sizes = [((side - 8) // 4 - 3) // 2 - 1 for side in (height, width)]
        if min(sizes) < 1:
            raise UserError(f"q.torso nature reads frames of at least 36x36 pixels, and these have {height}x{width}")
        self.z_shape = (64 * sizes[0] * sizes[1],)
        self.layers = nn.Sequential(
            *(nn.Conv2d(stack, 32, 8, stride=4), nn.ReLU(inplace=True)),
            *(nn.Conv2d(32, 64, 4, stride=2), nn.ReLU(inplace=True)),
            *(nn.Conv2d(64, 64, 3), nn.ReLU(inplace=True)),
        )

    def forward(self, obs: Tensor) -> Tensor:
        """(B, K, H, W) uint8 -> (B, Z) float32, channels last: as they lie in memory in that layout."""
        features: Tensor = self.layers(obs * (1 / 255))
        return features.permute(0, 2, 3, 1).flatten(1)


class QNetwork(nn.Module):
    """The whole way from what the replay holds to values; the encoder is absent where latents are given."""

    def __init__(self, head: QHead, encoder: nn.Module | None = None) -> None:
        """`encoder` maps (N, H, W) uint8 to (N, Z) float32, or is NatureConvolutions, and `head` reads one latent."""
        super().__init__()
        self.head = head
        self.encoder = encoder

    def outputs(self, obs: Tensor) -> Tensor:
        """(B, K, Z) latents, float, or (B, K, H, W) uint8 frames where there is an encoder -> the head's outputs."""
        return self.head.outputs(self.features(obs))

    @property
    def encodes_frames(self) -> bool:
        """Whether there is an encoder that makes a latent of each frame of a stack."""
        return self.encoder is not None and not isinstance(self.encoder, NatureConvolutions)

    def features(self, obs: Tensor) -> Tensor:
        """What the head reads of what `outputs` takes: (B, K, Z), with K = 1 of a torso that reads the whole stack."""
        if self.encoder is None or obs.is_floating_point():
            return obs
        if isinstance(self.encoder, NatureConvolutions):
            return self.encoder(obs)[:, None]
        z_NZ: Tensor = self.encoder(obs.flatten(0, 1))
        return z_NZ.view(*obs.shape[:2], -1)

    def forward(self, obs: Tensor) -> Tensor:
        """As `outputs`, to values (B, A) float32."""
        return self.head.values(self.outputs(obs))


def q_network(
    q: QConfig, stack: int, z_shape: tuple[int, ...], num_actions: int, encoder: nn.Module | None
) -> QNetwork:
    """A network with fresh head weights.

    Args:
        q: The head.
        stack: Observations that are seen at once.
        z_shape: Shape of each one's latent; (features,) of all together where the torso reads the stack.
        num_actions: Values that come out.
        encoder: What makes them from frames; None where latents are given.
    """
    num_read = 1 if q.torso == NATURE else stack
    return QNetwork(QHead(num_read, z_shape, num_actions, q), encoder)


@torch.no_grad()
def blend(target: nn.Module, online: nn.Module, tau: float) -> None:
    """Moves a target network towards the online one: target += tau * (online - target); tau 1 copies."""
    for target_value, online_value in zip(target.state_dict().values(), online.state_dict().values(), strict=True):
        if tau == 1.0 or not target_value.is_floating_point():
            target_value.copy_(online_value)
        else:
            target_value.lerp_(online_value, tau)
