"""The ruler: labels belong to their frames, the parts of a probe share nothing, and the probes are what they say."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from probe_toys import HEIGHT, PONG, WIDTH, ball_dataset, positions
from sklearn.metrics import accuracy_score, f1_score
from torch import nn

from jobs import cli
from pipeline import atariari, models, velocity
from pipeline.artifact import LatentStats, save_encoder
from pipeline.atari import make_vector, preprocess_for
from pipeline.collect import lane_seeds
from pipeline.errors import UserError
from pipeline.labels import TEST, TRAIN, UNUSED, VALIDATION, Labels, entropy_nats, features_of, read_labels
from pipeline.models.vae import VAESettings
from pipeline.origin import Origin, load_origin, require_unseen
from pipeline.probe import (
    BATCH,
    EpisodeSampler,
    Plateau,
    _Matrix,
    majority,
    probe_features,
    scored,
    standardised,
    weighted_scores,
)
from pipeline.store import FramesDataset

LENGTHS = [*[90] * 20, 65, 30, 65, 90]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> FramesDataset:
    return ball_dataset(tmp_path_factory.mktemp("ball") / "probe", LENGTHS, part="probe")


@pytest.fixture(scope="module")
def labels(dataset: FramesDataset) -> Labels:
    return read_labels(dataset)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


# --- what is known of the games


def test_scores_follow_from_the_published_variables() -> None:
    """The rule of categories gives the published score of a game, of most games to the rounding."""
    off = {}
    for game in atariari.games(only_published=True):
        figures = atariari.published(game)
        by_variable = {name: figures[name]["st-dim"] for name in figures if name in atariari.variables(game)}
        if by_variable:
            off[game] = abs(atariari.score(game, by_variable)[0] - figures[""]["st-dim"])  # type: ignore[arg-type,operator]
    assert len(atariari.games()) == 24
    assert len(atariari.games(only_published=True)) == 22
    assert sum(difference <= 0.0151 for difference in off.values()) >= 18


def test_a_game_goes_by_its_ale_id() -> None:
    assert atariari.variables("space_invaders") == atariari.variables("spaceinvaders")
    with pytest.raises(UserError, match=r"no labels for zaxxon.*pong"):
        atariari.variables("zaxxon")


# --- collection


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_parts_share_no_emulator_seed(one: int, other: int) -> None:
    assert not set(lane_seeds(one, 64, "pretrain")) & set(lane_seeds(other, 64, "probe"))
    assert len(set(lane_seeds(one, 64, "pretrain"))) == 64
    assert all(0 <= seed < 2**31 for seed in lane_seeds(one, 64, "probe"))


def test_ram_is_of_the_very_frame() -> None:
    """Pong's ball on the screen is where its RAM says, and not where the RAM of the frame before or after says."""
    preprocess = preprocess_for("pong", "atariari", (210, 160))
    env = make_vector(preprocess, 1, with_ram=True, life_loss_ends=True)
    rng, step = np.random.default_rng(0), env.reset(np.array([5]))
    ram, seen = [], []
    for _ in range(400):
        step = env.step(rng.integers(1, env.num_actions, 1))
        field = step.frames[0][34:194, 20:140].copy()  # without paddles and score
        ys, xs = np.nonzero(field == field.max())
        assert step.ram is not None
        ram.append(step.ram[0])
        seen.append((xs.mean(), ys.mean()) if 0 < len(xs) <= 40 and field.max() > 200 else (np.nan, np.nan))
    places, screen = positions(np.stack(ram)).astype(float), np.array(seen)

    def spread(lag: int) -> np.ndarray:
        known, on_screen = np.roll(places, lag, 0)[1:-1], screen[1:-1]
        is_clear = ~np.isnan(on_screen).any(1) & (np.abs(np.diff(places, axis=0)) < 16).all(1)[:-1]
        is_clear &= (np.abs(np.diff(places, axis=0)) < 16).all(1)[1:] & (known[:, 1] > 0)
        assert is_clear.sum() > 50
        return np.std((known - on_screen)[is_clear], axis=0)

    assert (spread(0) < 1.5).all()
    assert (spread(1) > 2.5).all()
    assert (spread(-1) > 2.5).all()


# --- labels and parts


