"""What a stage needs at once, worked out from its recipe and options before anything is started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from pipeline.errors import UserError

_RECIPE_OPTIONS = ("recipe", "config", "overrides")
_OPTIONS = {
    "collect": ("num_workers",),
    "pretrain": _RECIPE_OPTIONS,
    "encode": (),
    "train": (*_RECIPE_OPTIONS, "num_env_runners", "num_learners", "mode"),
}
STAGES = tuple(_OPTIONS)
_SPELLING = {"recipe": "a recipe", "overrides": "--set"}
_GAME = "pong"  # any will do: all games' frames are of one size


@dataclass(frozen=True)
class Wish:
    """A stage as it is about to be run; None and () stand for the stage's own defaults.

    Attributes:
        stage: One of STAGES; None where none is meant.
        recipe: Its recipe's name.
        config: File with settings.
        overrides: Changes of single settings.
        num_workers: Of collect.
        num_env_runners, num_learners, mode: Of train.
    """

    stage: str | None
    recipe: str | None = None
    config: str | None = None
    overrides: Sequence[str] = ()
    num_workers: int | None = None
    num_env_runners: int | None = None
    num_learners: int | None = None
    mode: str | None = None

    def check(self) -> None:
        """Refuses options that the stage does not have, and counts that make none.

        Raises:
            UserError: The first one.
        """
        known = _OPTIONS[self.stage] if self.stage else ()
        for name in fields(self)[1:]:
            if getattr(self, name.name) in (None, (), []) or name.name in known:
                continue
            option = _SPELLING.get(name.name, f"--{name.name.replace('_', '-')}")
            if self.stage is None:
                raise UserError(f"{option} says nothing without a stage; add --for {'|'.join(STAGES)}")
            raise UserError(f"{option} is not for {self.stage}; leave it out")
        for option, least in (("num_workers", 1), ("num_env_runners", 0), ("num_learners", 0)):
            value = getattr(self, option)
            if value is not None and value < least:
                raise UserError(f"--{option.replace('_', '-')} is {value}; ask for {least} or more")


@dataclass(frozen=True)
class Needs:
    """What a stage takes at once.

    Attributes:
        what: Who takes it, in words.
        cpus: Of Ray's count.
        replay_bytes: Memory of a full replay, in the driver; 0 where there is none.
        replay_capacity: Its rows.
    """

    what: str
    cpus: float
    replay_bytes: int = 0
    replay_capacity: int = 0


def stage_of(recipe: str | None, stage: str | None) -> str | None:
    """The stage that is meant, told from the recipe's name where no stage is named.

    Raises:
        UserError: There is no such recipe, or several stages have one of this name.
    """
    if recipe is None or stage is not None:
        return stage
    from jobs.recipes import PRETRAIN_RECIPES, TRAIN_RECIPES

    stages = [name for name, group in (("pretrain", PRETRAIN_RECIPES), ("train", TRAIN_RECIPES)) if recipe in group]
    if not stages:
        known = ", ".join(sorted({*PRETRAIN_RECIPES, *TRAIN_RECIPES}))
        raise UserError(f"unknown recipe {recipe!r}; there are {known}")
    if len(stages) > 1:
        raise UserError(f"{recipe} is a recipe of {' and of '.join(stages)}; add --for {stages[0]} or {stages[1]}")
    return stages[0]


def needs_of(wish: Wish) -> Needs | None:
    """What a stage needs; None where none is meant.

    Raises:
        UserError: Its options or settings cannot work.
    """
    wish.check()
    if wish.stage is None:
        return None
    if wish.stage == "collect":
        if wish.num_workers is None:
            return Needs("collecting workers, one a free CPU,", 1.0)
        return Needs(f"{wish.num_workers} collecting workers", float(wish.num_workers))
    if wish.stage == "encode":
        return Needs("an encoding worker", 1.0)
    return _pretraining(wish) if wish.stage == "pretrain" else _training(wish)


def _pretraining(wish: Wish) -> Needs:
    from jobs.recipes import pretrain_recipe
    from pipeline.train import resources_needed

    config = pretrain_recipe(wish.recipe or "vae", config=wish.config, overrides=wish.overrides).train
    workers = config.num_workers
    return Needs(
        f"{workers} training worker{'s' * (workers != 1)} and the data stream", resources_needed(config)["CPU"]
    )


def _training(wish: Wish) -> Needs:
    from jobs.recipes import train_recipe
    from pipeline.atari import preprocess_for
    from rllib_ext.config import LatentDQNConfig
    from rllib_ext.replay_spec import required_bytes

    recipe = train_recipe(wish.recipe or "dqn", config=wish.config, overrides=wish.overrides)
    preprocess = preprocess_for(_GAME)
    runners = 1 if wish.num_env_runners is None else wish.num_env_runners
    learners = wish.num_learners or 0
    config = LatentDQNConfig().latent(preprocess=preprocess, mode=wish.mode or "frozen").training(recipe.train)
    config = config.env_runners(num_env_runners=runners)
    config.settings.check(config.num_lanes)
    config.z_shape = recipe.model.for_frames(preprocess.height, preprocess.width).latent_shape
    counts = (runners, "rollout worker"), (learners, "learner")
    what = " and ".join(f"{count} {name}{'s' * (count != 1)}" for count, name in counts if count) or "the driver"
    capacity = recipe.train.replay_capacity
    return Needs(what, float(runners + learners), required_bytes(config.replay_spec()), capacity)
