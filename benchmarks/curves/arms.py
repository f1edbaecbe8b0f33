"""Tasks and arms by name: what each differs in from the recipe, and how many agent steps it takes.

Settings that an arm does not name are the shipped recipe's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from peers.rows import AS_SB3, NATURE

from jobs.recipes import PRETRAIN_RECIPES, PretrainRecipe, TrainRecipe, train_recipe
from rllib_ext.settings import replace_known

PLAIN = dict(AS_SB3["train"])  # what Stable-Baselines3's DQN does
PLAIN_Q = {**AS_SB3["q"], "num_atoms": 1}
PIXELS_Q = {**PLAIN_Q, **NATURE}  # and its network
RALLY = {"warmup_agent_steps": 1_000, "epsilon_decay_agent_steps": 8_000, "lr": 3e-4, "target_update_updates": 250}


@dataclass(frozen=True)
class Arm:
    """One way to learn a task.

    Attributes:
        what: In words.
        mode: "frozen", "finetune", "pixels", or "sb3".
        train: Changes to the recipe's Q-learning.
        q: Changes to its Q network.
        num_workers: Remote rollout workers.
        recipe: Which recipe it starts from.
        prior_frames: Random-play frames that a frozen encoder is trained on.
        encoder: By which recipe.
    """

    what: str
    mode: str
    train: dict[str, Any] = field(default_factory=dict)
    q: dict[str, Any] = field(default_factory=dict)
    num_workers: int = 1
    recipe: str = "dqn"
    prior_frames: int = 100_000
    encoder: str = "vae"


@dataclass(frozen=True)
class Task:
    """A game with the arms that learn it.

    Attributes:
        agent_steps: Decisions of a run.
        seeds: How many runs of an arm.
        arms: By name.
        window: Training games that a point of a curve, and the figure at the end, is the mean of.
        game: Its name.
    """

    agent_steps: int
    seeds: int
    arms: dict[str, Arm]
    window: int = 10
    game: str = "pong"


ENCODERS = {
    "grid": Arm("frozen latents of a grid's cells, recipe `dqn`", "frozen"),
    "axial": Arm("frozen latents of rows and columns, recipe `dqn`", "frozen", encoder="axial"),
}

TASKS = {
    "rally": Task(
        40_000,
        5,
        {
            "sb3": Arm("Stable-Baselines3 DQN, pixels", "sb3", {**RALLY, **PLAIN}, PIXELS_Q),
            "pixels": Arm("latentrl, pixels, same network and settings", "pixels", {**RALLY, **PLAIN}, PIXELS_Q),
            "pixels-sync": Arm("... synchronous", "pixels", {**RALLY, **PLAIN, "synchronous": True}, PIXELS_Q),
            "pixels-4-workers": Arm(
                "... 4 workers of 4 environments", "pixels", {**RALLY, **PLAIN, "envs_per_runner": 4}, PIXELS_Q, 4
            ),
        },
        window=40,
        game="rally",
    ),
    "pong-pixels": Task(
        100_000,
        1,
        {
            "sb3": Arm("Stable-Baselines3 DQN, pixels", "sb3", PLAIN, PIXELS_Q),
            "pixels": Arm("latentrl, pixels, same network and settings", "pixels", PLAIN, PIXELS_Q),
        },
    ),
    "pong": Task(
        100_000,
        3,
        {
            "frozen": Arm("latentrl, frozen, the recipe that the speed is measured with", "frozen"),
            "efficient": Arm("latentrl, frozen, the recipe `efficient`", "frozen", recipe="efficient"),
            "efficient-axial": Arm(
                "... on latents of rows and columns, without its convolution",
                "frozen",
                q={"grid_channels": 0},
                recipe="efficient",
                encoder="axial",
            ),
        },
    ),
    "encoders-pong": Task(100_000, 3, ENCODERS),
    "encoders-breakout": Task(100_000, 3, ENCODERS, game="breakout"),
    "pong-tricks": Task(
        100_000,
        3,
        {
            "plain": Arm("latentrl, frozen, no tricks", "frozen", PLAIN, PLAIN_Q),
            "n-step": Arm("... returns of 3 steps", "frozen", {**PLAIN, "n_step": 3}, PLAIN_Q),
            "n-step-dueling": Arm(
                "... returns of 3 steps, dueling", "frozen", {**PLAIN, "n_step": 3}, {**PLAIN_Q, "dueling": True}
            ),
            "double": Arm("... double", "frozen", {**PLAIN, "double": True}, PLAIN_Q),
            "dueling": Arm("... dueling", "frozen", PLAIN, {**PLAIN_Q, "dueling": True}),
            "distributional": Arm("... 51 atoms", "frozen", PLAIN, {**PLAIN_Q, "num_atoms": 51}),
            "bf16": Arm(
                "... bf16 where the processor computes in it", "frozen", {**PLAIN, "precision": "auto"}, PLAIN_Q
            ),
            "prioritised": Arm("... priorities", "frozen", {**PLAIN, "priority_alpha": 0.6}, PLAIN_Q),
        },
    ),
}
ENCODER_TASKS = ("encoders-pong", "encoders-breakout")


@dataclass(frozen=True)
class Cell:
    """One run: everything that decides it."""

    task: str
    arm: str
    seed: int
    agent_steps: int
    settings: dict[str, Any]

    @property
    def is_rally(self) -> bool:
        """The small game; all others are Atari's."""
        return self.game == "rally"

    @property
    def game(self) -> str:
        """What is played."""
        return TASKS[self.task].game

    @classmethod
    def of(cls, task: str, arm: str, seed: int) -> Cell:
        """Of the tables above."""
        return cls(task, arm, seed, TASKS[task].agent_steps, dataclasses.asdict(TASKS[task].arms[arm]))

    @property
    def recipe(self) -> TrainRecipe:
        """The arm's recipe with its changes."""
        base = train_recipe(self.settings["recipe"])
        q = replace_known(base.q, self.settings["q"])
        return TrainRecipe(base.name, q, base.train.replace(**self.settings["train"]), base.model)

    @property
    def encoder(self) -> PretrainRecipe | None:
        """How the frozen encoder is made; None where there is none."""
        return PRETRAIN_RECIPES[self.settings["encoder"]] if self.settings["mode"] == "frozen" else None

    @property
    def configuration(self) -> dict[str, Any]:
        """All that decides the run, the recipes' own settings included."""
        run = {key: self.settings[key] for key in ("mode", "num_workers", "prior_frames")}
        named = {"task": self.task, "arm": self.arm, "seed": self.seed, "agent_steps": self.agent_steps}
        return {**named, **run, "recipe": self.recipe, "encoder": self.encoder}

    @property
    def digest(self) -> str:
        """Of the configuration."""
        return hashlib.sha256(json.dumps(plain(self.configuration), sort_keys=True).encode()).hexdigest()[:12]

    def to_json(self) -> str:
        """One line."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


def plain(value: Any) -> Any:
    """As JSON has it; dataclasses are objects."""
    return json.loads(json.dumps(value, default=dataclasses.asdict))


def is_as_kept(now: Any, kept: Any) -> bool:
    """Whether a kept configuration is this one: settings added since then must be at their defaults."""
    if isinstance(now, dict):
        return set(now) == set(kept) and all(is_as_kept(now[key], kept[key]) for key in now)
    if not dataclasses.is_dataclass(now) or kept is None:
        return bool(plain(now) == kept)
    fields = {field.name: field for field in dataclasses.fields(now)}
    return set(kept) <= set(fields) and all(
        is_as_kept(getattr(now, name), kept[name] if name in kept else plain(_default(field)))
        for name, field in fields.items()
    )


def _default(of: dataclasses.Field[Any]) -> Any:
    return of.default if of.default_factory is dataclasses.MISSING else of.default_factory()
