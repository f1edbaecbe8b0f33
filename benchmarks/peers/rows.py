"""Which rows there are, and `python -m peers.rows JSON`: one of them measured in this process, as one JSON line."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from peers import measuring
from pipeline.machine import cores

AS_RLLIB = {
    "train": {"double": True, "n_step": 1, "priority_alpha": 0.6, "priority_beta": 0.4, "precision": "float32"},
    "q": {"dueling": True},
}
AS_SB3 = {
    "train": {"double": False, "n_step": 1, "priority_alpha": 0.0, "precision": "float32"},
    "q": {"dueling": False},
}
NATURE = {"torso": "nature", "hidden": (512,), "layer_norm": False}  # the peers' network, or close to it
POLL_S = 0.25


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        loop: Which of `_loop`'s it is.
        variants: The ways to set it up, by name; the fastest of the first turn stands for the row.
        what: The row in words.
    """

    loop: str
    what: str
    variants: dict[str, dict[str, Any]] = field(default_factory=lambda: {"": {}})


def rows(warmup: int, yardstick: str | None = None) -> dict[str, Row]:
    """All rows by name, in the order of their turns; each variant's first is the one that a short form measures.

    Args:
        warmup: Agent steps before the first update, for everybody.
        yardstick: A script that prints a JSON line with `agent_steps_per_s`; no such row if None.
    """
    table = {
        "rllib": Row("rllib", "stock RLlib DQN: double, dueling, prioritised", _rllib_variants(warmup)),
        "frozen": _ours("frozen", "latentrl frozen, shipped recipe", warmup),
        "sb3": Row("sb3", "Stable-Baselines3 DQN: plain, uniform", _sb3_variants(warmup)),
        "frozen_as_rllib": _ours("frozen", "latentrl frozen: double, dueling, prioritised", warmup, AS_RLLIB),
        "pixels_as_rllib": _ours("pixels", "latentrl pixels: double, dueling, prioritised", warmup, _nature(AS_RLLIB)),
        "frozen_as_sb3": _ours("frozen", "latentrl frozen: plain, uniform", warmup, AS_SB3),
        "pixels_as_sb3": _ours("pixels", "latentrl pixels: plain, uniform, float32", warmup, _nature(AS_SB3)),
        "pixels_best": _ours(
            "pixels", "latentrl pixels: plain, uniform, best precision", warmup, _nature(AS_SB3), "auto"
        ),
        "pixels_encoder": _ours(
            "pixels", "latentrl pixels: plain, uniform, the encoder's architecture", warmup, AS_SB3
        ),
        "pixels": _ours("pixels", "latentrl pixels, shipped recipe", warmup),
        "finetune": _ours("finetune", "latentrl finetune, shipped recipe", warmup),
        "hand_pixels": Row("hand", "hand-written pixel loop", {"": {"mode": "pixels", "warmup": warmup}}),
        "hand_latents": Row("hand", "hand-written latent loop", {"": {"mode": "latents", "warmup": warmup}}),
        "bare_environment": Row("bare_environment", "bare C++ environment"),
        "bare_encoder": Row("bare_encoder", "bare encoder, frames"),
        "yardstick": Row("yardstick", "yardstick for latents", {"": {"path": yardstick}}),
        "scaling_1": Row("scaling", "simulated environment, 1 worker", {"": {"num_workers": 1}}),
        "scaling_16": Row("scaling", "simulated environment, 16 workers", {"": {"num_workers": 16}}),
        "replay": Row("replay", "the replay alone"),
    }
    if yardstick is None:
        del table["yardstick"]
    return table


def _nature(features: dict[str, Any]) -> dict[str, Any]:
    return {**features, "q": {**features["q"], **NATURE}}


def _rllib_variants(warmup: int) -> dict[str, dict[str, Any]]:
    shapes = {"in-process, 8 environments": (0, 8), "in-process, 1 environment": (0, 1), "1 worker of 8": (1, 8)}
    networks = {"": False, ", network of the DQN paper": True}
    return {
        name + network: {"num_env_runners": runners, "num_envs": envs, "warmup": warmup, "is_nature": is_nature}
        for network, is_nature in networks.items()
        for name, (runners, envs) in shapes.items()
    }


def _sb3_variants(warmup: int) -> dict[str, dict[str, Any]]:
    return {f"{envs} environments": {"num_envs": envs, "warmup": warmup} for envs in (4, 1, 2, 8)}


def _ours(mode: str, what: str, warmup: int, features: dict[str, Any] | None = None, precision: str = "") -> Row:
    """Frozen rows run as shipped; where pixels are learned from, the learner may take one core or all."""
    features = features or {"train": {}, "q": {}}
    train = {**features["train"], "warmup_agent_steps": warmup} | ({"precision": precision} if precision else {})
    if mode == "frozen" or not features["train"]:
        return Row("latentrl", what, {"": {"mode": mode, "train": train, "q": features["q"]}})
    variants = {
        f"{threads} learner thread{'s' * (threads > 1)}": {
            "mode": mode,
            "train": {**train, "learner_threads": threads},
            "q": features["q"],
        }
        for threads in (cores(), 1)
    }
    return Row("latentrl", what, variants)


@dataclass(frozen=True)
class Cell:
    """One measurement: everything that decides its figures.

    Attributes:
        loop: See Row.
        options: The loop's arguments.
        seconds: Of the measured window.
        settle_s: Between the first update and the window.
        turn: Which repeat it is.
    """

    loop: str
    options: dict[str, Any]
    seconds: float
    settle_s: float
    turn: int

    def to_json(self) -> str:
        """One line."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


def run(cell: Cell) -> dict[str, Any]:
    """Measures a cell in this process."""
    if cell.loop == "replay":
        from replay import measure  # type: ignore[import-not-found]

        figures: dict[str, Any] = measure()
        return figures
    if cell.loop == "yardstick":
        return run_yardstick(**cell.options)
    loop = _loop(cell.loop)(**cell.options)
    try:
        return measuring.measure(loop, cell.seconds, cell.settle_s)
    finally:
        loop.close()


def _loop(name: str) -> Any:
    """Imported on demand, so that no row pays for the imports of another."""
    if name == "rllib":
        from peers.rllib_peer import rllib as loop
    elif name == "sb3":
        from peers.sb3_peer import sb3 as loop  # type: ignore[assignment]
    elif name == "latentrl":
        from peers.ours import latentrl as loop  # type: ignore[assignment]
    elif name == "hand":
        from peers.hand_loops import hand as loop  # type: ignore[assignment]
    elif name == "scaling":
        from peers.scaling import scaling as loop  # type: ignore[assignment]
    else:
        from peers import bare

        return getattr(bare, name)
    return loop


def run_yardstick(path: str) -> dict[str, Any]:
    """Runs the script to its end; its own figure, and the most memory seen."""
    process = subprocess.Popen([sys.executable, path], stdout=subprocess.PIPE, text=True)
    most = 0.0
    while process.poll() is None:
        most = max(most, measuring.resident_mb())
        time.sleep(POLL_S)
    assert process.stdout is not None
    lines = process.stdout.read().strip().splitlines()
    if process.returncode or not lines:
        raise SystemExit(f"the yardstick {path} ended with exit code {process.returncode} and {len(lines)} lines")
    figures = json.loads(lines[-1])
    return {"agent_steps_per_s": float(figures["agent_steps_per_s"]), "resident_mb": most}


if __name__ == "__main__":
    print(json.dumps(run(Cell(**json.loads(sys.argv[1])))), flush=True)
