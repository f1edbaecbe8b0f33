"""Probabilistic PCA against the algebra that defines it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_frames import toy_preprocess

from jobs.recipes import PRETRAIN_RECIPES
from pipeline import models
from pipeline.artifact import LatentStats, load_encoder, load_model, save_encoder
from pipeline.models.pca import PCA, PCASettings

HEIGHT, WIDTH, PIXELS = 3, 4, 12


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def sample(seed: int, count: int, factors: int) -> torch.Tensor:
    """Frames (N, 3, 4) uint8 that a few factors move."""
    rng = np.random.default_rng(seed)
    levels = 120 + rng.normal(size=(count, factors)) @ rng.normal(size=(factors, PIXELS)) * 20
    levels += rng.normal(size=(count, PIXELS)) * 3
    return torch.from_numpy(levels.clip(0, 255).astype(np.uint8)).view(count, HEIGHT, WIDTH)


def fitted(frames: torch.Tensor, z_dim: int) -> PCA:
    model = models.build(PCASettings(z_dim=z_dim).for_frames(HEIGHT, WIDTH))
    model.initialise(frames)
    return model.eval()


def marginal(model: PCA) -> np.ndarray:
    """W W' + noise I."""
    components = model.components.detach().double().numpy()
    return components @ components.T + math.exp(model.logvar.item()) * np.eye(len(components))


def log_likelihood(frames: torch.Tensor, mean: np.ndarray, covariance: np.ndarray) -> float:
    """Average over frames and over the dequantisation noise, nats."""
    y = frames.flatten(1).double().numpy() + 0.5 - mean
    scatter = y.T @ y / len(y) + np.eye(PIXELS) / 12
    _, logdet = np.linalg.slogdet(covariance)
    return -0.5 * (PIXELS * math.log(2 * math.pi) + logdet + np.trace(np.linalg.solve(covariance, scatter)))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), z_dim=st.integers(1, PIXELS), factors=st.integers(0, 4), count=st.integers(2, 60))
def test_its_posterior_is_that_of_its_own_prior_and_likelihood(seed, z_dim, factors, count):
    frames = sample(seed, count, factors)
    model = fitted(frames, z_dim)
    components, noise = model.components.detach().double().numpy(), math.exp(model.logvar.item())
    precision = components.T @ components / noise + np.eye(z_dim)
    y = frames.flatten(1).double().numpy() + 0.5 - model.mean_frame.detach().double().numpy()
    posterior = model.infer(frames)
    np.testing.assert_allclose(
        posterior.mean.detach(), np.linalg.solve(precision, components.T @ y.T / noise).T, atol=2e-3
    )
    spread = np.linalg.inv(precision)
    np.testing.assert_allclose(np.diag(spread), posterior.logvar[0].detach().exp(), atol=1e-4)
    assert np.abs(spread - np.diag(np.diag(spread))).max() < 1e-4


def test_nothing_near_it_is_more_likely():
    """It is the maximum of the likelihood, whose value follows from the eigenvalues of the covariance alone."""
    frames = sample(1, 400, 5)
    model = fitted(frames, 3)
    mean, best = model.mean_frame.detach().double().numpy(), marginal(model)
    reached = log_likelihood(frames, mean, best)
    values = np.linalg.eigvalsh(np.cov(frames.flatten(1).T.numpy(), bias=True) + np.eye(PIXELS) / 12)[::-1]
    noise = values[3:].mean()
    logdet = np.log(values[:3]).sum() + (PIXELS - 3) * math.log(noise)
    assert reached == pytest.approx(-0.5 * (PIXELS * (math.log(2 * math.pi) + 1) + logdet), abs=1e-3)
    rng, components = np.random.default_rng(0), model.components.detach().double().numpy()
    for _ in range(50):
        other = components + rng.normal(size=components.shape) * 0.5
        covariance = other @ other.T + math.exp(model.logvar.item() + rng.normal() * 0.1) * np.eye(PIXELS)
        assert log_likelihood(frames, mean + rng.normal(size=PIXELS) * 0.1, covariance) < reached


def test_its_bound_is_its_likelihood_but_for_what_the_posterior_does_not_see_of_the_noise():
    """The posterior is that of the middle of a level: the bound is exact there, and each pixel pays 1/24 over noise."""
    frames = sample(2, 50, 4)
    model = fitted(frames, 3)
    with torch.no_grad():
        bound = np.mean([model.elbo(frames).value.numpy() for _ in range(2_000)], axis=0)
    y = frames.flatten(1).double().numpy() + 0.5 - model.mean_frame.detach().double().numpy()
    covariance = marginal(model)
    _, logdet = np.linalg.slogdet(covariance)
    quadratic = (y * np.linalg.solve(covariance, y.T).T).sum(1)
    exact = -0.5 * (PIXELS * math.log(2 * math.pi) + logdet + quadratic)
    np.testing.assert_allclose(bound, exact - PIXELS / 24 / math.exp(model.logvar.item()), atol=0.15)


def test_latents_without_variance_stay_at_zero():
    """Of frames that two factors move there are two components; the others say nothing instead of rounding errors."""
    rng = np.random.default_rng(0)
    moved = rng.integers(0, 2, (200, 2)) * 50
    frames = torch.zeros(200, PIXELS, dtype=torch.uint8)
    frames[:, :2] = torch.from_numpy(moved.astype(np.uint8))
    model = fitted(frames.view(-1, HEIGHT, WIDTH), 5)
    variance = model.features(frames.view(-1, HEIGHT, WIDTH)).var(0)
    assert (variance[:2] > 0.9).all()
    assert (variance[2:] < 1e-3).all()


def test_a_bundle_gives_the_same_latents_again(tmp_path: Path):
    frames, preprocess = sample(3, 100, 4), toy_preprocess(HEIGHT, WIDTH)
    model = fitted(frames, 4)
    save_encoder(tmp_path / "bundle", model, LatentStats.identity(4), preprocess, {})
    encoder = load_encoder(tmp_path / "bundle", preprocess=preprocess)
    torch.testing.assert_close(encoder.encode(frames), model.features(frames), rtol=0, atol=0)
    torch.testing.assert_close(load_model(tmp_path / "bundle").reconstruct(frames).mean, model.reconstruct(frames).mean)


def test_the_recipe_has_as_many_components_as_the_grid_has_latents():
    vae, pca = (PRETRAIN_RECIPES[name].model.for_frames(84, 84) for name in ("vae", "pca"))
    assert pca.z_dim == vae.z_dim


@pytest.mark.parametrize(("z_dim", "size"), [(0, (3, 4)), (13, (3, 4)), (4, (0, 4)), (4, (3, 4096))])
def test_what_cannot_be_built_is_refused(z_dim, size):
    with pytest.raises(ValueError, match=r"z_dim|frames of"):
        PCASettings(z_dim=z_dim).for_frames(*size)
