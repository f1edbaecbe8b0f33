"""Kept runs as a summary, plots and a page."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from claims.cells import t_interval

from curves.arms import ENCODER_TASKS, TASKS, Arm, Cell
from curves.keep import Kept
from pipeline.bootstrap import bootstrap_interval
from pipeline.scores import human_normalised

Runs = dict[str, dict[str, dict[int, dict[str, Any]]]]  # task, arm, seed


def gather(kept: Kept) -> Runs:
    """Every run that the tables name and that has been made."""
    runs: Runs = defaultdict(lambda: defaultdict(dict))
    for task_name, task in TASKS.items():
        for arm in task.arms:
            for seed in range(task.seeds):
                if (result := kept.find(Cell.of(task_name, arm, seed))) is not None:
                    runs[task_name][arm][seed] = result
    return runs


def summary(runs: Runs) -> dict[str, dict[str, dict[str, Any]]]:
    """By task and arm: mean return of all and of the last training games and of greedy ones, over seeds; speed.

    The mean of all games, by the agent steps they took, is the area under the curve: it tells sooner who learns faster.
    """
    return {task: {arm: _summarise(task, by_seed) for arm, by_seed in arms.items()} for task, arms in runs.items()}


def gain(runs: Runs, arm: str, over: str, tasks: Sequence[str]) -> dict[str, Any]:
    """Human-normalised greedy score of one arm less another's: mean over games and seeds, run by run, 95% of a t."""
    both = [(task, runs[task][arm], runs[task][over]) for task in tasks if {arm, over} <= set(runs.get(task, {}))]
    pairs = [
        [_greedy(task, ours[seed]), _greedy(task, theirs[seed])]
        for task, ours, theirs in both
        for seed in sorted(set(ours) & set(theirs))
    ]
    if len(pairs) < 2:
        return {"pairs": len(pairs)}
    differences = np.subtract(*np.array(pairs).T)
    low, high = t_interval(differences)
    figures = {"mean": float(differences.mean()), "low": low, "high": high}
    return {"pairs": len(pairs), **{name: round(value, 3) for name, value in figures.items()}}


def _greedy(task: str, run: dict[str, Any]) -> float:
    score = human_normalised(TASKS[task].game, float(np.mean(run["greedy"])))
    assert score is not None
    return score


def _summarise(task: str, by_seed: dict[int, dict[str, Any]]) -> dict[str, Any]:
    results = list(by_seed.values())
    last = [float(np.mean([game[1] for game in run["games"][-TASKS[task].window :]])) for run in results]
    seconds = float(np.median([run["seconds"] for run in results]))
    area = [_area(np.array([game[:2] for game in run["games"]]), TASKS[task].agent_steps) for run in results]
    figures = {"seeds": len(results), "all_games": _mean(area), "last_games": _mean(last)}
    figures["minutes"] = round(seconds / 60, 1)
    figures["agent_steps_per_s"] = round(TASKS[task].agent_steps / seconds)
    if "greedy" in results[0]:
        greedy = [float(np.mean(run["greedy"])) for run in results]
        figures |= {"greedy": _mean(greedy), "games_a_seed": len(results[0]["greedy"])}
    return figures


def _area(games: np.ndarray, agent_steps: int) -> float:
    """Mean over the run's agent steps of the return of the last game that had ended; the first one's before that."""
    steps, returns = games.T
    spans = np.diff([0.0, *steps.clip(max=agent_steps), agent_steps])
    return float(np.average([returns[0], *returns], weights=spans))


def _mean(by_seed: list[float]) -> dict[str, Any]:
    """Mean over seeds; its 95% bootstrap interval where there are several."""
    interval = [round(value, 2) for value in bootstrap_interval(np.array(by_seed))] if len(by_seed) > 1 else None
    return {"mean": round(float(np.mean(by_seed)), 2), "interval": interval, "by_seed": [round(v, 2) for v in by_seed]}


def write(folder: Path, runs: Runs) -> None:
    """learning.md, learning.json and a plot for each task."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = summary(runs)
    axial = gain(runs, "axial", "grid", ENCODER_TASKS)
    (folder / "learning.json").write_text(json.dumps({**figures, "axial_over_grid": axial}, indent=1) + "\n")
    for task, arms in runs.items():
        plot(folder / f"learning-{task}.png", arms, TASKS[task].window)
    tables = "\n".join(_table(task, arms) for task, arms in figures.items())
    (folder / "learning-tables.md").write_text(_HEAD + tables + _compared(axial))


def _compared(axial: dict[str, Any]) -> str:
    if "mean" not in axial:
        return ""
    interval = f"{axial['mean']:+.3f} [{axial['low']:+.3f}, {axial['high']:+.3f}]"
    what = f"`axial` over `grid`, greedy games, human-normalised, {axial['pairs']} pairs of a game and a seed"
    return f"\n{what}: {interval} (95%, Student's t).\n"


def _table(task: str, arms: dict[str, dict[str, Any]]) -> str:
    lines = [f"\n## {task}: {TASKS[task].agent_steps:,} agent steps\n"]
    lines += [
        "| arm | | all training games | the last | greedy games | seeds | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in arms.items():
        arm: Arm = TASKS[task].arms[name]
        greedy = _shown(row["greedy"]) if "greedy" in row else ""
        training = (_shown(row["all_games"]), _shown(row["last_games"]))
        cells = (f"`{name}`", arm.what, *training, greedy, str(row["seeds"]), str(row["minutes"]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"![curves](learning-{task}.png)", ""])


def _shown(figure: dict[str, Any]) -> str:
    interval = figure["interval"]
    return f"{figure['mean']:.1f}" + (f" [{interval[0]:.1f}, {interval[1]:.1f}]" if interval else "")


def plot(path: Path, arms: dict[str, dict[int, dict[str, Any]]], window: int) -> None:
    """Returns by agent steps, and beside it by seconds of training: one thin line a seed, one colour an arm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (by_steps, by_seconds) = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for number, (name, by_seed) in enumerate(arms.items()):
        for place, run in enumerate(by_seed.values()):
            steps, returns, seconds = np.array(run["games"]).T
            smooth = _running_mean(returns, window)
            for axes, x in ((by_steps, steps), (by_seconds, seconds)):
                label = name if place == 0 else None
                axes.plot(x[-len(smooth) :], smooth, color=f"C{number}", linewidth=1, alpha=0.8, label=label)
    by_steps.set_xlabel("agent steps")
    by_seconds.set_xlabel("seconds of training")
    by_steps.set_ylabel(f"return, mean of {window} games")
    by_steps.legend(frameon=False, fontsize=8)
    for axes in (by_steps, by_seconds):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    window = min(window, len(values))
    sums = np.cumsum(np.concatenate([[0.0], values]))
    return (sums[window:] - sums[:-window]) / window


_HEAD = """# Learning: tables

Made by `python benchmarks/learning.py --write docs/results` of the runs in [learning/](learning/). Means over seeds
with 95% bootstrap intervals over seeds; training games are played with epsilon 0.02 at the end.
"""
