"""A trained policy on disk and in plain torch: what evaluation, collection and reports take. No Ray, no pickle.

    config.json      mode, sizes, action names, the encoder's address, version and sha256
    q.safetensors    the head; in finetune and pixels mode the trained encoder's weights too
    encoder/         the encoder bundle that the run started from (not in pixels mode)
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
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline import artifact, bundle, models
from pipeline.artifact import Encoder
from pipeline.errors import UserError
from pipeline.models.latent import ModelConfig
from pipeline.schema import Preprocess
from rllib_ext.networks import NatureConvolutions, QNetwork, q_network
from rllib_ext.settings import QConfig
from rllib_ext.stacking import RollingStack

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "q.safetensors"
PREPROCESS_FILE = "preprocess.json"
CARD_FILE = "README.md"
ENCODER_FOLDER = "encoder"


@dataclass(frozen=True)
class PolicyConfig:
    """What a policy is, as `config.json` holds it.

    Attributes:
        mode: "frozen", "finetune" or "pixels".
        stack: Latents that the head reads.
        z_shape: Shape of a latent, or (features,) of a torso that reads the stack.
        q: The head, and the torso.
        action_names: One a value of the head.
        encoder: Address, version and sha256 of the encoder the run started from; None in pixels mode.
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
    def from_json(cls, text: str) -> PolicyConfig:
        """Reads what `to_json` wrote.

        Raises:
            UserError: Unknown or missing keys.
        """
        record = json.loads(text)
        wrong = set(record) ^ {field.name for field in dataclasses.fields(cls)}
        wrong |= {
            f"q.{name}" for name in set(record.get("q", ())) - {field.name for field in dataclasses.fields(QConfig)}
        }
        if wrong:
            raise UserError(
                f"the policy's config.json has unknown or missing keys {sorted(wrong)}; it was written by another "
                f"version of latentrl"
            )
        record["q"] = QConfig(**{**record["q"], "hidden": tuple(record["q"]["hidden"])})
        record["action_names"], record["z_shape"] = tuple(record["action_names"]), tuple(record["z_shape"])
        return cls(**record)


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
        encoder_bundle: The encoder the run started from; None in pixels mode.
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
    config = PolicyConfig.from_json((path / CONFIG_FILE).read_text())
    preprocess = Preprocess.from_json((path / PREPROCESS_FILE).read_text())
    encoder = _load_encoder(path, config, preprocess)
    inside = None if config.mode == "frozen" else encoder
    network = q_network(config.q, config.stack, config.z_shape, len(config.action_names), inside)
    network.load_state_dict(load_file(path / WEIGHTS_FILE))
    policy = Policy(config, preprocess, network, encoder)
    policy.bundle_path, policy.sha256 = path, sha256
    return policy


def _load_encoder(path: Path, config: PolicyConfig, preprocess: Preprocess) -> Encoder | NatureConvolutions:
    if config.encoder is not None:
        expected = config.encoder["sha256"]
        return artifact.load_encoder(path / ENCODER_FOLDER, expect_sha256=expected, preprocess=preprocess)
    if config.encoder_config is None:
        return NatureConvolutions(config.stack, preprocess.height, preprocess.width)
    built_from: ModelConfig = models.from_record(dict(config.encoder_config))
    return artifact.from_scratch(built_from, preprocess)


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
