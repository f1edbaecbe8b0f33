"""Hand-written loops in one process: the shipped recipe's networks and sizes, plain torch, nothing around them.

They show what the arithmetic costs and do not learn anything worth having: no episode masks, no exploration.

Shapes: T rows of the ring, E environments, K stacked observations, B batch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import torch
from torch.nn import functional

from jobs.recipes import PRETRAIN_RECIPES, train_recipe
from peers.measuring import Counts
from pipeline import artifact
from pipeline.atari import make_vector, preprocess_for
from pipeline.machine import cores
from rllib_ext.networks import QHead, QNetwork
from rllib_ext.settings import DQNSettings


class Ring:
    """Observations, actions and rewards of the newest T vector steps."""

    def __init__(self, rows: int, num_envs: int, obs: np.ndarray) -> None:
        """`obs` (E, ...) shows shape and dtype."""
        self.obs = np.zeros((rows, *obs.shape), obs.dtype)
        self.action = np.zeros((rows, num_envs), np.int64)
        self.reward = np.zeros((rows, num_envs), np.float32)
        self.written = 0
        self._rng = np.random.default_rng(0)

    def add(self, obs: np.ndarray, action: np.ndarray, reward: np.ndarray) -> None:
        """One vector step."""
        at = self.written % len(self.obs)
        self.obs[at], self.action[at], self.reward[at] = obs, action, reward
        self.written += 1

    def draw(self, settings: DQNSettings) -> tuple[torch.Tensor, ...]:
        """Stacked observations (B, K, ...), actions, n-step returns, stacked observations n steps later."""
        rows, num_envs = self.action.shape
        oldest = max(0, self.written - rows)
        t = self._rng.integers(oldest + settings.stack, self.written - settings.n_step, settings.batch_size)
        e = self._rng.integers(0, num_envs, settings.batch_size)
        window = t[:, None] + np.arange(1 - settings.stack, 1)
        steps = np.arange(settings.n_step)
        rewards = self.reward[(t[:, None] + steps) % rows, e[:, None]]
        columns = (
            self.obs[window % rows, e[:, None]],
            self.action[t % rows, e],
            (rewards * settings.gamma**steps).sum(1).astype(np.float32),
            self.obs[(window + settings.n_step) % rows, e[:, None]],
        )
        return tuple(torch.from_numpy(column) for column in columns)


def hand(mode: str, warmup: int, num_envs: int = 32) -> Iterator[Counts]:
    """Double Q-learning for ever; `mode` "latents" (frozen encoder) or "pixels" (encoder inside)."""
    recipe, preprocess, threads = train_recipe("dqn"), preprocess_for("pong"), cores()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    settings = recipe.train
    env = make_vector(preprocess, num_envs, threads)
    encoder = artifact.from_scratch(PRETRAIN_RECIPES["vae"].model, preprocess).eval()
    head = QHead(settings.stack, encoder.z_shape, env.num_actions, recipe.q)
    online = QNetwork(head, encoder if mode == "pixels" else None)
    target = copy.deepcopy(online).requires_grad_(False)
    optimizer = torch.optim.Adam(online.parameters(), settings.lr, fused=True)

    def observe(frames: np.ndarray) -> np.ndarray:
        return frames if mode == "pixels" else encoder.encode(torch.from_numpy(frames)).half().numpy()

    obs = observe(env.reset(np.arange(num_envs)).frames)
    history = np.repeat(obs[:, None], settings.stack, 1)
    ring = Ring(settings.replay_capacity // num_envs, num_envs, obs)
    updates = 0
    while True:
        with torch.inference_mode():
            action = online(torch.from_numpy(history)).argmax(1).numpy()
        step = env.step(action)
        ring.add(obs, action, step.rewards)
        obs = observe(step.frames)
        history = np.concatenate([history[:, 1:], obs[:, None]], 1)
        agent_steps = ring.written * num_envs
        while updates < (agent_steps - warmup) * settings.updates_per_agent_step:
            update(online, target, optimizer, ring.draw(settings), settings)
            updates += 1
        yield Counts(agent_steps, updates)


def update(
    online: QNetwork,
    target: QNetwork,
    optimizer: torch.optim.Optimizer,
    batch: tuple[torch.Tensor, ...],
    settings: DQNSettings,
) -> None:
    """One double-Q step with the Huber loss."""
    obs, action_B, returns_B, next_obs = batch
    with torch.no_grad():
        best_B1 = online(next_obs).argmax(1, keepdim=True)
        target_B = returns_B + settings.gamma**settings.n_step * target(next_obs).gather(1, best_B1)[:, 0]
    loss = functional.smooth_l1_loss(online(obs).gather(1, action_B[:, None])[:, 0], target_B)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(online.parameters(), settings.grad_clip, foreach=True)
    optimizer.step()
