"""A trained policy on disk and in plain torch: what evaluation, collection and reports take. No Ray, no pickle.

    config.json      mode, sizes, action names, the encoder's address, version and sha256
    q.safetensors    the head; outside frozen mode the trained encoder's weights too
    encoder/         the encoder bundle that the run started from, where it did not start from nothing
    preprocess.json  how frames are made
    README.md        model card
    SHA256SUMS       one line a file; its own sha256 names the bundle

Shapes: E environments, K stacked latents, Z latent units, H x W frame.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from pipeline import artifact, bundle
from pipeline.artifact import Encoder
from pipeline.errors import UserError, reading
from pipeline.schema import Preprocess
from pipeline.untrusted import from_record, read_json, short
from pipeline.weights import load_weights
from rllib_ext.networks import NatureConvolutions, QNetwork, q_network
from rllib_ext.settings import FROZEN, MODES, ONLINE, PIXELS, QConfig
from rllib_ext.stacking import RollingStack

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "q.safetensors"
PREPROCESS_FILE = "preprocess.json"
CARD_FILE = "README.md"
ENCODER_FOLDER = "encoder"
MOST_STACK = 64


@dataclass(frozen=True)
class PolicyConfig:
    """What a policy is, as `config.json` holds it.

    Attributes:
        mode: "frozen", "finetune", "online" or "pixels".
        stack: Latents that the head reads.
        z_shape: Shape of a latent, or (features,) of a torso that reads the stack.
        q: The head, and the torso.
        action_names: One a value of the head.
        encoder: Address, version and sha256 of the encoder the run started from; None where from nothing.
        encoder_config: The encoder's architecture, as `pipeline.models.to_record` writes it; None of another torso.
    """

    mode: str
    stack: int
    z_shape: tuple[int, ...]
    q: QConfig
    action_names: tuple[str, ...]
    encoder: Mapping[str, str | None] | None
    encoder_config: Mapping[str, Any] | None

    def to_json(self) -> str:
        """Indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_record(cls, record: Mapping[str, Any], what: str) -> PolicyConfig:
        """Reads what `to_json` wrote, parsed; `what` names it for the message.

        Raises:
            UserError: Unknown or missing keys, or values that no policy can have.
        """
        config = from_record(cls, record, what)
        is_from_nothing = config.encoder is None
        if config.mode not in MODES or (config.mode != ONLINE and (config.mode == PIXELS) != is_from_nothing):
            raise UserError(f"{what}: a policy of mode {short(config.mode)} cannot be, with encoder {config.encoder}")
        if not 1 <= config.stack <= MOST_STACK or not 1 <= len(config.z_shape) <= 3 or min(config.z_shape) < 1:
            raise UserError(f"{what}: stack {config.stack} and z_shape {short(config.z_shape)} make no network")
        return config


