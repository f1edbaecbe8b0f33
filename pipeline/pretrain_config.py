"""Settings of a pretraining."""

from __future__ import annotations

from dataclasses import dataclass, fields

from pipeline.precision import PRECISIONS

RECORD_FILE = "pretrain.json"  # in a training's folder: what it was started with
_POSITIVE = ("batch_size", "lr", "num_workers", "monitor_frames", "log_every_steps")


@dataclass(frozen=True)
class PretrainConfig:
    """How a model is trained; everything but the model itself.

    Attributes:
        epochs: How many. 0 makes no update: the model stays as `initialise` sets it from `monitor_frames` frames.
        frames_per_epoch: Frames of an epoch; 0 means the training split once. A checkpoint ends each epoch.
        batch_size: Frames of an update over all workers.
        lr: Learning rate of Adam (Kingma & Ba 2015) between warm-up and decay.
        encoder_lr_scale: The encoder's learning rate as a share of `lr`. One that knows much from the start
            (`is_axial`) is best changed slowly, while the decoder learns from nothing.
        warmup_steps: Updates over which the learning rate rises from 0.
        decay_fraction: Part of the training, at its end, over which the learning rate falls linearly.
        final_lr_fraction: What is left of the learning rate at the end.
        grad_clip: Greatest norm of the gradient, nats per pixel; 0 leaves it alone. A rare frame unlike all others (a
            screen that flashes) otherwise throws the model back by hundreds of updates.
        seed: Decides initial weights, order of the frames and posterior draws.
        num_workers: Training workers; each takes one CPU of Ray's count.
        num_gpus_per_worker: 1 trains on GPUs, one a worker; 0 on the CPU.
        precision: "float32", or "bf16": forward passes of the training, but not of the evaluation, under autocast.
            "auto" is bf16 where the device computes in it, else float32.
        num_threads: torch threads of a worker; 0 means the machine's cores shared by its workers.
        max_seconds: Training ends after as many epochs as fit, at least one; 0 means no limit. With a limit the number
            of epochs depends on the machine's speed.
        max_failures: How often a sitting goes on from its last checkpoint by itself after a worker has died.
        monitor_frames: Frames for the look at held-out data after each epoch, and for what a model is initialised from.
        stats_frames: Frames of the training split over which the latents' statistics are taken; 0 means all.
        log_every_steps: Updates between two rows of metrics.
    """

    epochs: int = 10
    frames_per_epoch: int = 0
    batch_size: int = 64
    lr: float = 1e-3
    encoder_lr_scale: float = 1.0
    warmup_steps: int = 100
    decay_fraction: float = 0.5
    final_lr_fraction: float = 0.05
    grad_clip: float = 15.0
    seed: int = 0
    num_workers: int = 1
    num_gpus_per_worker: int = 0
    precision: str = "float32"
    num_threads: int = 0
    max_seconds: float = 0.0
    max_failures: int = 3
    monitor_frames: int = 1024
    stats_frames: int = 16_384
    log_every_steps: int = 10

    def __post_init__(self) -> None:
        """Refuses numbers that make no training.

        Raises:
            ValueError: Names the field and its value.
        """
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}; choose one of {', '.join(PRECISIONS)}")
        if self.num_gpus_per_worker > 1:
            raise ValueError(f"num_gpus_per_worker is {self.num_gpus_per_worker}; a worker trains on one")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "precision":
                continue
            if value < 0 or (value == 0 and field.name in _POSITIVE):
                raise ValueError(f"{field.name} is {value}; it must be {'positive' if value == 0 else 'at least 0'}")
