"""The mathematics: closed forms against Monte Carlo, bounds against exact likelihoods."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from claims.cells import Cell, Claim, Figures, Judged, Results, Scope, by_seed
from claims.fixed import bars
from claims.training import train
from jobs.recipes import PretrainRecipe
from pipeline.models.distributions import DiagonalGaussian, PixelGaussian, kl_divergence
from pipeline.models.latent import LatentModel, ModelConfig
from pipeline.models.vae import VAESettings
from pipeline.pretrain_config import PretrainConfig

CENTRE, SCALE = 128.0, 30.0  # levels


@dataclass(frozen=True)
class Plan:
    """Sizes.

    Attributes:
        kl_draws: Of each of the posteriors.
        height, width, z_dim: Of the linear model's frames and code.
        num_frames: Drawn from a linear Gaussian world.
        steps, batch_size: Of its training.
        iw_draws: Of the importance-weighted bound.
        elbo_draws: Of the ELBO. Single weights vary far less than the reconstruction alone where the bound is tight.
    """

    kl_draws: int = 400_000
    height: int = 4
    width: int = 6
    z_dim: int = 3
    num_frames: int = 4_000
    steps: int = 2_500
    batch_size: int = 256
    iw_draws: int = 64
    elbo_draws: int = 64


class LinearVAE(LatentModel):
    """x = W z + b + noise of one variance, with a linear encoder: its best ELBO is the likelihood of PPCA."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.encoder = LinearEncoder(config.height * config.width, config.z_dim)
        self.weight = nn.Linear(config.z_dim, config.height * config.width)
        self.logvar = nn.Parameter(torch.tensor(6.0))

    def decode(self, z: Tensor, c: Tensor | None = None) -> PixelGaussian:
        """See LatentModel."""
        levels = self.weight(z) * SCALE + CENTRE
        return PixelGaussian(levels.view(-1, self.config.height, self.config.width), self.logvar)


class LinearEncoder(nn.Module):
    """A posterior whose mean is linear in the pixels and whose variance is the same for all frames."""

    def __init__(self, num_pixels: int, z_dim: int) -> None:
        super().__init__()
        self.mean = nn.Linear(num_pixels, z_dim)
        self.logvar = nn.Parameter(torch.zeros(z_dim))

    def forward(self, x: Tensor) -> DiagonalGaussian:
        """Of frames (B, H, W) uint8."""
        mean = self.mean((x.float().flatten(1) - CENTRE) / SCALE)
        return DiagonalGaussian(mean, self.logvar.expand_as(mean))


def linear_frames(plan: Plan, seed: int) -> Tensor:
    """(N, H, W) uint8 from a linear Gaussian world: a few directions of different spread, and noise."""
    rng = np.random.default_rng(seed)
    num_pixels = plan.height * plan.width
    basis = np.linalg.qr(rng.normal(size=(num_pixels, plan.z_dim)))[0] * np.linspace(70, 35, plan.z_dim)
    levels = CENTRE + rng.normal(size=(plan.num_frames, plan.z_dim)) @ basis.T
    levels = np.clip(np.floor(levels + 8 * rng.normal(size=levels.shape)), 0, 255)
    return torch.from_numpy(levels.astype(np.uint8)).view(-1, plan.height, plan.width)


def ppca_log_likelihood(values: np.ndarray, z_dim: int) -> float:
    """Maximum of the average log-likelihood, nats, of a covariance's eigenvalues (in falling order).

    References:
        Tipping & Bishop (1999), equations 4 and 8.
    """
    noise = values[z_dim:].mean()
    logdet = np.log(values[:z_dim]).sum() + (len(values) - z_dim) * math.log(noise)
    return float(-0.5 * (len(values) * math.log(2 * math.pi) + logdet + len(values)))


@torch.no_grad()
def weighted_bound(model: LatentModel, x: Tensor, num_draws: int) -> np.ndarray:
    """(B,) the importance-weighted bound, nats, of frames (B, H, W); with one draw it is an ELBO.

    References:
        Burda et al. (2016), arXiv:1509.00519, equation 8.
    """
    q, prior, weights = model.infer(x), model.prior(), []
    for _ in range(num_draws):
        z = q.rsample()
        weights.append(model.decode(z).expected_log_prob(x) + prior.log_prob(z) - q.log_prob(z))
    return (torch.logsumexp(torch.stack(weights).double(), 0) - math.log(num_draws)).numpy()


