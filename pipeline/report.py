"""The page of a run: one HTML file with everything in it, good on a laptop and on a phone, that fetches nothing.

What goes onto the page is a `ReportContent`; how it looks is in `report.html.j2` and `report.css`. Every text is
escaped by the template engine, pictures are embedded, and a content security policy forbids any connection and all
scripts but `sliders.js`, which is named by its hash and stands on pages that have something to turn.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
from markupsafe import Markup

from pipeline.charts import BarChart, Chart, IntervalChart, interval_chart, percent, score
from pipeline.gameplay import poster

SCRIPT_FILE = "sliders.js"
_MEDIA_TYPES = {".png": "image/png", ".gif": "image/gif", ".webp": "image/webp"}


@dataclass(frozen=True)
class Score:
    """A row of the results: an agent's whole games.

    Attributes:
        agent: Who played ("random agent", "trained agent").
        mean_return: Raw points a game.
        ci95_low: Lower end of the 95% interval of the mean.
        ci95_high: Upper end.
        episodes: How many games.
        human_normalised: 0 random agent, 1 human tester; None where nothing is published for the game.
    """

    agent: str
    mean_return: float
    ci95_low: float
    ci95_high: float
    episodes: int
    human_normalised: float | None


@dataclass(frozen=True)
class Picture:
    """A PNG, GIF or WebP file to embed."""

    path: Path
    title: str
    caption: str


@dataclass(frozen=True)
class Fact:
    """One number worth a glance, for instance ("bits/dim", "0.113", "held out; lower is better")."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Names and values, for instance a resolved configuration."""

    title: str
    rows: list[tuple[str, str]]


@dataclass(frozen=True)
class Command:
    """Something to type next, and why."""

    why: str
    line: str


@dataclass(frozen=True)
class Strip:
    """A PNG file with several pictures side by side, of which one is seen at a time."""

    path: Path
    num_pictures: int
    caption: str


@dataclass(frozen=True)
class Turn:
    """Something to turn by a slider.

    Attributes:
        name: Of what is turned.
        note: A remark on it.
        texts: What the slider says at each of its places; as many as pictures in a strip.
        strips: All move together.
        stills: Shown beside them.
    """

    name: str
    note: str
    texts: list[str]
    strips: list[Strip]
    stills: list[Picture] = field(default_factory=list)
    start: int = 0


@dataclass(frozen=True)
class TurnGroup:
    """Things to turn, under a title; `is_wide` where one takes the whole width."""

    title: str
    lead: str
    turns: list[Turn]
    is_wide: bool = False


@dataclass(frozen=True)
class Mark:
    """Another's figure on a track: where, in percent, and its CSS class."""

    kind: str
    label: str
    percent: float


@dataclass(frozen=True)
class ProbeRow:
    """What is known of a variable: its own share as a bar, others' as marks, and the cells of the table of numbers."""

    name: str
    text: str
    percent: float
    marks: list[Mark]
    cells: list[str]


@dataclass(frozen=True)
class ProbeTable:
    """Probes of an encoder beside published ones; the first row is the game's.

    Attributes:
        lead: What was measured.
        legend: (CSS class, label) of the marks.
        columns: Of the table of numbers; the first is of names.
        rows: One a variable.
    """

    lead: str
    legend: list[tuple[str, str]]
    columns: list[str]
    rows: list[ProbeRow]


@dataclass(frozen=True)
class Version:
    """An encoder as it was at one time of a run; without facts the frames themselves.

    Attributes:
        name: When, in words.
        frames: A PNG picture: what it makes of them, beside each other.
        facts: Numbers of it.
    """

    name: str
    frames: bytes
    facts: list[Fact] = field(default_factory=list)


@dataclass(frozen=True)
class Plot:
    """A chart, and what its one or two lines are."""

    chart: Chart
    label: str
    second_label: str = ""


