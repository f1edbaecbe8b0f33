"""The figures as tables and plots of `atari.md`; its words are written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from atariari.keeping import write_page
from curves.page import plot

from experiment.arms import ARMS, COMPARED, GAMES
from experiment.measures import WINDOW
from experiment.summary import Runs, figures
from pipeline.scores import RANDOM_AND_HUMAN


class Bar(NamedTuple):
    """What a figure is held to: its key, what it is, what is required, what is wished."""

    key: str
    what: str
    required: str
    target: str


BARS = (
    Bar("cartpole_frozen", "pixel CartPole, VAE frozen, mean of 20 greedy episodes", "≥ 450", "≥ 490"),
    Bar("cartpole_online", "pixel CartPole, VAE online from pretrained", "≥ 450", "≥ 490"),
    Bar("frozen_minus_pixels", "frozen VAE - pixels at equal steps, human-normalised, mean", "", "≥ 0.25"),
    Bar("frozen_minus_pixels_low", "its lower 95% limit", "> 0", ""),
    Bar("clock_excluding", "time to score: pixels / frozen, pretraining and collection excluded", "≥ 5", "≥ 10"),
    Bar("clock_including", "the same, included", "≥ 1.5", "≥ 3"),
    Bar("improve_over_random_encoder", "probability that the frozen VAE beats the random encoder", "≥ 0.6", "≥ 0.75"),
    Bar("improve_over_pca", "and PCA", "≥ 0.55", "≥ 0.75"),
    Bar("online_minus_frozen_low", "online from pretrained - frozen, lower 95% limit", "≥ -0.05", "> 0"),
    Bar("mspacman_1m", "Ms Pac-Man, a million agent steps, frozen (`tuned-long`)", "≥ 1,000", "≥ 1,500"),
)
# Atari 100k from scratch, no extra frames. SPR (Schwarzer et al. 2021): as in arXiv:2108.13264, 100 runs a game.
# DIAMOND: Alonso et al. 2024, arXiv:2405.12399.
PUBLISHED = {
    "SPR": {"pong": -5.4, "freeway": 19.3, "boxing": 35.7, "breakout": 19.6},
    "DIAMOND": {"pong": 20.4, "freeway": 33.3, "boxing": 86.9, "breakout": 132.5},
}


def write(folder: Path, runs: Runs) -> None:
    """`atari.json`, the tables of `atari.md`, and a plot a game."""
    found = figures(runs)
    write_page(folder, "atari", found, tables(found))
    for game in GAMES:
        found_here = {arm: runs.get(arm, {}).get(game, {}) for arm in ARMS}
        played = {arm: {seed: run for seed, run in cells.items() if run["games"]} for arm, cells in found_here.items()}
        arms = {arm: cells for arm, cells in played.items() if cells}
        if arms:
            plot(folder / f"atari-{game}.png", arms, WINDOW)


def tables(found: dict[str, Any]) -> str:
    """Bars, scores by game, aggregates, the clock, and the tuned recipe beside published scores."""
    parts = [_bars(found), *(_game(game, found["cells"]) for game in GAMES), _iqm(found), _clock(found), _tuned(found)]
    return "\n\n".join(part for part in parts if part)


def _bars(found: dict[str, Any]) -> str:
    lines = ["| key | what | required | target | measured | runs |", "|---|---|---|---|---|---|"]
    for bar in BARS:
        done, planned = found["beside"]["runs"][bar.key]
        measured = _figure(found[bar.key])
        lines.append(f"| `{bar.key}` | {bar.what} | {bar.required} | {bar.target} | {measured} | {done} of {planned} |")
    return "\n".join(lines)


def _game(game: str, cells: list[dict[str, Any]]) -> str:
    here = [cell for cell in cells if cell["game"] == game]
    if not here:
        return ""
    plan = GAMES[game]
    head = f"**{game}**, {plan.agent_steps:,} agent steps"
    lines = [
        f"{head}: whole greedy games by seed; minutes of Q-learning, and before them of pretraining and collecting"
    ]
    lines += [
        "",
        "| arm | | mean | by seed | human-normalised | minutes | pretraining | collection |",
        "|---" * 8 + "|",
    ]
    for arm in dict.fromkeys(cell["arm"] for cell in here):
        rows = [cell for cell in here if cell["arm"] == arm]
        scores = [row["score"] for row in rows]
        human = [row["human_normalised"] for row in rows if row["human_normalised"] is not None]
        parts = [f"`{arm}`", ARMS[arm].what, f"{np.mean(scores):.1f}", ", ".join(f"{score:.1f}" for score in scores)]
        parts += [f"{np.mean(human):.3f}" if human else ""]
        parts += [
            f"{np.mean([row[f'{part}minutes'] for row in rows]):.1f}" for part in ("", "pretraining_", "collection_")
        ]
        lines.append(f"| {' | '.join(parts)} |")
    return "\n".join([*lines, "", f"![curves of {game}](atari-{game}.png)"])


def _iqm(found: dict[str, Any]) -> str:
    beside = found["beside"]
    views = {"at equal agent steps": beside["iqm"]}
    views |= {f"at equal minutes, {name}": view["iqm"] for name, view in beside["at_equal_minutes"].items()}
    lines = ["Interquartile mean of human-normalised scores over games and seeds, 95% by stratified bootstrap", ""]
    lines += ["| | " + " | ".join(f"`{arm}`" for arm in COMPARED) + " |", "|---" * (len(COMPARED) + 1) + "|"]
    rows = [
        f"| {games}, {view} | " + " | ".join(_interval(arms.get(arm)) for arm in COMPARED) + " |"
        for view, sets in views.items()
        for games, arms in sets.items()
        if arms
    ]
    return "\n".join(lines + rows) if rows else ""


def _interval(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{row['iqm']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def _clock(found: dict[str, Any]) -> str:
    rows = found["beside"]["clock"]["runs"]
    if not rows:
        return ""
    lines = [
        "Seconds of Q-learning until the mean of 10 training games is the score (a run that never came there: >)",
        "",
    ]
    lines += ["| game | seed | score | pixels | frozen | collection and pretraining |", "|---" * 6 + "|"]
    for row in rows:
        times = [_time(row[f"{arm}_s"], row[f"{arm}_spent_s"]) for arm in ("pixels", "frozen")]
        parts = [row["game"], str(row["seed"]), f"{row['score']:g}", *times, f"{row['prior_s']:.0f}"]
        lines.append(f"| {' | '.join(parts)} |")
    return "\n".join(lines)


def _time(reached: float | None, spent: float) -> str:
    return f"> {spent:.0f}" if reached is None else f"{reached:.0f}"


def _tuned(found: dict[str, Any]) -> str:
    """The recipe `efficient` at 100,000 agent steps beside what others publish at that budget."""
    cells = [cell for cell in found["cells"] if cell["arm"] == "tuned" and cell["game"] in PUBLISHED["SPR"]]
    if not cells:
        return ""
    games = list(dict.fromkeys(cell["game"] for cell in cells))
    extra = max(cell["prior_frames"] for cell in cells)
    lines = [f"Atari 100k: the tuned recipe, which has seen {extra:,} random-play frames more than the budget", ""]
    lines += ["| | " + " | ".join(games) + " |", "|---" * (len(games) + 1) + "|"]
    means = [np.mean([cell["score"] for cell in cells if cell["game"] == game]) for game in games]
    lines.append("| `tuned` | " + " | ".join(f"{mean:.1f}" for mean in means) + " |")
    for place, name in enumerate(("random agent", "human tester")):
        lines.append(f"| {name} | " + " | ".join(f"{RANDOM_AND_HUMAN[game][place]:g}" for game in games) + " |")
    for name, scores in PUBLISHED.items():
        lines.append(f"| {name}, published | " + " | ".join(f"{scores[game]:g}" for game in games) + " |")
    return "\n".join(lines)


def _figure(value: float | None) -> str:
    return "not yet" if value is None else f"{value:g}"
