"""`LatentDQN`: distributed Q-learning whose replay is columnar, on latents or on frames; a synchronous loop.

One training step: every runner samples one fragment in parallel, the fragments go into the replay, as many updates as
the replay ratio makes due are done, and the new weights go to the runners.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.core import COMPONENT_LEARNER, COMPONENT_METRICS_LOGGER, DEFAULT_MODULE_ID
from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS, LEARNER_RESULTS, WEIGHTS_SEQ_NO

from pipeline.errors import UserError
from rllib_ext import compat
from rllib_ext.checkpoint import verify_checkpoint, write_checkpoint
from rllib_ext.config import LatentDQNConfig
from rllib_ext.learner import LEARNER_FIGURES, UPDATES_KEY, LatentDQNLearner, to_training_data
from rllib_ext.replay import ColumnarReplay, ReplaySpec
from rllib_ext.replay_files import load_replay, save_replay
from rllib_ext.runner import Fragment, LatentEnvRunner
from rllib_ext.settings import DQNSettings
from rllib_ext.shared_bundle import SharedBundle
from rllib_ext.state_files import load_state, save_state

RESULTS_KEY = "latentrl"  # where a result of `train()` keeps the figures of this file
_RETURN_WINDOW_EPISODES = 20
_MAX_DRAW_BYTES = 64 * 2**20


class LatentDQN(Algorithm):
    """See the module. Built by `LatentDQNConfig(...).build_algo()`; `train()` makes one training step.

    `train()["latentrl"]` holds `agent_steps`, `updates`, `agent_steps_per_s`, `epsilon`, `episodes`,
    `episode_return_mean` (raw, last 20 games, NaN before the first), `td_loss`, `q_mean`, `update_s`, and seconds of
    the step by part.
    """

    @classmethod
    def get_default_config(cls) -> LatentDQNConfig:
        """RLlib's hook."""
        return LatentDQNConfig(algo_class=cls)

    def setup(self, config: LatentDQNConfig) -> None:
        """Puts the encoder into the object store, starts runners and learner, reserves the replay."""
        self.settings: DQNSettings = config.settings
        self.config = self._with_bundle(config)
        torch.set_num_threads(self.settings.learner_threads)
        super().setup(self.config)
        self.replay = ColumnarReplay(self._replay_spec(), seed=config.seed or 0)
        self.agent_steps = 0
        self.updates = 0
        self.num_episodes = 0
        self.num_restores = 0
        self.steps_per_runner: Counter[str] = Counter()
        self.recent_returns: deque[float] = deque(maxlen=_RETURN_WINDOW_EPISODES)
        self._finished_games: list[tuple[int, float]] = []
        self._sync_weights()

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

    def _replay_spec(self) -> ReplaySpec:
        is_latent = self.config.mode == "frozen"
        assert self.config.preprocess is not None
        frame = (self.config.preprocess.height, self.config.preprocess.width)
        return ReplaySpec(
            num_lanes=self.config.num_lanes,
            lane_rows=self.settings.replay_capacity // self.config.num_lanes,
            obs_shape=(self.config.z_dim,) if is_latent else frame,
            obs_dtype="float16" if is_latent else "uint8",
            stack=self.settings.stack,
            n_step=self.settings.n_step,
            gamma=self.settings.gamma,
        )

    def training_step(self) -> None:
        """See the module."""
        self._seconds: dict[str, float] = defaultdict(float)
        started = time.perf_counter()
        steps_before = self.agent_steps
        fragments = self._timed("sample_s", self._sample)
        self._timed("store_s", lambda: self._store(fragments))
        learner_figures = self._learn()
        if learner_figures:
            self._timed("sync_s", self._sync_weights)
        seconds = time.perf_counter() - started
        figures = {**self.figures(), **learner_figures, **self._seconds, "step_s": seconds}
        figures["agent_steps_per_s"] = (self.agent_steps - steps_before) / seconds
        for name, value in figures.items():
            self.metrics.log_value((RESULTS_KEY, name), value, reduce="item")

    def _timed(self, name: str, part: Any) -> Any:
        started = time.perf_counter()
        result = part()
        self._seconds[name] += time.perf_counter() - started
        return result

    def _sample(self) -> list[Fragment]:
        kwargs = {"agent_steps": self.agent_steps}
        if self.config.num_env_runners == 0:
            results = [_sample_and_report(self.env_runner, **kwargs)]
        else:
            results = self.env_runner_group.foreach_env_runner(
                lambda runner: _sample_and_report(runner, **kwargs), local_env_runner=False
            )
        self.metrics.aggregate([metrics for _, metrics, _ in results], key=ENV_RUNNER_RESULTS)
        for fragment, _, who in results:
            self.steps_per_runner[who] += fragment.agent_steps
        return [fragment for fragment, _, _ in results]

    def _store(self, fragments: list[Fragment]) -> None:
        for fragment in fragments:
            first_lane = max(0, fragment.worker_index - 1) * self.settings.envs_per_runner
            self.replay.add(fragment.rows, first_lane)
            self.agent_steps += fragment.agent_steps
            self.num_episodes += len(fragment.episode_returns)
            self.recent_returns.extend(fragment.episode_returns)
            self._finished_games += [(self.agent_steps, value) for value in fragment.episode_returns]
            for part, seconds in fragment.seconds.items():
                self._seconds[f"{part}_s"] += seconds / len(fragments)

    def _learn(self) -> dict[str, float]:
        due = self.settings.due_updates(self.agent_steps) - self.updates
        figures: dict[str, float] = {}
        while due > 0:
            num_updates = min(due, self._updates_per_draw())
            drawn = self._timed("draw_s", lambda n=num_updates: self.replay.sample(n * self.settings.batch_size))
            results = self._timed("update_total_s", lambda d=drawn: self._update(d))
            self.metrics.aggregate(results, key=LEARNER_RESULTS)
            stats = results[0][DEFAULT_MODULE_ID]
            figures = {name: float(stats[name].peek()) for name in LEARNER_FIGURES}
            self.updates += num_updates
            due -= num_updates
        return figures

    def _updates_per_draw(self) -> int:
        frames = 2 * self.settings.stack * self.settings.batch_size
        return max(1, _MAX_DRAW_BYTES // (frames * self.replay.bytes_per_row))

    def _update(self, drawn: Any) -> Any:
        return self.learner_group.update(
            training_data=to_training_data(drawn),
            minibatch_size=self.settings.batch_size,
            timesteps={UPDATES_KEY: self.updates},
        )

    def _sync_weights(self) -> None:
        self.env_runner_group.sync_weights(from_worker_or_learner_group=self.learner_group, inference_only=True)

    def figures(self) -> dict[str, float]:
        """Where the run stands: counters, epsilon, mean raw return of the last 20 games (NaN before the first)."""
        return {
            "agent_steps": self.agent_steps,
            "updates": self.updates,
            "episodes": self.num_episodes,
            "epsilon": self.settings.epsilon(self.agent_steps),
            "episode_return_mean": float(np.mean(self.recent_returns)) if self.recent_returns else float("nan"),
        }

    def encoder_sha256s(self) -> dict[str, str]:
        """Hash of the encoder's parameters wherever there is one: "learner", "runner 1", ..."""
        hashes = self.env_runner_group.foreach_env_runner(
            lambda runner: (f"runner {runner.worker_index}", runner.encoder_sha256())
        )
        learners = self.learner_group.foreach_learner(_learner_encoder_sha256)
        hashes += [("learner", result.get()) for result in learners]
        return {name: sha256 for name, sha256 in hashes if sha256 is not None}

    def network_state(self) -> dict[str, np.ndarray[Any, Any]]:
        """The learner's online network: parameter name ("head....", "encoder....") to array."""
        state = self.learner_group.get_state(inference_only=True)[COMPONENT_LEARNER]
        weights = state["rl_module"][DEFAULT_MODULE_ID]
        return {name.removeprefix("network."): value for name, value in weights.items()}

    def save_to_path(self, path: str | Path | None = None, **kwargs: Any) -> str:
        """Writes a checkpoint with everything a resumed run needs, the replay included; no pickle.

        Args:
            path: The checkpoint's folder; replaced when it exists.
            kwargs: None is supported.

        Returns:
            The folder.
        """
        if path is None or kwargs:
            raise UserError(f"LatentDQN writes checkpoints to a folder of yours; got path={path}, {kwargs}")
        write_checkpoint(Path(path), self.config.run_id, self._write_state)
        return str(path)

    def restore_from_path(self, path: str | Path, **kwargs: Any) -> None:
        """Continues from a checkpoint that this run wrote.

        Raises:
            UserError: Another run wrote it, its bytes have changed, or the settings differ.
        """
        if kwargs:
            raise UserError(f"LatentDQN restores whole checkpoints only; got {kwargs}")
        verify_checkpoint(Path(path), self.config.run_id)
        self._read_state(Path(path))

    def _write_state(self, folder: Path) -> None:
        learner = self.learner_group.get_state()[COMPONENT_LEARNER]
        learner.pop(COMPONENT_METRICS_LOGGER, None)
        state = {
            "learner": learner,
            "agent_steps": self.agent_steps,
            "updates": self.updates,
            "num_episodes": self.num_episodes,
            "num_restores": self.num_restores,
            "recent_returns": list(self.recent_returns),
            "steps_per_runner": dict(self.steps_per_runner),
            "iteration": self.iteration,
            "torch_rng": torch.get_rng_state().numpy(),
        }
        save_state(state, folder, "state")
        save_replay(self.replay, folder / "replay")

    def _read_state(self, folder: Path) -> None:
        state = load_state(folder, "state")
        self.replay = load_replay(folder / "replay", self._replay_spec())
        self.learner_group.set_state({COMPONENT_LEARNER: {**state["learner"], WEIGHTS_SEQ_NO: 0}})
        self.agent_steps, self.updates = state["agent_steps"], state["updates"]
        self.num_episodes, self.num_restores = state["num_episodes"], state["num_restores"] + 1
        self.recent_returns.extend(state["recent_returns"])
        self.steps_per_runner.update(state["steps_per_runner"])
        torch.set_rng_state(torch.from_numpy(state["torch_rng"]))
        compat.set_iteration(self, state["iteration"])
        num_restores = self.num_restores
        self.env_runner_group.foreach_env_runner(lambda runner: runner.restarted(num_restores))
        self._sync_weights()


def _sample_and_report(runner: LatentEnvRunner, *, agent_steps: int) -> tuple[Fragment, Any, str]:
    fragment = runner.sample(agent_steps=agent_steps)
    actor = ray.get_runtime_context().get_actor_id() if runner.worker_index else None
    return fragment, runner.get_metrics(), f"runner-{runner.worker_index} {actor}" if actor else "in-process"


def _learner_encoder_sha256(learner: LatentDQNLearner) -> str | None:
    return learner.weights_sha256()
