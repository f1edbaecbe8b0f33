"""An encoder's page: found by run, address or folder; its probes in MLflow; sliders that really move the picture."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chromium import Chromium
from PIL import Image
from probe_toys import HEIGHT, PONG, WIDTH, ball_dataset
from registry_toys import free_port
from test_report import SCREENS, TagCollector, require_sound

import jobs.report
from jobs import cli
from jobs.figures import PICTURES_FOLDER, draw_figures, frames_to_look_at
from jobs.probe_section import probe_summary
from jobs.workspace import Workspace
from pipeline import models
from pipeline.artifact import LatentStats, save_encoder
from pipeline.bundle import sha256_of
from pipeline.card import describe, model_card
from pipeline.errors import TrackingPending, UserError
from pipeline.journal import read_lines
from pipeline.models.vae import VAESettings
from pipeline.origin import Origin
from pipeline.pictures import Figures
from pipeline.probed import Probed
from pipeline.registry import Tracking, register_encoder
from pipeline.server import connect
from pipeline.store import FramesDataset

Z = 6
FLAT = VAESettings(z_dim=Z, patch=4, widths=(8, 8))


def make_bundle(path: Path, settings: VAESettings, data: FramesDataset) -> Path:
    """An encoder that has learned nothing, but whose decoder shows its latents."""
    torch.manual_seed(0)
    model = models.build(settings.for_frames(HEIGHT, WIDTH))
    with torch.no_grad():
        model.decoder.layers[-2].weight.normal_(0, 0.2)  # type: ignore[union-attr,index,operator]
    size = model.config.z_dim
    active = (True,) * (size - 1) + (False,)
    stats = LatentStats((0.0,) * size, (1.0,) * size, active, tuple(np.linspace(2, 0, size).tolist()))
    save_encoder(path, model, stats, PONG, {"Made for": "tests"}, Origin.of(data))
    return path


@dataclass(frozen=True)
class Project:
    """A registered encoder as its pretraining leaves it, and data to probe it with."""

    workspace: Workspace
    run: Path
    pretrain: FramesDataset
    probe: FramesDataset
    client: Any

    @property
    def run_id(self) -> str:
        return str(json.loads((self.run / "run.json").read_text())["run_id"])


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with Chromium() as chromium:
        yield chromium


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("encoder")
    data = ball_dataset(root / "pretrain", [40] * 4, emulator_seed=2, part="pretrain")
    workspace = Workspace.at(str(root / "home"))
    folder = workspace.new_run_folder("pretrain-toy")
    bundle = make_bundle(folder / "bundle", FLAT, data)
    with Tracking(workspace.tracking_uri).start_run(folder.name, stage="pretrain", folder=folder, game="pong") as run:
        run.log_dataset(data.facts(), "pretrain")
        for step in range(5):
            run.log_metrics({"bits_per_dim": 3.0 - 0.5 * step}, step * 10)
        draw_figures(bundle, *frames_to_look_at(data), folder / PICTURES_FOLDER)
        run.log_folder(folder / PICTURES_FOLDER, PICTURES_FOLDER)
        made = register_encoder(
            run, bundle, "toy", bits_per_dim=1.25, active_fraction=5 / 6, has_heldout=True, dataset=data.facts()
        )
        assert made is not None
        describe(run.outbox, bundle, made.sha256, [])
    lines = [json.dumps({"step": step * 10, "bits_per_dim": 3.0 - 0.5 * step}) for step in range(5)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    result = {"sha256": made.sha256, "model_uri": made.uri, "bits_per_dim": 1.25, "dataset": data.uri, "frames": 160}
    (folder / "result.json").write_text(json.dumps({**result, "digest": data.digest, "aliases": ["latest"]}))
    client = connect(Tracking(workspace.tracking_uri).address)
    return Project(workspace, folder, data, ball_dataset(root / "probe", [90] * 20, part="probe"), client)


def report(project: Project, asked: str, *more: str, home: Path | None = None) -> Path:
    """`latentrl report`, from the project's home or another one: its page."""
    workspace = Workspace(home, project.workspace.tracking_uri) if home else project.workspace
    return Path(jobs.report.run(workspace, asked, *more)["path"])


# --- what the page shows


def test_page_is_one_for_a_run_its_version_and_its_bundle(project: Project, browser: Chromium) -> None:
    page = report(project, project.run.name)
    assert page == project.run / "report.html"
    for asked in ("models:/toy/1", "models:/toy@latest", str(project.run / "bundle")):
        assert report(project, asked) == page
    for screen in SCREENS.values():
        visit = browser.visit(page, **screen)
        require_sound(visit, shown_px=80)
        assert len(visit.images) == 2 + 3 * 6 + 3 * 6 + 2 * 2
        for text in (
            "toy/1",
            "5 of 6",
            "z0",
            "direction 1",
            "Between two frames",
            "Drawn from the prior",
            "Active units",
        ):
            assert text in visit.text
        assert "held out, at the end 1.25" in visit.text
    assert page.stat().st_size < 1_000_000


