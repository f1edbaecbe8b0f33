"""The encoder that a run of Q-learning has improved on its bound: its bundle, and a new version in the registry."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from jobs.training import Training
from jobs.workspace import BUNDLE_FOLDER
from pipeline import models
from pipeline.artifact import LatentStats, save_encoder
from pipeline.models.distributions import bits_per_dim
from pipeline.models.latent import LatentModel
from pipeline.origin import Origin, load_origin
from pipeline.registry import Resolved, Run, register_encoder
from pipeline.schema import Preprocess
from pipeline.tally import Tally
from rllib_ext.algorithm import LatentDQN

NUM_FRAMES = 8_192  # of the replay, for the statistics
NUM_EXAMPLES = 8
_BATCH = 256
_REGISTRY = "models:/"


def improved_encoder(
    run: Run, algorithm: LatentDQN, plan: Training, preprocess: Preprocess, resolved: Resolved | None
) -> dict[str, Any]:
    """Writes the newest encoder as a bundle into the run's folder and registers it, where the run has trained one.

    It becomes a new version of the registered model that the run started from, or of GAME-encoder. Its bound is of
    frames that it has learned from, so it takes no champion's place.

    Returns:
        `encoder` (the bundle's folder), `encoder_uri` (None while the server is away), `encoder_bits_per_dim` and
        `encoder_active_units`, for the result; nothing where no encoder has learned on its bound.
    """
    learning = algorithm.encoder_learning
    if not learning.has_started or (resolved is not None and not learning.updates):
        return {}
    model = newest_model(algorithm, preprocess)
    frames = algorithm.replay.rows_at("obs", algorithm.replay.draw_rows(NUM_FRAMES))
    stats, bound = measured(model, frames)
    bits = bits_per_dim(bound, preprocess.height * preprocess.width)
    path = run.folder / BUNDLE_FOLDER
    if path.exists():  # of an earlier sitting, with fewer steps
        shutil.rmtree(path)
    origin = load_origin(resolved.path) if resolved else None
    sha256 = save_encoder(path, model, stats, preprocess, encoder_card(run, algorithm, resolved, bits), origin)
    registered = register_encoder(
        run,
        path,
        _name(plan, resolved),
        bits_per_dim=bits,
        active_fraction=stats.num_active / len(stats.active),
        has_heldout=False,
        example_frames=frames[:NUM_EXAMPLES],
        dataset=_dataset(origin),
    )
    return {
        "encoder": str(path),
        "encoder_uri": registered.uri if registered else None,
        "encoder_bundle_sha256": sha256,
        "encoder_bits_per_dim": round(bits, 4),
        "encoder_active_units": stats.num_active,
    }


def newest_model(algorithm: LatentDQN, preprocess: Preprocess) -> LatentModel:
    """The model as the learners have it now, in eval mode."""
    model = models.build(algorithm.config.encoder_config.for_frames(preprocess.height, preprocess.width))
    weights = algorithm.learners.model_weights()
    model.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in weights.items()})
    return model.eval()


def measured(model: LatentModel, frames: NDArray[np.uint8]) -> tuple[LatentStats, float]:
    """Statistics of the latents, and the bound in nats per frame."""
    tally = Tally(model.config.z_dim, torch.device("cpu"))
    for batch in torch.split(torch.from_numpy(frames), _BATCH):
        tally.add(model, batch)
    return tally.stats(model.config), tally.elbo


def encoder_card(run: Run, algorithm: LatentDQN, resolved: Resolved | None, bits: float) -> dict[str, Any]:
    """Facts for the model card of the newest encoder, whose bits per dimension are of frames of the replay."""
    updates = algorithm.encoder_learning.updates
    return {
        "Started from": f"{resolved.uri or resolved.address} ({resolved.sha256})" if resolved else "nothing",
        "Then learned on": f"{updates:,} updates from the replay of {algorithm.agent_steps:,} agent steps",
        "Bits per dimension": f"{bits:.3f} (frames of the replay)",
        "MLflow run": run.run_id,
    }


def _name(plan: Training, resolved: Resolved | None) -> str:
    """Of the registered model: the one that was started from, if it is one."""
    uri = resolved.uri if resolved else None
    return uri.removeprefix(_REGISTRY).split("/")[0] if uri and uri.startswith(_REGISTRY) else f"{plan.game}-encoder"


def _dataset(origin: Origin | None) -> dict[str, Any] | None:
    """What the encoder knew before the run, as a version's tags have it."""
    names = ("digest", "game", "protocol", "frames", "policy", "part")
    return None if origin is None else {name: getattr(origin, name) for name in names}
