"""What every training worker runs: the one training loop, for every latent-variable model.

B is a worker's share of a batch, H and W the frame, Z the latent dimensions. Workers contact no tracking server: rank 0
puts figures into a mailbox that the driver empties.
"""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline import models
from pipeline.artifact import LatentStats
from pipeline.board import Board
from pipeline.checkpoint import Progress, folder_name, load_checkpoint, newest_sound, save_checkpoint
from pipeline.disk import full_disk_told
from pipeline.machine import cores
from pipeline.models.distributions import bits_per_dim
from pipeline.models.latent import LatentModel, ModelConfig
from pipeline.order import ReadingOrder
from pipeline.precision import autocast, resolve_precision
from pipeline.pretrain_config import RECORD_FILE, PretrainConfig
from pipeline.storage import not_shared
from pipeline.store import FramesDataset
from pipeline.stream import CPU, all_batches, sample_frames, training_batches
from pipeline.tally import Tally

EVALUATION_BATCH = 256


@dataclass(frozen=True)
class Job:
    """What the driver hands to every worker.

    Attributes:
        model: Configuration of the model.
        config: Settings of the training.
        dataset: Opened in the driver; its address is absolute.
        mailbox: Actor handle of a Mailbox.
        filesystem, storage: Where checkpoints are kept.
    """

    model: ModelConfig
    config: PretrainConfig
    dataset: FramesDataset
    mailbox: Any
    filesystem: pafs.FileSystem
    storage: str


@dataclass(frozen=True)
class Outcome:
    """What rank 0 hands back; the weights are in the last checkpoint.

    Attributes:
        elbo_nats: Per frame, over the held-out split where there is one, else over the training split.
        bits_per_dim: The same per pixel and in bits.
        has_heldout: Whether there is a held-out split.
        stats: Of the latents.
        progress: At the end.
        startup_s: From the start of the loop to the first batch.
        steps_per_worker: Updates that each worker did in this session, by rank.
    """

    elbo_nats: float
    bits_per_dim: float
    has_heldout: bool
    stats: LatentStats
    progress: Progress
    startup_s: float
    steps_per_worker: tuple[int, ...]


def train_loop(arguments: dict[str, Any]) -> Outcome | None:
    """Entry point of a Ray Train worker; `arguments["job"]` is a Job. None where the driver asked it to stop."""
    return _Worker(arguments["job"]).run()


