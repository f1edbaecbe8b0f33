"""Pictures of an encoder and films of an agent: drawn completely, the same every time, crisp, within their size."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.errors import UserError
from pipeline.gameplay import FRAME_DURATION_MS, Moment, poster, write_gameplay
from pipeline.models.distributions import DiagonalGaussian, kl_divergence
from pipeline.models.vae import VAE, VAESettings
from pipeline.pictures import ACTIVE, INACTIVE, Figures, encoder_pictures, units_picture
from pipeline.plate import BACKGROUND, Row, compose, heat
from pipeline.views import (
    Unit,
    as_pixels,
    blends,
    decoded,
    direction_views,
    latent_views,
    posterior_of,
    units,
)

NAMES = ["reconstructions", "traversals", "directions", "looks", "interpolation", "samples"]


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
def test_encoder_pictures_are_readable_files(tmp_path: Path, height: int, width: int) -> None:
    frames = moving_squares(7, height, width)
    paths = encoder_pictures(tiny_vae(height, width), frames, tmp_path / "pictures")
    assert [path.stem for path in paths] == NAMES
    for path in paths:
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert 900 <= picture.width <= 1200
            assert len(picture.getcolors(1 << 24)) > 10
    assert sum(file.stat().st_size for file in (tmp_path / "pictures").rglob("*") if file.is_file()) < 2_000_000
    figures = Figures.read(tmp_path / "pictures")
    assert figures is not None
    assert (figures.height, figures.width, figures.is_grid) == (height, width, False)
    for view in (*figures.latents, *figures.directions):
        with Image.open(tmp_path / "pictures" / view.strip) as strip:
            assert strip.size == (width * len(view.values), height)


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


def seeing_vae(**settings: Any) -> VAE:
    """One whose decoder shows every latent, as if it had learned."""
    torch.manual_seed(0)
    model = VAE(VAESettings(patch=4, widths=(4, 4), **settings).for_frames(20, 20)).eval()
    torch.nn.init.normal_(model.decoder.layers[-2].weight, std=0.3)  # type: ignore[arg-type]
    return model


def test_what_a_latent_looks_at_is_where_its_mean_comes_from() -> None:
    """An encoder that reads each latent off one place: the map is bright there, and dark where nothing ever changes."""
    frames = np.random.default_rng(0).integers(0, 256, (50, 20, 20), dtype=np.uint8)
    frames[:, :, 10:] = 77
    model = seeing_vae(z_dim=3)
    places = [(2, 3), (15, 8), (9, 14)]

    class Reader(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> DiagonalGaussian:
            mean = torch.stack(
                [x[:, row, column] / 99.0 * (index + 1) for index, (row, column) in enumerate(places)], 1
            )
            return DiagonalGaussian(mean, torch.full_like(mean, -2.0))

    model.encoder = Reader()  # type: ignore[assignment]
    for view in latent_views(model, frames, posterior_of(model, frames)):
        place = places[int(view.name[1:])]
        is_constant = place[1] >= 10
        assert (view.looks > 0).sum() == (0 if is_constant else 1)
        assert is_constant or view.looks[place] > 0


def test_a_strip_is_the_decoder_along_one_latent() -> None:
    model, frames = seeing_vae(z_dim=5), moving_squares(8, 20, 20)
    posterior = posterior_of(model, frames)
    for view in latent_views(model, frames, posterior):
        dim = int(view.name[1:])
        assert np.mean(view.values) == pytest.approx(float(posterior.mean[:, dim].mean()), abs=1e-5)
        assert np.diff(view.values) == pytest.approx(0.5 * float(posterior.mean[:, dim].std()), abs=1e-5)
        others = posterior.mean.repeat_interleave(len(view.values), 0)
        others[:, dim] = torch.tensor(view.values).repeat(len(frames))
        shown = as_pixels(decoded(model, others)[0]).reshape(len(frames), len(view.values), 20, 20)
        assert (np.abs(shown.astype(int) - view.strip).max((1, 2, 3)) <= 1).any()
        assert view.change.max() > 0


def test_directions_explain_the_variance_in_order() -> None:
    model, frames = seeing_vae(z_dim=5), moving_squares(8, 20, 20)
    posterior = posterior_of(model, frames)
    views = direction_views(model, frames, posterior)
    shares = [float(view.note.partition("%")[0]) for view in views]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.5)
    spread = [view.values[-1] - view.values[0] for view in views]
    total = float(posterior.mean.var(0).sum())
    assert sum((width / 4) ** 2 for width in spread) == pytest.approx(total, rel=1e-4)


def test_channels_of_a_grid_are_shown_by_their_cells() -> None:
    """The map of a channel is the KL of its cells over the pixels that each covers, also where the frame ends early."""
    model, frames = seeing_vae(latent_channels=2), moving_squares(8, 20, 20)
    posterior = posterior_of(model, frames)
    kl = kl_divergence(posterior, model.prior()).mean(0).view(2, 3, 3)
    views = latent_views(model, frames, posterior)
    assert {view.name for view in views} == {"channel 0", "channel 1"}
    for view in views:
        own = kl[int(view.name[-1])]
        assert view.looks.shape == (20, 20)
        assert view.looks[0, 0] == view.looks[7, 7] == pytest.approx(float(own[0, 0]))
        assert view.looks[19, 19] == view.looks[16, 16] == pytest.approx(float(own[2, 2]))
        row, column = divmod(int(own.argmax()), 3)
        assert view.note == f"KL {float(own.sum()):.2f} nats; moved in row {row}, column {column}"
    found = units((2, 3, 3), kl.flatten().tolist(), [True] * 9 + [False] * 9)
    assert [(unit.num_active, unit.num_latents) for unit in found] == [(9, 9), (0, 9)]
    assert sum(unit.kl for unit in found) == pytest.approx(float(kl.sum()))


def test_a_blend_starts_and_ends_at_two_frames() -> None:
    model, frames = seeing_vae(z_dim=5), moving_squares(8, 20, 20)
    for way in blends(model, frames, posterior_of(model, frames)):
        for end in (0, -1):
            match = [index for index, frame in enumerate(frames) if (frame == way.pixels[end]).all()]
            assert len(match) == 1
            assert (way.latents[end] == as_pixels(decoded(model, posterior_of(model, frames[match]).mean)[0])[0]).all()
        assert (way.pixels[0] != way.pixels[-1]).any()


def test_units_are_drawn_from_the_greatest_down(tmp_path: Path) -> None:
    drawn = [Unit(f"z{index}", kl, int(kl > 0.1)) for index, kl in enumerate((0.0, 4.0, 2.0, 0.01))]
    plate = np.asarray(Image.open(units_picture(drawn, tmp_path)))
    heights = [
        int((plate[:, 24 + 1008 * number // 4 + 20] == colour).all(1).sum())
        for number, colour in enumerate([ACTIVE, ACTIVE, INACTIVE, INACTIVE])
    ]
    assert heights[0] == pytest.approx(300, abs=2)
    assert heights[1] == pytest.approx(150, abs=2)
    assert heights[2] == heights[3] == pytest.approx(3, abs=1)


def test_a_record_of_figures_leads_nowhere_else(tmp_path: Path) -> None:
    encoder_pictures(tiny_vae(24, 24), moving_squares(4, 24, 24), tmp_path)
    path = tmp_path / "figures.json"
    path.write_text(path.read_text().replace("strips/latent-00.png", "../../etc/passwd"))
    with pytest.raises(UserError, match="leads elsewhere"):
        Figures.read(tmp_path)


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
