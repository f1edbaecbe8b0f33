"""Whether a run has room: on this machine, and on the cluster."""

from __future__ import annotations

from typing import Protocol

import ray
import torch

from pipeline.errors import UserError
from pipeline.machine import free_bytes, ray_cpus
from pipeline.precision import resolve_precision
from rllib_ext.replay_spec import ReplaySpec, required_bytes
from rllib_ext.settings import DQNSettings, ElboSettings


class Asked(Protocol):
    """What a run asks for; LatentDQNConfig says it."""

    settings: DQNSettings
    elbo: ElboSettings
    num_env_runners: int
    num_learners: int
    num_gpus_per_learner: float
    local_gpu_idx: int

    @property
    def learns_bound(self) -> bool:
        """Whether minibatches of the bound are shared too."""

    @property
    def cpus_needed(self) -> float:
        """Of Ray's count."""

    @property
    def gpus_needed(self) -> float:
        """Of Ray's count."""

    def replay_spec(self) -> ReplaySpec:
        """What the replay holds."""


def check_machine(config: Asked) -> None:
    """Refuses a replay that memory cannot hold, and learners or a GPU that cannot be.

    Raises:
        UserError: The first problem.
    """
    needed, there = required_bytes(config.replay_spec()), free_bytes()
    if needed > there:
        raise UserError(
            f"train.replay_capacity is {config.settings.replay_capacity}, which takes {needed / 2**30:.1f} GiB when "
            f"full; this machine has {there / 2**30:.1f} GiB free; lower it"
        )
    sizes = {"train": config.settings.batch_size} | ({"elbo": config.elbo.batch_size} if config.learns_bound else {})
    for group, size in sizes.items():
        if not config.num_learners or size % config.num_learners == 0:
            continue
        what = f"{group}.batch_size is {size}"
        raise UserError(f"{what}, which {config.num_learners} learners cannot share evenly; make it a multiple")
    gpus = config.num_gpus_per_learner
    if not 0 <= gpus <= 1 or (gpus % 1 and config.num_learners > 1):  # NCCL refuses two processes on one GPU
        raise UserError(f"num_gpus_per_learner is {gpus}; give 0, 1 or a share of one, that to a single learner")
    if config.num_learners:
        return
    seen = torch.cuda.device_count() if gpus else 0
    if gpus and config.local_gpu_idx >= seen:
        what = f"num_gpus_per_learner is {gpus:g} and local_gpu_idx is {config.local_gpu_idx}"
        raise UserError(f"{what}, and torch sees {seen} GPUs on this machine; give 0, or install torch with CUDA")
    resolve_precision(config.settings.precision, "cuda" if gpus else "cpu")


def check_cluster(config: Asked) -> None:
    """Refuses more actors than the cluster, or this machine, has CPUs and GPUs for.

    Raises:
        UserError: The first problem.
    """
    gpus, each = _there("GPU", torch.cuda.device_count()), config.num_gpus_per_learner
    if config.gpus_needed > gpus:
        raise UserError(f"num_gpus_per_learner is {each:g}, for {config.num_learners} learners there are {gpus:g} GPUs")
    asked, there = config.cpus_needed, _there("CPU", ray_cpus())
    if asked > there:
        raise UserError(
            f"num_env_runners is {config.num_env_runners} and num_learners is {config.num_learners}, which take "
            f"{asked:g} CPUs, more than the {there:g} that there are; ask for fewer"
        )


def _there(resource: str, here: float) -> float:
    """What the cluster that is joined has of it, or this machine."""
    return float(ray.cluster_resources().get(resource, 0) if ray.is_initialized() else here)
