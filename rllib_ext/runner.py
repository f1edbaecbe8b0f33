"""The rollout worker: steps a vector environment and returns columns, no episode objects.

Imports neither MLflow nor Ray Data and contacts no server; everything it needs comes with its configuration.

Shapes: E environments, T vector steps of a fragment, K stacked observations, H x W frame.
"""

from __future__ import annotations

import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.rllib.core import COMPONENT_RL_MODULE, DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.env import INPUT_ENV_SINGLE_SPACES, INPUT_ENV_SPACES
from ray.rllib.env.env_runner import EnvRunner
from ray.rllib.utils.checkpoints import Checkpointable
from ray.rllib.utils.metrics import NUM_ENV_STEPS_SAMPLED_LIFETIME, WEIGHTS_SEQ_NO

from pipeline.artifact import weights_sha256
from pipeline.atari import Step, VectorAtari, make_vector
from pipeline.schema import Preprocess
from rllib_ext.connectors import IS_FIRST, EncodeObservations
from rllib_ext.module import LatentQModule
from rllib_ext.replay import Rows
from rllib_ext.settings import DQNSettings
from rllib_ext.stacking import RollingStack
from rllib_ext.workers import Request

EnvFactory = Callable[[Preprocess, int, int], VectorAtari]


class Fragment(NamedTuple):
    """What one call of `sample` brought.

    `rows` (T, E, ...); `worker_index` 0 in the driver, else 1...; `agent_steps` decisions taken (rows that are not the
    last of an episode); `episode_returns` raw, and `episode_lengths` in agent steps, of the games that ended;
    `weights_updates` updates that the weights acted with had seen; `actor` Ray's id of the worker, empty in-process;
    `seconds` spent in "environment", "observation" (encoding and stacking), "action", "busy" (the request in all) and
    "idle" (before it, since the last one).
    """

    rows: Rows
    worker_index: int
    agent_steps: int
    episode_returns: list[float]
    episode_lengths: list[int]
    weights_updates: int
    actor: str
    seconds: dict[str, float]


class VectorSpaces:
    """A vector environment with the spaces that RLlib asks for."""

    def __init__(self, env: VectorAtari, preprocess: Preprocess) -> None:
        """Takes the environment over."""
        self.vector = env
        self.unwrapped = self
        self.num_envs = env.num_envs
        shape = (preprocess.height, preprocess.width)
        self.single_observation_space = gym.spaces.Box(0, 255, shape, np.uint8)
        self.single_action_space = gym.spaces.Discrete(env.num_actions)
        self.observation_space = gym.spaces.Box(0, 255, (env.num_envs, *shape), np.uint8)
        self.action_space = gym.spaces.MultiDiscrete([env.num_actions] * env.num_envs)


def atari_factory(preprocess: Preprocess, num_envs: int, num_threads: int) -> VectorAtari:
    """The default environments."""
    return make_vector(preprocess, num_envs, num_threads)


