"""Pictures of an encoder and films of an agent: drawn completely, the same every time, crisp, within their size."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.gameplay import FRAME_DURATION_MS, Moment, poster, write_gameplay
from pipeline.models.vae import VAE, VAESettings
from pipeline.pictures import encoder_pictures
from pipeline.plate import BACKGROUND, Row, compose, heat

NAMES = ["reconstructions", "traversals", "interpolation", "samples"]


def tiny_vae(height: int = 84, width: int = 84) -> VAE:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return VAE(VAESettings(z_dim=8, widths=(4,), num_blocks=0).for_frames(height, width))


def moving_squares(count: int, height: int, width: int) -> np.ndarray:
    frames = np.full((count, height, width), 40, np.uint8)
    for i, frame in enumerate(frames):
        frame[5 + i : 13 + i, 7 : 15 + i] = 220
    return frames


@pytest.mark.parametrize(("height", "width"), [(84, 84), (210, 160), (12, 10)])
def test_encoder_pictures_are_four_readable_files(tmp_path: Path, height: int, width: int) -> None:
    frames = moving_squares(7, height, width)
    paths = encoder_pictures(tiny_vae(height, width), frames, tmp_path / "pictures")
    assert [path.stem for path in paths] == NAMES
    for path in paths:
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert 900 <= picture.width <= 1200
            assert len(picture.getcolors(1 << 24)) > 10


def test_encoder_pictures_are_reproducible_and_leave_the_model_as_it_was(tmp_path: Path) -> None:
    model, frames = tiny_vae().train(), moving_squares(9, 84, 84)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = [path.read_bytes() for path in encoder_pictures(model, frames, tmp_path / "a")]
    torch.manual_seed(123)
    second = [path.read_bytes() for path in encoder_pictures(model, frames, tmp_path / "b")]
    assert first == second
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_frames_stand_in_the_picture_pixel_for_pixel(tmp_path: Path) -> None:
    frames = moving_squares(2, 84, 84)
    plate = np.asarray(Image.open(encoder_pictures(tiny_vae(), frames, tmp_path)[0]).convert("L"))
    enlarged = frames[0].repeat(2, axis=0).repeat(2, axis=1)
    windows = np.lib.stride_tricks.sliding_window_view(plate, enlarged.shape)[:120, :40]
    assert (windows == enlarged).all(axis=(2, 3)).any()


@pytest.mark.parametrize("frames", [np.zeros((1, 84, 84), np.uint8), np.zeros((4, 84, 84), np.float32)])
def test_encoder_pictures_refuses_other_input(tmp_path: Path, frames: np.ndarray) -> None:
    with pytest.raises(ValueError, match="at least 2 frames"):
        encoder_pictures(tiny_vae(), frames, tmp_path / "pictures")
    assert not (tmp_path / "pictures").exists()


def test_heat_is_dark_at_zero_and_bright_at_the_top() -> None:
    colours = heat(np.array([[0.0, 1.0, 5.0]]), top=1.0).astype(int)
    assert colours[0, 0].sum() < 20
    assert colours[0, 1].sum() > 600
    assert (colours[0, 1] == colours[0, 2]).all()


def test_plate_is_dark_and_holds_all_cells() -> None:
    cells = [np.full((84, 84), level, np.uint8) for level in (101, 151, 201)]
    plate = np.asarray(compose([Row("three", cells, note="note", captions=["a", "b", "c"])]))
    assert tuple(plate[0, 0]) == BACKGROUND
    for level in (101, 151, 201):
        assert (plate == level).all(axis=-1).sum() == 168 * 168


def moments(count: int, *, is_noisy: bool = False, has_reconstruction: bool = True) -> list[Moment]:
    rng = np.random.default_rng(0)
    game_colours = np.array([[144, 72, 17], [236, 236, 236], [92, 186, 92]], np.uint8)
    result = []
    for i, frame in enumerate(moving_squares(count, 84, 84)):
        screen = np.repeat(game_colours[:1], 210 * 160, axis=0).reshape(210, 160, 3)
        screen[20 + i : 40 + i, 30:60] = game_colours[2]
        kept = rng.integers(0, 256, (84, 84), dtype=np.uint8) if is_noisy else frame
        result.append(Moment(screen, frame, kept if has_reconstruction else None))
    return result


def test_film_shows_the_exact_colours_in_real_time(tmp_path: Path) -> None:
    path = tmp_path / "film.gif"
    assert write_gameplay(moments(5), path) == 5
    with Image.open(path) as film:
        assert film.n_frames == 5
        assert film.info["duration"] == FRAME_DURATION_MS
        assert film.info["loop"] == 0
        film.seek(3)
        colours = {colour for _, colour in film.convert("RGB").getcolors(1 << 24)}
    assert {(144, 72, 17), (92, 186, 92)} <= colours


def test_film_without_decoder_is_narrower(tmp_path: Path) -> None:
    write_gameplay(moments(2), tmp_path / "with.gif")
    write_gameplay(moments(2, has_reconstruction=False), tmp_path / "without.gif")
    assert Image.open(tmp_path / "without.gif").width < Image.open(tmp_path / "with.gif").width


def test_film_is_cut_to_its_size(tmp_path: Path) -> None:
    path = tmp_path / "film.gif"
    count = write_gameplay(moments(30, is_noisy=True), path, max_bytes=200_000)
    assert 1 <= count < 30
    assert 100_000 < path.stat().st_size <= 200_000
    assert Image.open(path).n_frames == count


def test_film_that_cannot_fit_or_has_nothing_to_show_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none that fits"):
        write_gameplay(moments(2), tmp_path / "film.gif", max_bytes=100)
    with pytest.raises(ValueError, match="at least one moment"):
        write_gameplay([], tmp_path / "film.gif")
    assert not (tmp_path / "film.gif").exists()


def test_film_of_the_most_colourful_game_fits_a_gif(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    palette = rng.integers(0, 256, (128, 3), dtype=np.uint8)
    screen = palette[rng.integers(0, 128, (210, 160))]
    moment = dataclasses.replace(moments(1)[0], screen=screen)
    assert write_gameplay([moment], tmp_path / "film.gif") == 1


def test_poster_is_the_first_picture(tmp_path: Path) -> None:
    write_gameplay(moments(3), tmp_path / "film.gif")
    still = poster(tmp_path / "film.gif")
    assert still.startswith(b"\x89PNG")
