"""Arms and games by name: how each learns, for how long, and all that decides a cell.

Settings that an arm does not name are those of its recipe (`latentrl recipes`); CartPole has settings of its own, the
same for all arms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from curves import arms as curves

from experiment.worlds import CARTPOLE, RALLY, World, world
from jobs.recipes import PretrainRecipe, TrainRecipe, pretrain_recipe, train_recipe
from pipeline.models.pca import PCASettings
from rllib_ext.settings import replace_known

ENCODER = "vae"
ORACLE = "oracle"  # in place of a pretraining recipe
_BARE = {"lr": 1e-3, "n_step": 1, "target_update_updates": 1}  # what steadies Q-learning, left out
CLOCK_LIMIT_S = 3_600.0
GREEDY_EPISODES = 20


@dataclass(frozen=True)
class Arm:
    """One way to learn.

    Attributes:
        what: In words.
        mode: Of `latentrl train`.
        encoder: Recipe of `latentrl pretrain` that makes the encoder it starts from, ORACLE, or None.
        recipe: Of `latentrl train`; None: the game's, as all arms that are compared.
        q: Changes to the recipe's Q network.
        train: Changes to its Q-learning; the game's go before them.
        elbo: Changes to how the encoder learns on its bound.
    """

    what: str
    mode: str
    encoder: str | None
    recipe: str | None = None
    q: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    elbo: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Game:
    """What is played, by whom, for how long.

    Attributes:
        arms: Names of those that learn it.
        agent_steps: Decisions of a run.
        seeds: Runs of an arm.
        first_seed: Of those; seeds before it were looked at while settings were sought.
        prior_frames: Random-play frames that an encoder is made from.
        goal: Score whose time is taken, as the mean of the last 10 training games; None: of no interest.
        recipe: Of `latentrl train`, for arms that name none.
        num_workers: Remote rollout workers; 0 plays in the learner's process.
        train: Changes to every arm's Q-learning.
        pretrain: Changes to every encoder's training.
    """

    arms: tuple[str, ...]
    agent_steps: int = 100_000
    seeds: int = 3
    first_seed: int = 0
    prior_frames: int = 30_000
    goal: float | None = None
    recipe: str = "dqn"
    num_workers: int = 1
    train: Mapping[str, Any] = field(default_factory=dict)
    pretrain: Mapping[str, Any] = field(default_factory=dict)


ARMS = {
    "pixels": Arm("pixels from scratch, the DQN paper's convolutions", "pixels", None, q={"torso": "nature"}),
    "random-encoder": Arm("frozen: the VAE's encoder before its first update", "frozen", "random"),
    "pca": Arm("frozen: as many principal components as the VAE has latents", "frozen", "pca"),
    "vae-frozen": Arm("frozen: VAE of random-play frames", "frozen", "vae"),
    "vae-finetuned": Arm("the same VAE's encoder, finetuned by the TD error", "finetune", "vae"),
    "vae-online-scratch": Arm("VAE learned online on the replay, from nothing", "online", None),
    "vae-online": Arm("the same VAE, learned on online", "online", "vae"),
    "ram": Arm("oracle: 128 bytes of RAM, of CartPole its state's four", "frozen", ORACLE),
    "tuned": Arm(
        "frozen: the same VAE with the recipe `efficient`",
        *("frozen", "vae", "efficient"),
        train={"updates_per_agent_step": 1.0, "lr": 1e-4, "target_update_updates": 2_000},
    ),
    "tuned-long": Arm(
        "frozen: the same VAE, as the compared arms for ten times the steps, with a rate that falls",
        *("frozen", "vae"),
        train={"lr_decay_agent_steps": 1_000_000},
    ),
    "online-exact": Arm("online, drawn frames encoded anew", "online", "vae", elbo={"q_reads": "exact"}),
    "online-fast": Arm("online, the encoder's rate ten times higher", "online", "vae", elbo={"lr": 1e-3}),
    "joint": Arm(
        "TD error and bound both train the encoder, at the head's rate",
        *("finetune", "vae"),
        train={"encoder_lr": 1e-4},
        elbo={"in_finetune": True},
    ),
    "online-bare": Arm(
        "online, with neither target network, layer norm nor returns of 3 steps; rates of 1e-3",
        *("online", "vae"),
        q={"layer_norm": False},
        train=_BARE,
        elbo={"lr": 1e-3, "target_tau": 1.0, "publish_updates": 1},
    ),
    "joint-bare": Arm(
        "the same, and the TD error trains the encoder too",
        *("finetune", "vae"),
        q={"layer_norm": False},
        train={**_BARE, "encoder_lr": 1e-3},
        elbo={"lr": 1e-3, "in_finetune": True},
    ),
}
FROZEN = ("random-encoder", "pca", "vae-frozen", "ram")
TRAINED = ("pixels", "vae-finetuned", "vae-online-scratch", "vae-online")
CLOCKED = ("pixels", "vae-frozen")  # go on to the goal, beyond the games' agent steps
COMPARED = (*FROZEN, *TRAINED)
# What keeps the online loop steady, by what is left out.
STEADINESS = ("online-exact", "online-fast", "joint", "online-bare", "joint-bare")

# Found on the arms `ram` and `vae-frozen` with seeds that are not among those that count. What decides is how steady
# the last greedy policies are: small steps on large batches, ever smaller ones, and a tenth of random actions.
_CARTPOLE = {
    "warmup_agent_steps": 1_000,
    "epsilon_decay_agent_steps": 8_000,
    "epsilon_end": 0.1,
    "n_step": 16,
    "fragment_length": 16,
    "batch_size": 128,
    "updates_per_agent_step": 1.0,
    "target_update_updates": 1_000,
    "lr_decay_agent_steps": 20_000,
    "precision": "float32",
}
_RALLY = {
    "warmup_agent_steps": 1_000,
    "epsilon_decay_agent_steps": 5_000,
    "updates_per_agent_step": 1.0,
    "precision": "float32",
}
# The recipe `demo` with DQN's updates, found on the arm `vae-frozen` with seed 10 (docs/results/atari.md); float32 is
# the faster precision where these are run, for pixels too.
_COMPARED = {
    "recipe": "demo",
    "train": {
        "updates_per_agent_step": 0.25,
        "lr": 3e-4,
        "target_update_updates": 250,
        "precision": "float32",
    },
}
GAMES = {
    CARTPOLE: Game(COMPARED, 20_000, 5, 2, 20_000, num_workers=0, train=_CARTPOLE),
    RALLY: Game(("vae-frozen", "vae-online", *STEADINESS), 10_000, 3, 0, 20_000, num_workers=0, train=_RALLY),
    "pong": Game((*COMPARED, "tuned"), goal=-15.0, **_COMPARED),
    "breakout": Game((*COMPARED, "tuned"), goal=5.0, **_COMPARED),
    "freeway": Game((*FROZEN, "tuned"), **_COMPARED),
    "boxing": Game((*FROZEN, "tuned"), **_COMPARED),
    "ms_pacman": Game(("tuned-long",), 1_000_000, seeds=1, **_COMPARED),
}
_TINY = {"warmup_agent_steps": 100, "epsilon_decay_agent_steps": 200, "batch_size": 8, "envs_per_runner": 4}
_TINY_PRIOR = {"frames_per_epoch": 256, "monitor_frames": 512, "stats_frames": 512}


def short(game: Game) -> Game:
    """The same at toy size: proves that it runs, decides nothing."""
    return replace(
        game,
        agent_steps=400,
        seeds=1,
        prior_frames=1_024,
        num_workers=0,
        train={**game.train, **_TINY},
        pretrain={**game.pretrain, **_TINY_PRIOR},
    )


@dataclass(frozen=True)
class Cell(curves.Cell):
    """A game (`task`), an arm and a seed; `settings` holds arm and game as plain values."""

    @classmethod
    def of(cls, game: str, arm: str, seed: int, *, is_short: bool = False) -> Cell:
        """Of the tables above."""
        plan, is_clocked = GAMES[game], arm in CLOCKED
        plan = short(plan) if is_short else plan
        settings = {
            **dataclasses.asdict(ARMS[arm]),
            "recipe": ARMS[arm].recipe or plan.recipe,
            "num_workers": plan.num_workers,
            "prior_frames": plan.prior_frames if ARMS[arm].encoder else 0,
            "train": {**plan.train, **ARMS[arm].train},
            "pretrain": dict(plan.pretrain),
            "goal": plan.goal if is_clocked else None,
            "limit_s": 5.0 if is_short else CLOCK_LIMIT_S,
            "greedy_episodes": 2 if is_short else GREEDY_EPISODES,
        }
        return cls(game, arm, seed, plan.agent_steps, settings)

    @property
    def game(self) -> str:
        """What is played."""
        return self.task

    @property
    def world(self) -> World | None:
        """The game where `latentrl`'s commands do not play it."""
        return world(self.game, is_oracle=self.settings["encoder"] == ORACLE)

    @property
    def recipe(self) -> TrainRecipe:
        """The arm's recipe with its changes and the game's; the latent model's architecture is the VAE's.

        Raises:
            UserError: There is no such recipe or setting.
        """
        base = train_recipe(self.settings["recipe"])
        q, train = replace_known(base.q, dict(self.settings["q"])), base.train.replace(**self.settings["train"])
        return replace(base, q=q, train=train, elbo=replace_known(base.elbo, dict(self.settings["elbo"])))

    @property
    def encoder(self) -> PretrainRecipe | None:
        """How the encoder is made; None where there is none, or nothing is to be learned for it."""
        name = self.settings["encoder"]
        if name in (None, ORACLE):
            return None
        recipe = pretrain_recipe(name)
        known = self.world
        if known is not None and isinstance(recipe.model, PCASettings):
            latents = pretrain_recipe(ENCODER).model.for_frames(known.preprocess.height, known.preprocess.width)
            recipe = replace(recipe, model=replace(recipe.model, z_dim=latents.z_dim))
        return replace(recipe, train=replace(recipe.train, seed=self.seed, **self.settings["pretrain"]))

    @property
    def configuration(self) -> dict[str, Any]:
        """All that decides the run, the recipes' own settings included; errors as of `recipe`."""
        names = ("mode", "num_workers", "prior_frames", "goal", "limit_s", "greedy_episodes")
        run = {key: self.settings[key] for key in names}
        named = {"game": self.game, "arm": self.arm, "seed": self.seed, "agent_steps": self.agent_steps}
        encoder = ORACLE if self.settings["encoder"] == ORACLE else self.encoder
        return {**named, **run, "recipe": self.recipe, "encoder": encoder}


def cells(*, is_short: bool = False) -> list[Cell]:
    """All: seeds outside, so that every arm has its first run before any has its second."""
    games = {name: short(game) if is_short else game for name, game in GAMES.items()}
    return [
        Cell.of(name, arm, seed, is_short=is_short)
        for seed in range(max(game.first_seed + game.seeds for game in games.values()))
        for name, game in games.items()
        for arm in game.arms
        if game.first_seed <= seed < game.first_seed + game.seeds
    ]
