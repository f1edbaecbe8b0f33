"""The report: opened in a browser at laptop and phone width, every picture drawn, nothing fetched, all text escaped."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from chromium import Chromium, Visit
from PIL import Image
from policies import make_encoder, make_policy

import jobs.evaluate
import jobs.report
import pipeline.play as pipeline_play
from jobs.relatives import RunFolder, find_relatives
from jobs.settings import provenance
from jobs.workspace import Workspace
from pipeline.artifact import load_model
from pipeline.atari import VectorAtari, make_vector
from pipeline.bundle import sha256_of
from pipeline.charts import Series, interval_chart, line_chart, number, percent, recent_mean, score
from pipeline.errors import UserError
from pipeline.pictures import encoder_pictures
from pipeline.registry import Tracking
from pipeline.report import Command, Fact, Picture, ReportContent, Score, Table, write_report
from pipeline.schema import Preprocess

HOSTILE = "<script>fetch('https://example.com/x')</script><img src=https://example.com/y.png>&\"'"
SCREENS = {
    "laptop": {"width": 1280},
    "phone": {"width": 360, "is_phone": True},
    "dark phone": {"width": 360, "is_phone": True, "is_dark": True},
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with Chromium() as chromium:
        yield chromium


class Project:
    """Runs of all stages in one workspace, untrained and of toy size, as the stages leave them."""

    def __init__(self, home: Path) -> None:
        torch.set_num_threads(1)
        self.workspace = Workspace.at(str(home))
        self.tracking = Tracking(self.workspace.tracking_uri)
        self.pretrain = self._run("pretrain", self._pretrain)
        self.train = self._run("train", self._train)
        with pytest.MonkeyPatch.context() as patch:
            _cap_games(patch)
            trained = jobs.evaluate.run(self.workspace, str(self.train / "policy"), episodes=3, video=True)
            random = jobs.evaluate.run(self.workspace, "random:breakout", episodes=3)
        self.evaluation, self.random = Path(trained["run_folder"]), Path(random["run_folder"])

    def _run(self, stage: str, fill: Callable[[Path], None]) -> Path:
        folder = self.workspace.new_run_folder(stage)
        run = self.tracking.start_run(folder.name, stage=stage, folder=folder)
        run.close()
        fill(folder)
        (folder / "versions.yaml").write_text(yaml.safe_dump(provenance()))
        return folder

    def _pretrain(self, folder: Path) -> None:
        bundle = make_encoder(folder / "bundle")
        frames = np.random.default_rng(0).integers(0, 256, (8, 84, 84), dtype=np.uint8)
        encoder_pictures(load_model(bundle), frames, folder / "pictures")
        figures = {
            "elbo_nats": -5512.3,
            "bits_per_dim": 1.127,
            "images_per_s": 1150.0,
            "seconds": 61.0,
            "active_units": 6,
        }
        named = {"model_uri": "models:/toy/3", "version": "3", "aliases": ["latest"], "sha256": sha256_of(bundle)}
        (folder / "result.json").write_text(json.dumps({**figures, **named, "frames": 8, "dataset": HOSTILE}))
        (folder / "config.yaml").write_text(yaml.safe_dump({"stage": "pretrain", "model": {"z_dim": 8, "beta": 1.0}}))
        lines = [json.dumps({"step": i * 100, "bits_per_dim": 3.0 - 0.2 * i}) for i in range(9)]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")

    def _train(self, folder: Path) -> None:
        make_policy(folder / "policy", encoder=self.pretrain / "bundle")
        result = {
            "policy": str(folder / "policy"),
            "agent_steps": 4000,
            "updates": 500,
            "steps_per_worker": {"runner-1": 4000},
        }
        (folder / "result.json").write_text(json.dumps({**result, "model_uri": "models:/breakout-agent/1"}))
        (folder / "config.yaml").write_text(yaml.safe_dump({"stage": "train", "train": {"lr": 1e-4, HOSTILE: HOSTILE}}))
        rng = np.random.default_rng(0)
        games = [{"step": 40 * i, "episode_return": float(rng.poisson(1 + 0.05 * i))} for i in range(100)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(game) + "\n" for game in games) + '{"step": 40')


def _cap_games(patch: pytest.MonkeyPatch) -> None:
    def short(preprocess: Preprocess, num_envs: int, num_threads: int) -> VectorAtari:
        return make_vector(preprocess, num_envs, max_env_frames=240)

    patch.setattr(jobs.evaluate, "play", functools.partial(pipeline_play.play, make_env=short))
    patch.setattr(pipeline_play, "make_player", functools.partial(pipeline_play.make_player, max_env_frames=240))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project(tmp_path_factory.mktemp("report") / "home")


def require_sound(visit: Visit, *, shown_px: int = 100) -> None:
    """What holds for every page on every screen."""
    assert all(image["complete"] and image["natural"] > 0 and image["shown"] > shown_px for image in visit.images), (
        visit.images
    )
    assert visit.requests == []
    assert visit.messages == []
    assert visit.overflow_px <= 0
    assert visit.small_texts == []


@pytest.mark.parametrize("screen", SCREENS)
def test_page_of_a_training_is_complete_on_every_screen(project: Project, browser: Chromium, screen: str) -> None:
    page = Path(jobs.report.run(project.workspace, project.train.name)["path"])
    visit = browser.visit(page, **SCREENS[screen])
    require_sound(visit)
    assert len(visit.images) == 5
    for text in (
        "Results",
        "random agent",
        "trained agent",
        "At play",
        "Learning to play",
        "Reconstructions",
        "Settings",
    ):
        assert text in visit.text
    for text in ("models:/toy/3", "6 of 8", "1.13", "MLflow runs", "--home", "train.lr"):
        assert text in visit.text
    assert "latentrl report models:/toy/3 --home" in visit.text
    assert "has not been" not in visit.text
    assert len(visit.screenshot) > 50_000


def test_page_of_an_evaluation_and_of_a_pretraining(project: Project, browser: Chromium) -> None:
    for folder, num_pictures in ((project.evaluation, 5), (project.pretrain, 48), (project.random, 0)):
        page = Path(jobs.report.run(project.workspace, str(folder))["path"])
        visit = browser.visit(page, width=360, is_phone=True)
        require_sound(visit, shown_px=80 if folder == project.pretrain else 100)
        assert len(visit.images) == num_pictures


def test_page_is_found_by_its_mlflow_run_id_and_logged_there(project: Project) -> None:
    record = json.loads((project.train / "run.json").read_text())
    page = Path(jobs.report.run(project.workspace, record["run_id"])["path"])
    assert page == project.train / "report.html"
    copies = [path for path in project.workspace.home.rglob("report.html") if record["run_id"] in str(path)]
    assert [copy.read_bytes() for copy in copies] == [page.read_bytes()]


def test_report_leaves_status_and_end_of_a_run_alone(project: Project) -> None:
    journal = project.train / "outbox.jsonl"
    before = journal.read_text().count('"status"')
    jobs.report.run(project.workspace, project.train.name)
    assert journal.read_text().count('"status"') == before


def test_what_is_missing_is_said(project: Project, browser: Chromium, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "home", project.workspace.tracking_uri)
    shutil.copytree(project.train, workspace.runs / "train-001")
    (workspace.runs / "train-001" / "metrics.jsonl").unlink()
    (workspace.runs / "train-001" / "config.yaml").unlink()
    visit = browser.visit(Path(jobs.report.run(workspace, "train-001")["path"]), width=1280)
    require_sound(visit)
    for sentence in (
        "has not been evaluated. Type: latentrl evaluate models:/breakout-agent/1 --video",
        "no games by the random agent to compare with. Type: latentrl evaluate random:breakout",
        "No game has been filmed",
        "there is no learning curve",
        "The run that pretrained this encoder is not among the runs here",
        "has no config.yaml",
    ):
        assert sentence in visit.text


def test_agent_from_pixels_has_no_encoder_and_the_page_says_so(project: Project, tmp_path: Path) -> None:
    folder = tmp_path / "home" / "runs" / "train-001"
    shutil.copytree(project.train, folder)
    shutil.rmtree(folder / "policy")
    make_policy(folder / "policy", "pixels")
    workspace = Workspace(tmp_path / "home", project.workspace.tracking_uri)
    text = Path(jobs.report.run(workspace, "train-001")["path"]).read_text()
    assert "learned from pixels, without a pretrained encoder" in text


def test_collapsed_encoder_is_called_so(project: Project, tmp_path: Path) -> None:
    folder = tmp_path / "home" / "runs" / "pretrain-001"
    shutil.copytree(project.pretrain, folder)
    stats = json.loads((folder / "bundle" / "stats.json").read_text())
    (folder / "bundle" / "stats.json").write_text(json.dumps({**stats, "active": [False] * 8}))
    workspace = Workspace(tmp_path / "home", project.workspace.tracking_uri)
    assert "has collapsed" in Path(jobs.report.run(workspace, "pretrain-001")["path"]).read_text()
    assert "has collapsed" not in Path(jobs.report.run(project.workspace, "pretrain-001")["path"]).read_text()


def test_curve_without_single_games_has_no_interval_and_says_so(project: Project, tmp_path: Path) -> None:
    folder = tmp_path / "home" / "runs" / "train-001"
    shutil.copytree(project.train, folder)
    lines = [json.dumps({"step": i, "episode_return_mean": i / 10}) for i in range(500)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    workspace = Workspace(tmp_path / "home", project.workspace.tracking_uri)
    text = Path(jobs.report.run(workspace, "train-001")["path"]).read_text()
    assert "the curve has no interval" in text
    assert 'class="band"' not in text


def test_relatives_are_found_from_either_end(project: Project) -> None:
    for start in (project.train, project.evaluation):
        kin = find_relatives(RunFolder.read(start), project.workspace)
        found = [run.path if run else None for run in (kin.train, kin.evaluation, kin.random, kin.pretrain)]
        assert found == [project.train, project.evaluation, project.random, project.pretrain]
        assert kin.policy == project.train / "policy"


def test_page_of_an_evaluation_on_another_machine_says_what_it_lacks(project: Project, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "home", project.workspace.tracking_uri)
    folder = workspace.runs / "evaluate-001"
    shutil.copytree(project.evaluation, folder)
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps({**result, "policy": "models:/breakout-agent@latest"}))
    text = Path(jobs.report.run(workspace, "evaluate-001")["path"]).read_text()
    assert "The run that trained this policy is not among the runs here" in text
    assert "played by a trained agent" in text
    shutil.copytree(project.train / "policy", workspace.cache / result["policy_sha256"])
    text = Path(jobs.report.run(workspace, "evaluate-001")["path"]).read_text()
    assert "played from frozen latents" in text


def test_unknown_run_is_one_line(project: Project) -> None:
    with pytest.raises(UserError, match="no run 'train-999'"):
        jobs.report.run(project.workspace, "train-999")


def test_stage_without_a_page_is_refused(project: Project) -> None:
    folder = project.workspace.new_run_folder("encode")
    project.tracking.start_run(folder.name, stage="encode", folder=folder).close()
    with pytest.raises(UserError, match="a run of stage encode"):
        jobs.report.run(project.workspace, folder.name)


class TagCollector(HTMLParser):
    """All tags of a page with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, list[tuple[str, str | None]]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, attrs))

    @classmethod
    def of(cls, page: Path) -> list[tuple[str, list[tuple[str, str | None]]]]:
        collector = cls()
        collector.feed(page.read_text())
        return collector.tags