def test_parts_are_whole_episodes_that_are_long_enough(dataset: FramesDataset, labels: Labels) -> None:
    members = [set(labels.episode[labels.rows(part)]) for part in (TRAIN, VALIDATION, TEST)]
    assert sum(map(len, members)) == len(set().union(*members))
    # A frame on which an episode ends is not used: episodes of 65 rows have 64 frames, too few.
    assert set().union(*members) == {number for number, length in enumerate(LENGTHS) if length > 65}
    assert [len(part) for part in members] == [14, 2, 5]
    is_end = np.append(np.diff(labels.episode) != 0, True)
    assert (labels.split[is_end] == UNUSED).all()
    assert labels.variables == ("player_score", "ball_x", "ball_y")
    assert "enemy_x" in labels.dropped


def test_values_are_those_of_the_rows(labels: Labels) -> None:
    assert (labels.values[:, 1:] == positions(labels.ram)).all()


def test_test_frames_that_occur_elsewhere_are_left_out(tmp_path: Path) -> None:
    """Without noise a picture is the ball's place alone: what is left of the test part was nowhere else."""
    data = ball_dataset(tmp_path / "clean", [70] * 20, is_noisy=False)
    labels = read_labels(data)
    places = [tuple(place) for place in positions(labels.ram)]
    elsewhere = {places[row] for part in (TRAIN, VALIDATION) for row in labels.rows(part)}
    assert labels.num_duplicates > 0
    assert not elsewhere & {places[row] for row in labels.rows(TEST)}


def test_too_few_episodes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2 episodes of 65 frames or more"):
        read_labels(ball_dataset(tmp_path / "few", [90, 90, 30]))


def test_entropy() -> None:
    assert entropy_nats(np.zeros(9, np.uint8)) == 0
    assert entropy_nats(np.arange(256, dtype=np.uint8)) == pytest.approx(np.log(256))


# --- scores


@given(st.integers(0, 2**16), st.integers(1, 60), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_scores_are_those_of_scikit_learn(seed: int, size: int, num_values: int) -> None:
    rng = np.random.default_rng(seed)
    true, predicted = (rng.integers(0, num_values, size).astype(np.uint8) for _ in range(2))
    weight = rng.random(size) + 0.1
    f1, accuracy = weighted_scores(true, predicted, weight)
    assert f1 == pytest.approx(f1_score(true, predicted, average="weighted", sample_weight=weight, zero_division=0))
    assert accuracy == pytest.approx(accuracy_score(true, predicted, sample_weight=weight))


def test_the_majority_is_the_commonest_value(labels: Labels) -> None:
    called = majority(labels)
    assert called.shape == (len(labels.rows(TEST)), 3)
    for index, column in enumerate(labels.values[labels.rows(TRAIN)].T):
        values, counts = np.unique(column, return_counts=True)
        assert counts[values == called[0, index]] == counts.max()


def test_the_right_answers_score_one(labels: Labels) -> None:
    result = scored(labels, labels.values[labels.rows(TEST)])
    assert (result.f1, result.accuracy) == (1, 1)


# --- probes


def test_probes_find_what_is_there_and_nothing_else(dataset: FramesDataset, labels: Labels) -> None:
    pixels = features_of(dataset, lambda frames: frames.flatten(1).float() / 10)  # few frames: large steps
    result = probe_features(pixels, labels)
    chance = scored(labels, majority(labels))
    assert result.f1_by_variable["ball_x"] > 0.8
    assert result.f1_by_variable["ball_y"] > 0.8
    assert result.f1_by_variable["player_score"] < 0.5
    blind = probe_features(torch.zeros(len(pixels), 3), labels)
    for name in ("ball_x", "ball_y"):
        assert blind.f1_by_variable[name] < chance.f1_by_variable[name] + 0.1


def test_standardised_features_do_not_depend_on_their_scale(dataset: FramesDataset, labels: Labels) -> None:
    features = torch.randn(len(labels.values), 4) * torch.tensor([1e-4, 1.0, 50.0, 0.0]) + 3
    found = standardised(features, labels)
    known = found[torch.from_numpy(labels.rows(TRAIN))]
    torch.testing.assert_close(known.std(0, unbiased=False), torch.tensor([1.0, 1.0, 1.0, 0.0]), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(standardised(features[:, 1:3] * 7, labels), found[:, 1:3], rtol=1e-4, atol=1e-4)


def test_a_matrix_learns_as_separate_linear_layers_do() -> None:
    """All probes together, one learning rate each, against torch's own layers, cross-entropy and Adam."""
    rng = torch.Generator().manual_seed(0)
    x, sizes, lrs = torch.randn(40, BATCH, 5, generator=rng), (3, 7, 2), np.array([1e-3, 3e-4, 1e-2])
    x = torch.cat([x, torch.ones(40, BATCH, 1)], 2)
    targets = torch.stack([torch.randint(size, (40, BATCH), generator=rng) for size in sizes], 2)
    bounds = np.array([0, 3, 10, 12])
    matrix = _Matrix(6, bounds, seed=0)
    start = matrix.weight.clone()
    assert float(start.abs().max()) <= 5**-0.5
    matrix.begin(np.array([0, 2]), lrs)
    for batch, target in zip(x, targets):
        matrix.update(batch, target)
    matrix.end()
    assert torch.equal(matrix.weight[3:10], start[3:10])  # not at work
    for which in (0, 2):
        rows = slice(bounds[which], bounds[which + 1])
        layer = nn.Linear(6, sizes[which], bias=False)
        layer.weight.data = start[rows].clone()
        optimizer = torch.optim.Adam(layer.parameters(), lr=lrs[which], eps=1e-5)
        for batch, target in zip(x, targets[:, :, which]):
            optimizer.zero_grad()
            nn.functional.cross_entropy(layer(batch), target).backward()
            optimizer.step()
        torch.testing.assert_close(matrix.weight[rows], layer.weight.data, rtol=1e-4, atol=1e-5)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=100))
