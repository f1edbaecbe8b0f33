"""What a run of `latentrl train` is: its settings, resolved."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from pipeline.errors import UserError
from pipeline.models.latent import ModelSettings
from rllib_ext.settings import DQNSettings, ElboSettings, QConfig


@dataclass(frozen=True)
class Training:
    """The resolved settings of a run.

    Attributes:
        recipe: Its name.
        game: ALE's id.
        protocol: The rules that the game is played by.
        mode: "frozen", "finetune", "online" or "pixels".
        encoder: Address as given; None where the encoder starts from nothing.
        encoder_uri: The address that means this version for ever, where there is one.
        encoder_sha256: Of the encoder's bundle.
        agent_steps: Decisions to take, over all runners.
        num_env_runners: Remote rollout workers; 0 samples in the driver.
        num_learners: Remote learners; 0 learns in the driver.
        num_gpus_per_learner: GPUs that Ray sets aside for each; 0 learns on the CPU, more than 0 on a GPU.
        seed: Of everything random.
        q: The Q network.
        train: The Q-learning.
        model: The architecture of an encoder that starts from nothing.
        elbo: How an encoder goes on learning on its bound, in the modes that have that.
    """

    recipe: str
    game: str
    protocol: str
    mode: str
    encoder: str | None
    encoder_uri: str | None
    encoder_sha256: str | None
    agent_steps: int
    num_env_runners: int
    num_learners: int
    num_gpus_per_learner: float
    seed: int
    q: QConfig
    train: DQNSettings
    model: ModelSettings
    elbo: ElboSettings

    def check(self) -> None:
        """Refuses counts that make no run; the rest is up to `LatentDQNConfig.check`.

        Raises:
            UserError: The first problem.
        """
        if self.agent_steps < 1:
            raise UserError(f"--agent-steps is {self.agent_steps}; ask for 1 or more")
        if self.num_env_runners < 0:
            raise UserError(f"--num-env-runners is {self.num_env_runners}; give 0 (in this process) or more")
        if self.num_learners < 0:
            raise UserError(f"--num-learners is {self.num_learners}; give 0 (in this process) or more")

    def note_if_learning_nothing(self) -> None:
        """Says on stderr where nothing will be learned, which may be meant: it is the shortest trial of all else."""
        decay = self.train.lr_decay_agent_steps
        if 0 < decay < self.agent_steps:
            print(
                f"note: --agent-steps {self.agent_steps} goes beyond {decay} (train.lr_decay_agent_steps), from which "
                "on all rates are 0 and nothing is learned; raise the latter, or ask for fewer steps",
                file=sys.stderr,
            )
        if self.agent_steps <= self.train.warmup_agent_steps:
            print(
                f"note: --agent-steps {self.agent_steps} does not go beyond the warm-up of "
                f"{self.train.warmup_agent_steps}, in which nothing is learned; ask for more, or shorten it with "
                "--set train.warmup_agent_steps=N",
                file=sys.stderr,
            )

    def describe_workers(self) -> str:
        """The actors that the run needs at once, in words."""
        counts = [(self.num_env_runners, "rollout worker"), (self.num_learners, "learner")]
        return " and ".join(f"{count} {name}{'s' * (count != 1)}" for count, name in counts if count) or "the driver"
