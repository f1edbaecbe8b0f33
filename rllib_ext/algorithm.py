"""`LatentDQN`: distributed Q-learning whose replay is columnar, on latents or on frames.

The loop is asynchronous and holds the replay ratio. Rollout workers sample while the learner learns:

    workers   are asked for fragments as long as what they have taken and been asked for is less than
              `max_lead_fragments` a worker ahead of what the learner has answered to
    learner   updates as long as fewer updates have been made than the replay ratio makes due
    weights   are put into the object store after each training step; a worker pulls them at its next fragment

In the synchronous mode the two take turns, in a fixed order: every worker one fragment, then all updates that are due.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import ray
import torch
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.utils.metrics import (
    ENV_RUNNER_RESULTS,
    EPISODE_LEN_MEAN,
    EPISODE_RETURN_MEAN,
    LEARNER_RESULTS,
    NUM_ENV_STEPS_SAMPLED,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
)

from pipeline.errors import UserError, reading
from rllib_ext import compat
from rllib_ext.checkpoint import verify_checkpoint, write_checkpoint
from rllib_ext.config import LatentDQNConfig
from rllib_ext.encoder_learning import EncoderLearning
from rllib_ext.learner import LearnerReport
from rllib_ext.learners import Learners
from rllib_ext.not_offered import NotOffered
from rllib_ext.replay import ColumnarReplay, Transitions
from rllib_ext.replay_files import load_replay, save_replay
from rllib_ext.runner import Fragment
from rllib_ext.settings import DQNSettings
from rllib_ext.shared_bundle import SharedBundle
from rllib_ext.state_files import load_state, save_state
from rllib_ext.workers import Request, RolloutWorkers, Weights

_COUNTERS = ("agent_steps", "updates", "num_episodes", "q_divergences", "seed")
RESULTS_KEY = "latentrl"  # where a result of `train()` keeps the figures of this file
_RETURN_WINDOW_EPISODES = 20
_MAX_DRAW_BYTES = 64 * 2**20
_WAIT_S = 0.5

P = ParamSpec("P")
T = TypeVar("T")


class LatentDQN(NotOffered, Algorithm):
    """See the module. Built by `LatentDQNConfig(...).build_algo()`; `train()` makes one training step.

    `train()["latentrl"]` holds `agent_steps`, `updates`, `agent_steps_per_s`, `updates_per_s`, `epsilon`, `episodes`,
    `episode_return_mean` (raw, last 20 games, NaN before the first), `td_loss`, `q_mean`, `update_s`, `replay_ratio`
    (updates per agent step since the warm-up), `staleness_updates` (how many updates behind the weights were that the
    newest fragments were played with), `runner_idle_share` (of a runner's time, waiting for the limiter) and
    `learner_idle_share` (of the driver's time, waiting for fragments), `cut_episodes`, `lost_runners`, `q_divergences`
    (updates with values that no return can have), what `EncoderLearning.figures` names where an encoder learns on its
    bound, and seconds of the step by part. What a step has nothing of (no fragment came, no update was due) is None
    there, or absent.
    """

    @classmethod
    def get_default_config(cls) -> LatentDQNConfig:
        """RLlib's hook."""
        return LatentDQNConfig(algo_class=cls)

    def setup(self, config: LatentDQNConfig) -> None:
        """Puts the encoder into the object store, starts runners and learner, reserves the replay."""
        self.settings: DQNSettings = config.settings
        self.config = self._with_bundle(config)
        torch.set_num_threads(self.config.learner_threads)
        from pipeline.rendezvous import on_one_machine  # here: it brings Ray Data, which rollout workers do without

        with compat.learners_meet_by(on_one_machine(self.config.num_learners)):
            super().setup(self.config)
        self.learners = Learners(self.learner_group)
        self.workers = RolloutWorkers(self.env_runner_group, self.settings, self.config.num_env_runners)
        self.seed = config.seed if config.seed is not None else int(np.random.SeedSequence().generate_state(1)[0])
        self.replay = ColumnarReplay(self.config.replay_spec(), seed=self.seed)
        self.encoder_learning = EncoderLearning(self.config, self.learners, self.replay)
        self.agent_steps = self.updates = self.num_episodes = self.q_divergences = 0
        self.num_barriers = self.num_restores = 0
        self.steps_per_runner: Counter[str] = Counter()
        self.recent_returns: deque[float] = deque(maxlen=_RETURN_WINDOW_EPISODES)
        self._finished_games: list[tuple[int, float]] = []
        self._publications = self._restores_here = 0
        self._publish()

    def take_finished_games(self) -> list[tuple[int, float]]:
        """(agent steps taken by then, raw return) of the games that ended since the last call."""
        games, self._finished_games = self._finished_games, []
        return games

    def _with_bundle(self, config: LatentDQNConfig) -> LatentDQNConfig:
        if config.encoder_path is None:
            return config
        assert config.encoder_sha256 is not None
        with_bundle = config.copy(copy_frozen=False)
        with_bundle.bundle = SharedBundle.put(config.encoder_path, config.encoder_sha256)
        with_bundle.freeze()
        return with_bundle

    def training_step(self) -> None:
        """See the module."""
        self._seconds: dict[str, float] = defaultdict(float)
        self._staleness: list[int] = []
        started = time.perf_counter()
        steps_before, updates_before = self.agent_steps, self.updates
        learner_figures = self._take_turns() if self.settings.synchronous else self._overlap()
        seconds = time.perf_counter() - started
        figures = {**self.figures(), **learner_figures, **self._seconds, "step_s": seconds}
        figures["agent_steps_per_s"] = (self.agent_steps - steps_before) / seconds
        figures["updates_per_s"] = (self.updates - updates_before) / seconds
        figures["learner_idle_share"] = self._seconds["wait_s"] / seconds
        if self._staleness:
            figures["staleness_updates"] = float(np.mean(self._staleness))
            figures["runner_idle_share"] = self._seconds["idle_s"] / (self._seconds["idle_s"] + self._seconds["busy_s"])
        for name, value in figures.items():
            self.metrics.log_value((RESULTS_KEY, name), value, reduce="item")

    def _take_turns(self) -> dict[str, float]:
        """Every worker one fragment, then all updates that are due."""
        while not (fragments := self._timed("wait_s", self._one_each)):
            self.restore_env_runners(self.env_runner_group)
        self._store(fragments)
        figures = self._learn(self._due())
        self._publish()
        return figures

    def _one_each(self) -> list[Fragment]:
        """A fragment of every worker; none, after a while, where all are lost."""
        self.workers.ask_all(self._request())
        return self.workers.take_all() or self.workers.take(_WAIT_S)

    def _overlap(self) -> dict[str, float]:
        """One portion of updates, or while none is due what the workers have brought; workers are kept busy."""
        figures: dict[str, float] = {}
        while not figures:
            self._ask()
            is_due = self._due() > 0
            fragments = self._timed("wait_s", self.workers.take, 0.0 if is_due else _WAIT_S)
            self._store(fragments)
            self._ask()
            figures = self._learn(min(self._due(), self.settings.max_updates_per_step))
            if fragments and not figures and self.agent_steps < self.settings.warmup_agent_steps:
                break
            if not fragments and not figures:
                self.restore_env_runners(self.env_runner_group)
        if figures:
            self._publish()
        return figures

    def _ask(self) -> None:
        """Asks for as many fragments as the limit on the lead allows.

        Agent steps that make no whole update due yet are no lead: counted, they would cost a fragment of overlap.
        """
        settings = self.settings
        limit = settings.max_lead_fragments * self.workers.num_runners * settings.fragment_steps
        limit += 1 / settings.updates_per_agent_step
        lead = self.agent_steps + self.workers.steps_under_way - settings.consumed_agent_steps(self.updates)
        self.workers.ask(self._request(), int(limit - lead))

    def _request(self) -> Request:
        era = (self.seed, self.num_barriers, self.num_restores)
        return Request(self.agent_steps, era, self._weights, self._restores_here)

    def _due(self) -> int:
        return self.settings.due_updates(self.agent_steps) - self.updates

    def restore_env_runners(self, env_runner_group: Any) -> list[int]:
        """RLlib's hook before each training step: lost runners are back in service as soon as they answer."""
        return self.workers.revive()

    def _timed(self, name: str, part: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        started = time.perf_counter()
        result = part(*args, **kwargs)
        self._seconds[name] += time.perf_counter() - started
        return result

    def _store(self, fragments: list[Fragment]) -> None:
        started = time.perf_counter()
        for fragment in fragments:
            first_lane = max(0, fragment.worker_index - 1) * self.settings.envs_per_runner
            self.replay.add(fragment.rows, first_lane)
            self._timed("encode_s", self.encoder_learning.add, first_lane, *fragment.rows.action.shape)
            self.agent_steps += fragment.agent_steps
            self.num_episodes += len(fragment.episode_returns)
            self.recent_returns.extend(fragment.episode_returns)
            self._finished_games += [(self.agent_steps, value) for value in fragment.episode_returns]
            self._staleness.append(self.updates - fragment.weights_updates)
            name = f"runner-{fragment.worker_index} {fragment.actor}" if fragment.actor else "in-process"
            self.steps_per_runner[name] += fragment.agent_steps
            for part, seconds in fragment.seconds.items():
                self._seconds[f"{part}_s"] += seconds / len(fragments)
            self._log_for_rllib(fragment)
        self._seconds["store_s"] += time.perf_counter() - started

    def _log_for_rllib(self, fragment: Fragment) -> None:
        """What RLlib's own tools look for in a result."""
        for key, reduce in ((NUM_ENV_STEPS_SAMPLED, "sum"), (NUM_ENV_STEPS_SAMPLED_LIFETIME, "lifetime_sum")):
            self.metrics.log_value((ENV_RUNNER_RESULTS, key), fragment.agent_steps, reduce=reduce)
        for episode_return, length in zip(fragment.episode_returns, fragment.episode_lengths, strict=True):
            window = _RETURN_WINDOW_EPISODES
            self.metrics.log_value((ENV_RUNNER_RESULTS, EPISODE_RETURN_MEAN), episode_return, window=window)
            self.metrics.log_value((ENV_RUNNER_RESULTS, EPISODE_LEN_MEAN), length, window=window)

    def _learn(self, num_updates: int) -> dict[str, float]:
        """Makes so many updates; figures of the last portion, none where there was nothing to do."""
        figures: dict[str, float] = {}
        while num_updates > 0:
            portion = min(num_updates, self._updates_per_draw())
            self._timed("elbo_s", self.encoder_learning.improve, self.agent_steps, portion / num_updates)
            drawn = self._timed("draw_s", self._draw, portion)
            with self.encoder_learning.refreshing(portion):
                reports = self._timed("update_total_s", self.learners.update, drawn, self.updates)
            self._require_finite(reports)
            self._timed("priorities_s", self._prioritise, reports)
            figures = reports[0].figures
            self.q_divergences += max(report.num_diverged for report in reports)
            self.updates += portion
            num_updates -= portion
        for name, value in figures.items():
            self.metrics.log_value((LEARNER_RESULTS, DEFAULT_MODULE_ID, name), value, window=1)
        return figures

    def _draw(self, num_updates: int) -> Transitions:
        settings = self.settings
        return self.replay.sample(settings.batch_size, settings.priority_beta, num_updates)

    def _require_finite(self, reports: list[LearnerReport]) -> None:
        """Ends a run whose network holds nothing any more.

        Raises:
            UserError: The loss is not a number.
        """
        loss = sum(report.figures["td_loss"] for report in reports)
        if not np.isfinite(loss):
            raise UserError(
                f"Q-learning has diverged: the loss is {loss} after {self.updates} updates; lower train.lr "
                f"({self.settings.lr}), or set train.grad_clip ({self.settings.grad_clip}) and train.reward_clip "
                f"({self.settings.reward_clip}) above 0"
            )

    def _prioritise(self, reports: list[LearnerReport]) -> None:
        if self.settings.priority_alpha:
            for report in reports:
                self.replay.update_priorities(report.ids, report.td_errors)

    def _updates_per_draw(self) -> int:
        """As many as fit into memory; with priorities few enough that they are not stale when drawn."""
        frames = 2 * self.settings.stack * self.settings.batch_size
        fitting = max(1, _MAX_DRAW_BYTES // (frames * self.replay.bytes_per_row))
        return min(fitting, self.settings.max_updates_per_draw)

    def _publish(self) -> None:
        """Puts the newest weights where runners will find them."""
        started = time.perf_counter()
        state = self.learners.inference_state()
        self._publications += 1
        shared = ray.put(state) if self.config.num_env_runners else state
        self._weights = Weights(self._publications, self.updates, shared)
        if hasattr(self, "_seconds"):
            self._seconds["publish_s"] += time.perf_counter() - started

    def figures(self) -> dict[str, float]:
        """Where the run stands: counters, epsilon, mean raw return of the last 20 games (NaN before the first)."""
        return {
            "agent_steps": self.agent_steps,
            "updates": self.updates,
            "episodes": self.num_episodes,
            "epsilon": self.settings.epsilon(self.agent_steps),
            "replay_ratio": self.updates / max(1, self.agent_steps - self.settings.warmup_agent_steps),
            "cut_episodes": self.replay.num_cut_episodes,
            "lost_runners": self.workers.deaths.total(),
            "q_divergences": self.q_divergences,
            **self.encoder_learning.figures(),
            "episode_return_mean": float(np.mean(self.recent_returns)) if self.recent_returns else float("nan"),
        }

    def encoder_sha256s(self) -> dict[str, str]:
        """Hash of the encoder's parameters wherever there is one: "learner", "runner 1", ..."""
        hashes = self.env_runner_group.foreach_env_runner(
            lambda runner: (f"runner {runner.worker_index}", runner.encoder_sha256())
        )
        hashes += [("learner", sha256) for sha256 in self.learners.encoder_sha256s()]
        return {name: sha256 for name, sha256 in hashes if sha256 is not None}

    def network_state(self) -> dict[str, np.ndarray[Any, Any]]:
        """The learner's online network: parameter name ("head....", "encoder....") to array."""
        return {name.removeprefix("network."): value for name, value in self.learners.inference_state().items()}

    def save_to_path(self, path: str | Path | None = None, **kwargs: Any) -> str:
        """Writes a checkpoint with everything a resumed run needs, the replay included; no pickle.

        In the synchronous mode it is a barrier: the workers go on with new episodes from seeds of its number.

        Args:
            path: The checkpoint's folder; replaced when it exists.
            kwargs: None is supported.

        Returns:
            The folder.
        """
        if path is None or kwargs:
            raise UserError(f"LatentDQN writes checkpoints to a folder of yours; got path={path}, {kwargs}")
        # In the synchronous mode every run starts new episodes here, so that a resumed one is in the same place.
        num_barriers = self.num_barriers + self.settings.synchronous
        write_checkpoint(
            Path(path),
            self.config.run_id,
            lambda folder, earlier: self._write_state(folder, earlier, num_barriers),
        )
        self.num_barriers = num_barriers
        return str(path)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Tune's hook; RLlib's own would ask for a choice between pickle and msgpack."""
        self.save_to_path(checkpoint_dir)

    def restore_from_path(self, path: str | Path, **kwargs: Any) -> None:
        """Continues from a checkpoint that this run wrote.

        Raises:
            UserError: Another run wrote it, its bytes have changed, or it was made with other settings than this
                algorithm's; those of `LatentDQNConfig.MAY_CHANGE` may differ, and this algorithm's count from now on.
        """
        if kwargs:
            raise UserError(f"LatentDQN restores whole checkpoints only; got {kwargs}")
        verify_checkpoint(Path(path), self.config.run_id)
        with reading(f"the checkpoint {path}", "restore it, or start the run anew"):
            self._read_state(Path(path))

    def restore(self, checkpoint_path: Any) -> None:
        """Tune's way, which would unpickle a file of its own that lay in the folder; errors as of restore_from_path."""
        is_place = isinstance(checkpoint_path, str | Path)
        checkpoint = ray.tune.Checkpoint(str(checkpoint_path)) if is_place else checkpoint_path
        with getattr(checkpoint, "checkpoint", checkpoint).as_directory() as folder:
            verify_checkpoint(Path(folder), self.config.run_id)
        super().restore(checkpoint)

    def _write_state(self, folder: Path, earlier: Path | None, num_barriers: int) -> None:
        state = {
            "identity": self.config.identity(),
            "learner": self.learners.state(),
            **{name: getattr(self, name) for name in _COUNTERS},
            "encoder_learning": self.encoder_learning.state(),
            "num_barriers": num_barriers,
            "num_restores": self.num_restores,
            "deaths": dict(self.workers.deaths),
            "recent_returns": list(self.recent_returns),
            "finished_games": self._finished_games,
            "steps_per_runner": dict(self.steps_per_runner),
            "iteration": self.iteration,
            "torch_rng": torch.get_rng_state().numpy(),
        }
        save_state(state, folder, "state")
        save_replay(self.replay, folder / "replay", earlier / "replay" if earlier else None)

    def _read_state(self, folder: Path) -> None:
        state = load_state(folder, "state")
        self.config.require_identity(state["identity"], f"the checkpoint {folder}")
        self.workers.forget()
        self.replay = load_replay(folder / "replay", self.config.replay_spec())
        self.learners.set_state(state["learner"])
        self.encoder_learning.set_state(state["encoder_learning"], self.replay)
        for name in (*_COUNTERS, "num_barriers"):
            setattr(self, name, state[name])
        self.num_restores = state["num_restores"] + (not self.settings.synchronous)
        self._restores_here += 1
        self.workers.deaths = Counter(state["deaths"])
        self.recent_returns = deque(state["recent_returns"], maxlen=_RETURN_WINDOW_EPISODES)
        self.steps_per_runner = Counter(state["steps_per_runner"])
        self._finished_games = state["finished_games"]
        lifetime = (ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME)
        missing = self.agent_steps - self.metrics.peek(lifetime, default=0)
        self.metrics.log_value(lifetime, missing, reduce="lifetime_sum")
        torch.set_rng_state(torch.from_numpy(state["torch_rng"]))
        compat.set_iteration(self, state["iteration"])
        self._publish()