def hostile_content(picture: Path) -> ReportContent:
    return ReportContent(
        title=HOSTILE,
        subtitle=HOSTILE,
        summary=HOSTILE,
        stages=[Fact(HOSTILE, HOSTILE, HOSTILE)],
        scores=[Score(HOSTILE, 1.0, 0.5, 1.5, 3, None)],
        curve=line_chart(
            Series(np.array([0.0, 1.0]), np.array([0.0, 1.0])), HOSTILE, HOSTILE, [(HOSTILE, "random", 0.5)]
        ),
        curve_note=HOSTILE,
        encoder_facts=[Fact(HOSTILE, "x" * 500, HOSTILE)],
        pictures=[Picture(picture, HOSTILE, HOSTILE)],
        settings=[Table(HOSTILE, [(HOSTILE, HOSTILE), ("y" * 300, "z" * 3000)])],
        provenance=[Table(HOSTILE, [(HOSTILE, HOSTILE)])],
        commands=[Command(HOSTILE, HOSTILE + "w" * 400)],
        remarks={"results": [HOSTILE], "gameplay": [HOSTILE]},
    )


def test_hostile_text_is_only_text_and_long_words_do_not_widen_the_page(tmp_path: Path, browser: Chromium) -> None:
    picture = tmp_path / "dot.png"
    Image.new("L", (200, 200)).save(picture)
    page = write_report(tmp_path / "report.html", hostile_content(picture))
    tags = TagCollector.of(page)
    assert not {"script", "iframe", "object", "embed", "form"} & {tag for tag, _ in tags}
    addresses = [value for _, given in tags for name, value in given if name in ("src", "href", "srcset", "action")]
    assert addresses
    assert all(str(address).startswith("data:") for address in addresses)
    for screen in SCREENS.values():
        visit = browser.visit(page, **screen)
        require_sound(visit)
        assert len(visit.images) == 1
        assert visit.text.count("<script>") > 8


