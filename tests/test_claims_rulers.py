"""What decides the claims about VAEs: checkers that cannot be fooled, and metrics on codes whose worth is known."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from claims.fixed import metrics, montezuma, ruler_digest, shapes, sprites

from pipeline.atari import preprocess_for


def drawn(count: int = 60, seed: int = 0) -> np.ndarray:
    return sprites.render(sprites.draw_scenes(count, seed)).astype(np.float32)


def with_sprite(frame: np.ndarray, art: np.ndarray, level: float, top: int, left: int) -> np.ndarray:
    changed = frame.copy()
    region = changed[top : top + art.shape[0], left : left + art.shape[1]]
    region[art] = np.maximum(region[art], level)
    return changed


def test_every_scene_is_valid_and_stays_so_under_a_decoders_smoothness() -> None:
    frames = drawn(200)
    for image in (
        frames,
        ndimage.gaussian_filter(frames, (0, 0.7, 0.7)),
        ndimage.shift(frames, (0, 0.5, 0.5), order=1),
    ):
        verdict = sprites.check(image)
        assert verdict.is_valid.mean() > 0.99
    assert (sprites.check(frames).num_stray == 0).all()


def test_no_number_of_sprites_but_three_is_valid() -> None:
    scenes = sprites.draw_scenes(40, 1)
    away = sprites.Scenes(scenes.walkers, np.where(scenes.ball < 29, 0, 57))  # the ball in a corner
    frames = sprites.render(away).astype(np.float32)
    without_ball = np.where(frames == sprites.BALL_LEVEL, 0, frames)
    without_walker = frames.copy()
    without_walker[:, 14:27] = np.where(frames[:, 14:27] == sprites.WALKER_LEVEL, 0, frames[:, 14:27])
    fourth = np.stack([with_sprite(f, sprites.BALL, 255, 30, 30) for f in frames])
    third_walker = np.stack([with_sprite(f, sprites.WALKER, 128, 29, 28) for f in frames])
    assert sprites.check(frames).is_valid.all()
    assert (sprites.check(without_ball).num_sprites == 2).all()
    assert (sprites.check(without_walker).num_sprites == 2).all()
    assert (sprites.check(np.zeros((2, 64, 64))).num_sprites == 0).all()
    for wrong in (without_ball, without_walker, fourth, third_walker):
        assert not sprites.check(wrong).is_valid.any()


@pytest.mark.parametrize("kind", ["blur", "ghosts", "both at once", "half as bright", "noise", "grey", "white", "mean"])
def test_what_only_looks_like_a_scene_is_not_valid(kind: str) -> None:
    frames, others = drawn(40, 2), drawn(40, 3)
    images = {
        "blur": ndimage.gaussian_filter(frames, (0, 2.5, 2.5)),
        "ghosts": (frames + others) / 2,
        "both at once": np.maximum(frames, others),
        "half as bright": frames / 2,
        "noise": np.random.default_rng(0).uniform(0, 255, frames.shape),
        "grey": np.full_like(frames, 128),
        "white": np.full_like(frames, 255),
        "mean": np.broadcast_to(frames.mean(0), frames.shape),
    }
    assert sprites.check(images[kind]).is_valid.mean() < 0.02


def test_a_sprite_may_be_hidden_in_part_and_never_whole() -> None:
    left = np.arange(40, 50)
    rows = np.full(10, 17)
    hiding = sprites.Scenes(np.stack([left, left], 1), np.stack([rows, left + 1], 1))
    frames = sprites.render(hiding)
    assert sprites.check(frames).is_valid.all()
    assert ((frames == sprites.WALKER_LEVEL).sum((1, 2)) > 1.4 * sprites.WALKER.sum()).all()


def test_frames_of_shapes_are_found_by_their_factors() -> None:
    index = np.random.default_rng(0).integers(0, shapes.num_frames(), 50)
    factors = shapes.factors_of(index)
    assert (shapes.index_of(factors) == index).all()
    frames = shapes.render(factors)
    assert (frames.max((1, 2)) == 255).all()
    assert (frames[:, [0, -1]] == 0).all()
    for factor in range(5):  # every factor is to be seen
        others = factors.copy()
        others[:, factor] = (others[:, factor] + 1) % shapes.SIZES[factor]
        assert (np.abs(shapes.render(others).astype(int) - frames).sum((1, 2)) > 5 * 255).all()


def test_one_shape_is_one_and_two_ghosts_or_blots_are_none() -> None:
    pairs = shapes.draw_pairs(60, 0)
    first, second = (shapes.render(shapes.factors_of(end)).astype(np.float32) for end in pairs.T)
    assert ((first > 0) & (second > 0)).sum() == 0
    assert (shapes.factors_of(pairs[:, 0])[:, 0] == shapes.factors_of(pairs[:, 1])[:, 0]).all()
    square = np.zeros((1, 64, 64))
    square[0, 15:45, 15:45] = 255
    assert shapes.shows_one_shape(first).all()
    assert shapes.shows_one_shape(ndimage.gaussian_filter(first, (0, 1, 1))).all()
    blank, grey = np.zeros((1, 64, 64)), np.full((1, 64, 64), 140)
    for wrong in ((first + second) / 2, np.maximum(first, second), first / 2, square, blank, grey):
        assert not shapes.shows_one_shape(wrong).any()
    assert shapes.shows_one_shape(ndimage.gaussian_filter(first, (0, 5, 5))).mean() < 0.3


def true_codes() -> np.ndarray:
    factors = shapes.factors_of(np.arange(shapes.num_frames())).astype(np.float32)
    return (factors - factors.mean(0)) / factors.std(0)


def figures(codes: np.ndarray) -> tuple[float, float, float, float]:
    parts = metrics.dci(codes, shapes.SIZES, 0)
    higgins = metrics.higgins(codes, shapes.SIZES, 0)
    return (
        higgins,
        metrics.mutual_information_gap(codes, shapes.SIZES),
        parts["disentanglement"],
        parts["informativeness"],
    )


def test_metrics_know_true_factors_mixed_ones_and_noise() -> None:
    rng = np.random.default_rng(0)
    true = true_codes()
    mixed = true @ np.linalg.qr(rng.normal(size=(5, 5)))[0].astype(np.float32)
    noise = rng.normal(size=(len(true), 6)).astype(np.float32)
    best = figures(np.concatenate([true[:, [2, 0, 4, 3, 1]] * 3, np.zeros_like(true)], 1))
    middle, worst = figures(mixed), figures(noise)
    assert best[0] == pytest.approx(100, abs=0.5)
    assert best[1] > 0.99
    assert best[2] > 0.98
    assert best[3] > 0.97
    for high, medium in zip(best[:3], middle):
        assert medium < 0.97 * high
    assert middle[3] > 0.8  # all is in there, mixed
    assert worst[0] == pytest.approx(100 / len(shapes.SIZES), abs=4)
    assert worst[1] < 0.02
    assert worst[2] < 0.1


def test_linear_r2_is_of_held_out_episodes() -> None:
    rng = np.random.default_rng(0)
    episodes = np.repeat(np.arange(20), 30)
    codes = rng.normal(size=(600, 5))
    labels = np.stack([codes @ [1, 2, 0, 0, 1] + 3, rng.normal(size=600)], 1)
    is_held_out = montezuma.held_out(episodes, 0)
    assert is_held_out.sum() == 120
    r2 = montezuma.linear_r2(codes, labels, is_held_out, episodes)
    assert r2[0] > 0.999
    assert r2[1] < 0.05
    labels[is_held_out] = rng.normal(size=(120, 2))
    assert (montezuma.linear_r2(codes, labels, is_held_out, episodes) < 0).all()


def test_scripts_play_the_same_for_a_seed_and_press_what_they_say() -> None:
    preprocess = preprocess_for(montezuma.GAME, "atariari", (210, 160))
    first, again = (montezuma.ScriptsFactory()(preprocess, [3, 4]) for _ in range(2))
    frames, is_first = np.zeros((2, 1, 1), np.uint8), np.ones(2, bool)
    played = []
    for _ in range(300):
        actions = first.act(frames, is_first)
        assert (actions == again.act(frames, is_first)).all()
        played.append(actions)
        is_first = np.zeros(2, bool)
    names = {preprocess.action_set[action] for action in np.unique(played)}
    assert {"LEFT", "RIGHT", "UP", "DOWN"} <= names
    assert (np.array(played)[:, 0] != np.array(played)[:, 1]).any()


def test_the_digest_is_of_the_rulers() -> None:
    assert len(ruler_digest()) == 64