class Policy:
    """A loaded policy: greedy actions for any number of environments, which it follows from frame to frame.

    Attributes:
        config: What it is.
        preprocess: How its frames must be made.
        encoder: Frames to latents, or a stack of them to features.
        bundle_path: Where it was loaded from.
        sha256: Of that bundle.
    """

    def __init__(
        self, config: PolicyConfig, preprocess: Preprocess, network: QNetwork, encoder: Encoder | NatureConvolutions
    ) -> None:
        """Takes the parts; `load_policy` fills in where they came from."""
        self.config = config
        self.preprocess = preprocess
        self.encoder = encoder.eval().requires_grad_(False)
        self.bundle_path: Path | None = None
        self.sha256 = ""
        self._network = network.eval().requires_grad_(False)
        self._rolling = RollingStack(config.stack)

    @property
    def mode(self) -> str:
        """How it was trained."""
        return self.config.mode

    def reset(self, num_envs: int) -> None:
        """Forgets what it saw; the next frames are the first of `num_envs` environments."""
        self._rolling.clear()

    @torch.inference_mode()
    def act(self, frames: NDArray[np.uint8], is_first: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Greedy actions for the newest frames.

        Args:
            frames: (E, H, W) uint8.
            is_first: (E,) whether a frame is the first of its episode.

        Returns:
            (E,) int64, indices into the action set.
        """
        actions: NDArray[np.int64] = self.values(frames, is_first).argmax(1).numpy()
        return actions

    @torch.inference_mode()
    def values(self, frames: NDArray[np.uint8], is_first: NDArray[np.bool_]) -> Tensor:
        """Values (E, A) float32 of the newest frames; each is encoded once, where that can be, and counted as seen."""
        if isinstance(self.encoder, NatureConvolutions):
            values: Tensor = self._network(torch.from_numpy(self._rolling.push(frames, is_first)))
            return values
        z_EZ = self.encoder.encode(torch.from_numpy(frames))
        if self.mode == "frozen":
            z_EZ = z_EZ.to(torch.float16)  # the precision in which it was trained
        values = self._network.head(torch.from_numpy(self._rolling.push(z_EZ.numpy(), is_first)))
        return values


def save_policy(
    path: str | Path,
    config: PolicyConfig,
    preprocess: Preprocess,
    weights: Mapping[str, NDArray[Any]],
    *,
    encoder_bundle: Path | None,
    card: Mapping[str, Any],
) -> str:
    """Writes a policy bundle, all or nothing.

    Args:
        path: The folder to make; must not exist.
        config: What the policy is.
        preprocess: How its frames are made.
        weights: Parameters of the network: "head...." and, outside frozen mode, "encoder....".
        encoder_bundle: The encoder the run started from; None where from nothing.
        card: Facts for the model card, in order.

    Returns:
        The bundle's sha256.

    Raises:
        UserError: `path` exists or cannot be written.
    """
    with bundle.writing(Path(path)) as draft:
        (draft / CONFIG_FILE).write_text(config.to_json())
        save_file({name: torch.tensor(value).contiguous() for name, value in weights.items()}, draft / WEIGHTS_FILE)
        (draft / PREPROCESS_FILE).write_text(preprocess.to_json() + "\n")
        if encoder_bundle is not None:
            shutil.copytree(encoder_bundle, draft / ENCODER_FOLDER)
        (draft / CARD_FILE).write_text(_model_card(config, preprocess, card))
    return bundle.sha256_of(Path(path))


def load_policy(path: str | Path) -> Policy:
    """Verifies and loads a policy bundle, in plain torch.

    Raises:
        UserError: Not a policy bundle, or its bytes have changed (the file is named).
    """
    path = Path(path)
    sha256 = bundle.verify(path)
    if not (path / WEIGHTS_FILE).is_file():
        raise UserError(f"{path} is not a policy bundle (it has no {WEIGHTS_FILE}); name the folder of a policy")
    config, preprocess = load_config(path), artifact.load_preprocess(path)
    if config.action_names != preprocess.action_set:
        raise UserError(f"the policy {path} has actions {config.action_names}, its environment {preprocess.action_set}")
    with reading(f"the policy bundle {path}", "it does not fit this version of latentrl; train it again"):
        policy = _loaded(path, config, preprocess)
    policy.bundle_path, policy.sha256 = path, sha256
    return policy


def load_config(path: Path) -> PolicyConfig:
    """What the policy of a bundle is."""
    what = f"the {CONFIG_FILE} of the policy {path}"
    return PolicyConfig.from_record(read_json(path / CONFIG_FILE, what), what)


def _loaded(path: Path, config: PolicyConfig, preprocess: Preprocess) -> Policy:
    bundled = _bundled_encoder(path, config, preprocess)

    def build() -> QNetwork:
        inside = None if config.mode == FROZEN else bundled or _encoder_from_scratch(config, preprocess)
        return q_network(config.q, config.stack, config.z_shape, len(config.action_names), inside)

    network = load_weights(build, path / WEIGHTS_FILE)
    encoder = network.encoder or bundled
    assert isinstance(encoder, Encoder | NatureConvolutions)
    if encoder.z_shape != config.z_shape:
        raise ValueError(f"the encoder makes latents {encoder.z_shape}, the head reads {config.z_shape}")
    return Policy(config, preprocess, network, encoder)


def _bundled_encoder(path: Path, config: PolicyConfig, preprocess: Preprocess) -> Encoder | None:
    """The encoder that the run started from; None where it started from nothing."""
    if config.encoder is None:
        return None
    expected = config.encoder["sha256"]
    return artifact.load_encoder(path / ENCODER_FOLDER, expect_sha256=expected, preprocess=preprocess)


def _encoder_from_scratch(config: PolicyConfig, preprocess: Preprocess) -> Encoder | NatureConvolutions:
    if config.encoder_config is None:
        return NatureConvolutions(config.stack, preprocess.height, preprocess.width)
    return artifact.from_scratch(artifact.model_config(config.encoder_config, "its encoder_config"), preprocess)


def _model_card(config: PolicyConfig, preprocess: Preprocess, card: Mapping[str, Any]) -> str:
    origin = "from scratch" if config.encoder is None else f"{config.encoder['address']} ({config.encoder['sha256']})"
    facts = {
        "Game": f"{preprocess.game} ({preprocess.protocol})",
        "Mode": config.mode,
        "Encoder": origin,
        "Actions": ", ".join(config.action_names),
        **card,
    }
    rows = "".join(f"| {label} | {value} |\n" for label, value in facts.items())
    return _CARD.format(game=preprocess.game, rows=rows)


_CARD = """# {game} agent

| | |
|---|---|
{rows}
Plays greedily from single frames, (E, H, W) uint8, of E games at once:

```python
from rllib_ext.policy import load_policy
policy = load_policy("path/of/this/folder")
actions = policy.act(frames, is_first)
```
"""
