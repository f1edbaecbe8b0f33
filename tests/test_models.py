"""Models by property: closed forms and Monte Carlo, densities against integrals, a bound against its exact value."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from toy_frames import toy_frames

from pipeline import models
from pipeline.artifact import model_config
from pipeline.errors import UserError
from pipeline.models.distributions import DiagonalGaussian, PixelGaussian, bits_per_dim, kl_divergence
from pipeline.models.latent import LatentModel, ModelConfig
from pipeline.models.nets import Body, ConvEncoder, Cross, padded_size, profiles
from pipeline.models.vae import VAE, VARIANCES, VAESettings


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def tiny(variance="pixel_map", height=12, width=10, **settings) -> VAE:
    fields = {"z_dim": 5, "patch": 2, "widths": (8, 8), "variance": variance, **settings}
    return models.build(VAESettings(**fields).for_frames(height, width))


def test_kl_agrees_with_monte_carlo():
    q = DiagonalGaussian(torch.randn(3, 4), torch.randn(3, 4))
    p = DiagonalGaussian(torch.randn(4), torch.randn(4))
    many = DiagonalGaussian(q.mean.expand(200_000, 3, 4), q.logvar.expand(200_000, 3, 4))
    z = many.rsample()
    estimate = (q.log_prob(z) - p.log_prob(z)).mean(0)
    torch.testing.assert_close(kl_divergence(q, p).sum(-1), estimate, rtol=0.02, atol=0.02)


def test_kl_to_itself_is_zero():
    q = DiagonalGaussian(torch.randn(3, 4), torch.randn(3, 4))
    assert kl_divergence(q, q).abs().max() < 1e-6


def test_pixel_density_integrates_to_one():
    y = torch.arange(-2000, 2256, 0.05)
    for std in (0.289, 3.0, 80.0):
        pixel = PixelGaussian(torch.tensor([[[100.3]]]), torch.tensor(2 * math.log(std)))
        density = pixel.log_prob(y[:, None, None]).exp()
        assert abs(float(density.sum()) * 0.05 - 1) < 1e-3


def test_expected_likelihood_agrees_with_drawn_dequantisation_noise():
    x = torch.randint(0, 256, (2, 3, 4), dtype=torch.uint8)
    likelihood = PixelGaussian(torch.rand(2, 3, 4) * 256, torch.rand(2, 3, 4) * 6)
    draws = torch.stack([likelihood.log_prob(x + torch.rand(x.shape)) for _ in range(20_000)])
    torch.testing.assert_close(likelihood.expected_log_prob(x), draws.mean(0), rtol=2e-3, atol=0.05)


def test_expected_likelihood_is_below_the_probability_of_the_discrete_level():
    """Jensen: the average log density over a level's cell cannot exceed the log of the cell's mass."""
    normal = torch.distributions.Normal(100.0, 5.0)
    pixel = PixelGaussian(torch.tensor([[[100.0]]]), torch.tensor(2 * math.log(5.0)))
    for level in (80, 99, 100, 120):
        mass = normal.cdf(torch.tensor(level + 1.0)) - normal.cdf(torch.tensor(float(level)))
        bound = pixel.expected_log_prob(torch.tensor([[[level]]], dtype=torch.uint8))
        assert float(bound) <= float(mass.log()) + 1e-4


def test_bits_per_dim_of_uniform_noise_cannot_beat_eight():
    assert bits_per_dim(-math.log(256) * 7056, 7056) == pytest.approx(8.0)


class LinearVAE(LatentModel):
    """x = W z + b + noise with a linear encoder: its best ELBO is the likelihood of probabilistic PCA."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        pixels = config.height * config.width
        self.encoder = LinearEncoder(pixels, config.z_dim)
        self.weight = nn.Linear(config.z_dim, pixels)
        self.logvar = nn.Parameter(torch.tensor(6.0))

    def decode(self, z: Tensor, c: Tensor | None = None) -> PixelGaussian:
        return PixelGaussian((self.weight(z) * 30 + 128).view(-1, self.config.height, self.config.width), self.logvar)


