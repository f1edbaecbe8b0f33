"""An encoder bundle on disk: what pretraining leaves behind and everything else starts from. No pickle anywhere.

    config.json        class and sizes of the model
    model.safetensors  all its weights, decoder included
    preprocess.json    how its frames were made
    stats.json         mean and scale of every latent dimension, its KL, and whether it is active
    data.json          what it learned from (pipeline.origin); not in bundles of earlier versions
    README.md          model card
    SHA256SUMS         one line a file; its own sha256 names the bundle

Shapes: B batch, Z latent dimensions, H height, W width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline import bundle, models
from pipeline.bundle import pack, unpack
from pipeline.errors import UserError, reading
from pipeline.models.latent import ACTIVE_VARIANCE, LatentModel, ModelConfig, ModelSettings
from pipeline.origin import DATA_FILE, Origin
from pipeline.schema import Preprocess
from pipeline.untrusted import from_record, read_json
from pipeline.weights import load_weights

__all__ = [
    "Encoder",
    "LatentStats",
    "from_scratch",
    "load_encoder",
    "load_model",
    "load_preprocess",
    "load_stats",
    "pack",
    "save_encoder",
    "unpack",
    "weights_sha256",
]

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
PREPROCESS_FILE = "preprocess.json"
STATS_FILE = "stats.json"
CARD_FILE = "README.md"

MIN_SCALE = ACTIVE_VARIANCE**0.5
ENCODE_BATCH = 256
MOST_PARAMETERS = 2**29


@dataclass(frozen=True)
class LatentStats:
    """What the latents of the training split look like, per dimension; Z numbers each.

    Attributes:
        mean: Mean of the posterior means.
        scale: Their standard deviation, at least 0.1: a dimension below that is inactive (its variance is under 0.01),
            and dividing by its true spread would blow its noise up to the size of the signal. On a grid, mean and
            scale are a channel's over all cells, so that the same content is the same number in every cell.
        active: Whether the variance of the posterior mean exceeds 0.01 (Burda et al. 2016, arXiv:1509.00519).
        kl: KL of the posterior to the prior, nats, averaged over frames.
    """

    mean: tuple[float, ...]
    scale: tuple[float, ...]
    active: tuple[bool, ...]
    kl: tuple[float, ...]

    @classmethod
    def from_moments(
        cls, mean_Z: Tensor, variance_Z: Tensor, kl_Z: Tensor, z_shape: tuple[int, ...] | None = None
    ) -> LatentStats:
        """From mean and variance of the posterior means and the average KL, each (Z,).

        Args:
            mean_Z: (Z,).
            variance_Z: (Z,).
            kl_Z: (Z,), nats.
            z_shape: How the latents lie: (Z,) if None, or (channels, height, width).
        """
        mean_CM, variance_CM = (
            moment.view(*(z_shape or mean_Z.shape), 1).flatten(1) for moment in (mean_Z, variance_Z)
        )
        mean_C1 = mean_CM.mean(1, keepdim=True)
        scale_C1 = (variance_CM + (mean_CM - mean_C1).square()).mean(1, keepdim=True).sqrt().clamp(min=MIN_SCALE)
        mean, scale = (moment.expand_as(mean_CM).flatten() for moment in (mean_C1, scale_C1))
        active = variance_Z > ACTIVE_VARIANCE
        return cls(tuple(mean.tolist()), tuple(scale.tolist()), tuple(active.tolist()), tuple(kl_Z.tolist()))

    @classmethod
    def identity(cls, z_dim: int) -> LatentStats:
        """Stats that leave latents as they are."""
        return cls((0.0,) * z_dim, (1.0,) * z_dim, (True,) * z_dim, (0.0,) * z_dim)

    @property
    def num_active(self) -> int:
        """Number of active dimensions."""
        return sum(self.active)

    def to_json(self) -> str:
        """JSON object of four lists."""
        return json.dumps(vars(self))

    @classmethod
    def from_record(cls, record: Mapping[str, Any], what: str) -> LatentStats:
        """Reads what `to_json` wrote; `what` names it for the message.

        Raises:
            UserError: Not four lists of one length, or a scale that is not above 0.
        """
        stats = from_record(cls, record, what)
        if len({len(values) for values in vars(stats).values()}) != 1 or not all(scale > 0 for scale in stats.scale):
            raise UserError(f"{what} does not hold four lists of one length with scales above 0")
        return stats


class Encoder(nn.Module):
    """Frames to standardised latents: (posterior mean - mean) / scale.

    Attributes:
        z_dim: Number of latent dimensions.
        z_shape: How they lie: (Z,), or (channels, height, width) of a grid over the frame.
        config: What the model was built from.
        stats: Statistics that standardise.
        preprocess: How its frames must be made.
        sha256: Of the bundle it came from; "" when made from scratch.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, model: LatentModel, stats: LatentStats, preprocess: Preprocess, sha256: str = "") -> None:
        """Takes the encoder network out of a model; the decoder is not kept."""
        super().__init__()
        self.net = model.encoder
        self.config = model.config
        self.z_dim = model.config.z_dim
        self.z_shape = model.config.latent_shape
        self.stats = stats
        self.preprocess = preprocess
        self.sha256 = sha256
        self.register_buffer("mean", torch.tensor(stats.mean))
        self.register_buffer("scale", torch.tensor(stats.scale))

    def forward(self, frames: Tensor) -> Tensor:
        """Standardised latents (B, Z) float32 of frames (B, H, W) uint8; differentiable."""
        z: Tensor = (self.net(frames).mean - self.mean) / self.scale
        return z

    @torch.inference_mode()
    def encode(self, frames: Tensor) -> Tensor:
        """As `forward`, for any number of frames (N, H, W), in batches and without gradient."""
        return torch.cat([self(batch) for batch in torch.split(frames, ENCODE_BATCH)])


