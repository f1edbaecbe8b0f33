"""Latents beside a replay's frames: each row's are of the version that it names, and all follow in turn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from catch import catch_preprocess
from rl_toys import TOY_VAE

from pipeline import artifact
from rllib_ext.cache import LatentCache
from rllib_ext.replay import ColumnarReplay, Rows
from rllib_ext.replay_spec import ReplaySpec

SIDE, LANES = 12, 3


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