@settings(max_examples=60, deadline=None)
def test_rates_and_stops_are_torchs(accuracies: list[int]) -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([parameter], lr=5e-4)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", patience=5, factor=0.2, min_lr=1e-5)
    plateau, best, waited = Plateau(1), -1.0, 0
    for accuracy in (number / 20 for number in accuracies):
        plateau.step(np.array([accuracy]))
        schedule.step(accuracy)
        waited = 0 if accuracy > best else waited + 1
        best = max(best, accuracy)
        assert plateau.lr[0] == pytest.approx(optimizer.param_groups[0]["lr"])
        assert plateau.is_stopped[0] == (waited >= 15)
        if waited >= 15:
            break


def test_batches_are_uniform_over_episodes() -> None:
    episode = np.repeat([0, 1, 2], [1000, 10, 50])
    rows = np.arange(1060)[episode != 2]
    drawn = EpisodeSampler(rows, episode)
    epochs = np.concatenate([drawn.epoch(np.random.default_rng(seed)).reshape(-1) for seed in range(20)])
    assert drawn.epoch(np.random.default_rng(0)).shape == (1010 // BATCH, BATCH)
    assert set(epochs) <= set(rows)
    assert abs((episode[epochs] == 1).mean() - 0.5) < 0.02
    assert (np.bincount(epochs[episode[epochs] == 1])[1000:] > 0).all()


# --- velocity


def test_velocity_needs_a_stack(dataset: FramesDataset, labels: Labels) -> None:
    """Places of the ball are features enough, but only those of several frames; the target is what the RAM does."""
    places = torch.from_numpy(positions(labels.ram)).float()
    found = velocity.velocity(places, labels)
    assert min(found.stacked.values()) > 0.99
    assert max(found.single.values()) < 0.3
    ends, target = velocity.moving(labels, 4)
    assert (labels.episode[ends] == labels.episode[ends - 3]).all()
    assert (target == (positions(labels.ram)[ends] - positions(labels.ram)[ends - 1])).all()


def test_a_ball_that_is_out_or_served_anew_has_no_velocity(labels: Labels) -> None:
    ram = labels.ram.copy()
    row = int(labels.rows(TRAIN)[10])
    ram[row, atariari.variables("pong")["ball_x"]] = 200
    ends = set(velocity.moving(Labels(**{**vars(labels), "ram": ram}), 3)[0].tolist())
    assert not ends & {row, row + 1, row + 2}
    assert {row - 1, row + 3} <= ends


# --- the command


def encoder(path: Path, origin: Origin | None = None) -> Path:
    model_settings = VAESettings(z_dim=6, patch=4, widths=(8, 8))
    torch.manual_seed(0)
    model = models.build(model_settings.for_frames(HEIGHT, WIDTH))
    save_encoder(path, model, LatentStats.identity(6), PONG, {}, origin)
    return path


def test_the_command(dataset: FramesDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = ball_dataset(tmp_path / "pretrain", [20, 20], emulator_seed=2, part="pretrain")
    bundle = encoder(tmp_path / "bundle", Origin.of(other))
    command = ["probe", str(bundle), "--data", dataset.root, "--home", str(tmp_path / "home"), "--velocity", "--json"]
    assert cli.main(command) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["game"] == "pong"
    assert result["f1_by_variable"].keys() == {"player_score", "ball_x", "ball_y"}
    assert result["f1"] == pytest.approx(np.mean(list(result["f1_by_category"].values())))
    assert result["z_dim"] == 6
    assert result["features"] == "posterior mean"
    assert result["resolution"] == f"{HEIGHT}x{WIDTH}"
    assert 0 < result["test_frames"] < result["probe_frames"] < sum(LENGTHS)
    assert result["velocity_r2"].keys() == result["velocity_r2_single"].keys() == {"dx", "dy"}
    assert result["remark"] is None
    assert {"accuracy", "seconds"} <= result.keys()


def test_it_is_refused_where_it_would_mean_nothing(
    dataset: FramesDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = ["--home", str(tmp_path / "home")]
    trained = encoder(tmp_path / "trained", Origin.of(dataset))
    twin = ball_dataset(tmp_path / "twin", [20, 20], emulator_seed=1, part="probe")
    played = ball_dataset(tmp_path / "played", [20], policy="models:/agent/1")
    blind = ball_dataset(tmp_path / "blind", [20], has_ram=False)
    ruled = ball_dataset(tmp_path / "ruled", [20], preprocess=replace(PONG, protocol="atari100k"))
    cropped = ball_dataset(tmp_path / "cropped", [20], preprocess=replace(PONG, resize="area"))
    unlabelled = ball_dataset(tmp_path / "unlabelled", [20], preprocess=replace(PONG, game="zaxxon"))
    for bundle, data, message in (
        (trained, dataset, "learned from .* itself"),
        (encoder(tmp_path / "akin", Origin.of(twin)), dataset, "1 emulators' seeds in common"),
        (trained, played, "has policy 'models:/agent/1', not 'random'"),
        (trained, blind, "holds no RAM"),
        (trained, ruled, "has protocol 'atari100k', not 'atariari'"),
        (trained, cropped, "prepare frames differently .resize: .* has 'none', these frames 'area'"),
        (trained, unlabelled, "no labels for zaxxon; it has them for asteroids, .*yarsrevenge"),
    ):
        assert cli.main(["probe", str(bundle), "--data", data.root, *home]) == 2
        error = capsys.readouterr().err
        assert re.search(message, error), error


def test_an_encoder_of_another_protocol_is_probed_with_a_remark_and_of_other_frames_refused(
    dataset: FramesDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What its frames look like must be the same, and not who played and by which rules."""
    torch.manual_seed(0)
    model = models.build(VAESettings(z_dim=6, patch=4, widths=(8, 8)).for_frames(HEIGHT, WIDTH))
    other = replace(PONG, protocol="machado", sticky_probability=0.25, action_set=("NOOP", "FIRE"), noop_max=0)
    kept = {"played": other, "skipped": replace(other, frame_skip=3), "same": PONG}
    for name, preprocess in kept.items():
        save_encoder(tmp_path / name, model, LatentStats.identity(6), preprocess, {})
    results = {}
    for name in ("played", "same"):
        command = ["probe", str(tmp_path / name), "--data", dataset.root, "--home", str(tmp_path / "home"), "--json"]
        assert cli.main(command) == 0
        results[name] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results["played"]["f1_by_variable"] == results["same"]["f1_by_variable"]
    assert "learned under protocol machado" in results["played"]["remark"]
    assert "protocol" not in results["same"]["remark"]
    assert cli.main(["probe", str(tmp_path / "skipped"), "--data", dataset.root, "--home", str(tmp_path / "home")]) == 2
    error = capsys.readouterr().err
    assert re.search(r"prepare frames differently .frame_skip: .* has 3, these frames \d+\)", error), error


def test_a_bundle_that_does_not_say_what_it_learned_from_is_remarked_on(dataset: FramesDataset, tmp_path: Path) -> None:
    assert load_origin(encoder(tmp_path / "old")) is None
    assert "not excluded" in str(require_unseen(dataset, None))
    origin = Origin.of(dataset)
    assert load_origin(encoder(tmp_path / "new", origin)) == origin