def weights_sha256(net: nn.Module) -> str:
    """Hash of the names and bytes of all parameters and buffers: equal only if no bit has moved."""
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def from_scratch(settings: ModelSettings, preprocess: Preprocess) -> Encoder:
    """An untrained encoder for these frames, with statistics that change nothing (torch's current random state)."""
    config = settings.for_frames(preprocess.height, preprocess.width)
    return Encoder(models.build(config), LatentStats.identity(config.z_dim), preprocess)


def require_moderate(config: ModelConfig) -> None:
    """For the start of a stage: refuses a model that no machine could train, before memory is taken for it.

    Raises:
        UserError: It has more than 2^29 weights, 2 GiB.
    """
    if (count := models.num_parameters(config)) > MOST_PARAMETERS:
        raise UserError(
            f"a model of these settings has {count:,} weights, {MOST_PARAMETERS:,} at most can be: {config}"
        )


def save_encoder(
    path: str | Path,
    model: LatentModel,
    stats: LatentStats,
    preprocess: Preprocess,
    card: dict[str, Any],
    origin: Origin | None = None,
) -> str:
    """Writes a bundle, all or nothing.

    Args:
        path: The folder to make; must not exist.
        model: The trained model, decoder included.
        stats: Statistics of its latents.
        preprocess: How its frames were made.
        card: Facts for the model card, in order: label to value.
        origin: What it learned from, where it has.

    Returns:
        The bundle's sha256.

    Raises:
        UserError: `path` exists or cannot be written.
    """
    with bundle.writing(Path(path)) as draft:
        (draft / CONFIG_FILE).write_text(json.dumps(models.to_record(model.config), indent=1) + "\n")
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, draft / WEIGHTS_FILE)
        (draft / PREPROCESS_FILE).write_text(preprocess.to_json() + "\n")
        (draft / STATS_FILE).write_text(stats.to_json() + "\n")
        if origin is not None:
            (draft / DATA_FILE).write_text(json.dumps(asdict(origin)) + "\n")
        (draft / CARD_FILE).write_text(_model_card(model.config, stats, preprocess, card))
    return bundle.sha256_of(Path(path))


