"""Samples from the prior are valid images: the sprite world, a VAE and a plain autoencoder of the same networks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from claims.cells import Cell, Claim, Figures, Judged, Results, Scope, by_seed, paired
from claims.fixed import bars, sprites
from claims.training import Autoencoder, Warmup, decoded, initialised, mean_bound, posterior, train
from jobs.recipes import PretrainRecipe
from pipeline.models.distributions import bits_per_dim
from pipeline.models.vae import VAE, VAESettings
from pipeline.pretrain_config import PretrainConfig

HELD_OUT_SEED = 1_000  # of the held-out scenes: this and the cell's seed
WARMUP = Warmup(kl_until=0.6, blur=16.0, blur_hold=0.15, blur_until=0.6)


@dataclass(frozen=True)
class Plan:
    """How a world's model is trained and looked at.

    Attributes:
        recipe: Model and training; the seed is the cell's.
        warmup: How it begins.
        num_frames: Scenes to train on.
        num_held_out: Scenes for the aggregate posterior and for reconstructions.
        num_samples: From the prior.
    """

    recipe: PretrainRecipe
    warmup: Warmup = WARMUP
    num_frames: int = 40_000
    num_held_out: int = 4_000
    num_samples: int = bars.NUM_PRIOR_SAMPLES


RECIPE = PretrainRecipe(
    "sprites",
    VAESettings(z_dim=4, patch=8, widths=(64,), min_std=64.0),
    PretrainConfig(epochs=1, batch_size=32, frames_per_epoch=32 * 20_000, lr=2e-3, precision="auto"),
)


def _measure(cell: Cell) -> Figures:
    plan: Plan = cell.plan
    torch.manual_seed(cell.seed)
    frames = torch.from_numpy(sprites.render(sprites.draw_scenes(plan.num_frames, cell.seed)))
    held_out = torch.from_numpy(sprites.render(sprites.draw_scenes(plan.num_held_out, HELD_OUT_SEED + cell.seed)))
    recipe = replace(plan.recipe, train=replace(plan.recipe.train, seed=cell.seed))
    build = VAE if cell.arm == "vae" else Autoencoder
    model = initialised(build(recipe.model.for_frames(sprites.SIDE, sprites.SIDE)), frames, cell.seed)
    trained = train(model, frames, recipe, plan.warmup)
    q = posterior(model, held_out)
    z = q.rsample() if cell.arm == "vae" else q.mean
    is_active = q.mean.var(0) >= bars.ACTIVE_VARIANCE_LEAST
    noise = torch.randn(plan.num_samples, recipe.model.z_dim)
    figures = {
        "valid": _share_valid(model, noise),
        "valid_reconstructions": _share_valid(model, q.mean[: plan.num_samples]),
        "active": int(is_active.sum()),
        "aggregate_mean": z.mean(0)[is_active].tolist(),
        "aggregate_std": z.std(0)[is_active].tolist(),
        "training_s": trained.seconds,
    }
    if cell.arm == "vae":
        bits = bits_per_dim(mean_bound(model, held_out), sprites.SIDE**2)
        return {**figures, "bits_per_dim": bits, "bounds": trained.bounds}
    # A kindness: codes drawn with the mean and the spread that they have, each dimension by itself.
    return {**figures, "valid_matched": _share_valid(model, z.mean(0) + z.std(0) * noise)}


def _share_valid(model: VAE, z: torch.Tensor) -> float:
    return float(sprites.check(decoded(model, z)).is_valid.mean())


def _cells(scope: Scope) -> list[Cell]:
    if scope.is_short:
        tiny = replace(RECIPE, train=replace(RECIPE.train, frames_per_epoch=64 * 20))
        plan = Plan(tiny, num_frames=500, num_held_out=100, num_samples=50)
        return [Cell("sprites", arm, bars.SEEDS[0], plan) for arm in ("vae", "autoencoder")]
    return [Cell("sprites", arm, seed, Plan(RECIPE)) for seed in bars.SEEDS for arm in ("vae", "autoencoder")]


def _judge(results: Results) -> list[Judged]:
    valid, plain = by_seed(results, "vae", "valid"), by_seed(results, "autoencoder", "valid")
    judged = []
    if len(valid):
        least = f"≥ {bars.VALID_LEAST:.0%}"
        met = bool(valid.mean() >= bars.VALID_LEAST)
        judged.append(Judged("samples from the prior that are valid", _shares(valid), least, met))
        judged += _judge_aggregate(results)
        judged.append(
            Judged("reconstructions that are valid", _shares(by_seed(results, "vae", "valid_reconstructions")))
        )
    if len(plain):
        difference = paired(results, "vae", "autoencoder", "valid")
        least = f"≥ {100 * bars.VALID_OVER_AUTOENCODER_LEAST:.0f} points"
        if len(difference):
            met = bool(difference.mean() >= bars.VALID_OVER_AUTOENCODER_LEAST)
            found = f"{100 * difference.mean():.1f} points"
            judged.append(Judged("the VAE above a plain autoencoder on the same prior", found, least, met))
        judged.append(Judged("valid samples of the plain autoencoder", _shares(plain)))
        matched = _shares(by_seed(results, "autoencoder", "valid_matched"))
        judged.append(Judged("the same, each dimension given the mean and spread of its codes", matched))
    return judged


def _judge_aggregate(results: Results) -> list[Judged]:
    cells = [figures for _, figures in sorted(results["vae"].items())]
    means = np.abs(np.concatenate([figures["aggregate_mean"] for figures in cells]))
    stds = np.concatenate([figures["aggregate_std"] for figures in cells])
    low, high = bars.AGGREGATE_STD
    active = ", ".join(str(figures["active"]) for figures in cells)
    return [
        Judged(
            "aggregate posterior, |mean| of an active dimension, worst",
            f"{means.max():.3f}",
            f"≤ {bars.AGGREGATE_MEAN_MOST}",
            bool(means.max() <= bars.AGGREGATE_MEAN_MOST),
        ),
        Judged(
            "aggregate posterior, standard deviation of an active dimension",
            f"{stds.min():.3f} to {stds.max():.3f}",
            f"{low} to {high}",
            bool(stds.min() >= low and stds.max() <= high),
        ),
        Judged("active dimensions by seed (the world has 4 numbers)", active),
    ]


def _shares(values: np.ndarray) -> str:
    return f"{values.mean():.1%} ({', '.join(f'{value:.1%}' for value in values)})"


CLAIM = Claim(
    "Samples from the prior are valid images",
    "64 x 64 frames of two walkers, one on each of two floors, and a ball that flies in front of them. A checker seeks "
    "the scene that explains an image best and holds the image to its drawing.",
    _cells,
    _measure,
    _judge,
)