class LinearEncoder(nn.Module):
    def __init__(self, pixels: int, z_dim: int) -> None:
        super().__init__()
        self.mean = nn.Linear(pixels, z_dim)
        self.logvar = nn.Parameter(torch.zeros(z_dim))

    def forward(self, x: Tensor) -> DiagonalGaussian:
        mean = self.mean((x.float().flatten(1) - 128) / 30)
        return DiagonalGaussian(mean, self.logvar.expand_as(mean))


def test_a_linear_vae_reaches_the_likelihood_of_probabilistic_pca():
    """Tipping & Bishop (1999): the exact maximum likelihood, from the eigenvalues of the covariance."""
    rng = np.random.default_rng(0)
    height, width, z_dim, count = 3, 4, 2, 4000
    basis = np.linalg.qr(rng.normal(size=(12, z_dim)))[0] * [70, 40]
    levels = 128 + rng.normal(size=(count, z_dim)) @ basis.T + rng.normal(size=(count, 12)) * 8
    x = torch.from_numpy(np.clip(np.floor(levels), 0, 255).astype(np.uint8)).view(count, height, width)
    exact = ppca_log_likelihood(x.numpy().reshape(count, -1) + 0.5, z_dim)
    model = LinearVAE(ModelConfig(z_dim=z_dim, height=height, width=width))
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for step in range(1500):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * min(1.0, 2 * (1 - step / 1500))
        optimizer.zero_grad()
        model.elbo(x[torch.randint(0, count, (512,))]).loss().backward()
        optimizer.step()
    with torch.no_grad():
        reached = np.mean([float(model.elbo(x).value.mean()) for _ in range(20)])
    assert exact - 0.1 < reached < exact + 0.02


def ppca_log_likelihood(y: np.ndarray, z_dim: int) -> float:
    """Maximum average log-likelihood of dequantised rows, whose covariance has 1/12 added for the noise."""
    dims = y.shape[1]
    values = np.linalg.eigvalsh(np.cov(y.T, bias=True) + np.eye(dims) / 12)[::-1]
    noise = values[z_dim:].mean()
    logdet = np.log(values[:z_dim]).sum() + (dims - z_dim) * math.log(noise)
    return -0.5 * (dims * math.log(2 * math.pi) + logdet + dims)


@pytest.mark.parametrize("size", [(84, 84), (210, 160), (37, 51), (5, 3)])
@pytest.mark.parametrize("variance", VARIANCES)
def test_any_size_of_frame_goes_in_and_comes_out(size, variance):
    model = tiny(variance, *size, patch=6)
    x = torch.randint(0, 256, (2, *size), dtype=torch.uint8)
    terms = model(x)
    terms.loss().backward()
    assert model.decode(model.infer(x).mean).mean.shape == (2, *size)
    assert terms.value.shape == (2,)
    assert terms.kl.shape == (2, 5)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("variance", VARIANCES)
def test_standard_deviation_stays_above_its_floor(variance):
    model = tiny(variance, min_std=2.0)
    model.raw_logvar.data.fill_(-50.0)
    assert float(model.decode(torch.randn(3, 5)).variance.min().detach()) >= 4.0 - 1e-4


