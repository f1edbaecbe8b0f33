"""The ruler's benchmark: its real entry point at toy size, what it keeps, and that long trainings go on."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from probe_toys import HEIGHT, PONG, WIDTH, ball_dataset
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import ruler
from atariari import keeping
from atariari.networks import PublishedVAE, SupervisedProbe, pixels
from atariari.training import Clocked

from pipeline import models
from pipeline.artifact import LatentStats, save_encoder
from pipeline.errors import UserError
from pipeline.models.vae import VAESettings
from pipeline.origin import Origin

PAGE = "# Ruler\n\nWords before.\n\n" + keeping.BEGIN + "\nold\n" + keeping.END + "\n\nWords after.\n"


def test_rows_are_measured_once_and_stand_beside_the_published(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    ball_dataset(tmp_path / "data" / "pong-probe", [90] * 20)
    ball_dataset(tmp_path / "data" / "pong-pretrain", [90] * 5, emulator_seed=2)
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "ruler.md").write_text(PAGE)
    arguments = ["--data", str(tmp_path / "data"), "--results", str(tmp_path / "kept"), "--json"]
    arguments += ["--rows", "majority", "pixels", "pca+std", "--games", "pong", "--write", str(tmp_path / "page")]
    assert ruler.main(arguments) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["pong"]
    assert rows["majority"]["published_f1"] == 0.10
    assert rows["pixels"]["published_f1"] is None
    assert rows["pixels"]["f1"] > rows["majority"]["f1"]
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").iterdir()}
    assert len(kept) == 3
    assert ruler.main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").iterdir()} == kept
    text = (tmp_path / "page" / "ruler.md").read_text()
    assert text.startswith("# Ruler\n\nWords before.")
    assert text.endswith("\n\nWords after.\n")
    assert "| pong | majority | 1 | " in text
    assert "old" not in text


def test_an_encoder_is_measured_again_once_it_is_another(tmp_path: Path) -> None:
    """A row is kept for a bundle's bytes, not for its folder; one that has seen the games is refused."""
    torch.set_num_threads(1)
    probe = ball_dataset(tmp_path / "pong-probe", [90] * 20)
    bundle, kept = tmp_path / "bundle", tmp_path / "kept"
    arguments = ["--data", str(tmp_path), "--results", str(kept), "--rows", str(bundle), "--games", "pong"]
    for seed in (0, 0, 1):
        encoder(bundle, seed)
        assert ruler.main(arguments) == 0
    assert len(list(kept.iterdir())) == 2
    encoder(bundle, 2, Origin.of(probe))
    with pytest.raises(UserError, match=r"learned from .* itself"):
        ruler.main(arguments)


def encoder(path: Path, seed: int, origin: Origin | None = None) -> None:
    """Writes a bundle over another one."""
    shutil.rmtree(path, ignore_errors=True)
    torch.manual_seed(seed)
    model = models.build(VAESettings(z_dim=4, patch=4, widths=(8,)).for_frames(HEIGHT, WIDTH))
    save_encoder(path, model, LatentStats.identity(4), PONG, {}, origin)


def test_games_that_are_held_out_are_not_probed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ruler.main(["--data", "nowhere", "--games", "freeway"])
    assert "invalid choice: 'freeway'" in capsys.readouterr().err


def test_what_can_be_mended_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert keeping.exit_code(lambda: ruler.main(["--data", str(tmp_path)])) == 2
    assert capsys.readouterr().err == (
        f"error: there is no dataset at {tmp_path}/pong-probe; make one with `latentrl collect --out "
        f"{tmp_path}/pong-probe`\n"
    )


def test_the_published_networks_fit_their_frames() -> None:
    torch.manual_seed(0)
    frames = torch.randint(0, 256, (2, 210, 160), dtype=torch.uint8)
    vae = PublishedVAE()
    assert vae.encoder(frames).shape == (2, 256)
    assert vae.decoder(vae.encoder(frames)).shape == pixels(frames).shape
    loss = vae.loss(frames)
    loss.backward()
    assert 0 < loss.item() < 2 * 210 * 160 + 1e4
    assert all(weight.grad is not None for weight in vae.parameters())
    assert SupervisedProbe(2).logits(frames, 1).shape == (2, 256)


def test_a_long_training_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    class Cut(Exception):
        pass

    def training(cut_at: int | None) -> tuple[Clocked, list[int]]:
        weight, updates = nn.Linear(1, 1), list[int]()

        def update() -> None:
            if len(updates) == cut_at:
                raise Cut
            updates.append(1)
            with torch.no_grad():
                weight.bias += 1
            torch.randn(200, 200) @ torch.randn(200, 200)

        if not (tmp_path / "state.pt").exists():
            nn.init.zeros_(weight.bias)
        clocked = Clocked(tmp_path, {"w": weight}, update, lambda: {"bias": round(float(weight.bias))})
        clocked.keep_every_s = 0.0
        return clocked, updates

    with pytest.raises(Cut):
        training(cut_at=7)[0].run([100.0])
    clocked, _ = training(cut_at=None)
    assert clocked.updates == 7
    assert [point["bias"] for point in clocked.run([clocked.seconds + 0.05])] == [clocked.updates]
    again, updates = training(cut_at=0)
    assert again.run([point["mark_s"] for point in clocked.curve]) == clocked.curve
    assert updates == []
