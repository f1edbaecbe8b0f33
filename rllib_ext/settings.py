"""The settings of the Q-learning: typed, frozen, complete, and checked together before anything starts.

Imports neither Ray nor torch, so recipes and the command line can read it at no cost.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.errors import UserError
from pipeline.names import suggestion
from pipeline.untrusted import short

T = TypeVar("T")

FROZEN, FINETUNE, ONLINE, PIXELS = "frozen", "finetune", "online", "pixels"
MODES = (FROZEN, FINETUNE, ONLINE, PIXELS)
MOST_LAYERS, MOST_WIDTH = 16, 8192
MOST_FRAMES = 4_096  # of an update on the bound
ENCODER_TORSO, NATURE = "encoder", "nature"
TORSOS = (ENCODER_TORSO, NATURE)
CACHE, EXACT = "cache", "exact"
_CHOICES = {"exploration": ("schedule", "apex"), "precision": ("float32", "bf16", "auto")}


@dataclass(frozen=True)
class QConfig:
    """The Q network on top of the stacked features.

    Attributes:
        hidden: Widths of the hidden layers.
        grid_channels: Channels of a 3x3 convolution over the cells of the stacked latents, before the hidden layers; 0:
            none. For encoders whose latents lie on a grid: what a cell holds then means the same in all of them.
        layer_norm: Whether each hidden layer is normalised before its nonlinearity (Ba et al. 2016).
        dueling: Value and advantage streams after the last hidden layer (Wang et al. 2016).
        num_atoms: 1 learns expected returns; more learn their distribution on so many atoms (C51,
            Bellemare et al. 2017).
        v_min: Lowest atom; only with several atoms.
        v_max: Highest atom.
        torso: What makes features of frames in pixels mode: "encoder", the latent model's encoder from scratch, frame
            by frame; or "nature", the convolutions of Mnih et al. (2015) over the stack, for which the paper's hidden
            layer is (512,) without layer_norm. The other modes have the pretrained encoder.
    """

    hidden: tuple[int, ...] = (256,)
    grid_channels: int = 0
    layer_norm: bool = True
    dueling: bool = False
    num_atoms: int = 1
    v_min: float = -10.0
    v_max: float = 10.0
    torso: str = ENCODER_TORSO

    def __post_init__(self) -> None:
        """Checks types, the widths, the atoms and the torso."""
        if (wrong := wrong_type(self)) is not None:
            raise ValueError(f"q.{wrong}")
        if len(self.hidden) > MOST_LAYERS or any(not 1 <= width <= MOST_WIDTH for width in self.hidden):
            limits = f"at most {MOST_LAYERS} widths, each from 1 to {MOST_WIDTH}"
            raise ValueError(f"q.hidden is {short(list(self.hidden))}; give {limits}")
        if not 0 <= self.grid_channels <= MOST_WIDTH:
            raise ValueError(f"q.grid_channels is {self.grid_channels}; give 0 (no convolution) or up to {MOST_WIDTH}")
        if not 1 <= self.num_atoms <= MOST_WIDTH:
            raise ValueError(f"q.num_atoms is {self.num_atoms}; give 1 (expected returns) or up to {MOST_WIDTH}")
        if self.num_atoms > 1 and self.v_min >= self.v_max:
            raise ValueError(f"q.v_min is {self.v_min} and q.v_max is {self.v_max}; v_min must be the lower one")
        if self.torso not in TORSOS:
            raise ValueError(f"q.torso is {self.torso!r}; choose one of {', '.join(TORSOS)}")

    def check(self, mode: str) -> None:
        """Refuses what another mode has no use for.

        Raises:
            UserError: A torso of its own, where there is a pretrained encoder; a convolution over a torso's features.
        """
        if self.torso != ENCODER_TORSO and self.grid_channels:
            raise UserError(
                f"q.grid_channels is {self.grid_channels}, and q.torso {self.torso} has no grid; set it to 0"
            )
        if mode != PIXELS and self.torso != ENCODER_TORSO:
            raise UserError(
                f"q.torso is {self.torso!r}, and mode {mode} reads frames with the pretrained encoder; leave it at "
                f"{ENCODER_TORSO!r}, or take mode {PIXELS}"
            )


@dataclass(frozen=True)
class ElboSettings:
    """How the latent-variable model goes on learning on its bound, from the replay's frames, beside the Q-learning.

    Attributes:
        updates_per_agent_step: Cumulative updates on the bound over agent steps after their own warm-up.
        warmup_agent_steps: Agent steps that are not counted for that; the first update comes with Q's first one.
        scratch_updates: Updates in one go before Q's first one, where the model starts from nothing.
        scratch_lr: Adam's rate in those.
        batch_size: Frames per update, each of the replay's equally likely.
        lr: Adam's rate, for encoder and decoder. What Q has learned is worth less the faster latents change.
        grad_clip: Greatest norm of a gradient, nats per pixel; 0 leaves gradients alone.
        publish_updates: Updates between two versions of the encoder that Q and the rollout workers read with.
        target_tau: Share of each new version that is blended into the target network's own encoder.
        q_reads: "cache": latents that the replay keeps beside its frames, some made by earlier versions; "exact": every
            drawn frame is encoded anew.
        refresh_rows_per_update: Rows of the cache that are made anew for every update of Q, in turn; fewer while some
            lanes hold more rows than others.
        in_finetune: Whether mode finetune makes such updates too, beside those on the TD error.
    """

    updates_per_agent_step: float = 0.0625
    warmup_agent_steps: int = 1_000
    scratch_updates: int = 500
    scratch_lr: float = 1e-3
    batch_size: int = 64
    lr: float = 1e-4
    grad_clip: float = 15.0
    publish_updates: int = 50
    target_tau: float = 0.1
    q_reads: str = CACHE
    refresh_rows_per_update: int = 16
    in_finetune: bool = False

    def check_mode(self, mode: str) -> None:
        """Refuses values that decide nothing in a mode.

        Raises:
            UserError: The first of them.
        """
        unread, advice = {field.name for field in dataclasses.fields(self)}, "leave it out"
        if mode == ONLINE:
            unread = {"in_finetune"}
        elif mode == FINETUNE and self.in_finetune:
            unread = {"target_tau", "q_reads", "refresh_rows_per_update", "scratch_updates", "scratch_lr"}
        else:
            advice += f", take mode {ONLINE}, or elbo.in_finetune=true in mode {FINETUNE}"
        for name in changed_names(self):
            if name in unread:
                value = getattr(self, name)
                raise UserError(f"elbo.{name} is {value!r}, which decides nothing in this run in mode {mode}; {advice}")

    def due_updates(self, agent_steps: int) -> int:
        """Updates on the bound that the ratio allows in total after so many agent steps."""
        return max(0, int((agent_steps - self.warmup_agent_steps) * self.updates_per_agent_step + 1e-9))

    def check(self) -> None:
        """Refuses values that cannot work.

        Raises:
            UserError: The first problem: what, the value seen, what to do.
        """
        _require_sound(self, "elbo", _ELBO_RULES)
        if self.q_reads not in (CACHE, EXACT):
            raise UserError(f"elbo.q_reads is {self.q_reads!r}; choose one of {CACHE}, {EXACT}")


@dataclass(frozen=True)
class DQNSettings:
    """Everything that decides a run of Q-learning besides the network, the game and the mode.

    Attributes:
        lr: Adam's rate for the Q network, and for an encoder that starts from scratch.
        encoder_lr: Adam's rate for a pretrained encoder that is finetuned.
        lr_decay_agent_steps: Agent steps over which all rates, the bound's too, fall linearly to 0, so that the last
            policies differ little from each other; nothing is learned after them. 0: rates stay.
        adam_epsilon: Adam's epsilon, for both.
        batch_size: Transitions per update.
        gamma: Discount per agent step.
        n_step: Rewards summed before the bootstrap.
        stack: Latents or frames that Q sees at once.
        updates_per_agent_step: The replay ratio: cumulative updates over agent steps after the warm-up.
        replay_capacity: Rows (frames or latents) that the replay holds, over all environments.
        warmup_agent_steps: Agent steps before the first update.
        epsilon_start: Chance of a random action at the start.
        epsilon_end: And from `epsilon_decay_agent_steps` on; linear in between.
        epsilon_decay_agent_steps: See above; counted over all runners, from the start.
        exploration: "schedule": every runner follows epsilon's schedule. "apex": environment i of all N keeps a rate
            of its own, 0.4 ** (1 + 7 * i / (N - 1)), from the end of the warm-up on (Horgan et al. 2018, section 4).
        priority_alpha: 0 draws uniformly; above, with probability proportional to |TD error| ** alpha (Schaul et
            al. 2016).
        priority_beta: Exponent of the importance weights that correct such draws; 1 corrects fully.
        target_update_updates: Updates between copies to the target network; 0 when `target_tau` is used.
        double: The online network chooses the next action, the target network values it (van Hasselt et al. 2016);
            without it the target network does both.
        target_tau: Share of the network blended into the target after every update; 0 when copies are used.
        envs_per_runner: Environments stepped together by one runner.
        fragment_length: Vector steps that a runner takes between two exchanges with the learner.
        synchronous: Sampling and learning take turns, so that runs are reproducible bit for bit; otherwise they
            overlap.
        max_lead_fragments: How many fragments a runner may be ahead of the learner before it has to wait.
        max_updates_per_step: Updates of one training step at most; a longer backlog is worked off in several.
        checkpoint_agent_steps: Agent steps between two checkpoints of `latentrl train`; in the synchronous mode part of
            what a run is, since workers start new episodes there.
        reward_clip: Learning sees rewards cut to [-reward_clip, reward_clip]; 0 leaves them alone.
        life_loss_ends_bootstrap: Whether no value is carried over the loss of a life (the game goes on).
        grad_clip: Greatest norm of a gradient, per optimizer; 0 leaves them alone.
        precision: "float32", or "bf16": forward passes of the update under autocast, but for the last layer, whose
            values stay float32. "auto" is bf16 where the processor gains by it, else float32.
        runner_threads: Threads of a remote runner, for its environments and for torch.
        learner_threads: Threads of torch in each learner; 0: one where it reads latents, its share of the cores, up to
            four, where it trains an encoder.
    """

    lr: float = 1e-4
    encoder_lr: float = 1e-5
    lr_decay_agent_steps: int = 0
    adam_epsilon: float = 1.5e-4
    batch_size: int = 32
    gamma: float = 0.99
    n_step: int = 3
    stack: int = 4
    updates_per_agent_step: float = 0.25
    replay_capacity: int = 200_000
    warmup_agent_steps: int = 2_000
    epsilon_start: float = 1.0
    epsilon_end: float = 0.02
    epsilon_decay_agent_steps: int = 20_000
    exploration: str = "schedule"
    priority_alpha: float = 0.0
    priority_beta: float = 0.5
    target_update_updates: int = 1_000
    double: bool = False
    target_tau: float = 0.0
    envs_per_runner: int = 16
    fragment_length: int = 8
    synchronous: bool = False
    max_lead_fragments: float = 2.0
    max_updates_per_step: int = 32
    checkpoint_agent_steps: int = 20_000
    reward_clip: float = 1.0
    life_loss_ends_bootstrap: bool = True
    grad_clip: float = 10.0
    precision: str = "auto"
    runner_threads: int = 1
    learner_threads: int = 0

    @property
    def fragment_steps(self) -> int:
        """Agent steps of a fragment at most."""
        return self.envs_per_runner * self.fragment_length

    @property
    def max_updates_per_draw(self) -> int:
        """Minibatches drawn at once: with priorities few, so that they have heard of the last ones."""
        return 4 if self.priority_alpha else self.max_updates_per_step

    def epsilon(self, agent_steps: int) -> float:
        """Chance of a random action after so many agent steps."""
        done = min(1.0, agent_steps / max(1, self.epsilon_decay_agent_steps))
        return self.epsilon_start + done * (self.epsilon_end - self.epsilon_start)

    def apex_epsilon(self, agent_steps: int, environment: int, num_environments: int) -> float:
        """Chance of a random action in one of all environments; everything is random during the warm-up.

        References:
            Horgan et al. (2018), Distributed Prioritized Experience Replay, section 4. arXiv:1803.00933.
        """
        if agent_steps < self.warmup_agent_steps:
            return 1.0
        power = 1.0 + 7.0 * environment / max(1, num_environments - 1)
        return float(0.4**power)

    def rate_share(self, agent_steps: float) -> float:
        """Share of the rates that is left after so many agent steps."""
        if not self.lr_decay_agent_steps:
            return 1.0
        return max(0.0, 1.0 - agent_steps / self.lr_decay_agent_steps)

    def consumed_agent_steps(self, updates: int) -> float:
        """Agent steps that so many updates answer to, the warm-up included."""
        return self.warmup_agent_steps + updates / self.updates_per_agent_step

    def due_updates(self, agent_steps: int) -> int:
        """Updates that the replay ratio allows in total after so many agent steps."""
        return max(0, int((agent_steps - self.warmup_agent_steps) * self.updates_per_agent_step + 1e-9))

    def replace(self, **changes: Any) -> DQNSettings:
        """A copy with some fields changed; an unknown one is a UserError."""
        return replace_known(self, changes)

    def check(self, num_lanes: int) -> None:
        """Refuses settings that cannot work together.

        Args:
            num_lanes: Environments of all runners.

        Raises:
            UserError: The first problem: what, the value seen, what to do.
        """
        _require_sound(self, "train", _FIELD_RULES)
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"train.{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}")
        self._check_target()
        self._check_sizes(num_lanes)

    def _check_target(self) -> None:
        if (self.target_tau > 0) == (self.target_update_updates > 0):
            raise UserError(
                f"train.target_tau is {self.target_tau} and train.target_update_updates is "
                f"{self.target_update_updates}; set exactly one of them above 0"
            )

    def _check_sizes(self, num_lanes: int) -> None:
        if self.replay_capacity < self.batch_size:
            raise UserError(
                f"train.replay_capacity is {self.replay_capacity}, less than one batch of "
                f"{self.batch_size} (train.batch_size); raise it"
            )
        if self.n_step > self.fragment_length:
            raise UserError(
                f"train.n_step is {self.n_step}, longer than a fragment of {self.fragment_length} "
                f"steps (train.fragment_length); lower the one or raise the other"
            )
        lane_rows = self.replay_capacity // num_lanes
        needed = 2 * (self.stack + self.n_step) + self.fragment_length
        if lane_rows < needed:
            raise UserError(
                f"train.replay_capacity is {self.replay_capacity}, {lane_rows} rows for each of {num_lanes} "
                f"environments; raise it to at least {needed * num_lanes}"
            )
        if self.warmup_agent_steps < num_lanes * (self.n_step + 1):
            raise UserError(
                f"train.warmup_agent_steps is {self.warmup_agent_steps}, too few for {num_lanes} environments to fill "
                f"one {self.n_step}-step return each; raise it to at least {num_lanes * (self.n_step + 1)}"
            )


_POSITIVE: tuple[Callable[[Any], bool], str] = (lambda v: v > 0, "it must be above 0")
_NATURAL: tuple[Callable[[Any], bool], str] = (lambda v: v >= 0, "it must be 0 or more")
_SHARE: tuple[Callable[[Any], bool], str] = (lambda v: 0 <= v <= 1, "it must lie between 0 and 1")
_Rules = tuple[tuple[str, Callable[[Any], bool], str], ...]
_ELBO_RULES: _Rules = (
    *((name, *_POSITIVE) for name in ("updates_per_agent_step", "lr", "scratch_lr")),
    ("batch_size", lambda v: 1 <= v <= MOST_FRAMES, f"it must be from 1 to {MOST_FRAMES}"),
    ("publish_updates", *_POSITIVE),
    *((name, *_NATURAL) for name in ("warmup_agent_steps", "scratch_updates", "grad_clip", "refresh_rows_per_update")),
    ("target_tau", lambda v: 0 < v <= 1, "it must be above 0 and at most 1"),
)
_FIELD_RULES: _Rules = (
    *((name, *_POSITIVE) for name in ("lr", "encoder_lr", "adam_epsilon", "batch_size", "n_step", "stack")),
    *((name, *_POSITIVE) for name in ("updates_per_agent_step", "replay_capacity", "envs_per_runner")),
    *((name, *_POSITIVE) for name in ("fragment_length", "runner_threads")),
    *((name, *_POSITIVE) for name in ("max_updates_per_step", "checkpoint_agent_steps")),
    ("max_lead_fragments", lambda v: v >= 1, "it must be 1 or more, or no worker could ever be asked for a fragment"),
    *((name, *_NATURAL) for name in ("warmup_agent_steps", "epsilon_decay_agent_steps", "reward_clip", "grad_clip")),
    *((name, *_NATURAL) for name in ("target_update_updates", "learner_threads", "lr_decay_agent_steps")),
    *((name, *_SHARE) for name in ("gamma", "epsilon_start", "epsilon_end", "target_tau")),
    *((name, *_SHARE) for name in ("priority_alpha", "priority_beta")),
)


def _require_sound(settings: Any, prefix: str, rules: _Rules) -> None:
    if (wrong := wrong_type(settings)) is not None:
        raise UserError(f"{prefix}.{wrong}")
    for name, is_sound, advice in rules:
        if not is_sound(value := getattr(settings, name)):
            raise UserError(f"{prefix}.{name} is {value}; {advice}")


_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
    "str": ((str,), "a word"),
}


def changed_names(settings: Any) -> list[str]:
    """The fields of a dataclass that hold another value than their default."""
    return [field.name for field in dataclasses.fields(settings) if getattr(settings, field.name) != field.default]


def wrong_type(settings: Any) -> str | None:
    """The first field of a dataclass that holds another type than it declares, or no finite number; None if all do."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.type == "tuple[int, ...]":
            if not isinstance(value, tuple | list) or any(type(item) is not int for item in value):
                return f"{field.name} is {value!r}; it must be a list of whole numbers"
            continue
        types, what = _TYPES[str(field.type)]
        if not isinstance(value, types) or (isinstance(value, bool) and field.type != "bool"):
            return f"{field.name} is {value!r}; it must be {what}"
        if isinstance(value, float) and not math.isfinite(value):
            return f"{field.name} is {value!r}; it must be finite"
    return None


def replace_known(settings: T, changes: dict[str, Any]) -> T:
    """`dataclasses.replace` whose unknown names are a UserError that says what there is."""
    names = [field.name for field in dataclasses.fields(settings)]  # type: ignore[arg-type]
    for name in changes:
        if name not in names:
            raise UserError(f"unknown setting {name!r}; {suggestion(name, names)}")
    return dataclasses.replace(settings, **changes)  # type: ignore[type-var]
