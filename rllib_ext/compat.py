"""Everything that latentrl uses of RLlib 2.60 without RLlib promising it. One contract test stands behind each.

RLlib is pinned to 2.60; when the pin moves, tests/test_compat.py says which of these changed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import ray
from ray.rllib.core.learner.learner import Learner
from ray.rllib.env.env_runner_group import EnvRunnerGroup

if TYPE_CHECKING:
    from ray.train.backend import BackendConfig


@contextlib.contextmanager
def learners_meet_by(config: BackendConfig | None) -> Iterator[None]:
    """Around the setup of an algorithm: its remote learners are joined as Ray Train's configuration says.

    RLlib 2.60 makes that configuration itself, by a function of its module. None leaves it to that.
    """
    from ray.rllib.core.learner import learner_group  # here: it brings Ray Data, which rollout workers do without

    before = learner_group._get_backend_config
    if config is not None:
        learner_group._get_backend_config = lambda learner_class: config
    try:
        yield
    finally:
        learner_group._get_backend_config = before


def learner_rank(learner: Learner) -> int:
    """Which of the group's learners this is, from 0 (`Learner._learner_index`); also its rank in torch's group."""
    rank: int = learner._learner_index
    return rank


def count_call(learner: Learner) -> None:
    """Raises the sequence number by which RLlib tells newer weights from older ones."""
    learner._weights_seq_no += 1


def set_iteration(algorithm: Any, iteration: int) -> None:
    """Continues RLlib's count of training iterations after a restore (`Trainable._iteration`)."""
    algorithm._iteration = iteration


def wait_for_any_request(group: EnvRunnerGroup, timeout_s: float) -> None:
    """Waits until one of the requests under way at a group's runners is done, at most `timeout_s` seconds.

    `EnvRunnerGroup.fetch_ready_async_reqs` with a timeout waits for all of them.
    """
    refs = list(group._worker_manager._in_flight_req_to_actor_id)
    if refs:
        ray.wait(refs, num_returns=1, timeout=timeout_s)
    else:
        time.sleep(min(timeout_s, 0.05))


def ready_requests(group: EnvRunnerGroup, tag: str) -> list[tuple[int, Any]]:
    """(runner, result or the error it ended with) of the requests that are done.

    `EnvRunnerGroup.fetch_ready_async_reqs` drops errors where lost runners are replaced, an environment's own too.
    """
    results = group._worker_manager.fetch_ready_async_reqs(tags=tag, timeout_seconds=0.0)
    return [(result.actor_id, result.get()) for result in results]