def test_policy_of_the_page_blocks_what_would_leave(tmp_path: Path, browser: Chromium) -> None:
    page = write_report(tmp_path / "report.html", ReportContent("t", "s"))
    leak = '<script>document.title="ran"</script><img src="https://example.com/leak.png" width=200>'
    page.write_text(page.read_text().replace("</main>", leak + "</main>"))
    visit = browser.visit(page, width=800)
    assert any("Content Security Policy" in message for message in visit.messages)
    assert not visit.images[0]["natural"]


def test_browser_that_is_missing_fails_with_the_line_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(pytest.fail.Exception, match="apt-get install chromium"):
        Chromium()


def test_report_replaces_in_one_step(tmp_path: Path) -> None:
    page = write_report(tmp_path / "report.html", ReportContent("first", "s"))
    broken = ReportContent("second", "s", pictures=[Picture(tmp_path / "absent.png", "a", "b")])
    with pytest.raises(FileNotFoundError):
        write_report(page, broken)
    assert "first" in page.read_text()
    assert list(tmp_path.iterdir()) == [page]


def test_recent_mean_looks_back_over_a_window() -> None:
    series = recent_mean(range(100), [0.0] * 50 + [10.0] * 50, window=10, num_points=10)
    assert series.low is not None
    assert series.high is not None
    assert (series.mean[0], series.mean[-1]) == (0.0, 10.0)
    assert series.x[0] == 4
    assert ((series.low <= series.mean) & (series.mean <= series.high)).all()


