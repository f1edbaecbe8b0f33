"""The interleaved loop: encoder and decoder learn on their bound, Q on what the encoder makes of frames."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from rl_toys import TOY_VAE, toy_config, toy_ray, train
from test_algorithm import LEARNING, greedy_return, refresh
from test_loop import assert_same

from pipeline import artifact
from pipeline.errors import UserError
from rllib_ext.config import ElboSettings, QConfig

pytest_plugins = ["rl_fixtures"]
ELBO = ElboSettings(
    updates_per_agent_step=0.1, warmup_agent_steps=32, batch_size=32, publish_updates=5, scratch_updates=20
)


@pytest.fixture(scope="module", autouse=True)
def _ray_session():
    with toy_ray(4):
        yield


def online(encoder, elbo: ElboSettings = ELBO, **training):
    config = toy_config("online", encoder, **training).latent(elbo=elbo)
    return config if encoder is not None else config.latent(encoder_config=TOY_VAE)


@pytest.mark.parametrize(
    ("mode", "has_encoder", "changes"),
    [
        ("frozen", True, {"lr": 1e-3}),
        ("finetune", True, {"lr": 1e-3}),
        ("pixels", False, {"batch_size": 32}),
        ("finetune", True, {"in_finetune": True, "q_reads": "exact"}),
        ("online", False, {"in_finetune": True}),
        ("finetune", True, {"in_finetune": True, "scratch_lr": 1e-2}),
    ],
)
def test_settings_that_decide_nothing_are_refused(encoder, mode, has_encoder, changes):
    config = toy_config(mode, encoder if has_encoder else None).latent(elbo=replace(ElboSettings(), **changes))
    config.encoder_config = None if has_encoder else TOY_VAE
    name = list(changes)[-1]
    with pytest.raises(
        UserError, match=rf"elbo\.{name} is .*, which decides nothing in this run in mode {mode}; leave"
    ):
        config.check()


def test_with_double_q_learning_both_encoders_latents_of_next_states_are_drawn(build, encoder):
    for double in (False, True):
        algorithm = build(online(encoder, replace(ELBO, target_tau=0.1), double=double))
        train(algorithm, 300)
        drawn = algorithm.replay.sample(32)
        assert (drawn.next_obs_online is not None) == double
    assert not np.array_equal(drawn.next_obs, drawn.next_obs_online)


@pytest.mark.parametrize("num_learners", [0, 2])
def test_a_state_without_the_model_that_learns_is_refused(build, encoder, num_learners):
    algorithm = build(online(encoder).learners(num_learners=num_learners))
    state = algorithm.learners.state()
    with pytest.raises(UserError, match="lacks the model that learns on its bound"):
        algorithm.learners.set_state({key: value for key, value in state.items() if key != "bound"})


def test_q_never_moves_the_encoder_and_the_bound_does(build, encoder):
    hashes = {}
    for name, first in (("bound", 32), ("none", 10**6)):
        algorithm = build(online(encoder, replace(ELBO, warmup_agent_steps=first)))
        before = algorithm.encoder_sha256s()["learner"]
        head = algorithm.network_state()["head.layers.0.weight"].copy()
        train(algorithm, 300)
        assert not np.array_equal(head, algorithm.network_state()["head.layers.0.weight"])
        hashes[name] = before, algorithm.encoder_sha256s()["learner"]
        refresh(algorithm)
        assert len(set(algorithm.encoder_sha256s().values())) == 1, "the runner acts with what Q reads with"
    assert hashes["bound"][0] == hashes["none"][0] == hashes["none"][1] != hashes["bound"][1]


def test_rates_that_have_fallen_to_nothing_are_the_bounds_too(build, encoder):
    algorithm = build(online(encoder, lr_decay_agent_steps=200))
    train(algorithm, 300)
    before, head = algorithm.encoder_sha256s(), algorithm.network_state()["head.layers.0.weight"].copy()
    figures = train(algorithm, 600)
    assert figures["elbo_updates"] > 40, "it was asked to learn"
    assert algorithm.encoder_sha256s()["learner"] == before["learner"]
    np.testing.assert_array_equal(algorithm.network_state()["head.layers.0.weight"], head)


def test_the_targets_encoder_follows_by_its_own_share(build, encoder):
    algorithm = build(
        online(
            encoder, replace(ELBO, target_tau=0.25, warmup_agent_steps=10**6), target_tau=1.0, target_update_updates=0
        )
    )
    train(algorithm, 100)  # copies the whole target network after every update, were the encoder among it
    before, _ = algorithm.learners.reading_encoders()
    algorithm.encoder_learning._update(5)
    online_weights, target_weights = algorithm.learners.reading_encoders()
    moved = [name for name in before if not np.array_equal(before[name], online_weights[name])]
    assert len(moved) >= 4
    for name in before:
        np.testing.assert_allclose(
            target_weights[name], 0.75 * before[name] + 0.25 * online_weights[name], rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("q_reads", ["cache", "exact"])
def test_ratios_figures_and_latents_are_as_they_should_be(build, encoder, q_reads):
    algorithm = build(online(encoder, replace(ELBO, q_reads=q_reads)))
    figures = train(algorithm, 600)
    due = ELBO.due_updates(algorithm.agent_steps)
    assert due - 4 <= figures["elbo_updates"] <= due
    named = {"elbo", "elbo_kl", "elbo_fresh", "elbo_old", "active_units", "q_divergences", "td_error_mean"}
    assert named <= set(figures)
    assert all(np.isfinite(figures[name]) for name in named)
    if q_reads == "exact":
        assert algorithm.replay.sample(10).obs.dtype == np.uint8
        assert "stale_share" not in figures
        return
    assert figures["encoder_version"] == 1 + figures["elbo_updates"] // ELBO.publish_updates
    assert 0 < figures["stale_share"] <= 1
    assert figures["latent_drift"] > 0
    assert algorithm.replay.sample(10).obs.dtype == np.float16


@pytest.mark.parametrize("double", [False, True])
def test_q_learns_the_same_from_cache_and_frames_while_the_encoder_stands_still(build, encoder, double):
    """But for latents that are rounded to float16."""
    heads = []
    for q_reads in ("cache", "exact"):
        still = replace(ELBO, warmup_agent_steps=10**6, q_reads=q_reads)
        algorithm = build(online(encoder, still, synchronous=True, epsilon_end=1.0, double=double))
        train(algorithm, 300)
        assert algorithm.updates > 50
        heads.append({name: v for name, v in algorithm.network_state().items() if name.startswith("head")})
    for name, value in heads[0].items():
        np.testing.assert_allclose(value, heads[1][name], atol=5e-3, err_msg=name)


@pytest.mark.parametrize(("num_runners", "num_learners"), [(0, 0), (2, 0), (0, 2)])
def test_a_resumed_run_equals_an_uninterrupted_one(build, encoder, tmp_path, num_runners, num_learners):
    config = online(encoder, synchronous=True).env_runners(num_env_runners=num_runners)
    config.learners(num_learners=num_learners)
    whole = build(config.copy())
    train(whole, 220)
    path = whole.save_to_path(tmp_path / "checkpoint")
    train(whole, 500)
    resumed = build(config.copy())
    resumed.restore_from_path(path)
    train(resumed, 500)
    assert_same(whole, resumed)
    assert whole.encoder_learning.state() == resumed.encoder_learning.state()
    weights = whole.learners.model_weights()
    assert all(np.array_equal(value, resumed.learners.model_weights()[name]) for name, value in weights.items())


def test_learners_that_share_a_batch_stay_the_same(build, encoder):
    config = online(encoder).learners(num_learners=2)
    algorithm = build(config)
    train(algorithm, 300)
    hashes = algorithm.learner_group.foreach_learner(
        lambda learner: tuple(map(artifact.weights_sha256, (learner.bound.model, learner.q_module)))
    )
    assert [len(set(of_both)) for of_both in zip(*(result.get() for result in hashes), strict=True)] == [1, 1]
    assert len(algorithm.learners.encoder_sha256s()) == 2


def test_finetune_trains_one_encoder_by_both(build, encoder):
    algorithm = build(
        toy_config("finetune", encoder).latent(
            elbo=replace(ELBO, in_finetune=True, scratch_updates=ElboSettings.scratch_updates)
        )
    )
    figures = train(algorithm, 300)
    assert figures["elbo_updates"] > 0
    of_q = {k: v for k, v in algorithm.network_state().items() if k.startswith("encoder.net.")}
    model = algorithm.learners.model_weights()
    assert of_q
    for name, value in of_q.items():
        np.testing.assert_array_equal(value, model[name.replace("encoder.net.", "encoder.")])
    without = build(toy_config("finetune", encoder))
    assert "elbo_updates" not in train(without, 100)


def test_from_nothing_it_learns_catch(build, tmp_path):
    vae = replace(TOY_VAE, z_dim=32, widths=(16,))
    elbo = replace(ELBO, scratch_updates=200, lr=1e-4)
    config = toy_config("online", None, **LEARNING).latent(encoder_config=vae, elbo=elbo, q=QConfig(hidden=(128,)))
    algorithm = build(config)
    figures = train(algorithm, 6_000)
    assert figures["active_units"] >= 4
    assert figures["elbo_fresh"] > -900
    assert greedy_return(algorithm, tmp_path) > 0.6


def test_q_begins_with_latents_of_the_encoder_that_the_start_from_nothing_ends_with(build):
    algorithm = build(online(None, replace(ELBO, scratch_updates=23, warmup_agent_steps=10**6)))
    figures = train(algorithm, 100)
    assert figures["updates"] > 0
    assert (figures["encoder_version"], figures["stale_share"], figures["elbo_updates"]) == (1, 0.0, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "elbo.batch_size is 0; it must be from 1 to 4096"),
        ({"batch_size": 10**9}, "elbo.batch_size is 1000000000; it must be from 1 to 4096"),
        ({"target_tau": 0.0}, "elbo.target_tau is 0.0"),
        ({"q_reads": "guess"}, "elbo.q_reads is 'guess'; choose one of cache, exact"),
        ({"lr": "fast"}, "elbo.lr is 'fast'; it must be a number"),
    ],
)
def test_settings_that_cannot_work_are_refused(encoder, changes, message):
    with pytest.raises(UserError, match=message):
        online(encoder, replace(ELBO, **changes)).validate()


def test_it_needs_something_to_start_from():
    with pytest.raises(UserError, match="mode online needs"):
        toy_config("online", None).validate()
