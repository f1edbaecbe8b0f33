"""The interleaved loop: an encoder that learns on the variational bound while Q learns on what it makes of frames.

collect   frames go into the replay, and their latents into its cache
improve   updates of encoder and decoder on replayed frames, as their own ratio makes due
publish   now and then Q, rollout workers and cache take the newest encoder over; the target's own follows it
update Q  on latents of the cache, while a few of them are made anew in the background
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UserError
from rllib_ext.cache import LatentCache
from rllib_ext.config import LatentDQNConfig
from rllib_ext.learners import Learners
from rllib_ext.module import SPEC_KEY
from rllib_ext.replay import ColumnarReplay

_LOOK_FRAMES = 64  # fresh ones, and as many old ones
_INITIAL_FRAMES = 1_024
_MOST_UPDATES_AT_ONCE = 16
_MOST_BYTES_AT_ONCE = 64 * 2**20


class EncoderLearning:
    """What the driver does for a model that learns on its bound; nothing in the modes that have none.

    Attributes:
        is_on: Whether this run's mode has one.
        has_started: Whether the first version has been published.
        updates: On the bound, those from nothing at the start not counted.
        on_start: Called when the first version has been published.
        cache: Latents beside the replay's frames; None where Q's frames are encoded when drawn.
    """

    def __init__(self, config: LatentDQNConfig, learners: Learners, replay: ColumnarReplay) -> None:
        """Takes the algorithm's parts; a restored replay takes the place of the first."""
        self._config, self._settings, self._learners, self._replay = config, config.elbo, learners, replay
        self.is_on, self.updates = config.learns_bound, 0
        self.has_started = False
        self.on_start: Callable[[], None] = lambda: None
        self._figures: dict[str, float] = {}
        self._background = ThreadPoolExecutor(1, thread_name_prefix="latents")
        self.cache = self._new_cache(replay)

    def _new_cache(self, replay: ColumnarReplay) -> LatentCache | None:
        if not self._config.has_cache:
            return None
        spec = self._config.get_default_rl_module_spec().model_config[SPEC_KEY]
        return LatentCache(replay, spec.build_encoder(), spec.build_encoder())

    def add(self, first_lane: int, num_rows: int, num_lanes: int) -> None:
        """After rows have come into some lanes of the replay."""
        if self.cache is not None:
            self.cache.add(first_lane, num_rows, num_lanes)

    def improve(self, agent_steps: int, share: float) -> None:
        """Makes a share of the updates that are due, before Q makes the same share of its own."""
        if not self.is_on:
            return
        if not self.has_started:
            self._start()
        due = self._settings.due_updates(agent_steps) - self.updates
        self._update(max(0, math.ceil(due * share)), self._config.settings.rate_share(agent_steps))

    def _start(self) -> None:
        """Once, before Q's first update: a model from nothing is set from what has been seen, and learns from it."""
        self.has_started = True
        if self._config.bundle is None:
            self._learners.initialise_model(self._frames(_INITIAL_FRAMES))
            for done in range(0, self._settings.scratch_updates, self._updates_per_draw):
                self._learn(min(self._settings.scratch_updates - done, self._updates_per_draw), "scratch_lr")
        self._publish(1.0)  # not before: what is held is encoded by the first version
        self.on_start()

    def _update(self, number: int, rate_share: float = 1.0) -> None:
        every = self._settings.publish_updates
        while number > 0:
            now = min(number, self._updates_per_draw, every - self.updates % every)
            self._learn(now, "lr", rate_share)
            self.updates += now
            number -= now
            if self.updates % every == 0:
                self._publish(self._settings.target_tau)

    @property
    def _updates_per_draw(self) -> int:
        """As many as their frames fit into memory."""
        batch_bytes = self._settings.batch_size * math.prod(self._replay.spec.obs_shape)
        return max(1, min(_MOST_UPDATES_AT_ONCE, _MOST_BYTES_AT_ONCE // batch_bytes))

    def _learn(self, number: int, rate: str, share: float = 1.0) -> None:
        """Makes so many updates at a share of the rate of that name; ends a run whose model holds nothing any more.

        Raises:
            UserError: The bound is not a number.
        """
        lr: float = getattr(self._settings, rate)
        self._figures |= self._learners.update_bound(self._frames(number * self._settings.batch_size), lr * share)
        if not math.isfinite(self._figures["elbo"]):
            raise UserError(
                f"the latent-variable model has diverged: its bound is {self._figures['elbo']}; "
                f"start again with a lower elbo.{rate} ({lr}), or with elbo.grad_clip "
                f"({self._settings.grad_clip}) lower and above 0"
            )

    def _frames(self, count: int) -> NDArray[np.uint8]:
        return self._replay.rows_at("obs", self._replay.draw_rows(count))

    def _publish(self, tau: float) -> None:
        rows_a_lane = max(1, _LOOK_FRAMES // self._replay.spec.num_lanes)
        fresh, old = (self._replay.rows_at("obs", places) for places in self._replay.ends(rows_a_lane))
        self._figures |= self._learners.publish_encoder(fresh, old, tau)
        if self.cache is not None:
            self.cache.take_over(self._learners.reading_encoders())

    @contextlib.contextmanager
    def refreshing(self, num_updates: int) -> Iterator[None]:
        """Around so many updates of Q: latents are made anew beside them, and are all there at the end."""
        if self.cache is None or not self._settings.refresh_rows_per_update:
            yield
            return
        refresh = self._background.submit(self.cache.refresh, num_updates * self._settings.refresh_rows_per_update)
        try:
            yield
        finally:
            self._figures["latent_drift"] = refresh.result()

    def figures(self) -> dict[str, float]:
        """The newest of each.

        Returns:
            What BoundUpdates says (`elbo`, `elbo_kl`; `elbo_fresh`, `elbo_old`, `active_units`) and `elbo_updates`;
            where there is a cache `encoder_version`, `stale_share` (of the rows held, those with latents of an earlier
            version) and `latent_drift` (how far latents had moved when they were made anew; root mean square, in
            units of z).
        """
        if not self.is_on:
            return {}
        figures = {**self._figures, "elbo_updates": self.updates}
        if self.cache is not None:
            figures |= {"stale_share": self.cache.stale_share(), "encoder_version": self.cache.version}
        return figures

    def state(self) -> dict[str, Any]:
        """What learners and replay do not hold."""
        state = {"updates": self.updates, "has_started": self.has_started, "figures": dict(self._figures)}
        return state | ({} if self.cache is None else {"cache": self.cache.state()})

    def set_state(self, state: Mapping[str, Any], replay: ColumnarReplay) -> None:
        """Goes on with a restored replay and restored learners."""
        self.updates, self.has_started, self._figures = state["updates"], state["has_started"], dict(state["figures"])
        self._replay, self.cache = replay, self._new_cache(replay)
        if self.cache is not None:
            self.cache.set_state(state["cache"], self._learners.reading_encoders())
