"""The Q module of RLlib's new API stack, in four modes.

    frozen    reads stacked latents; the encoder is not in the module at all, so that online and target network
              read the same latents: they share it by construction
    finetune  reads stacked frames; the pretrained encoder is inside and trained with its own rate
    online    reads stacked frames, or latents that are kept for them; the encoder is inside and has no gradient from Q:
              rllib_ext.bound trains it, beside its decoder, and publishes versions of it
    pixels    reads stacked frames; the same encoder architecture from scratch, or the convolutions of the DQN paper:
              the baselines

Where the encoder is inside, the target network has a copy of its own, which lags behind as its head does.

Shapes: B batch, K stacked observations, Z latent units, A actions, N atoms.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis import InferenceOnlyAPI, QNetAPI, TargetNetworkAPI
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchRLModule
from torch import Tensor

from pipeline import artifact, models
from pipeline.artifact import Encoder
from pipeline.models.latent import LatentModel
from pipeline.schema import Preprocess
from rllib_ext.networks import NatureConvolutions, QNetwork, q_network
from rllib_ext.settings import FROZEN, NATURE, ONLINE, DQNSettings, QConfig
from rllib_ext.shared_bundle import SharedBundle

QF_PREDS = "qf_preds"  # values (B, A); RLlib's name
QF_OUTPUTS = "qf_outputs"  # values (B, A), or logits (B, A, N) of distributions
QF_NEXT_CHOOSER = "qf_next_chooser"  # values (B, A) by which the next action is chosen
QF_TARGET_NEXT_OUTPUTS = "qf_target_next_outputs"  # the target network's, as QF_OUTPUTS
SPEC_KEY = "latent"


@dataclass(frozen=True)
class QModuleSpec:
    """What it takes to build the module on a learner or a rollout worker.

    Attributes:
        mode: "frozen", "finetune", "online" or "pixels".
        preprocess: The environment's frames.
        z_shape: Shape of a latent, or (features,) of a torso that reads the stack.
        q: The head, and the torso.
        settings: The run's settings (stack, double).
        encoder_config: The encoder's architecture.
        bundle: The pretrained encoder; None where it starts from nothing.
    """

    mode: str
    preprocess: Preprocess
    z_shape: tuple[int, ...]
    q: QConfig
    settings: DQNSettings
    encoder_config: Any
    bundle: SharedBundle | None

    def build_encoder(self) -> Encoder | NatureConvolutions | None:
        """The encoder that belongs inside the module; None in frozen mode."""
        if self.mode == FROZEN:
            return None
        if self.q.torso == NATURE:
            return NatureConvolutions(self.settings.stack, self.preprocess.height, self.preprocess.width)
        if self.bundle is None:
            encoder = artifact.from_scratch(self.encoder_config, self.preprocess)
        else:
            encoder = self.bundle.load(self.preprocess)
        return encoder.requires_grad_(self.mode != ONLINE)

    def build_model(self) -> LatentModel:
        """The whole latent-variable model that goes on learning on its bound."""
        if self.bundle is not None:
            return self.bundle.load_model()
        return models.build(self.encoder_config.for_frames(self.preprocess.height, self.preprocess.width))

    def build_network(self, num_actions: int) -> QNetwork:
        """The online network with fresh head weights."""
        return q_network(self.q, self.settings.stack, self.z_shape, num_actions, self.build_encoder())


class LatentQModule(TorchRLModule, QNetAPI, TargetNetworkAPI, InferenceOnlyAPI):
    """Q-values of stacked observations, epsilon-greedy on the way out, a target network on the learner."""

    def setup(self) -> None:
        """Builds the online network from `model_config["latent"]`, a QModuleSpec."""
        self.spec: QModuleSpec = self.model_config[SPEC_KEY]
        self.num_actions = int(self.action_space.n)
        self.network = self.spec.build_network(self.num_actions)
        self.network.to(memory_format=torch.channels_last)  # an update takes 3 to 19% less time so with convolutions

    def make_target_networks(self) -> None:
        """Copies the online network; called once, on the learner."""
        self.target = copy.deepcopy(self.network).requires_grad_(False)

    def get_target_network_pairs(self) -> list[tuple[torch.nn.Module, torch.nn.Module]]:
        """[(online, target)]."""
        return [(self.network, self.target)]

    def get_non_inference_attributes(self) -> list[str]:
        """What rollout workers are not sent."""
        return ["target"]

    def train(self, mode: bool = True) -> LatentQModule:
        """As in torch, at no cost where the mode does not change; RLlib calls it for every forward pass."""
        return self if self.training == mode else super().train(mode)

    def compute_q_values(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Values of `obs` (B, K, ...), as {"qf_preds": (B, A) float32}."""
        return {QF_PREDS: self.network(batch[Columns.OBS])}

    @torch.no_grad()
    def forward_target(self, batch: dict[str, Any]) -> Tensor:
        """The target network's values (B, A) of `new_obs`."""
        values: Tensor = self.target(batch[Columns.NEXT_OBS])
        return values

    @torch.no_grad()
    def target_outputs(self, next_obs: Tensor) -> Tensor:
        """The target network's outputs (N, A) or (N, A, atoms) of `next_obs` (N, K, ...)."""
        outputs: Tensor = self.target.outputs(next_obs)
        return outputs

    def _forward_train(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """The network's outputs for `obs` with gradient, and the values that choose the next action, without.

        Args:
            batch: `obs`, `new_obs` (B, K, ...) and `qf_target_next_outputs`, which `target_outputs` gives.
            kwargs: For RLlib.

        The pass with gradient comes first: autocast keeps the weights that it has cast, and those that a pass without
        gradient cast first would have none.
        """
        outputs = {QF_OUTPUTS: self.network.outputs(batch[Columns.OBS])}
        with torch.no_grad():
            is_double, target = self.spec.settings.double, batch[QF_TARGET_NEXT_OUTPUTS]
            chooser = self.network(batch[Columns.NEXT_OBS]) if is_double else self.target.head.values(target)
        outputs[QF_NEXT_CHOOSER] = chooser
        return outputs

    @torch.inference_mode()
    def _forward_inference(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Greedy `actions` (B,) int64."""
        outputs: dict[str, Any] = self.compute_q_values(batch)
        outputs[Columns.ACTIONS] = outputs[QF_PREDS].argmax(1)
        return outputs

    @torch.inference_mode()
    def _forward_exploration(
        self,
        batch: dict[str, Any],
        *,
        epsilon: float | Tensor,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Epsilon-greedy `actions` (B,) int64.

        Args:
            batch: `obs` (B, K, ...).
            epsilon: Chance of a random action; a number, or one per row, (B,) float32.
            generator: Source of the random choices; torch's global one if None.
            kwargs: For RLlib.
        """
        outputs = self._forward_inference(batch)
        greedy = outputs[Columns.ACTIONS]
        is_random = torch.rand(len(greedy), generator=generator) < epsilon
        random = torch.randint(self.num_actions, greedy.shape, generator=generator)
        outputs[Columns.ACTIONS] = torch.where(is_random, random, greedy)
        return outputs
