"""What kept cells come to: the issue's keys, what stands beside them, and each cell's scores and minutes.

Scores are means of whole greedy games; on Atari human-normalised (0 the random agent, 1 the human tester). Arms are
compared pair by pair, a pair being the same game and seed: mean difference, 95% of Student's t. Over games and seeds
stand the interquartile mean and the probability of improvement (Agarwal et al. 2021, arXiv:2108.13264), by `rliable`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from claims.cells import t_interval
from curves.keep import Kept

from experiment import measures
from experiment.arms import ARMS, CLOCKED, COMPARED, FROZEN, GAMES, Cell, cells
from experiment.worlds import CARTPOLE, RALLY
from pipeline.errors import UserError
from pipeline.scores import human_normalised

Runs = dict[str, dict[str, dict[int, dict[str, Any]]]]  # arm, game, seed
FRESH = "vae-frozen"
ATARI = tuple(game for game in GAMES if game not in (CARTPOLE, RALLY))
MINUTE = 60.0
# The arms and games whose runs a figure is of.
NEEDED = {
    "cartpole_frozen": ((FRESH,), (CARTPOLE,)),
    "cartpole_online": (("vae-online",), (CARTPOLE,)),
    "frozen_minus_pixels": ((FRESH, "pixels"), ATARI),
    "frozen_minus_pixels_low": ((FRESH, "pixels"), ATARI),
    "clock_excluding": ((FRESH, "pixels"), ATARI),
    "clock_including": ((FRESH, "pixels"), ATARI),
    "improve_over_random_encoder": ((FRESH, "random-encoder"), ATARI),
    "improve_over_pca": ((FRESH, "pca"), ATARI),
    "online_minus_frozen_low": (("vae-online", FRESH), ATARI),
    "mspacman_1m": (("tuned-long",), ("ms_pacman",)),
}


def find(kept: Kept, cell: Cell) -> dict[str, Any] | None:
    """What a cell gave; None where it has not been run, or its recipe is not there."""
    try:
        _ = cell.configuration
    except UserError:
        return None
    return kept.find(cell)


def gather(kept: Kept, *, is_short: bool = False) -> Runs:
    """All that has been run."""
    runs: Runs = {}
    for cell in cells(is_short=is_short):
        if (result := find(kept, cell)) is not None:
            runs.setdefault(cell.arm, {}).setdefault(cell.game, {})[cell.seed] = result
    return runs


def figures(runs: Runs) -> dict[str, Any]:
    """By key, of the cells that have been run; None where there are none to say it of."""
    pairs = _pairs(runs, FRESH, "pixels", ATARI, normalised)
    online = _pairs(runs, "vae-online", FRESH, ATARI, normalised)
    clock, long = clocked(runs), _runs(runs, "tuned-long", "ms_pacman")
    found: dict[str, Any] = {
        "cartpole_frozen": _mean(list(_scores(runs, FRESH, CARTPOLE).values())),
        "cartpole_online": _mean(list(_scores(runs, "vae-online", CARTPOLE).values())),
        "frozen_minus_pixels": _mean(pairs),
        "frozen_minus_pixels_low": _low(pairs),
        "clock_excluding": clock["excluding"],
        "clock_including": clock["including"],
        "improve_over_random_encoder": _improvement(runs, "random-encoder", ATARI, normalised),
        "improve_over_pca": _improvement(runs, "pca", ATARI, normalised),
        "online_minus_frozen_low": _low(online),
        "mspacman_1m": _mean(list(_scores(runs, "tuned-long", "ms_pacman").values())),
    }
    found["beside"] = {
        "clock": clock,
        "cartpole_gains": _gains(runs),
        "frozen_minus_pixels_pairs": len(pairs),
        "online_minus_frozen": _mean(online),
        "online_minus_frozen_pairs": len(online),
        "mspacman_1m_minutes": _mean([run["seconds"] / MINUTE for run in long.values()]),
        "iqm": aggregated(runs, normalised),
        "at_equal_minutes": at_equal_minutes(runs),
    }
    found["beside"]["runs"] = {key: _counted(runs, *needed) for key, needed in NEEDED.items()}
    found["cells"] = [
        {"arm": arm, "game": game, "seed": seed, **_told(game, run)}
        for arm in ARMS
        for game, by_seed in runs.get(arm, {}).items()
        for seed, run in sorted(by_seed.items())
    ]
    return found


def _counted(runs: Runs, arms: Sequence[str], games: Sequence[str]) -> tuple[int, int]:
    """Seeds over games that all these arms have run, and those that they are to run."""
    shared = [game for game in games if set(arms) <= set(GAMES[game].arms)]
    done = [set.intersection(*(set(_runs(runs, arm, game)) for arm in arms)) for game in shared]
    return sum(map(len, done)), sum(GAMES[game].seeds for game in shared)


def described(cell: Cell, run: dict[str, Any]) -> dict[str, Any]:
    """A cell with all that it gave."""
    return {"arm": cell.arm, "game": cell.game, "seed": cell.seed, **_told(cell.game, run), "result": run}


def normalised(game: str, run: dict[str, Any]) -> float:
    """Mean greedy score, human-normalised where that is published."""
    return _on_scale(game, float(np.mean(run["greedy"])))


def _on_scale(game: str, score: float) -> float:
    known = human_normalised(game, score)
    return score if known is None else known


def _told(game: str, run: dict[str, Any]) -> dict[str, Any]:
    prior = run["prior"] or {"frames": 0, "collect_s": 0.0, "pretrain_s": 0.0}
    score = float(np.mean(run["greedy"]))
    return {
        "score": round(score, 2),
        "human_normalised": _rounded(human_normalised(game, score)),
        "scores": [round(float(value), 2) for value in run["greedy"]],
        "last_training_games": _rounded(measures.at_step(run["games"], GAMES[game].agent_steps)),
        "minutes": round(run["seconds"] / MINUTE, 2),
        "pretraining_minutes": round(prior["pretrain_s"] / MINUTE, 2),
        "collection_minutes": round(prior["collect_s"] / MINUTE, 2),
        "prior_frames": prior["frames"],
        "updates": run["updates"],
        "goal": run.get("goal"),
        "q_divergences": run.get("q_divergences"),
    }


def clocked(runs: Runs) -> dict[str, Any]:
    """Seconds of Q-learning to a game's score: pixels over frozen, geometric mean over games and seeds.

    A run on pixels that never came there counts with the time it was given, so the ratio is then a lower bound. Where
    a frozen one never came there is no ratio.
    """
    shared = [
        (game, seed, pixels["goal"], frozen["goal"], frozen["prior"])
        for game in GAMES
        for seed, pixels in sorted(_runs(runs, "pixels", game).items())
        for frozen in [_runs(runs, FRESH, game).get(seed)]
        if frozen is not None and pixels.get("goal") and frozen.get("goal")
    ]
    rows = [
        {
            "game": game,
            "seed": seed,
            "score": slow["score"],
            "pixels_s": slow["reached_s"],
            "pixels_spent_s": slow["spent_s"],
            "frozen_s": fast["reached_s"],
            "frozen_spent_s": fast["spent_s"],
            "prior_s": prior["collect_s"] + prior["pretrain_s"],
        }
        for game, seed, slow, fast, prior in shared
    ]
    there = bool(rows) and all(row["frozen_s"] is not None for row in rows)
    slow = [row["pixels_s"] or row["pixels_spent_s"] for row in rows]
    ratios = {
        "excluding": [s / row["frozen_s"] for s, row in zip(slow, rows)] if there else [],
        "including": [s / (row["frozen_s"] + row["prior_s"]) for s, row in zip(slow, rows)] if there else [],
    }
    means = {
        name: _rounded(float(np.exp(np.mean(np.log(values))))) if values else None for name, values in ratios.items()
    }
    return {**means, "is_lower_bound": any(row["pixels_s"] is None for row in rows), "runs": rows}


def aggregated(
    runs: Runs, score: Callable[[str, dict[str, Any]], float], arms: Sequence[str] = COMPARED
) -> dict[str, Any]:
    """By set of games and arm: interquartile mean over games and seeds, its 95% interval by stratified bootstrap.

    Arms are in a set with the seeds that they have run all its games with.
    """
    shared = tuple(game for game in ATARI if set(COMPARED) <= set(GAMES[game].arms))
    frozen = tuple(game for game in ATARI if set(FROZEN) <= set(GAMES[game].arms))
    sets = {" ".join(games): games for games in (shared, frozen)}
    return {
        name: {
            arm: measures.interquartile_mean(matrix)
            for arm in arms
            if (matrix := _matrix(runs, arm, games, score)) is not None
        }
        for name, games in sets.items()
    }


def at_equal_minutes(runs: Runs) -> dict[str, Any]:
    """The same figures at the time at which the frozen VAE has taken its agent steps, by game and seed.

    Scores are then means of the last 10 training games, the frozen VAE's too. With collection and pretraining, others
    have the seconds of its making as well; only arms that go on beyond their agent steps can use them, and no other
    arm is compared there.
    """
    found: dict[str, Any] = {}
    for name, has_prior in (("learning alone", False), ("with collection and pretraining", True)):

        def score(game: str, run: dict[str, Any], *, _has_prior: bool = has_prior) -> float:
            return _on_scale(game, _at_the_same_time(runs, game, run, has_prior=_has_prior))

        pairs = _pairs(runs, FRESH, "pixels", ATARI, score)
        found[name] = {
            "frozen_minus_pixels": _mean(pairs),
            "frozen_minus_pixels_low": _low(pairs),
            "improve_over_pixels": _improvement(runs, "pixels", ATARI, score),
            "iqm": aggregated(runs, score, CLOCKED if has_prior else COMPARED),
        }
        if not has_prior:
            found[name] |= {
                f"improve_over_{arm.replace('-', '_')}": _improvement(runs, arm, ATARI, score)
                for arm in ("random-encoder", "pca")
            }
    return found


def _at_the_same_time(runs: Runs, game: str, run: dict[str, Any], *, has_prior: bool) -> float:
    seed = next(s for arm in runs.values() for s, other in arm.get(game, {}).items() if other is run)
    leader = _runs(runs, FRESH, game).get(seed)
    if leader is None:
        return math.nan
    seconds = leader["seconds"]
    if has_prior:
        seconds += sum(leader["prior"][key] for key in ("collect_s", "pretrain_s"))
        seconds -= sum(run["prior"][key] for key in ("collect_s", "pretrain_s")) if run["prior"] else 0.0
    return measures.at_second(run["games"], seconds)


def _gains(runs: Runs) -> dict[str, Any]:
    """On CartPole: the VAE's arms over the random encoder and over PCA, pair by pair."""
    found = {}
    for arm in (FRESH, "vae-online"):
        for other in ("random-encoder", "pca"):
            pairs = _pairs(runs, arm, other, (CARTPOLE,), normalised)
            low, high = t_interval(np.array(pairs))
            found[f"{arm} - {other}"] = {
                "mean": _mean(pairs),
                "low": _rounded(low),
                "high": _rounded(high),
                "pairs": len(pairs),
            }
    return found


