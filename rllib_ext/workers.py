"""The rollout workers as the algorithm sees them: ask for fragments, take those that are ready, replace the dead.

A runner may have several requests under way, so that it never waits for an answer; what it asks for next is up to the
algorithm, which holds the replay ratio. Each request carries where the newest weights lie and in which era the runner
is: a runner pulls weights when it starts the fragment, and starts fresh episodes from fresh seeds in a new era.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from typing import Any, NamedTuple

import ray
from ray.rllib.env.env_runner_group import EnvRunnerGroup

from pipeline.errors import UserError
from rllib_ext import compat
from rllib_ext.settings import DQNSettings

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_PROBES = 1.0
_PROBE_S = 0.2
_REVIVAL_LIMIT_S = 180.0


class WorkersLost(UserError):
    """All rollout workers are gone; what the driver holds is whole."""


class Weights(NamedTuple):
    """The learner's network as of so many updates: arrays by name, or a reference to them in the object store.

    `serial` is another one for each publication: two runs' networks may have had the same number of updates.
    """

    serial: int
    updates: int
    state: Any

    def load(self) -> dict[str, Any]:
        """The arrays."""
        state: dict[str, Any] = ray.get(self.state) if isinstance(self.state, ray.ObjectRef) else self.state
        return state


class Request(NamedTuple):
    """Asks a runner for one fragment.

    `agent_steps` taken so far by all runners, for schedules; `era`: numbers that seed environments and exploration; a
    runner that meets a new era starts new episodes; `weights` to act with; `restores` of this algorithm: after another
    one a runner starts anew, in the same era too, and from its seeds.
    """

    agent_steps: int
    era: tuple[int, ...]
    weights: Weights
    restores: int = 0


class RolloutWorkers:
    """Requests under way at the remote runners, or the one runner in this process.

    Attributes:
        deaths: How often each runner, by index, has been lost.
    """

    def __init__(self, group: EnvRunnerGroup, settings: DQNSettings, num_runners: int) -> None:
        """`num_runners` 0: the group's local runner samples, when it is asked."""
        self._group = group
        self._local = group.local_env_runner if num_runners == 0 else None
        self._ids = [0] if self._local is not None else list(range(1, num_runners + 1))
        self._fragment_steps = settings.envs_per_runner * settings.fragment_length
        self._max_each = max(1, round(settings.max_lead_fragments))
        self._under_way: Counter[int] = Counter()
        self._fragments_here: list[Any] = []
        self._probed_at = self._all_lost_at = 0.0
        self.deaths: Counter[int] = Counter()

    @property
    def num_runners(self) -> int:
        """Runners, the lost ones included; 1 in-process."""
        return len(self._ids)

    @property
    def steps_under_way(self) -> int:
        """Agent steps that have been asked for and not yet taken over."""
        return self._under_way.total() * self._fragment_steps

    def ask_all(self, request: Request) -> None:
        """Asks every runner for one fragment."""
        for runner in self._healthy():
            self._ask(runner, request)

    def ask(self, request: Request, max_steps: int) -> None:
        """Asks the least busy runners for fragments of at most `max_steps` agent steps in all."""
        budget = max_steps // self._fragment_steps
        for depth in range(self._max_each):
            for runner in self._healthy():
                if budget > 0 and self._under_way[runner] == depth:
                    self._ask(runner, request)
                    budget -= 1

    def take(self, wait_s: float) -> list[Any]:
        """The fragments that are ready; waits up to `wait_s` for the first one."""
        if self._local is not None:
            fragments, self._fragments_here = self._fragments_here, []
            self._under_way.clear()
            return fragments
        if wait_s > 0:
            compat.wait_for_any_request(self._group, wait_s)
        return self._received()

    def take_all(self) -> list[Any]:
        """One fragment of every runner that was asked, in the order of their indices; waits for them."""
        fragments = self.take(0.0)
        while self._under_way.total():
            fragments += self.take(1.0)
        return sorted(fragments, key=lambda fragment: fragment.worker_index)

    def forget(self) -> None:
        """Drops what is under way; waits for the runners to finish it."""
        self.take_all()

    def revive(self) -> list[int]:
        """Looks, now and then, whether lost runners are back.

        Returns:
            Their indices.

        Raises:
            WorkersLost: All of them have been gone for long.
        """
        lost = set(self._ids) - set(self._healthy())
        now = time.monotonic()
        if not lost or now - self._probed_at < _SECONDS_BETWEEN_PROBES:
            return []
        self._probed_at = now
        restored: list[int] = self._group.probe_unhealthy_env_runners(timeout_seconds=_PROBE_S)
        for runner in restored:
            logger.warning("rollout worker %d is back", runner)
        self._require_life(len(lost) - len(restored), now)
        return restored

    def _require_life(self, num_lost: int, now: float) -> None:
        if num_lost < len(self._ids):
            self._all_lost_at = 0.0
            return
        self._all_lost_at = self._all_lost_at or now
        if now - self._all_lost_at > _REVIVAL_LIMIT_S:
            raise WorkersLost(f"all {num_lost} rollout workers are lost and none came back in {_REVIVAL_LIMIT_S:.0f} s")

    def _healthy(self) -> list[int]:
        return self._ids if self._local is not None else sorted(self._group.healthy_env_runner_ids())

    def _ask(self, runner: int, request: Request) -> None:
        self._under_way[runner] += 1
        own = request._replace(era=(*request.era, self.deaths[runner]))
        if self._local is not None:
            self._fragments_here.append(_fragment(self._local.sample_fragment(own)))
            return
        self._group.foreach_env_runner_async(
            "sample_fragment", tag="sample", kwargs={"request": own}, remote_worker_ids=[runner]
        )

    def _received(self) -> list[Any]:
        fragments = []
        for runner, result in compat.ready_requests(self._group, "sample"):
            if isinstance(result, ray.exceptions.RayError):
                self._lost(runner, result)
            else:
                self._under_way[runner] -= 1
                fragments.append(_fragment(result))
        return fragments

    def _lost(self, runner: int, error: Exception) -> None:
        if self._under_way[runner]:  # the first of its requests to fail; the others went with it
            self.deaths[runner] += 1
            logger.warning("rollout worker %d is lost (%s); it is being replaced", runner, type(error).__name__)
        self._under_way[runner] = 0


def _fragment(answer: Any) -> Any:
    if isinstance(answer, Exception):
        raise answer
    return answer
