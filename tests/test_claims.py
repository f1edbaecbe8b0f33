"""The claims about VAEs: their real entry point at toy size, what it keeps, and the mathematics beneath."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from claims import bits, bounds, cells, factors, page, training, worlds
from claims.__main__ import CLAIMS, main
from claims.cells import Cell, Kept, Scope
from claims.play import random_frames

from pipeline.models.vae import VAE, VAESettings


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize("claim", ["bounds", "bits", "sprites"])
def test_a_short_claim_is_measured_once_and_told(
    claim: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--claim", claim, "--short", "--json", "--results", str(tmp_path / "kept")]
    assert main([*arguments, "--write", str(tmp_path / "page")]) == 0
    first = capsys.readouterr()
    told = json.loads(first.out)["claims"][claim]
    assert told["measured"] == told["cells"] > 0
    assert told["judged"]
    assert "kept" not in first.err
    main(arguments)
    again = capsys.readouterr()
    assert json.loads(again.out)["claims"][claim] == told
    assert again.err.count("kept") == told["cells"]
    text = (tmp_path / "page" / "claims.md").read_text()
    assert all(row["figure"] in text for row in told["judged"])
    assert "not yet measured" in text  # the other claims


def test_the_mathematics_holds_already_at_toy_size(tmp_path: Path) -> None:
    scope, kept = Scope(is_short=True), Kept(tmp_path)
    chosen = bounds.CLAIM.cells(scope)
    for cell in chosen:
        kept.measure(cell, bounds.CLAIM.measure)
    judged = bounds.CLAIM.judge(kept.results(chosen))
    assert [row.is_met for row in judged if row.bar] == [True, True, True]


def test_a_beta_vae_of_shapes_is_measured(tmp_path: Path) -> None:
    (cell,) = factors.CLAIM.cells(Scope(is_short=True))
    figures = Kept(tmp_path).measure(cell, factors.CLAIM.measure)
    assert 20 <= figures["higgins"] <= 100
    assert figures["pixel_midpoint"] == 0
    assert figures["weighted_nats"] >= figures["elbo_nats"]
    assert len(figures["kl_nats"]) == factors.RECIPE.model.z_dim


def test_what_decides_the_figures_is_in_the_digest() -> None:
    cell = Cell("sprites", "vae", 0, worlds.Plan(worlds.RECIPE))
    others = [
        Cell("sprites", "vae", 1, worlds.Plan(worlds.RECIPE)),
        Cell("sprites", "autoencoder", 0, worlds.Plan(worlds.RECIPE)),
        Cell("sprites", "vae", 0, worlds.Plan(worlds.RECIPE, num_frames=1)),
    ]
    assert len({one.digest for one in (cell, *others)}) == 4
    assert cell.digest == Cell("sprites", "vae", 0, worlds.Plan(worlds.RECIPE)).digest


def test_bars_are_judged_by_the_figures() -> None:
    """A world of figures that fail every bar, and one that meets them."""
    good = {"valid": 0.97, "valid_reconstructions": 1.0, "active": 4, "aggregate_mean": [0.1], "aggregate_std": [1.0]}
    bad = {**good, "valid": 0.5, "aggregate_mean": [-0.2], "aggregate_std": [0.8]}
    plain = {"valid": 0.4, "valid_matched": 0.6}
    for figures, is_met in ((good, True), (bad, False)):
        results = {"vae": {0: figures, 1: figures}, "autoencoder": {0: plain, 1: plain}}
        assert [row.is_met for row in worlds.CLAIM.judge(results) if row.bar] == [is_met] * 4
    for four, is_met in (([95.0, 96.0, 97.0], True), ([80.0, 90.0, 70.0], False)):
        rest = {"mig": 0.1, "dci_disentanglement": 0.1, "dci_completeness": 0.1, "dci_informativeness": 0.1}
        rest |= {
            "latent_midpoint": 0.99 if is_met else 0.5,
            "latent_end": 1.0,
            "pixel_midpoint": 0.0 if is_met else 0.1,
        }
        rest |= {"weighted_nats": 1.0 if is_met else 0.0, "elbo_nats": 0.5}
        results = {
            "beta-4": {seed: {**rest, "higgins": value} for seed, value in enumerate(four)},
            "beta-1": {seed: {**rest, "higgins": 82.0 - seed} for seed in range(3)},
        }
        judged = [row for row in factors.CLAIM.judge(results) if row.bar]
        assert len(judged) == 7
        assert all(row.is_met is is_met for row in judged)


def test_an_interval_of_few_seeds_is_wide() -> None:
    low, high = cells.t_interval(np.array([1.0, 2.0, 3.0]))
    assert (low, high) == pytest.approx((2 - 4.302653 / np.sqrt(3), 2 + 4.302653 / np.sqrt(3)), rel=1e-5)
    assert cells.t_interval(np.array([1.0]))[0] == -np.inf


def test_random_frames_are_those_that_collect_stores(tmp_path: Path) -> None:
    """Lane by lane: the digest of a dataset is over these bytes."""
    import pyarrow.fs as pafs
    import pyarrow.parquet as pq

    from pipeline.atari import preprocess_for
    from pipeline.collect import plan_shards
    from pipeline.lanes import LaneWriter, play_lanes
    from pipeline.policies import random_policy

    (tmp_path / "data").mkdir()
    preprocess, (lanes,) = preprocess_for("pong"), plan_shards(300, 5)
    writers = [LaneWriter(pafs.LocalFileSystem(), str(tmp_path), preprocess, lane, False) for lane in lanes]
    for _ in play_lanes(preprocess, lanes, writers, random_policy("random"), with_ram=False):
        pass
    names = [writer.close().file.name for writer in writers]
    stored = b"".join(b"".join(pq.read_table(tmp_path / name)["obs"].to_pylist()) for name in names)
    assert random_frames("pong", 300, 5).tobytes() == stored


def test_principal_density_is_that_of_its_full_covariance() -> None:
    """Against the dense formula, and averaged over drawn dequantisation noise."""
    torch.manual_seed(0)
    frames = (torch.randn(500, 3) @ torch.randn(3, 12) * 20 + 128 + 4 * torch.randn(500, 12)).clamp(0, 255).byte()
    density = bits.PrincipalDensity.fit(frames.view(500, 3, 4), 3)
    basis = density.basis.double()
    covariance = (basis * (density.spread.double() - density.noise)) @ basis.T + density.noise * torch.eye(12)
    normal = torch.distributions.MultivariateNormal(density.mean.double(), covariance)
    drawn = normal.log_prob(frames[:5] + torch.rand(4_000, 5, 12, dtype=torch.float64)).mean(0).float()
    torch.testing.assert_close(density.expected_log_prob(frames[:5].view(5, 3, 4)), drawn, rtol=1e-3, atol=0.02)
    levels = frames.double().numpy() + 0.5
    values = np.linalg.eigvalsh(np.cov(levels.T, bias=True) + np.eye(12) / 12)[::-1]
    reached = float(density.expected_log_prob(frames.view(500, 3, 4)).mean())
    assert reached == pytest.approx(bounds.ppca_log_likelihood(values, 3), abs=0.02)


def test_a_fixed_variance_stays_while_the_rest_learns() -> None:
    frames = torch.from_numpy(random_frames("pong", 200, 0))
    torch.manual_seed(0)
    model = training.initialised(VAE(VAESettings(z_dim=3, patch=12, widths=(8,)).for_frames(84, 84)), frames, 0)
    training.fix_variance(model, 7.0)
    before = model.decode(torch.zeros(1, 3)).mean.detach().clone()
    recipe = bits.RECIPE
    training.train(model, frames, replace(recipe, train=replace(recipe.train, frames_per_epoch=64 * 3)))
    after = model.decode(torch.zeros(1, 3))
    assert float(after.variance.sqrt().detach()) == pytest.approx(7.0, rel=1e-4)
    assert not torch.equal(after.mean, before)


def test_an_autoencoder_has_no_noise_and_no_kl() -> None:
    frames = torch.from_numpy(random_frames("pong", 20, 0))
    torch.manual_seed(0)
    model = training.Autoencoder(VAESettings(z_dim=3, patch=12, widths=(8,)).for_frames(84, 84))
    first, again = model(frames), model(frames)
    assert torch.equal(first.value, again.value)
    assert float(first.kl.sum()) == 0


def test_every_claim_lists_its_cells_and_a_missing_one_is_said(tmp_path: Path) -> None:
    told = page.verdict(CLAIMS, Kept(tmp_path), Scope(montezuma_recipe="flat"))
    assert told["claims"]["montezuma"]["cells"] == 1
    assert all(claim["measured"] == 0 and claim["cells"] > 0 for claim in told["claims"].values())
    assert page.page(told).count("not yet measured") == len(CLAIMS)


def test_a_warm_up_ends_in_what_is_to_be_learned() -> None:
    """At first blurred and without KL, at the end the frames themselves with all of it."""
    warmup = training.Warmup(kl_until=0.5, blur=8.0, blur_hold=0.1, blur_until=0.6)
    done = np.linspace(0, 1, 101)
    shares, stds = [warmup.kl_share(d) for d in done], [warmup.blur_std(d) for d in done]
    assert (shares[0], shares[-1], stds[0], stds[-1]) == (0.0, 1.0, 8.0, 0.0)
    assert shares == sorted(shares)
    assert stds == sorted(stds, reverse=True)
    frame = torch.zeros(1, 20, 30, dtype=torch.uint8)
    frame[0, 8:12, 13:17] = 255
    assert torch.equal(training.blurred(frame, warmup.blur_std(1.0)), frame)
    soft = training.blurred(frame, 3.0)[0].float()
    assert (soft > 20).sum() > 5 * (frame > 20).sum()
    assert torch.equal(soft, soft.flip(0))
    assert int(soft[9:11, 14:16].min()) == int(soft.max())
