"""The interleaved loop: encoder and decoder learn on their bound, Q on what the encoder makes of frames."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from catch import catch_preprocess
from rl_toys import TOY_VAE, toy_config, toy_ray, train
from test_algorithm import LEARNING, greedy_return, refresh
from test_loop import assert_same

from pipeline import artifact
from pipeline.errors import UserError
from pipeline.models.vae import VAE, VAESettings
from rllib_ext.bound import BoundUpdates
from rllib_ext.cache import LatentCache
from rllib_ext.config import ElboSettings, QConfig
from rllib_ext.replay import ColumnarReplay, Rows
from rllib_ext.replay_spec import ReplaySpec

pytest_plugins = ["rl_fixtures"]
ELBO = ElboSettings(
    updates_per_agent_step=0.1, warmup_agent_steps=32, batch_size=32, publish_updates=5, scratch_updates=20
)
SIDE, LANES = 12, 3


@pytest.fixture(scope="module", autouse=True)
def _ray_session():
    with toy_ray(4):
        yield


def online(encoder, elbo: ElboSettings = ELBO, **training):
    config = toy_config("online", encoder, **training).latent(elbo=elbo)
    return config if encoder is not None else config.latent(encoder_config=TOY_VAE)


# --- the cache


def an_encoder(seed: int) -> artifact.Encoder:
    torch.manual_seed(seed)
    return artifact.from_scratch(TOY_VAE, catch_preprocess()).requires_grad_(False).eval()


def arrays(encoder: artifact.Encoder) -> dict[str, np.ndarray]:
    return {name: value.numpy().copy() for name, value in encoder.state_dict().items()}


def add_rows(replay: ColumnarReplay, cache: LatentCache, rng: np.random.Generator, num_rows: int) -> None:
    shape = (num_rows, LANES)
    false = np.zeros(shape, bool)
    is_first = false.copy()
    is_first[0] = replay.written[0] == 0
    frames = rng.integers(0, 256, (*shape, SIDE, SIDE), dtype=np.uint8)
    replay.add(Rows(frames, np.zeros(shape, int), np.ones(shape, np.float32), is_first, false, false, false), 0)
    cache.add(0, num_rows, LANES)


def encoded(encoder: artifact.Encoder, frames: np.ndarray) -> np.ndarray:
    return encoder.encode(torch.from_numpy(frames)).to(torch.float16).numpy()


@pytest.mark.parametrize("seed", range(4))
def test_every_row_has_latents_of_the_version_that_it_names(seed):
    """Whatever rows come, wherever the rings wrap, however few are made anew between two versions."""
    rng = np.random.default_rng(seed)
    spec = ReplaySpec(LANES, 20, (SIDE, SIDE), "uint8", stack=2, n_step=2, gamma=0.9, z_dim=16, is_double=True)
    replay = ColumnarReplay(spec)
    cache = LatentCache(replay, an_encoder(0), an_encoder(0))
    versions = [(an_encoder(100 + i), an_encoder(200 + i)) for i in range(4)]
    add_rows(replay, cache, rng, int(rng.integers(5, 15)))
    for online_encoder, target in versions:
        cache.take_over((arrays(online_encoder), arrays(target)))
        for _ in range(int(rng.integers(1, 4))):
            add_rows(replay, cache, rng, int(rng.integers(1, 9)))
            cache.refresh(int(rng.integers(0, 12)))
    held = replay.held_places(np.arange(len(replay)))
    frames, made_by = replay.rows_at("obs", held), replay.rows_at("version", held)
    assert set(made_by) <= {1, 2, 3, 4}
    assert cache.stale_share() == pytest.approx((made_by < 4).mean())
    for number in set(made_by):
        rows = made_by == number
        for name, encoder in zip(("z", "z_target"), versions[number - 1], strict=True):
            expected = encoded(encoder, frames[rows])  # in a batch of another size: on some processors sums differ
            np.testing.assert_allclose(replay.rows_at(name, held)[rows], expected, rtol=1e-3, atol=1e-6)
    moved = cache.refresh(len(replay))
    assert moved > 0 or (made_by == 4).all()
    assert cache.stale_share() == cache.refresh(len(replay)) == 0
    drawn, positions = replay.sample(50), {frame.tobytes(): i for i, frame in enumerate(frames)}
    assert drawn.obs.shape == (50, 2, 16)
    assert len(positions) == len(frames)
    newest, target = versions[-1]
    known = {z.tobytes() for z in encoded(newest, frames)}, {z.tobytes() for z in encoded(target, frames)}
    assert drawn.next_obs_online is not None
    for z_BKZ, latents in zip((drawn.obs, drawn.next_obs, drawn.next_obs_online), (*known, known[0]), strict=True):
        assert {z.tobytes() for z in z_BKZ.reshape(-1, 16)} <= latents


def test_all_rows_are_made_anew_in_turn():
    replay = ColumnarReplay(ReplaySpec(LANES, 20, (SIDE, SIDE), "uint8", stack=2, n_step=2, gamma=0.9, z_dim=16))
    cache = LatentCache(replay, an_encoder(0), an_encoder(0))
    add_rows(replay, cache, np.random.default_rng(0), 14)
    for version in (1, 2):
        cache.take_over((arrays(an_encoder(version)), arrays(an_encoder(version))))
    shares = [cache.stale_share()]
    for _ in range(6):
        cache.refresh(7)
        shares.append(cache.stale_share())
    np.testing.assert_allclose(shares, 1 - np.arange(7) / 6)


def test_no_lane_is_left_out_while_the_replay_fills_faster_than_rows_are_made_anew():
    replay = ColumnarReplay(ReplaySpec(LANES, 400, (SIDE, SIDE), "uint8", stack=2, n_step=2, gamma=0.9, z_dim=16))
    cache = LatentCache(replay, an_encoder(0), an_encoder(0))
    rng = np.random.default_rng(0)
    for version in (1, 2):
        add_rows(replay, cache, rng, 20)
        cache.take_over((arrays(an_encoder(version)), arrays(an_encoder(version))))
    for _ in range(60):
        add_rows(replay, cache, rng, 1)  # three rows come, and two are made anew
        cache.refresh(2)
    versions = replay.rows_at("version", replay.held_places(np.arange(len(replay))))
    assert (versions == 2).all()


def test_the_ends_of_the_replay_are_its_newest_and_oldest_rows_also_while_a_lane_holds_none():
    replay = ColumnarReplay(ReplaySpec(3, 20, (), "uint8", stack=1, n_step=1, gamma=0.9))
    for first_lane, numbers in ((1, range(30)), (0, range(100, 105))):
        for number in numbers:
            one = np.full((1, 1), number)
            false = np.zeros((1, 1), bool)
            replay.add(Rows(one.astype(np.uint8), one * 0, one * 0.0, false, false, false, false), first_lane)
    newest, oldest = (replay.rows_at("obs", places).tolist() for places in replay.ends(3))
    assert sorted(newest) == [27, 28, 29, 102, 103, 104]
    assert sorted(oldest) == [10, 11, 12, 100, 101, 102]
    assert [len(places) for places in replay.ends(50)] == [10, 10], "as many of each lane"


# --- updates on the bound


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


# --- the loop


@pytest.mark.parametrize(
    ("mode", "has_encoder", "changes"),
    [
        ("frozen", True, {"lr": 1e-3}),
        ("finetune", True, {"lr": 1e-3}),
        ("pixels", False, {"batch_size": 32}),
        ("finetune", True, {"in_finetune": True, "q_reads": "exact"}),
        ("online", False, {"in_finetune": True}),
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
    algorithm = build(toy_config("finetune", encoder).latent(elbo=replace(ELBO, in_finetune=True)))
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
