"""Held-out bits per dimension on Pong: fitted variance, fixed variance, and the density of PCA."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from claims.cells import Cell, Claim, Figures, Judged, Results, Scope, by_seed, paired, t_interval
from claims.fixed import bars
from claims.play import random_frames
from claims.training import fix_variance, initialised, mean_bound, train
from jobs.recipes import PretrainRecipe
from pipeline.models.distributions import DEQUANTISATION_MEAN, DEQUANTISATION_VARIANCE, LOG_2PI, bits_per_dim
from pipeline.models.vae import VAE, VAESettings
from pipeline.pretrain_config import PretrainConfig

SEEDS = bars.SEEDS[:3]
HELD_OUT_SEED = 1_000  # of the held-out games: this and the cell's seed
UNIT_STD = 255.0  # levels: variance 1 where pixels are on [0, 1]


@dataclass(frozen=True)
class Plan:
    """How a density of Pong's frames is fitted and scored.

    Attributes:
        recipe: Model and training; the seed is the cell's. PCA has its number of latent dimensions.
        game: Which one, at random play, 84 x 84.
        num_frames, num_held_out: Frames of games with different seeds.
    """

    recipe: PretrainRecipe
    game: str = "pong"
    num_frames: int = 16_384
    num_held_out: int = 4_096


RECIPE = PretrainRecipe(
    "pong",
    VAESettings(z_dim=32, patch=6, widths=(32, 64), variance="global"),
    PretrainConfig(epochs=1, frames_per_epoch=64 * 3_000, precision="auto"),
)


@dataclass(frozen=True)
class PrincipalDensity:
    """Probabilistic PCA of dequantised pixels (Tipping & Bishop 1999).

    Attributes:
        mean: (P,) levels.
        basis: (P, Z) orthonormal.
        spread: (Z,) variances along the basis, the noise in them.
        noise: Variance in all other directions.
    """

    mean: Tensor
    basis: Tensor
    spread: Tensor
    noise: float

    @classmethod
    def fit(cls, frames: Tensor, z_dim: int) -> PrincipalDensity:
        """The maximum-likelihood density of frames (N, H, W) uint8."""
        levels = frames.flatten(1).float()
        mean = levels.mean(0)
        centred = levels - mean
        num_pixels = levels.shape[1]
        total = float(centred.double().square().sum()) / len(frames) + num_pixels * DEQUANTISATION_VARIANCE
        torch.manual_seed(0)
        _, singular, basis = torch.svd_lowrank(centred, z_dim + 16, niter=6)
        spread = singular[:z_dim].double().square() / len(frames) + DEQUANTISATION_VARIANCE
        noise = (total - float(spread.sum())) / (num_pixels - z_dim)
        return cls(mean + DEQUANTISATION_MEAN, basis[:, :z_dim], spread.float(), noise)

    def expected_log_prob(self, frames: Tensor) -> Tensor:
        """(N,) nats, the expectation over the dequantisation noise, as PixelGaussian has it."""
        centred = frames.flatten(1).float() + DEQUANTISATION_MEAN - self.mean
        codes = centred @ self.basis
        num_pixels, z_dim = self.basis.shape
        rest = centred.square().sum(1) - codes.square().sum(1)
        rest = (rest + (num_pixels - z_dim) * DEQUANTISATION_VARIANCE) / self.noise
        along = ((codes.square() + DEQUANTISATION_VARIANCE) / self.spread).sum(1)
        logdet = float(self.spread.double().log().sum()) + (num_pixels - z_dim) * math.log(self.noise)
        return -0.5 * (along + rest + logdet + num_pixels * LOG_2PI)


def _measure(cell: Cell) -> Figures:
    plan: Plan = cell.plan
    torch.manual_seed(cell.seed)
    frames = torch.from_numpy(random_frames(plan.game, plan.num_frames, cell.seed))
    held_out = torch.from_numpy(random_frames(plan.game, plan.num_held_out, HELD_OUT_SEED + cell.seed))
    height, width = frames.shape[1:]
    principal = PrincipalDensity.fit(frames, plan.recipe.model.z_dim)
    if cell.arm == "pca":
        nats = float(principal.expected_log_prob(held_out).double().mean())
        return {"bits_per_dim": bits_per_dim(nats, height * width), "std": math.sqrt(principal.noise)}
    model = initialised(VAE(plan.recipe.model.for_frames(height, width)), frames, cell.seed)
    if cell.arm != "fitted":
        fix_variance(model, math.sqrt(principal.noise) if cell.arm == "fixed" else UNIT_STD)
    trained = train(model, frames, replace(plan.recipe, train=replace(plan.recipe.train, seed=cell.seed)))
    with torch.no_grad():
        variance = float(model.decode(torch.zeros(1, plan.recipe.model.z_dim)).variance.mean())
        mse = np.mean([float((model.reconstruct(b).mean - b - 0.5).square().mean()) for b in held_out.split(256)])
    return {
        "bits_per_dim": bits_per_dim(mean_bound(model, held_out), height * width),
        "std": math.sqrt(variance),
        "rms_error": math.sqrt(float(mse)),
        "bounds": trained.bounds,
        "training_s": trained.seconds,
    }


ARMS = ("fitted", "fixed", "unit", "pca")


def _cells(scope: Scope) -> list[Cell]:
    if scope.is_short:
        tiny = replace(RECIPE, train=replace(RECIPE.train, frames_per_epoch=64 * 5))
        plan = Plan(replace(tiny, model=replace(tiny.model, z_dim=4)), num_frames=300, num_held_out=100)
        return [Cell("bits", arm, SEEDS[0], plan) for arm in ARMS]
    return [Cell("bits", arm, seed, Plan(RECIPE)) for seed in SEEDS for arm in ARMS]


def _judge(results: Results) -> list[Judged]:
    judged = []
    for what, arm, other in (
        ("fitted variance below fixed variance", "fitted", "fixed"),
        ("fitted variance below PCA's density", "fitted", "pca"),
        ("fixed variance below PCA's density", "fixed", "pca"),
    ):
        difference = -paired(results, arm, other, "bits_per_dim")
        if len(difference):
            low, high = t_interval(difference)
            found = f"by {difference.mean():.3f} [{low:.3f}, {high:.3f}] bits/dim"
            judged.append(Judged(what, found, "> 0", bool((difference > 0).all())))
    for arm, what in _ROWS.items():
        if arm in results:
            bits, std = by_seed(results, arm, "bits_per_dim"), by_seed(results, arm, "std")
            judged.append(Judged(what, f"{bits.mean():.3f} bits/dim, standard deviation {std.mean():.2f} levels"))
    return judged


_ROWS = {
    "fitted": "VAE, one variance fitted",
    "fixed": "VAE, the variance fixed at what PCA leaves",
    "unit": "VAE, the variance fixed at 1 on [0, 1] (the squared-error VAE)",
    "pca": "probabilistic PCA of the same dimension",
}
CLAIM = Claim(
    "Bits per dimension on held-out Atari frames",
    "Pong at random play, 84 x 84; densities of dequantised pixels; the VAE's are bounds, PCA's is exact.",
    _cells,
    _measure,
    _judge,
)