class LatentEnvRunner(EnvRunner, Checkpointable):
    """An RLlib EnvRunner whose samples are columnar fragments."""

    def __init__(self, *, config: Any, **kwargs: Any) -> None:
        """Builds environments (not in a driver that has remote runners), connectors and module."""
        super().__init__(config=config, **kwargs)
        self.settings: DQNSettings = self.config.settings
        self.spaces: dict[str, Any] = kwargs.get("spaces") or {}
        self.env: VectorSpaces | None = None
        if self.worker_index:
            torch.set_num_threads(self.settings.runner_threads)
        if self.worker_index or self.config.num_env_runners == 0:
            self.make_env()
        self._env_to_module = self.config.build_env_to_module_connector(env=self.env, spaces=self.spaces)
        self._features = RollingStack(self.settings.stack)
        self.make_module()
        self._weights_seq_no = 0
        self._weights_serial = self._weights_updates = -1
        self._answered_at: float | None = None
        self._obs: _Observation | None = None
        self._era: tuple[tuple[int, ...], int] | None = None
        self._actor = ray.get_runtime_context().get_actor_id() or "" if self.worker_index else ""
        self._enter((self.config.seed or 0, 0, 0), restores=0)

    def make_env(self) -> None:
        """Builds the vector environment; the next sample starts new episodes."""
        factory: EnvFactory = self.config.env_factory
        vector = factory(self.config.preprocess, self.settings.envs_per_runner, self.settings.runner_threads)
        self.env = VectorSpaces(vector, self.config.preprocess)
        self._obs = None

    def make_module(self) -> None:
        """Builds the module; its weights arrive with the first synchronisation."""
        spec = self.config.get_rl_module_spec(spaces=self.get_spaces(), inference_only=True)
        self.module: LatentQModule = spec.build().eval()

    def _enter(self, era: tuple[int, ...], restores: int) -> None:
        """Starts anew: fresh episodes, seeds of environments and exploration that depend on the era and the runner."""
        if (era, restores) == self._era:
            return
        entropy = np.random.SeedSequence([*era, self.worker_index or 0])
        self._env_seeds = np.random.default_rng(entropy)
        self._exploration = torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))
        self._era, self._obs = (era, restores), None

    @ray.method(enable_task_events=False)
    def apply(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What RLlib calls a remote runner by. Ray would keep a record of each call, 1 to 3 kB of the last 100,000."""
        return super().apply(func, *args, **kwargs)

    def sample_fragment(self, request: Request) -> Fragment | Exception:
        """Answers a request of the algorithm: takes newer weights over, enters its era, takes a fragment's steps.

        What the environment or the module raises is the answer: RLlib would restart a runner that raises, for ever.
        """
        started = time.perf_counter()
        try:
            fragment = self._answer(request)
        except Exception as error:
            error.add_note(traceback.format_exc())
            return error
        idle_s, self._answered_at = started - (self._answered_at or started), time.perf_counter()
        fragment.seconds.update(idle=idle_s, busy=self._answered_at - started)
        return fragment

    def _answer(self, request: Request) -> Fragment:
        self._enter(request.era, request.restores)
        if request.weights.serial != self._weights_serial:
            self._load(request.weights.load())
            self._weights_serial, self._weights_updates = request.weights.serial, request.weights.updates
        return self.sample(agent_steps=request.agent_steps)

    def _load(self, weights: dict[str, Any]) -> None:
        self.module.set_state(weights)
        self._features.clear()  # what an encoder inside made of earlier frames is no longer what it would make

    def sample(self, *, agent_steps: int = 0, explore: bool = True, force_reset: bool = False) -> Fragment:
        """Takes `fragment_length` vector steps.

        Args:
            agent_steps: Taken so far by all runners; sets epsilon.
            explore: Epsilon-greedy, or greedy.
            force_reset: Starts new episodes first; the open ones are cut.
        """
        assert self.env is not None, "this runner has no environment"
        self._clock: dict[str, float] = defaultdict(float)
        self._ended: list[tuple[float, int]] = []
        if self._obs is None or force_reset:
            self._obs = self._start(self.env.vector)
        rows = []
        for t in range(self.settings.fragment_length):
            global_steps = agent_steps + t * self.env.num_envs * max(1, self.config.num_env_runners)
            rows.append(self._step(self.env.vector, global_steps, explore))
        columns = Rows(*(np.stack(column) for column in zip(*rows, strict=True)))
        return self._finish(columns)

    def _start(self, vector: VectorAtari) -> _Observation:
        every, none = np.ones(vector.num_envs, bool), np.zeros(vector.num_envs, bool)
        self._returns, self._lengths = np.zeros(vector.num_envs), np.zeros(vector.num_envs, np.int64)
        seeds = self._env_seeds.integers(0, 2**31 - 1, vector.num_envs)
        return self._observe(vector.reset(seeds), is_first=every, is_last=none)

    def _step(self, vector: VectorAtari, global_steps: int, explore: bool) -> Rows:
        now = self._obs
        assert now is not None
        actions = self._act(now, global_steps, explore)
        started = time.perf_counter()
        step = vector.step(actions)
        self._clock["environment"] += time.perf_counter() - started
        terminated, truncated = step.terminated & ~now.is_last, step.truncated & ~step.terminated & ~now.is_last
        is_over = terminated | truncated
        self._count_games(step.rewards, ~now.is_last, is_over)
        ends_bootstrap = terminated | self._lost_life(now, step, is_over)
        row = Rows(
            now.stacked[:, -1], actions, self._clip(step.rewards), now.is_first, ends_bootstrap, truncated, now.is_last
        )
        self._obs = self._observe(step, is_first=now.is_last, is_last=is_over)
        return row

    def _count_games(
        self, rewards: NDArray[np.float32], is_step: NDArray[np.bool_], is_over: NDArray[np.bool_]
    ) -> None:
        self._returns += rewards
        self._lengths += is_step
        self._ended += [(float(self._returns[e]), int(self._lengths[e])) for e in np.flatnonzero(is_over)]
        self._returns[is_over] = 0
        self._lengths[is_over] = 0

    def _lost_life(self, now: _Observation, step: Step, is_over: NDArray[np.bool_]) -> NDArray[np.bool_]:
        if not self.settings.life_loss_ends_bootstrap:
            return np.zeros_like(is_over)
        lost: NDArray[np.bool_] = (step.lives < now.lives) & ~is_over & ~now.is_last
        return lost

    def _clip(self, rewards: NDArray[np.float32]) -> NDArray[np.float32]:
        bound = self.settings.reward_clip
        return rewards.clip(-bound, bound) if bound else rewards

    def _act(self, now: _Observation, global_steps: int, explore: bool) -> NDArray[np.int64]:
        started = time.perf_counter()
        batch = {Columns.OBS: torch.from_numpy(self._read(now))}
        if explore:
            epsilon = self._epsilon(global_steps)
            outputs = self.module.forward_exploration(batch, epsilon=epsilon, generator=self._exploration)
        else:
            outputs = self.module.forward_inference(batch)
        actions: NDArray[np.int64] = outputs[Columns.ACTIONS].numpy()
        self._clock["action"] += time.perf_counter() - started
        return actions

    @torch.inference_mode()
    def _read(self, now: _Observation) -> NDArray[Any]:
        """What Q reads (E, K, ...): an encoder inside the module sees a frame once, unless new weights came since."""
        network = self.module.network
        if not network.encodes_frames:
            return now.stacked
        if self._features.is_empty:
            return self._features.hold(network.features(torch.from_numpy(now.stacked)).numpy())
        newest = network.features(torch.from_numpy(now.stacked[:, -1:]))
        return self._features.push(newest[:, 0].numpy(), now.is_first)

    def _epsilon(self, global_steps: int) -> float | torch.Tensor:
        """One rate for all environments, or with Ape-X one for each of this runner's, (E,) float32."""
        if self.settings.exploration == "schedule":
            return self.settings.epsilon(global_steps)
        num_envs = self.settings.envs_per_runner
        first = max(0, (self.worker_index or 0) - 1) * num_envs
        total = max(1, self.config.num_env_runners) * num_envs
        rates = [self.settings.apex_epsilon(global_steps, first + e, total) for e in range(num_envs)]
        return torch.tensor(rates)

    def _observe(self, step: Step, *, is_first: NDArray[np.bool_], is_last: NDArray[np.bool_]) -> _Observation:
        started = time.perf_counter()
        batch = {Columns.OBS: step.frames, IS_FIRST: is_first}
        batch = self._env_to_module(rl_module=self.module, batch=batch, episodes=[], explore=True)
        self._clock["observation"] += time.perf_counter() - started
        return _Observation(batch[Columns.OBS], is_first, is_last, step.lives)

    def _finish(self, rows: Rows) -> Fragment:
        agent_steps = int((~rows.is_last).sum())
        self.num_env_steps_sampled_lifetime += agent_steps
        returns, lengths = [r for r, _ in self._ended], [n for _, n in self._ended]
        return Fragment(
            rows,
            self.worker_index or 0,
            agent_steps,
            returns,
            lengths,
            self._weights_updates,
            self._actor,
            dict(self._clock),
        )

    def get_metrics(self) -> Any:
        """RLlib's metrics since the last call, reduced for the driver's logger."""
        return self.metrics.reduce()

    def get_spaces(self) -> dict[str, Any]:
        """Spaces of the environment and of the module's observation, as RLlib keys them."""
        if self.env is None:
            return self.spaces
        single = (self.env.single_observation_space, self.env.single_action_space)
        return {
            INPUT_ENV_SPACES: (self.env.observation_space, self.env.action_space),
            INPUT_ENV_SINGLE_SPACES: single,
            DEFAULT_MODULE_ID: (self._env_to_module.observation_space, self.env.single_action_space),
        }

    def get_state(
        self,
        components: str | Collection[str] | None = None,
        *,
        not_components: str | Collection[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The module's weights and the count of steps; connectors keep no state."""
        state: dict[str, Any] = {NUM_ENV_STEPS_SAMPLED_LIFETIME: self.num_env_steps_sampled_lifetime}
        if self._check_component(COMPONENT_RL_MODULE, components, not_components):
            state[COMPONENT_RL_MODULE] = self.module.get_state(**kwargs)
            state[WEIGHTS_SEQ_NO] = self._weights_seq_no
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Takes weights over, from the learner or from another runner."""
        if COMPONENT_RL_MODULE in state:
            weights = state[COMPONENT_RL_MODULE]
            self._load(weights.get(DEFAULT_MODULE_ID, weights))
            self._weights_seq_no = state.get(WEIGHTS_SEQ_NO, 0)

    def get_ctor_args_and_kwargs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """For RLlib's checkpoints of components."""
        return (), {"config": self.config}

    @property
    def weights_seq_no(self) -> int:
        """RLlib's number of the weights that this runner acts with."""
        return self._weights_seq_no

    def encoder_sha256(self) -> str | None:
        """Hash of the parameters of the encoder that this runner uses; None in a driver that only learns."""
        if self.module.network.encoder is not None:
            return weights_sha256(self.module.network.encoder)
        pieces = self._env_to_module[EncodeObservations]
        return weights_sha256(pieces[0].encoder) if self.env is not None else None

    def assert_healthy(self) -> None:
        """Fails where construction did not come to its end."""
        assert self.module is not None
        assert self.env is not None or self.worker_index == 0

    def stop(self) -> None:
        """Closes the environments."""
        if self.env is not None:
            self.env.vector.close()


class _Observation(NamedTuple):
    """The newest observation of every environment."""

    stacked: NDArray[Any]  # (E, K, ...)
    is_first: NDArray[np.bool_]
    is_last: NDArray[np.bool_]
    lives: NDArray[np.int32]
