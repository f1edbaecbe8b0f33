"""Updates of a model on its bound: Adam's, with noise that a restored one draws again."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from rl_toys import TOY_VAE

from pipeline import artifact
from pipeline.models.vae import VAE, VAESettings
from rllib_ext.bound import BoundUpdates
from rllib_ext.settings import ElboSettings

ELBO, SIDE = ElboSettings(batch_size=32), 12


def bound_updates(settings: VAESettings = TOY_VAE, **changes) -> BoundUpdates:
    torch.manual_seed(0)
    model = VAE(settings.for_frames(SIDE, SIDE))
    return BoundUpdates(model, replace(ELBO, **changes), None)


def some_frames(count: int) -> np.ndarray:
    """A bright square somewhere on black."""
    rng, frames = np.random.default_rng(0), np.zeros((count, SIDE, SIDE), np.uint8)
    for frame, (down, right) in zip(frames, rng.integers(0, SIDE - 3, (count, 2)), strict=True):
        frame[down : down + 3, right : right + 3] = 200
    return frames


def test_the_bound_rises_on_frames_it_learns_from_and_dimensions_come_into_use():
    updates, frames = bound_updates(), some_frames(320)
    updates.initialise(frames)
    first = updates.look_at(frames[:64], frames[64:128])
    for _ in range(20):
        figures = updates.update(frames, 3e-3)
    last = updates.look_at(frames[:64], frames[64:128])
    assert last["elbo_fresh"] > first["elbo_fresh"] + 20
    assert last["elbo_old"] > first["elbo_old"] + 20
    assert 0 < last["active_units"] <= 16
    assert figures["elbo_kl"] > 1


CONVOLUTIONS = replace(TOY_VAE, widths=(8, 8), num_blocks=1)  # weights that gradients lie across


@pytest.mark.parametrize("channels_last", [False, True])
def test_an_update_is_adams_whatever_order_weights_and_gradients_have_in_memory(channels_last):
    """Fused Adam pairs the two as they lie; the plain one by their places."""
    updates, frames = bound_updates(CONVOLUTIONS), some_frames(128)
    updates.initialise(frames)
    if channels_last:
        updates.model.to(memory_format=torch.channels_last)
    plain = copy.deepcopy(updates)
    plain._optimizer = torch.optim.Adam(plain._parameters, fused=False)
    for each in (updates, plain):
        for _ in range(3):
            each.update(frames, 1e-3)
    for (name, one), other in zip(updates.model.named_parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4, msg=lambda said, name=name: f"{name}: {said}")


@pytest.mark.parametrize("model", [TOY_VAE, CONVOLUTIONS])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_state_that_is_taken_over_goes_on_as_the_one_that_gave_it(model, channels_last):
    one, other, frames = bound_updates(model), bound_updates(model), some_frames(64)
    for updates in (one, other) if channels_last else ():
        updates.model.to(memory_format=torch.channels_last)
    one.update(frames, 1e-3)
    other.set_state(one.state())
    results = []
    for updates in (one, other):
        torch.rand(3)  # whatever else of the process draws noise
        results.append((updates.update(frames, 1e-3), artifact.weights_sha256(updates.model)))
    assert results[0] == results[1]


def test_noise_is_of_run_learner_and_update():
    def noise(updates: BoundUpdates) -> float:
        with updates._own_noise():
            return float(torch.rand(()))

    before, drawn = torch.get_rng_state(), []
    model = VAE(TOY_VAE.for_frames(SIDE, SIDE))
    for seed, rank in ((0, 0), (1, 0), (0, 1)):
        updates = BoundUpdates(model, ELBO, None, seed=seed, rank=rank)
        torch.set_rng_state(before)
        drawn.append(noise(updates))
        assert noise(updates) == drawn[-1]
        assert torch.equal(before, torch.get_rng_state())
    one = bound_updates()
    one.update(some_frames(32), 0.0)
    assert len({*drawn, noise(one)}) == 4