def test_pictures_and_page_are_in_mlflow(project: Project) -> None:
    report(project, project.run.name)
    there = {file.path for file in project.client.list_artifacts(project.run_id)}
    assert {"report.html", PICTURES_FOLDER} <= there
    drawn = {file.path for file in project.client.list_artifacts(project.run_id, PICTURES_FOLDER)}
    names = ("reconstructions", "traversals", "directions", "looks", "interpolation", "samples", "units")
    assert {f"{PICTURES_FOLDER}/{name}.png" for name in names} <= drawn


@pytest.mark.parametrize("card", [".turn", ".turn.pair"])
def test_sliders_move_the_picture(project: Project, browser: Chromium, card: str) -> None:
    """What the screen shows at a place of the slider is that picture of the strip and no other."""
    page = report(project, project.run.name)
    figures = Figures.read(project.run / PICTURES_FOLDER)
    assert figures is not None
    name, count = (figures.latents[0].strip, 9) if card == ".turn" else (figures.blends[0].latents, 11)
    strip = np.asarray(Image.open(project.run / PICTURES_FOLDER / name).convert("L"), float)
    pictures = strip.reshape(HEIGHT, count, WIDTH).swapaxes(0, 1)
    places = [count // 2, count // 2 + 1, count // 2 + 2, count // 2 + 1]
    seen = browser.turn(page, card, ["ArrowRight", "ArrowRight", "ArrowLeft"])
    for place, (shot, _) in zip(places, seen):
        small = np.asarray(
            Image.open(io.BytesIO(shot)).convert("L").resize((WIDTH, HEIGHT), Image.Resampling.BOX), float
        )
        assert int(np.abs(pictures - small).mean((1, 2)).argmin()) == place
    assert len({said for _, said in seen}) == 3
    assert seen[1] == seen[3]


def test_the_only_script_is_ours_and_nothing_is_fetched(project: Project, browser: Chromium) -> None:
    page = report(project, project.run.name)
    tags = TagCollector.of(page)
    assert [tag for tag, _ in tags if tag in ("script", "iframe", "object", "embed", "form")] == ["script"]
    addresses = [value for _, given in tags for name, value in given if name in ("src", "href", "srcset", "action")]
    assert addresses
    assert all(str(address).startswith("data:") for address in addresses)
    text = page.read_text()
    planted = page.with_name("planted.html")
    planted.write_text(text.replace("</main>", '<script>document.title = "ran"</script></main>'))
    visit = browser.visit(planted, width=800)
    assert any("Content Security Policy" in message for message in visit.messages)
    assert visit.requests == []


def test_frames_are_those_of_another_dataset_on_request(project: Project) -> None:
    """Without touching the pictures of the run."""
    before = (project.run / PICTURES_FOLDER / "reconstructions.png").read_bytes()
    text = report(project, "models:/toy/1", project.probe.uri).read_text()
    assert f"dataset {project.probe.digest[:12]}" in text
    assert (project.run / PICTURES_FOLDER / "reconstructions.png").read_bytes() == before
    assert (
        project.run / f"{PICTURES_FOLDER}-{project.probe.digest[:8]}" / "reconstructions.png"
    ).read_bytes() != before


def test_what_is_not_known_is_said_with_the_command_for_it(project: Project, tmp_path: Path, browser: Chromium) -> None:
    """A bundle that came from nowhere."""
    bundle = shutil.copytree(project.run / "bundle", tmp_path / "bundle")
    result = jobs.report.run(Workspace.at(str(tmp_path / "home")), str(bundle))
    assert result["run_id"] is None
    visit = browser.visit(Path(result["path"]), width=800)
    require_sound(visit)
    for sentence in (
        f"Not probed yet. Type: latentrl probe {bundle} --data DIR --home",
        "No frames to draw pictures of: where its training frames lie is not known here. Type: latentrl report /",
        "so there is no curve of its bits per dimension. Type: latentrl report",
        f"latentrl train --game pong --protocol {PONG.protocol} --encoder {bundle} --mode frozen",
    ):
        assert sentence in visit.text
    assert "Active units" in visit.text
    assert not (tmp_path / "home" / "mlflow.db").exists()


def test_channels_of_a_grid_are_called_so(project: Project, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "grid", VAESettings(latent_channels=3, patch=4, widths=(8, 8)), project.pretrain)
    text = report(project, str(bundle), project.pretrain.uri, home=tmp_path / "home").read_text()
    assert "Turn a channel" in text
    assert re.search(r"channel \d <span>KL [\d.]+ nats; moved in row \d, column \d", text)
    assert "channels, each over its 9 cells" in text


def test_pages_that_cannot_be_are_refused(project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = ["--home", str(project.workspace.home)]
    folder = project.workspace.new_run_folder("evaluate")
    Tracking(project.workspace.tracking_uri).start_run(folder.name, stage="evaluate", folder=folder).close()
    unfinished = project.workspace.new_run_folder("pretrain-cut")
    Tracking(project.workspace.tracking_uri).start_run(unfinished.name, stage="pretrain", folder=unfinished).close()
    other = ball_dataset(tmp_path / "other", [20], preprocess=PONG.__class__(**{**vars(PONG), "frame_skip": 2}))
    for asked, message in (
        (["models:/toy/9"], "has no version 9"),
        ([folder.name, "--data", project.probe.uri], "--data is for an encoder's page"),
        ([unfinished.name], "has no finished encoder"),
        (["models:/toy/1", "--data", str(tmp_path)], "not a finished dataset|no dataset|manifest"),
        (["models:/toy/1", "--data", other.uri], "frame_skip"),
    ):
        assert cli.main(["report", *asked, *home]) == 2
        error = capsys.readouterr().err
        assert re.search(message, error), error
    shutil.rmtree(folder)
    shutil.rmtree(unfinished)


def test_a_home_that_cannot_be_written_is_said_at_once(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, sealed = str(project.run / "bundle"), "/sys/kernel/latentrl"
    for command in (["probe", bundle, "--data", project.probe.root], ["report", bundle]):
        assert cli.main([*command, "--home", sealed]) == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1
        assert said[0].startswith(f"error: cannot write to {sealed}/encoders/")


def test_a_server_that_is_away_stops_no_page(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.registry.CLOSE_PATIENCE_S", 0.5)
    workspace = Workspace.at(str(tmp_path / "home"), f"http://127.0.0.1:{free_port()}")
    folder = shutil.copytree(project.run, workspace.runs / "pretrain-toy-001")
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "uri": workspace.tracking_uri, "run_id": "0" * 32}))
    before = len(read_lines(folder / "outbox.jsonl"))
    with pytest.raises(TrackingPending, match=r"the page is written, but .* have not reached") as pending:
        jobs.report.run(workspace, folder.name)
    assert pending.value.result is not None
    assert "Probes that MLflow has on record are not shown: " in Path(pending.value.result["path"]).read_text()
    assert [entry["kind"] for entry in read_lines(folder / "outbox.jsonl")[before:]] == ["file"]


def test_a_run_of_someone_else_names_no_host_and_no_file(project: Project, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "home", project.workspace.tracking_uri)
    folder = shutil.copytree(project.run, workspace.runs / "pretrain-toy-001")
    result = json.loads((folder / "result.json").read_text())
    elsewhere = "s3://bucket/frames?endpoint_override=example.com"
    (folder / "result.json").write_text(json.dumps({**result, "dataset": elsewhere}))
    shutil.rmtree(folder / PICTURES_FOLDER)
    assert f"{elsewhere.partition('?')[0]}" in report(project, str(folder), home=workspace.home).read_text()
    shutil.copytree(project.run / PICTURES_FOLDER, folder / PICTURES_FOLDER)
    (folder / PICTURES_FOLDER / "samples.png").unlink()
    (folder / PICTURES_FOLDER / "samples.png").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="neither a file nor a folder"):
        report(project, str(folder), home=workspace.home)