def learning_rate(config: PretrainConfig, step: int, num_steps: int) -> float:
    """Linear warm-up, a constant part, and a linear fall over the last `decay_fraction` of `num_steps`."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    left = (num_steps - step) / max(1.0, config.decay_fraction * num_steps)
    return config.lr * warmup * max(config.final_lr_fraction, min(1.0, left))


def _optimizer(model: LatentModel, config: PretrainConfig) -> torch.optim.Adam:
    """Adam with a learning rate for the encoder and one for all else."""
    encoder = list(model.encoder.parameters())
    rest = [value for name, value in model.named_parameters() if not name.startswith("encoder.")]
    groups = [{"params": encoder, "lr_scale": config.encoder_lr_scale}, {"params": rest, "lr_scale": 1.0}]
    return torch.optim.Adam(groups, config.lr, fused=True)


class _Worker:
    """One rank's model, optimizer, data and clock."""

    def __init__(self, job: Job) -> None:
        self._job, self._config = job, job.config
        self._started = time.perf_counter()
        # Otherwise found out at the first checkpoint, an epoch later.
        if job.filesystem.get_file_info(f"{job.storage}/{RECORD_FILE}").type != pafs.FileType.File:
            raise not_shared(job.storage, f"the driver's {RECORD_FILE} is not there on {platform.node()}")
        context = ray.train.get_context()
        self._rank, self._num_workers = context.get_world_rank(), context.get_world_size()
        torch.set_num_threads(self._config.num_threads or cores() // context.get_local_world_size() or 1)
        self._device = ray.train.torch.get_device() if self._config.num_gpus_per_worker else CPU
        self._dtype = resolve_precision(self._config.precision, self._device.type)
        self._order = self._plan("train", self._config.batch_size, self._config.frames_per_epoch)
        self._heldout = self._heldout_order()
        self._model = self._build().to(self._device)
        self._optimizer = _optimizer(self._model, self._config)
        self._max_norm = self._config.grad_clip * job.model.height * job.model.width
        self._progress = Progress(0, 0, 0, 0.0, 0.0, self._config.epochs)
        self._is_restored = self._restore()
        self._parallel = ray.train.torch.prepare_model(self._model, move_to_device=self._device)
        self._sampled = sample_frames(job.dataset, self._heldout, self._config.monitor_frames).to(self._device)
        self._board = Board(job.mailbox, job.config, job.model, is_silent=self._rank != 0)
        self._startup_s = 0.0
        self._steps_here = 0
        self._is_stopping = False

    def run(self) -> Outcome | None:
        """Trains to the end and sums up; ends with a checkpoint and None where it is asked to stop."""
        epochs = range(self._progress.epoch, self._config.epochs)
        batches = training_batches(
            self._job.dataset, self._order, epochs, self._rank, self._progress.batch, self._device
        )
        before = time.perf_counter()
        if self._config.epochs == 0 and not self._is_restored:
            self._report()
        while self._progress.epoch < self._progress.planned_epochs:
            self._run_epoch(batches)
            self._progress.total_s += time.perf_counter() - before
            before = time.perf_counter()
            if self._progress.batch == 0:
                self._plan_end()
                self._report()
            else:
                self._keep({})
            if self._is_stopping:
                self._board.flush(wait=True)
                return None
        batches.close()
        return self._sum_up()

    def _plan(self, split: str, batch_size: int, epoch_frames: int) -> ReadingOrder:
        return ReadingOrder.plan(
            self._job.dataset,
            split,
            batch_size=batch_size,
            num_workers=self._num_workers,
            epoch_frames=epoch_frames,
            seed=self._config.seed,
        )

    def _heldout_order(self) -> ReadingOrder:
        """All frames of the held-out split, or of the training split where nothing is held out."""
        dataset = self._job.dataset
        has_heldout = "val" in dataset.episodes["split"].to_pylist()
        batch_size = EVALUATION_BATCH * self._num_workers
        return ReadingOrder.whole(dataset, "val" if has_heldout else "train", batch_size, self._num_workers)

    def _build(self) -> LatentModel:
        """The same model on every rank, with what it takes from data."""
        torch.manual_seed(self._config.seed)
        model = models.build(self._job.model)
        model.initialise(sample_frames(self._job.dataset, self._order, self._config.monitor_frames))
        return model

    def _restore(self) -> bool:
        """Goes on from the last checkpoint, if there is one."""
        checkpoint = newest_sound(self._job.filesystem, self._job.storage)
        if checkpoint is None:
            return False
        with checkpoint.as_directory() as folder:
            self._progress = load_checkpoint(Path(folder), self._model, self._optimizer)
        if self._rank == 0:
            self._job.mailbox.say.remote(f"training goes on from its checkpoint after {self._progress.step:,} updates")
        return True

    def _run_epoch(self, batches: Iterator[Tensor]) -> None:
        progress = self._progress
        self._model.train()
        began = time.perf_counter()
        while progress.batch < self._order.num_batches and not self._is_stopping:
            batch = next(batches)
            if not self._startup_s:
                began = time.perf_counter()
                self._startup_s = began - self._started
            self._step(batch)
            self._listen()
        self._board.settle()
        progress.train_s += time.perf_counter() - began
        if progress.batch == self._order.num_batches:
            progress.epoch, progress.batch = progress.epoch + 1, 0

    def _listen(self) -> None:
        """Now and then: whether the driver wants training to stop. All ranks stop after the same update."""
        if self._progress.step % self._config.log_every_steps:
            return
        wish = torch.tensor(int(self._board.is_asked_to_stop()), device=self._device)
        if self._num_workers > 1:
            dist.broadcast(wish, 0)
        self._is_stopping = bool(wish)

    def _seed(self, step: int) -> None:
        """Makes what is random from here on depend on the update alone, so that training can go on after any."""
        torch.manual_seed(hash((self._config.seed, step, self._rank)) & (2**63 - 1))

    def _step(self, batch_BHW: Tensor) -> None:
        progress = self._progress
        self._seed(progress.step)
        rate = learning_rate(self._config, progress.step, progress.planned_epochs * self._order.num_batches)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        with autocast(self._device.type, self._dtype):
            terms = self._parallel(batch_BHW)
        loss = terms.loss()
        self._optimizer.zero_grad()
        loss.backward()
        if self._max_norm:
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._max_norm)
        self._optimizer.step()
        progress.step += 1
        progress.batch += 1
        progress.frames += self._order.batch_size
        self._steps_here += 1
        self._board.add(progress, terms, loss, rate)

    def _plan_end(self) -> None:
        """Where time is limited: ends after as many epochs as fit, the same number on every rank."""
        progress = self._progress
        if not self._config.max_seconds:
            return
        fitting = int(self._config.max_seconds / (progress.total_s / progress.epoch))
        planned = torch.tensor(min(self._config.epochs, max(progress.epoch, fitting)), device=self._device)
        if self._num_workers > 1:
            dist.broadcast(planned, 0)
        progress.planned_epochs = int(planned)

    def _report(self) -> None:
        """Ends an epoch: figures on held-out frames, and a checkpoint."""
        figures = self._monitor()
        self._board.post(self._progress, figures)
        self._keep(figures)

    def _keep(self, figures: dict[str, float]) -> None:
        """Hands a checkpoint to Ray Train, which stores it; all ranks wait for that."""
        with tempfile.TemporaryDirectory() as folder:
            checkpoint, name = None, folder_name(self._progress)
            if self._rank == 0:
                with full_disk_told(folder):
                    save_checkpoint(Path(folder) / name, self._model, self._optimizer, self._progress)
                checkpoint = ray.train.Checkpoint.from_directory(Path(folder) / name)
            with full_disk_told(self._job.storage):
                ray.train.report({**figures, "step": self._progress.step}, checkpoint, checkpoint_dir_name=name)

    def _monitor(self) -> dict[str, float]:
        """A quick look at a fixed sample of held-out frames."""
        tally = self._tally()
        for batch in torch.split(self._sampled, EVALUATION_BATCH):
            tally.add(self._model, batch)
        return tally.figures(self._job.model, "heldout/")

    def _sum_up(self) -> Outcome:
        heldout, train = self._tally(), self._tally()
        self._seed(-1)
        for batch in all_batches(self._job.dataset, self._heldout, self._rank, self._device):
            heldout.add(self._model, batch)
        for batch in self._statistics_batches():
            train.add(self._model, batch)
        heldout.reduce(self._num_workers)
        train.reduce(self._num_workers)
        self._board.flush(wait=True)
        return Outcome(
            elbo_nats=heldout.elbo,
            bits_per_dim=bits_per_dim(heldout.elbo, self._job.model.height * self._job.model.width),
            has_heldout=self._heldout.split == "val",
            stats=train.stats(self._job.model),
            progress=self._progress,
            startup_s=self._startup_s,
            steps_per_worker=_gathered(self._steps_here, self._num_workers, self._device),
        )

    def _statistics_batches(self) -> Iterator[Tensor]:
        """A random sample of the training split."""
        frames = min(self._config.stats_frames or self._order.num_frames, self._order.num_frames)
        order = self._plan("train", EVALUATION_BATCH * self._num_workers, max(frames, self._num_workers))
        return training_batches(self._job.dataset, order, range(1), self._rank, device=self._device)

    def _tally(self) -> Tally:
        return Tally(self._job.model.z_dim, self._device)


def _gathered(value: int, num_workers: int, device: torch.device) -> tuple[int, ...]:
    """Everyone's value, by rank."""
    if num_workers == 1:
        return (value,)
    values = [torch.zeros((), dtype=torch.int64, device=device) for _ in range(num_workers)]
    dist.all_gather(values, torch.tensor(value, device=device))
    return tuple(int(item) for item in values)
