"""Figures of a pretraining on their way to the driver. Workers contact no tracking server."""

from __future__ import annotations

import math
import time
from typing import Any

import ray
import torch
from torch import Tensor

from pipeline.checkpoint import Progress
from pipeline.errors import UserError
from pipeline.models.distributions import bits_per_dim
from pipeline.models.latent import ELBO, ModelConfig
from pipeline.pretrain_config import PretrainConfig

SECONDS_BETWEEN_POSTS = 0.5
AVERAGES = ("loss", "elbo_nats", "kl_nats", "log_likelihood_nats")


class Board:
    """Rank 0's figures on their way to the driver: averaged over `log_every_steps`, posted in batches."""

    def __init__(self, mailbox: Any, config: PretrainConfig, model: ModelConfig, *, is_silent: bool) -> None:
        """`mailbox` is the actor handle of a Mailbox; nothing is sent by a worker that `is_silent`."""
        self._mailbox, self._config, self._model, self._is_silent = mailbox, config, model, is_silent
        self._rows: list[tuple[int, dict[str, float]]] = []
        self._unread: list[tuple[int, Tensor]] = []
        self._sums: dict[str, float] = {}
        self._posted = self._counted = time.perf_counter()
        self._answer: Any = None
        self._is_asked_to_stop = False

    def add(self, progress: Progress, terms: ELBO, loss: Tensor, rate: float) -> None:
        """Takes in the figures of one step; errors as of `settle`."""
        self._unread.append((progress.step, _averages(terms, loss)))
        is_row = progress.step % self._config.log_every_steps == 0
        if is_row or loss.device.type == "cpu":  # a GPU is not waited for until there is something to say
            self.settle()
        if is_row:
            self._row(progress, rate)

    def settle(self) -> None:
        """Reads the figures of all steps so far; on a GPU, waits for them.

        Raises:
            UserError: A loss is not a number.
        """
        every, unread, self._unread = self._config.log_every_steps, self._unread, []
        for step, averages in unread:
            values = dict(zip(AVERAGES, averages.tolist(), strict=True))
            if not math.isfinite(values["loss"]):
                raise UserError(f"training diverged: the loss at step {step} is {values['loss']}; lower train.lr")
            for key, value in values.items():
                self._sums[key] = self._sums.get(key, 0.0) + value / every

    def _row(self, progress: Progress, rate: float) -> None:
        now, config, model = time.perf_counter(), self._config, self._model
        row = dict(self._sums, lr=rate, epoch=progress.epoch, frames=progress.frames)
        row["bits_per_dim"] = bits_per_dim(row["elbo_nats"], model.height * model.width)
        row["images_per_s"] = config.log_every_steps * progress.frames / progress.step / (now - self._counted)
        self._sums, self._counted = {}, now
        self.post(progress, row)

    def post(self, progress: Progress, values: dict[str, float]) -> None:
        """Queues figures of the present step."""
        self._rows.append((progress.step, values))
        if time.perf_counter() - self._posted > SECONDS_BETWEEN_POSTS:
            self.flush()

    def flush(self, *, wait: bool = False) -> None:
        """Sends what is queued."""
        rows, self._rows, self._posted = self._rows, [], time.perf_counter()
        self.is_asked_to_stop()  # the answer to the rows before, whose place the next one takes
        if not self._is_silent:
            self._answer = self._mailbox.put.remote(rows)
            if wait:
                ray.get(self._answer)

    def is_asked_to_stop(self) -> bool:
        """Whether the driver asks training to stop, as of what it last answered."""
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            self._is_asked_to_stop, self._answer = ray.get(self._answer), None
        return self._is_asked_to_stop


@torch.no_grad()
def _averages(terms: ELBO, loss: Tensor) -> Tensor:
    """(4,) float32, as AVERAGES names them."""
    kl, likelihood = terms.kl.sum(-1).mean(), terms.log_likelihood.mean()
    return torch.stack([loss, likelihood - kl, kl, likelihood])