def _runs(runs: Runs, arm: str, game: str) -> dict[int, dict[str, Any]]:
    return runs.get(arm, {}).get(game, {})


def _scores(runs: Runs, arm: str, game: str) -> dict[int, float]:
    return {seed: float(np.mean(run["greedy"])) for seed, run in sorted(_runs(runs, arm, game).items())}


def _pairs(
    runs: Runs, arm: str, other: str, games: Sequence[str], score: Callable[[str, dict[str, Any]], float]
) -> list[float]:
    """Differences of the games and seeds that both arms have."""
    return [
        score(game, run) - score(game, _runs(runs, other, game)[seed])
        for game in games
        for seed, run in sorted(_runs(runs, arm, game).items())
        if seed in _runs(runs, other, game)
    ]


def _matrix(
    runs: Runs, arm: str, games: Sequence[str], score: Callable[[str, dict[str, Any]], float]
) -> np.ndarray | None:
    """(seeds, games) of the seeds that all these games have; None where there is none, or a score is missing."""
    seeds = set.intersection(*(set(_runs(runs, arm, game)) for game in games)) if games else set()
    if not seeds:
        return None
    matrix = np.array([[score(game, _runs(runs, arm, game)[seed]) for game in games] for seed in sorted(seeds)])
    return matrix if np.isfinite(matrix).all() else None


def _improvement(
    runs: Runs, other: str, games: Sequence[str], score: Callable[[str, dict[str, Any]], float]
) -> float | None:
    """Chance that a run of the frozen VAE is better than one of another arm, mean over the games that both have run.

    Of the seeds that both have; every run of the one is held against every run of the other.
    """
    chances = []
    for game in games:
        mine, theirs = _runs(runs, FRESH, game), _runs(runs, other, game)
        seeds = sorted(mine.keys() & theirs.keys())
        if seeds:
            of_both = (np.array([[score(game, by_seed[seed])] for seed in seeds]) for by_seed in (mine, theirs))
            chances.append(measures.probability_of_improvement(*of_both))
    return _mean(chances)


def _mean(values: Sequence[float]) -> float | None:
    return _rounded(float(np.mean(values))) if len(values) else None


def _low(values: Sequence[float]) -> float | None:
    return _rounded(t_interval(np.array(values))[0])


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 3)