def load_encoder(
    path: str | Path, *, expect_sha256: str | None = None, preprocess: Preprocess | None = None
) -> Encoder:
    """Verifies a bundle and loads its encoder, in eval mode.

    Args:
        path: The bundle's folder.
        expect_sha256: What the bundle must hash to, if known.
        preprocess: How the frames that it will read are made, if known.

    Raises:
        UserError: Not a bundle, changed bytes (the file is named), another bundle than expected, or frames prepared
            differently (both values shown).
    """
    path = Path(path)
    sha256 = bundle.verify(path, expect_sha256)
    own = load_preprocess(path)
    if preprocess is not None:
        own.require_match(preprocess, mine=f"the encoder {path}", theirs="these frames")
    model, stats = _read_model(path), load_stats(path)
    if (len(stats.mean), model.config.height, model.config.width) != (model.config.z_dim, own.height, own.width):
        raise UserError(f"the files of the encoder bundle {path} do not fit each other; train it again")
    return Encoder(model, stats, own, sha256).eval()


def load_model(path: str | Path) -> LatentModel:
    """Verifies a bundle and loads the whole model, decoder included, in eval mode.

    Raises:
        UserError: As `load_encoder`.
    """
    bundle.verify(Path(path))
    return _read_model(Path(path)).eval()


def load_preprocess(path: str | Path) -> Preprocess:
    """How the frames of a bundle's encoder were made."""
    return Preprocess.from_record(_record(path, PREPROCESS_FILE), f"the {PREPROCESS_FILE} of {path}")


def load_stats(path: str | Path) -> LatentStats:
    """The statistics of a bundle's latents."""
    return LatentStats.from_record(_record(path, STATS_FILE), f"the {STATS_FILE} of {path}")


def load_config(path: str | Path) -> ModelConfig:
    """What a bundle's model was built from."""
    return model_config(_record(path, CONFIG_FILE), f"the {CONFIG_FILE} of {path}")


def model_config(record: Mapping[str, Any], what: str) -> ModelConfig:
    """What `pipeline.models.to_record` was given; `what` names the record for the message.

    Raises:
        UserError: An unknown class, unknown or missing keys, or values that no model can have.
    """
    try:
        config_class, fields = models.known_record(record)
    except ValueError as error:
        raise UserError(f"{what}: {error}; it was written by another version of latentrl") from None
    return from_record(config_class, fields, what)


def _record(path: str | Path, name: str) -> dict[str, Any]:
    return read_json(Path(path) / name, f"the {name} of {path}")


def _read_model(path: Path) -> LatentModel:
    config = load_config(path)
    with reading(f"the encoder bundle {path}", "it does not fit this version of latentrl; train it again"):
        return load_weights(lambda: models.build(config), path / WEIGHTS_FILE)


def _model_card(config: ModelConfig, stats: LatentStats, preprocess: Preprocess, card: dict[str, Any]) -> str:
    facts = {
        "Game": f"{preprocess.game} ({preprocess.protocol})",
        "Frames": f"{preprocess.height}x{preprocess.width} grey, frame skip {preprocess.frame_skip}",
        "Latent dimensions": f"{config.z_dim}, {stats.num_active} active",
        **card,
    }
    rows = "".join(f"| {label} | {value} |\n" for label, value in facts.items())
    return _CARD.format(name=f"{config.model} encoder of {preprocess.game}", rows=rows)


_CARD = """# {name}

| | |
|---|---|
{rows}
Reads single frames, (N, H, W) uint8, and gives standardised posterior means, (N, Z) float32:

```python
from pipeline.artifact import load_encoder
encoder = load_encoder("path/of/this/folder")
z = encoder.encode(frames)
```
"""