def _measure(cell: Cell) -> Figures:
    torch.manual_seed(cell.seed)
    return {"kl": _measure_kl, "linear": _measure_linear}[cell.arm](cell.plan, cell.seed)


@torch.no_grad()
def _measure_kl(plan: Plan, seed: int) -> Figures:
    """The largest relative error of the closed form over posteriors near the prior and far from it."""
    errors = []
    for spread in (0.3, 1.0, 3.0):
        q = DiagonalGaussian(spread * torch.randn(8), spread * torch.randn(8) - 1)
        p = DiagonalGaussian(torch.zeros(8), torch.zeros(8))
        many = DiagonalGaussian(q.mean.expand(plan.kl_draws, 8), q.logvar.expand(plan.kl_draws, 8))
        z = many.rsample()
        estimate = float((q.log_prob(z) - p.log_prob(z)).double().mean())
        errors.append(abs(float(kl_divergence(q, p).sum()) / estimate - 1))
    return {"relative_error": max(errors)}


def _measure_linear(plan: Plan, seed: int) -> Figures:
    x = linear_frames(plan, seed)
    levels = x.flatten(1).double().numpy() + 0.5
    covariance = np.cov(levels.T, bias=True) + np.eye(levels.shape[1]) / 12  # of the dequantised pixels
    exact = ppca_log_likelihood(np.linalg.eigvalsh(covariance)[::-1], plan.z_dim)
    model = LinearVAE(ModelConfig(z_dim=plan.z_dim, height=plan.height, width=plan.width))
    config = PretrainConfig(
        epochs=1, frames_per_epoch=plan.steps * plan.batch_size, batch_size=plan.batch_size, lr=0.02, seed=seed
    )
    train(model, x, PretrainRecipe("linear", VAESettings(z_dim=plan.z_dim), config))
    with torch.no_grad():
        elbo = float(np.mean([float(model.elbo(x).value.mean()) for _ in range(20)]))
    one = float(np.mean([weighted_bound(model, x, 1).mean() for _ in range(plan.elbo_draws)]))
    weighted = float(weighted_bound(model, x, plan.iw_draws).mean())
    bounds = {"elbo_nats": elbo, "one_draw_nats": one, "weighted_nats": weighted}
    return {"exact_nats": exact, **bounds, "gap_nats": exact - elbo}


def _cells(scope: Scope) -> list[Cell]:
    plan = Plan(kl_draws=100_000, num_frames=1_000, steps=600, iw_draws=8, elbo_draws=8) if scope.is_short else Plan()
    seeds = bars.SEEDS[:1] if scope.is_short else bars.SEEDS
    return [Cell("bounds", arm, seed, plan) for arm in ("kl", "linear") for seed in seeds]


def _judge(results: Results) -> list[Judged]:
    error, gap = by_seed(results, "kl", "relative_error"), by_seed(results, "linear", "gap_nats")
    rise = by_seed(results, "linear", "weighted_nats") - by_seed(results, "linear", "one_draw_nats")
    over = by_seed(results, "linear", "weighted_nats") - by_seed(results, "linear", "exact_nats")
    judged = []
    if len(error):
        most = f"≤ {bars.KL_RELATIVE_ERROR_MOST:.0%}"
        met = bool(error.max() <= bars.KL_RELATIVE_ERROR_MOST)
        judged.append(Judged("closed-form KL against Monte Carlo, worst", f"{error.max():.2%} off", most, met))
    if len(gap):
        most = f"≤ {bars.PPCA_GAP_MOST_NATS} nat"
        met = bool(np.abs(gap).max() <= bars.PPCA_GAP_MOST_NATS)
        judged.append(Judged("linear VAE below exact probabilistic PCA, worst", f"{gap.max():.3f} nat", most, met))
        found = f"by {rise.min():.4f} to {rise.max():.4f} nat"
        judged.append(Judged("importance-weighted bound above the ELBO", found, "≥ 0", bool((rise >= 0).all())))
        judged.append(Judged("and over the exact likelihood by, at most", f"{over.max():.4f} nat"))
    return judged


CLAIM = Claim(
    "Bounds",
    "A linear Gaussian world, where the likelihood is known exactly (Tipping & Bishop 1999).",
    _cells,
    _measure,
    _judge,
)