@dataclass(frozen=True)
class Change:
    """How an encoder changed during a run.

    Attributes:
        lead: What is shown.
        order: Which frames they are, from left to right.
        versions: The frames first, then the encoders in order of time.
        probe_columns: Of the table of probes; the first is of names.
        probe_rows: One a variable; none where nothing has been probed.
        plots: What the run recorded on its way.
    """

    lead: str
    order: str
    versions: list[Version]
    probe_columns: list[str] = field(default_factory=list)
    probe_rows: list[list[str]] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)


@dataclass(frozen=True)
class ReportContent:
    """Everything that a page shows. What is absent or went wrong is named in `remarks` and so said on the page.

    Attributes:
        title: Headline.
        subtitle: One sentence below it.
        summary: One sentence with the result; may be empty.
        stages: The way from frames to an agent, one fact a stage.
        scores: Results of whole games.
        gameplay: The film.
        curve: Learning curve of the agent.
        curve_note: How to read it.
        change: How the encoder changed meanwhile, where it did.
        encoder_facts: Numbers of the encoder.
        encoder_curve: Learning curve of the encoder.
        pictures: What the encoder has learned.
        probes: What a linear layer can read off its latents.
        turns: What can be turned by sliders.
        last_pictures: After those.
        units: The KL of its units, as bars.
        settings: Resolved configurations.
        provenance: Digests, versions, run ids.
        commands: What to type next.
        remarks: Section name (results, gameplay, curve, change, probes, encoder, pictures, encoder_curve, settings,
            provenance) to the sentences that say what is not there, and how to get it, or what went wrong.
    """

    title: str
    subtitle: str
    summary: str = ""
    stages: list[Fact] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    gameplay: Picture | None = None
    curve: Chart | None = None
    curve_note: str = ""
    change: Change | None = None
    encoder_facts: list[Fact] = field(default_factory=list)
    encoder_curve: Chart | None = None
    pictures: list[Picture] = field(default_factory=list)
    probes: ProbeTable | None = None
    turns: list[TurnGroup] = field(default_factory=list)
    last_pictures: list[Picture] = field(default_factory=list)
    units: BarChart | None = None
    settings: list[Table] = field(default_factory=list)
    provenance: list[Table] = field(default_factory=list)
    commands: list[Command] = field(default_factory=list)
    remarks: Mapping[str, list[str]] = field(default_factory=dict)


def write_report(out: Path, content: ReportContent) -> Path:
    """Writes the page.

    Args:
        out: The .html file; replaced in one step when it exists.
        content: What to show. Its pictures are read now and embedded.

    Returns:
        `out`.

    Raises:
        OSError: A picture cannot be read or the page not written.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"score": score, "percent": percent}
    script = (Path(__file__).parent / SCRIPT_FILE).read_text(encoding="utf-8")
    environment.globals |= {"content": content, "embed": _embed, "embed_png": _embed_png, "still": _still}
    page = environment.get_template("report.html.j2").render(
        intervals=_intervals(content.scores), script=Markup(script), script_hash=Markup(_policy_hash(script))
    )
    partial = out.with_name(out.name + ".partial")
    partial.write_text(page.lstrip(), encoding="utf-8")
    os.replace(partial, out)
    return out


def _intervals(scores: list[Score]) -> IntervalChart | None:
    results = [(row.agent, row.mean_return, row.ci95_low, row.ci95_high) for row in scores]
    return interval_chart(results) if results else None


def _policy_hash(script: str) -> str:
    """How a content security policy names a script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _embed(path: Path) -> Markup:
    return _data_uri(_MEDIA_TYPES[path.suffix], path.read_bytes())


def _embed_png(data: bytes) -> Markup:
    return _data_uri("image/png", data)


def _still(path: Path) -> Markup:
    return _data_uri("image/png", poster(path))


def _data_uri(media_type: str, data: bytes) -> Markup:
    return Markup(f"data:{media_type};base64,{base64.b64encode(data).decode()}")
