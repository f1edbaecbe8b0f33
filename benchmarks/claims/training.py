"""A plain training loop over the project's models, on frames in memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from jobs.recipes import PretrainRecipe
from pipeline.loop import learning_rate
from pipeline.models.distributions import DiagonalGaussian
from pipeline.models.latent import ELBO, LatentModel
from pipeline.models.vae import LOGVAR_RATE, VAE
from pipeline.precision import autocast, resolve_precision

INITIAL_FRAMES = 1_024
EVALUATION_BATCH = 256
PRIOR_START = 0.1  # of the spread that `initialise` gives the posterior means
SHARP_STD, CONTRAST = 0.4, 0.5  # pixels; and per pixel of blur

Model = TypeVar("Model", bound=LatentModel)


class Autoencoder(VAE):
    """The same networks without a bound: codes are points, nothing ties them to the prior."""

    def elbo(self, x: Tensor, c: Tensor | None = None) -> ELBO:
        """The reconstruction alone."""
        code = self.infer(x).mean
        return ELBO(self.decode(code).expected_log_prob(x), torch.zeros_like(code), 0.0)


@dataclass(frozen=True)
class Warmup:
    """How a training begins.

    Attributes:
        kl_until: Part of the training over which the weight of the KL rises from 0 (Bowman et al. 2016,
            arXiv:1511.06349).
        blur: Pixels; frames are blurred by a Gaussian of this standard deviation at first, their contrast restored. A
            small sprite that is anywhere then shows in few principal directions, which are monotone in its place.
        blur_hold, blur_until: Parts of the training: until the first the blur stays, by the second it has gone.
    """

    kl_until: float = 0.0
    blur: float = 0.0
    blur_hold: float = 0.2
    blur_until: float = 0.6

    def kl_share(self, done: float) -> float:
        """Of the recipe's weight of the KL, when a part `done` of the training is over."""
        return min(1.0, done / self.kl_until) if self.kl_until else 1.0

    def blur_std(self, done: float) -> float:
        """Standard deviation, pixels; 0 once the frames are sharp."""
        if not self.blur or done >= self.blur_until:
            return 0.0
        fallen = max(0.0, done - self.blur_hold) / (self.blur_until - self.blur_hold)
        return float(self.blur * (SHARP_STD / self.blur) ** fallen)


def blurred(frames: Tensor, std: float) -> Tensor:
    """Frames (B, H, W) uint8 under a Gaussian blur; where it spreads spots thin they are brightened again."""
    if not std:
        return frames
    down, right = (_gaussian(side, std) for side in frames.shape[1:])
    levels = (down @ frames.float() @ right.T) * max(1.0, CONTRAST * std)
    return levels.round().clamp(0, 255).to(torch.uint8)


def _gaussian(side: int, std: float) -> Tensor:
    place = torch.arange(side, dtype=torch.float32)
    weights = torch.exp(-0.5 * ((place[:, None] - place) / std) ** 2)
    return weights / weights.sum(1).max()


@dataclass(frozen=True)
class Trained:
    """A finished training: seconds, and the bound of each of some hundred steps, nats per frame."""

    seconds: float
    bounds: list[float]


def fix_variance(model: VAE, std: float) -> None:
    """Holds a "global" variance at `std` levels squared, whatever is trained."""
    surplus = 2 * torch.tensor(std).log() - model._min_logvar
    model.raw_logvar.data.fill_(float(torch.log(torch.expm1(surplus)) / LOGVAR_RATE))
    model.raw_logvar.requires_grad_(False)


def num_steps(recipe: PretrainRecipe, num_frames: int) -> int:
    """Updates that a recipe makes on so many frames."""
    return recipe.train.epochs * (recipe.train.frames_per_epoch or num_frames) // recipe.train.batch_size


def train(model: LatentModel, frames: Tensor, recipe: PretrainRecipe, warmup: Warmup = Warmup()) -> Trained:
    """Trains an initialised model on frames (N, H, W) uint8; batches are drawn with replacement, by the seed."""
    config, started = recipe.train, time.perf_counter()
    steps, bounds = num_steps(recipe, len(frames)), []
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, config.lr, fused=True)
    dtype = resolve_precision(config.precision)
    most = config.grad_clip * frames[0].numel()
    for step, batch in enumerate(_batches(frames, steps, config.batch_size, config.seed)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, steps)
        optimizer.zero_grad()
        with autocast("cpu", dtype):
            terms = model(blurred(batch, warmup.blur_std(step / steps)))
        replace(terms, beta=warmup.kl_share(step / steps) * terms.beta).loss().backward()
        if most:
            torch.nn.utils.clip_grad_norm_(parameters, most)
        optimizer.step()
        if step % max(1, steps // 100) == 0:
            bounds.append(round(float(terms.value.detach().mean()), 2))
    return Trained(time.perf_counter() - started, bounds)


def _batches(frames: Tensor, steps: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    rng = np.random.default_rng([seed, 1])
    for _ in range(steps):
        yield frames[torch.from_numpy(rng.integers(0, len(frames), batch_size))]


def initialised(model: Model, frames: Tensor, seed: int) -> Model:
    """The model with what it takes from data before training, of frames drawn by the seed."""
    rng = np.random.default_rng([seed, 2])
    model.initialise(frames[torch.from_numpy(rng.integers(0, len(frames), INITIAL_FRAMES))])
    return model


@torch.no_grad()
def start_at_prior(model: VAE) -> VAE:
    """Posteriors near the prior, so that dimensions come into use one by one, those that tell most first."""
    outputs = model.encoder.head.weight.shape[0] // 2
    assert model.encoder.head.bias is not None
    model.encoder.head.weight[:outputs] *= PRIOR_START
    model.encoder.head.bias[:outputs] *= PRIOR_START
    model.encoder.head.bias[outputs:] = 0
    return model


@torch.no_grad()
def posterior(model: LatentModel, frames: Tensor) -> DiagonalGaussian:
    """q(z | x) of frames (N, H, W), in batches."""
    parts = [model.infer(batch) for batch in torch.split(frames, EVALUATION_BATCH)]
    return DiagonalGaussian(torch.cat([p.mean for p in parts]), torch.cat([p.logvar for p in parts]))


@torch.no_grad()
def decoded(model: LatentModel, z: Tensor) -> np.ndarray:
    """Mean frames (N, H, W) float32 of latents (N, Z), in levels of the undisturbed pixels."""
    return torch.cat([model.decode(batch).mean for batch in torch.split(z, EVALUATION_BATCH)]).numpy() - 0.5


@torch.no_grad()
def mean_bound(model: LatentModel, frames: Tensor) -> float:
    """The ELBO, nats per frame, of frames (N, H, W) with one draw each."""
    sums = [float(model.elbo(batch).value.sum()) for batch in torch.split(frames, EVALUATION_BATCH)]
    return sum(sums) / len(frames)