# --- probes


def test_a_probe_is_recorded_and_found_by_everyone(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str], browser: Chromium
) -> None:
    """In MLflow with run and version, on the card, and on the page made in a home that has seen nothing of it."""
    places = ["--home", str(tmp_path / "one"), "--tracking-uri", project.workspace.tracking_uri, "--json"]
    assert cli.main(["probe", "models:/toy/1", "--data", project.probe.root, "--velocity", *places]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["run_id"] == project.run_id
    found = project.client.get_run(project.run_id)
    assert found.data.metrics["probe/f1"] == pytest.approx(result["f1"])
    assert found.data.metrics["probe/f1.ball_x"] == pytest.approx(result["f1_by_variable"]["ball_x"])
    assert found.info.status == "FINISHED"
    version = project.client.get_model_version("toy", "1")
    assert float(version.tags["probe.f1"]) == pytest.approx(result["f1"], abs=1e-4)
    assert version.tags["bundle_sha256"] == sha256_of(project.run / "bundle")
    for card in (version.description, found.data.tags["mlflow.note.content"]):
        assert card.startswith("# VAE encoder of pong")
        assert f"| ball_x | {result['f1_by_variable']['ball_x']:.2f} | 0.15 | 0.15 | 0.81 | 0.91 |" in card
    page = report(project, "models:/toy/1", home=tmp_path / "two")
    assert tmp_path / "two" in page.parents
    visit = browser.visit(page, width=360, is_phone=True)
    require_sound(visit, shown_px=80)
    assert f"with a mean F1 of {result['f1']:.2f}.\n" in visit.text
    assert re.search(rf"ball x\s+{result['f1_by_variable']['ball_x']:.2f}\s+0.15\s+0.15\s+0.81\s+0.91", visit.text)
    assert "held out, at the end 1.25" in visit.text  # the curve, from MLflow's history
    assert "Turn a latent" in visit.text  # from the dataset at the place that the server knows


def test_a_probe_without_a_run_is_kept_and_said(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = make_bundle(tmp_path / "bundle", FLAT, project.pretrain)
    home = ["--home", str(tmp_path / "home")]
    for scaled in ([], ["--standardised"]):
        assert cli.main(["probe", str(bundle), "--data", project.probe.root, *home, *scaled]) == 0
        assert "only: no run that made it is known here" in capsys.readouterr().out
    assert cli.main(["report", str(bundle), *home]) == 0
    text = next((tmp_path / "home" / "encoders").rglob("report.html")).read_text()
    assert '<th scope="col">standardised</th>' in text
    assert not (tmp_path / "home" / "mlflow.db").exists()


def record(**changed: Any) -> dict[str, Any]:
    figures = {"ball_x": 0.5, "ball_y": 0.25}
    probe = {"game": "pong", "resolution": "210x160", "features": "posterior mean", "digest": "d" * 64, "seed": 0}
    scores = {"f1": 0.4, "f1_by_category": {"small_object_localization": 0.375}, "f1_by_variable": figures}
    return {**probe, **scores, "accuracy": 0.5, "test_frames": 99, "anything": "else", **changed}


def test_published_figures_stand_in_the_summary_only_where_frames_are_theirs() -> None:
    assert "Published: random network 0.17, VAE 0.09, ST-DIM 0.81" in probe_summary(Probed.of(record()), 256)
    assert "Published" not in probe_summary(Probed.of(record(resolution="84x84")), 256)
    assert probe_summary(Probed.of(record(game="skiing", f1_by_variable={})), 256).endswith("0.40.")


def test_a_record_of_a_probe_is_read_strictly() -> None:
    probed = Probed.of(record())
    assert probed.published("ball_x") == {"random-cnn": 0.15, "vae": 0.15, "st-dim": 0.81, "supervised": 0.91}
    assert probed.metrics()["probe/f1.ball_y"] == 0.25
    scaled = Probed.of(record(features="posterior mean, standardised"))
    assert scaled.tags() == {}
    assert not scaled.metrics().keys() & probed.metrics().keys()
    for wrong in ({"f1": "high"}, {"game": "chess"}, {"f1_by_variable": [1]}, {"seed": None}, {"f1": float("nan")}):
        with pytest.raises(UserError):
            Probed.of(record(**wrong))


def test_a_card_fits_mlflow_and_says_what_it_leaves_out(project: Project) -> None:
    many = {f"enemy_asteroids_and_other_things_y_{index}": 0.5 for index in range(80)}
    card = model_card(project.run / "bundle", [Probed.of(record(f1_by_variable=many))])
    assert 4_000 < len(card) <= 5_000
    left_out = int(re.search(r"(\d+) more: the run's artifacts", card)[1])  # type: ignore[index]
    assert card.count("enemy_asteroids_and_other") == 80 - left_out
    assert "Not probed yet" in model_card(project.run / "bundle", [])


def test_only_a_runs_own_versions_are_described(project: Project) -> None:
    """Two runs have registered the same bytes; what is found later is told of one of them."""
    folder = project.workspace.new_run_folder("pretrain-again")
    bundle = shutil.copytree(project.run / "bundle", folder / "bundle")
    with Tracking(project.workspace.tracking_uri).start_run(folder.name, stage="pretrain", folder=folder) as run:
        register_encoder(run, bundle, "twin", bits_per_dim=1.0, active_fraction=1.0, has_heldout=True)
        describe(run.outbox, bundle, sha256_of(bundle), [Probed.of(record(f1=0.123))])
    assert project.client.get_model_version("twin", "1").tags["probe.f1"] == "0.123"
    assert "0.12 |" in project.client.get_model_version("twin", "1").description
    assert project.client.get_model_version("toy", "1").tags.get("probe.f1") != "0.123"
    shutil.rmtree(folder)


def test_figures_of_few_frames(project: Project, tmp_path: Path) -> None:
    """A dataset of one frame leaves what needs no frames."""
    frames, source = frames_to_look_at(project.pretrain)
    assert "none of them held out" in source
    draw_figures(project.run / "bundle", frames[:1], source, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["units.png"]
    assert Figures.read(tmp_path) is None