@given(
    height=st.integers(1, 30),
    width=st.integers(1, 30),
    patch=st.integers(1, 7),
    num_widths=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_the_stem_is_a_projection_of_centred_patches_of_padded_frames(height, width, patch, num_widths, seed):
    torch.manual_seed(seed)
    encoder = ConvEncoder(Body(height, width, 3, patch, (4,) * num_widths, 0, 0, is_axial=False))
    encoder.mean_frame.uniform_(0, 255)
    frames = torch.randint(0, 256, (2, height, width), dtype=torch.uint8)
    kept = frames.clone()
    padded_height, padded_width = padded_size(height, width, patch, num_widths - 1)
    centred = torch.zeros(2, 1, padded_height, padded_width)
    centred[:, 0, :height, :width] = (frames - encoder.mean_frame) / 256
    weight = encoder.stem.weight[:, :, None, None]
    expected = F.conv2d(F.pixel_unshuffle(centred, patch), weight, encoder.stem.bias)
    torch.testing.assert_close(encoder._embed(frames), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(frames, kept)


def test_initialisation_puts_mean_and_variance_where_the_data_are():
    frames = torch.from_numpy(toy_frames(500, 12, 10))
    model = tiny("pixel")
    before = float(model(frames).value.mean().detach())
    model.initialise(frames)
    likelihood = model.decode(torch.zeros(1, 5))
    torch.testing.assert_close(likelihood.mean[0], frames.float().mean(0) + 0.5)
    torch.testing.assert_close(likelihood.variance.mean(), frames.float().var(0).mean(), rtol=0.01, atol=0)
    torch.testing.assert_close(model.features(frames).var(0), torch.ones(5), rtol=0.01, atol=0)
    assert float(model(frames).value.mean().detach()) > before + 50


def test_profiles_tell_rows_whatever_the_columns_and_columns_whatever_the_rows():
    cells = torch.randn(2, 3, 4, 6)
    rows, columns = profiles(cells).split([12, 18], 1)
    shuffled_across, shuffled_down = cells[..., torch.randperm(6)], cells[:, :, torch.randperm(4)]
    torch.testing.assert_close(profiles(shuffled_across)[:, :12], rows)
    torch.testing.assert_close(profiles(shuffled_down)[:, 12:], columns)
    torch.testing.assert_close(profiles(cells)[:, :12].view(2, 3, 4), cells.sum(3) / 6**0.5)


def test_a_cross_is_what_profiles_read():
    entries = torch.randn(2, 3 * (4 + 6))
    cells = Cross(3, (4, 6))(entries)
    rows, columns = entries[:, :12].view(2, 3, 4), entries[:, 12:].view(2, 3, 6)
    for i, j in ((0, 0), (3, 5), (2, 1)):
        torch.testing.assert_close(cells[..., i, j], rows[..., i] + columns[..., j])


@pytest.mark.parametrize("layout", [{"is_axial": True}, {"latent_channels": 2}, {}])
def test_every_layout_starts_with_standardised_means_and_reads_what_moves(layout):
    frames = torch.from_numpy(toy_frames(300, 12, 10))
    model = tiny("global", z_dim=6, **layout)
    model.initialise(frames)
    means = model.features(frames).view(300, 2 if "latent_channels" in layout else 6, -1)
    torch.testing.assert_close(means.var((0, 2), unbiased=False), torch.ones(means.shape[1]), rtol=0.01, atol=0)
    torch.testing.assert_close(means.mean((0, 2)), torch.zeros(means.shape[1]), rtol=0, atol=1e-4)


def test_a_head_on_profiles_starts_with_what_random_projections_would_drown():
    """A dim pixel beside bright noise is read off means that are blurred a little."""
    noise = np.random.default_rng(0).integers(0, 256, (600, 2), dtype=np.uint8)
    frames = torch.zeros(600, 12, 10, dtype=torch.uint8)
    frames[:, 1, 1], frames[:, 7, 6] = torch.from_numpy(noise.T.copy())
    frames[:, 9, 2] = torch.arange(600) % 2 * 8
    model = tiny("global", z_dim=8, is_axial=True)
    model.initialise(frames)
    means = model.features(frames)
    blurred = torch.cat([means + 0.05 * torch.randn_like(means), torch.ones(600, 1)], 1)
    is_lit = (frames[:, 9, 2] > 0).float()
    fitted = blurred @ torch.linalg.lstsq(blurred, is_lit[:, None]).solution
    assert float(((fitted[:, 0] > 0.5) == (is_lit > 0.5)).float().mean()) > 0.95


@pytest.mark.parametrize(("rarity", "seed"), [(0.1, 0), (0.5, 1), (1.0, 2)])
def test_rarity_weighs_errors_in_training_and_never_the_bound(rarity, seed):
    frames = torch.from_numpy(toy_frames(64, 12, 10))
    models_of = [tiny("global", rarity=value) for value in (0.0, rarity)]
    terms = []
    for model in models_of:
        torch.manual_seed(seed)
        model.load_state_dict(models_of[0].state_dict(), strict=False)
        model.initialise(frames)
        terms += [model.train()(frames)]
    plain, weighed = terms
    torch.testing.assert_close(weighed.value, plain.value, rtol=1e-4, atol=0)
    mean, variance = frames.float().mean(0), frames.float().var(0, unbiased=False).clamp(min=1)
    weights = (1 + (frames.float() - mean) ** 2 / variance) ** rarity
    torch.manual_seed(seed)
    likelihood = models_of[1].decode(models_of[1].infer(frames).rsample())
    errors = (frames.float() + 0.5 - likelihood.mean) ** 2 + 1 / 12
    expected = plain.loss() + (0.5 * (weights - 1) * errors / likelihood.variance).sum((1, 2)).mean()
    torch.testing.assert_close(weighed.loss(), expected, rtol=1e-4, atol=0)
    assert float(models_of[1].eval()(frames).emphasis) == 0.0


def test_beta_changes_the_loss_and_not_the_bound():
    plain, heavy = tiny(), tiny(beta=4.0)
    heavy.load_state_dict(plain.state_dict())
    x = torch.from_numpy(toy_frames(8, 12, 10))
    torch.manual_seed(1)
    one = plain(x)
    torch.manual_seed(1)
    four = heavy(x)
    torch.testing.assert_close(one.value, four.value)
    torch.testing.assert_close(four.loss(), one.loss() + 3 * one.kl.sum(-1).mean())


def test_features_are_the_posterior_mean_without_noise():
    model, x = tiny(), torch.from_numpy(toy_frames(8, 12, 10))
    assert torch.equal(model.features(x), model.features(x))
    assert torch.equal(model.features(x), model.infer(x).mean)


def test_training_finds_what_moves():
    """A square that moves about is worth many nats; a model that sees it beats the best one that does not."""
    frames = torch.from_numpy(toy_frames(600, 12, 10))
    model = tiny("global", z_dim=8, widths=(32, 32))
    model.initialise(frames)
    blind = float(model(frames).value.mean().detach())
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(400):
        optimizer.zero_grad()
        model(frames[torch.randint(0, 600, (64,))]).loss().backward()
        optimizer.step()
    with torch.no_grad():
        assert float(model(frames).value.mean()) > blind + 20
        assert int((model.features(frames).var(0) > 0.01).sum()) >= 2


def test_samples_and_reconstructions_have_the_shape_of_frames():
    model = tiny()
    assert model.sample(3).mean.shape == (3, 12, 10)
    assert model.reconstruct(torch.zeros(2, 12, 10, dtype=torch.uint8)).mean.shape == (2, 12, 10)


def test_configuration_survives_json_and_unknown_keys_do_not():
    config = VAESettings(z_dim=7, widths=(4, 8, 16)).for_frames(21, 16)
    record = models.to_record(config)
    assert model_config(record, "it") == config
    older = {name: value for name, value in record.items() if name not in ("is_axial", "rarity")}
    assert model_config(older, "it") == config
    with pytest.raises(UserError, match=r"unknown or missing keys \['depth'\]"):
        model_config({**record, "depth": 3}, "it")
    with pytest.raises(UserError, match="no model class 'GAN'"):
        model_config({**record, "class": "GAN"}, "it")


@pytest.mark.parametrize(
    "wrong",
    [
        {"variance": "none"},
        {"z_dim": 0},
        {"widths": ()},
        {"beta": -1.0},
        {"min_std": 0.1},
        {"rarity": 2.0},
        {"is_axial": True, "latent_channels": 1},
    ],
)
def test_settings_that_make_no_model_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        VAESettings(**wrong)
