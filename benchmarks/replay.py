"""What the replay costs: bytes per agent step, and seconds of drawing with priorities beside those of an update.

A replay of latents is filled to its capacity of 1,000,000 rows and one of 10,000 beside it. Then every turn does what
a frozen run does for an update: a fragment is added (overwriting the oldest), 256 transitions are drawn by priority, a
plain double-DQN update of the shipped Q network is made on them, and its TD errors become priorities. Every part is
timed in every turn, so that all of them see the same machine, and the replay the caches as an update leaves them.
Growth is measured apart, draws from the large and the small replay in turn and nothing between them: after an update
all draws are slow alike, which would hide it. Medians over the turns, in seconds that the one thread was running: what
else the machine does stays out.

    python benchmarks/replay.py
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional

from jobs.recipes import train_recipe
from rllib_ext.networks import QHead
from rllib_ext.replay import ColumnarReplay, Rows, Transitions
from rllib_ext.replay_spec import ReplaySpec, required_bytes

Z_DIM, STACK, NUM_ACTIONS, BATCH_SIZE = 392, 4, 6, 256
NUM_LANES, FRAGMENT_ROWS, EPISODE_ROWS = 16, 8, 800
LARGE_ROWS, SMALL_ROWS = 1_000_000, 10_000
TURNS, SETTLING_TURNS = 300, 30
BETA = 0.4


def measure() -> dict[str, Any]:
    """Fills the replays and takes the turns; see the keys in the code. One thread is used."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measure()
    finally:
        torch.set_num_threads(threads)


def _measure() -> dict[str, Any]:
    resident = psutil.Process().memory_info().rss
    large = _filled(LARGE_ROWS)
    resident = psutil.Process().memory_info().rss - resident
    small = _filled(SMALL_ROWS)
    seconds = _turns(large, small)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    replay_s = statistics.median(map(sum, zip(seconds["add"], seconds["sample"], seconds["priorities"], strict=True)))
    return {
        "replay_bytes_per_step_pixels": _bytes_per_step(_spec(LARGE_ROWS, (84, 84), "uint8")),
        "replay_bytes_per_step_latent": _bytes_per_step(large.spec),
        "replay_resident_bytes_per_step_latent": round(resident / len(large), 1),
        "z_dim": Z_DIM,
        "replay_add_sample_update_s": replay_s,
        "frozen_update_s": median["update"],
        "replay_share_of_update": round(replay_s / median["update"], 4),
        "replay_growth_cost": round(median["draw_large"] / median["draw_small"], 3),
        "replay_parts_s": {name: value for name, value in median.items() if name != "update"},
    }


def _spec(num_rows: int, obs_shape: tuple[int, ...] = (Z_DIM,), obs_dtype: str = "float16") -> ReplaySpec:
    return ReplaySpec(NUM_LANES, num_rows // NUM_LANES, obs_shape, obs_dtype, STACK, 3, 0.99, priority_alpha=0.6)


def _bytes_per_step(spec: ReplaySpec) -> float:
    return round(required_bytes(spec) / (spec.num_lanes * spec.lane_rows), 2)


def _filled(num_rows: int) -> ColumnarReplay:
    """A replay whose rings are full, with priorities of all sizes."""
    rng, replay = np.random.default_rng(0), ColumnarReplay(_spec(num_rows))
    while len(replay) < num_rows:
        replay.add(_rows(rng, replay, num_rows=min(125, replay.spec.lane_rows)), 0)
    ids = np.arange(num_rows)
    replay.update_priorities(ids, rng.exponential(size=num_rows).astype(np.float32))
    return replay


def _rows(rng: np.random.Generator, replay: ColumnarReplay, num_rows: int) -> Rows:
    shape = (num_rows, NUM_LANES)
    numbers = np.broadcast_to((replay.written[0] + np.arange(num_rows))[:, None], shape)
    never = np.zeros(shape, bool)
    return Rows(
        obs=rng.standard_normal((*shape, Z_DIM), np.float32).astype(np.float16),
        action=rng.integers(0, NUM_ACTIONS, shape),
        reward=rng.standard_normal(shape, np.float32),
        is_first=numbers % EPISODE_ROWS == 0,
        terminated=numbers % EPISODE_ROWS == EPISODE_ROWS - 2,
        truncated=never,
        is_last=numbers % EPISODE_ROWS == EPISODE_ROWS - 1,
    )


class _Clock:
    """Seconds that the thread ran in each kind of call."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def __call__(self, name: str, call: Callable[[], Any]) -> Any:
        started = time.thread_time()
        result = call()
        self.seconds.setdefault(name, []).append(time.thread_time() - started)
        return result


def _turns(large: ColumnarReplay, small: ColumnarReplay) -> dict[str, list[float]]:
    rng, update, timed = np.random.default_rng(1), _frozen_update(), _Clock()
    for _ in range(SETTLING_TURNS + TURNS):
        rows = _rows(rng, large, FRAGMENT_ROWS)
        timed("add", lambda new=rows: large.add(new, 0))
        drawn = timed("sample", lambda: large.sample(BATCH_SIZE, BETA))
        td_errors = timed("update", lambda batch=drawn: update(batch))
        timed("priorities", lambda ids=drawn.ids, td=td_errors: large.update_priorities(ids, td))
        del drawn  # as in a run: a batch is gone before the next one is drawn
    for _ in range(SETTLING_TURNS + TURNS):
        timed("draw_large", lambda: large.sample(BATCH_SIZE, BETA))
        timed("draw_small", lambda: small.sample(BATCH_SIZE, BETA))
    return {name: values[SETTLING_TURNS:] for name, values in timed.seconds.items()}


def _frozen_update() -> Callable[[Transitions], np.ndarray]:
    """Double Q-learning on latents in plain PyTorch; gives the TD errors."""
    online = QHead(STACK, (Z_DIM,), NUM_ACTIONS, train_recipe("dqn").q)
    target = copy.deepcopy(online).requires_grad_(False)
    optimizer = torch.optim.Adam(online.parameters(), lr=1e-4, fused=True)

    def update(drawn: Transitions) -> np.ndarray:
        columns = (drawn.obs, drawn.action, drawn.returns, drawn.next_obs, drawn.discount, drawn.weights)
        obs, action, returns, next_obs, discount, weights = map(torch.from_numpy, columns)
        obs, next_obs = obs.float(), next_obs.float()
        wanted = _targets(online, target, returns, discount, next_obs)
        value = online(obs).gather(1, action[:, None]).squeeze(1)
        loss = (weights * functional.smooth_l1_loss(value, wanted, reduction="none")).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return (wanted - value).detach().numpy()

    return update


@torch.no_grad()
def _targets(online: nn.Module, target: nn.Module, returns: Tensor, discount: Tensor, next_obs: Tensor) -> Tensor:
    best = online(next_obs).argmax(1, keepdim=True)
    return returns + discount * target(next_obs).gather(1, best).squeeze(1)


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