def test_recent_mean_of_one_game() -> None:
    series = recent_mean([7], [3.0])
    assert (series.x.tolist(), series.mean.tolist()) == ([7.0], [3.0])
    assert line_chart(series, "x", "y").line.startswith("M")


def test_chart_names_a_far_line_and_draws_a_near_one() -> None:
    series = Series(np.array([0.0, 100.0]), np.array([-21.0, -18.0]))
    chart = line_chart(series, "steps", "points", [("near", "random", -20.7), ("far", "human", 14.6)])
    near, far = chart.references
    assert near.position is not None
    assert chart.top <= near.position <= chart.bottom
    assert far.position is None
    assert all(chart.left <= tick.position <= chart.right for tick in chart.x_ticks)
    assert all(chart.top <= tick.position <= chart.bottom for tick in chart.y_ticks)


@pytest.mark.parametrize("results", [[("a", -21.0, -21.0, -21.0)], [("a", 0, -1, 1), ("b", 1e6, 9e5, 1.1e6)]])
def test_intervals_lie_on_the_drawing(results: list[tuple[str, float, float, float]]) -> None:
    chart = interval_chart(results)
    for whisker in chart.whiskers:
        assert 0 <= whisker.low <= whisker.mean <= whisker.high <= chart.width


def test_numbers_for_people() -> None:
    shown = [number(value) for value in (0.0, -0.0001, 0.1134, 1.0, -9.45, -20.44, 1150.4, 100_000)]
    minus = "\N{MINUS SIGN}"
    assert shown == ["0", "0.000", "0.113", "1", f"{minus}9.45", f"{minus}20.4", "1,150", "100,000"]
    assert [score(value) for value in (-21.0, -9.456, 123.456, 1234.5)] == [
        f"{minus}21.00",
        f"{minus}9.46",
        "123.5",
        "1,234",
    ]
    assert [percent(0.318), percent(-0.004), percent(-0.2)] == ["32%", "0%", f"{minus}20%"]
