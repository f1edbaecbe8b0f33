"""Pretraining: Ray Train runs the one training loop on its workers, the driver hears the figures and writes the bundle.

A training has a name within a storage path. Its record there says what it was started with; only `resume` goes on with
it, and only with the same settings and the same dataset.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import ray
import ray.train
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from safetensors.torch import load_file

from pipeline import models
from pipeline.artifact import require_moderate, save_encoder
from pipeline.checkpoint import MODEL_FILE, keep_only, newest_sound, step_of
from pipeline.disk import full, is_full
from pipeline.errors import Terminated, UserError, reading
from pipeline.loop import Job, Outcome, train_loop
from pipeline.mailbox import Mailbox
from pipeline.models.latent import LatentModel, ModelConfig, ModelSettings
from pipeline.order import ReadingOrder
from pipeline.origin import Origin
from pipeline.pretrain_config import RECORD_FILE, PretrainConfig
from pipeline.rendezvous import on_one_machine
from pipeline.storage import locate, read_small, reason, write_atomically
from pipeline.store import FramesDataset
from pipeline.untrusted import parse_object, short

__all__ = ["PretrainConfig", "PretrainResult", "num_steps", "pretrain", "resources_needed"]

KEPT_CHECKPOINTS = 2
SECONDS_BETWEEN_LOOKS = 0.3

OnMetrics = Callable[[dict[str, float], int], None]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PretrainResult:
    """A finished pretraining.

    Attributes:
        bundle_path: The encoder bundle.
        sha256: Of the bundle.
        elbo_nats: Per frame; over held-out episodes if `has_heldout`, else over the training frames.
        bits_per_dim: The same per pixel and in bits.
        has_heldout: Whether the dataset has held-out episodes.
        active_units: Latent dimensions whose posterior mean varies by more than 0.01 (variance).
        z_dim: All latent dimensions.
        images_per_s: Frames trained on per second of training steps, waiting for data included.
        startup_s: From the start of the workers' loop to their first batch.
        seconds: Of all epochs, evaluation and checkpoints included.
        steps: Updates.
        steps_per_worker: Updates that each worker did since it was started, by rank.
    """

    bundle_path: Path
    sha256: str
    elbo_nats: float
    bits_per_dim: float
    has_heldout: bool
    active_units: int
    z_dim: int
    images_per_s: float
    startup_s: float
    seconds: float
    steps: int
    steps_per_worker: tuple[int, ...]


def resources_needed(config: PretrainConfig) -> dict[str, float]:
    """What Ray must have: CPUs for workers and one for Ray Data, without which they would wait for ever; GPUs."""
    gpus = config.num_workers * config.num_gpus_per_worker
    return {"CPU": config.num_workers + 1.0} | ({"GPU": float(gpus)} if gpus else {})


def num_steps(config: PretrainConfig, dataset: FramesDataset) -> int:
    """Updates of a whole training.

    Raises:
        UserError: The dataset is too small for the workers, or the batch cannot be shared.
    """
    return config.epochs * _order(config, dataset).num_batches


def pretrain(
    settings: ModelSettings,
    config: PretrainConfig,
    dataset: FramesDataset,
    storage_path: str,
    run_name: str,
    bundle_path: Path,
    *,
    resume: bool = False,
    on_metrics: OnMetrics = lambda metrics, step: None,
    is_asked_to_stop: Callable[[], bool] = lambda: False,
) -> PretrainResult:
    """Trains a model on a dataset's training split with Ray Train; Ray must be running.

    Args:
        settings: Of the model.
        config: Of the training.
        dataset: Opened; its files are read by the workers.
        storage_path: Folder or pyarrow.fs address that all nodes see; checkpoints go to a folder in it.
        run_name: That folder's name.
        bundle_path: Where the encoder bundle is written.
        resume: Go on with the training of that name from its last checkpoint.
        on_metrics: Called with (figures, step) in a thread of this process, in order; after a resumption steps that
            were done since the last checkpoint come again.
        is_asked_to_stop: Looked at several times a second in another thread; once it is true, training writes a
            checkpoint within about `log_every_steps` updates and ends.

    Raises:
        Terminated: It was asked to stop, and a checkpoint is written.
        UserError: The training exists already and `resume` is False, or the reverse; it was started with other settings
            (each is named); a file of the dataset is damaged; training diverged.
    """
    order = _order(config, dataset)
    model = settings.for_frames(dataset.preprocess.height, dataset.preprocess.width)
    require_moderate(model)
    filesystem, root = locate(storage_path)
    folder = f"{root}/{run_name}"
    _claim(filesystem, folder, _record(model, config, dataset), run_name, resume=resume)
    if resume:
        _tidy(filesystem, folder)
    with _mail(on_metrics, is_asked_to_stop) as mailbox:
        job = Job(model, config, dataset, mailbox, filesystem, folder)
        result = _fit(job, root, run_name)
    checkpoint = newest_sound(filesystem, folder)
    assert checkpoint is not None
    if result.return_value is None:
        raise Terminated(f"terminated; training is kept at {step_of(checkpoint):,} updates: go on with --resume")
    if resume and bundle_path.exists():
        shutil.rmtree(bundle_path)
    return _finish(job, order, checkpoint, result.return_value, bundle_path)


def _order(config: PretrainConfig, dataset: FramesDataset) -> ReadingOrder:
    return ReadingOrder.plan(
        dataset,
        "train",
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        epoch_frames=config.frames_per_epoch,
        seed=config.seed,
    )


def _record(model: ModelConfig, config: PretrainConfig, dataset: FramesDataset) -> dict[str, Any]:
    """What must be the same for a training to go on, in flat keys."""
    record = {f"model.{key}": value for key, value in models.to_record(model).items()}
    record |= {f"train.{key}": value for key, value in asdict(config).items() if key != "max_failures"}
    record["dataset digest"] = dataset.digest
    return dict(json.loads(json.dumps(record)))


def _claim(filesystem: pafs.FileSystem, folder: str, record: dict[str, Any], name: str, *, resume: bool) -> None:
    """Records a new training, or makes sure that the one to resume is the same."""
    path = f"{folder}/{RECORD_FILE}"
    exists = filesystem.get_file_info(path).type == pafs.FileType.File
    if exists and not resume:
        raise UserError(f"a training exists already at {folder}; add --resume to go on with it, or use another folder")
    if resume and not exists:
        raise UserError(f"there is no training to resume at {folder}; start one without --resume")
    if resume:
        with reading(f"the training at {folder}", "restore it, or start anew"):
            _require_same(parse_object(read_small(filesystem, path), path), record, folder)
        return
    try:
        filesystem.create_dir(folder, recursive=True)
        write_atomically(filesystem, path, json.dumps(record, indent=1).encode())
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({reason(error)}); name a writable folder") from None


def _require_same(stored: dict[str, Any], record: dict[str, Any], folder: str) -> None:
    keys = [key for key in {**stored, **record} if stored.get(key) != record.get(key)]
    if keys:
        both = "; ".join(f"{key}: started with {short(stored.get(key))}, now {record.get(key)!r}" for key in keys)
        raise UserError(
            f"the training at {folder} cannot go on with other settings ({both}); use the same or start anew"
        )


def _tidy(filesystem: pafs.FileSystem, folder: str) -> None:
    """Leaves the checkpoint to go on from, and nothing by which Ray Train would choose another one."""
    record = f"{folder}/{CHECKPOINT_MANAGER_SNAPSHOT_FILENAME}"
    if filesystem.get_file_info(record).type == pafs.FileType.File:
        filesystem.delete_file(record)
    checkpoint = newest_sound(filesystem, folder)
    keep_only(filesystem, folder, checkpoint)
    if checkpoint is None:
        log.warning("there is no whole checkpoint at %s: training starts from its beginning", folder)


@contextlib.contextmanager
def _mail(on_metrics: OnMetrics, is_asked_to_stop: Callable[[], bool]) -> Iterator[Any]:
    """A mailbox whose content a thread hands to `on_metrics`; all of it has been handed over at the end.

    It lies on this process's node, so that it is not lost with another one.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    mailbox = Mailbox.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    has_ended = threading.Event()
    failures: list[BaseException] = []

    def hand_over() -> None:
        rows, lines = ray.get(mailbox.take.remote())
        for line in lines:
            log.warning(line)
        for step, values in rows:
            on_metrics(values, step)

    def watch() -> None:
        has_asked = False
        try:
            while not has_ended.wait(SECONDS_BETWEEN_LOOKS):
                hand_over()
                if not has_asked and is_asked_to_stop():
                    has_asked = True
                    mailbox.ask_to_stop.remote()
        except Exception as error:  # raised again in the driver's own thread
            failures.append(error)

    thread = threading.Thread(target=watch, name="pretrain-metrics", daemon=True)
    thread.start()
    try:
        yield mailbox
    finally:
        has_ended.set()
        thread.join()
    if failures:
        raise failures[0]
    hand_over()
    ray.kill(mailbox)


def _fit(job: Job, root: str, name: str) -> ray.train.Result:
    """Runs the workers to the end."""
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"job": job},
        torch_config=on_one_machine(job.config.num_workers),
        scaling_config=ray.train.ScalingConfig(
            num_workers=job.config.num_workers,
            use_gpu=job.config.num_gpus_per_worker > 0,
            resources_per_worker={"CPU": 1, "GPU": job.config.num_gpus_per_worker},
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=root,
            storage_filesystem=job.filesystem,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=KEPT_CHECKPOINTS),
            failure_config=ray.train.FailureConfig(max_failures=job.config.max_failures),
            callbacks=[_Failures(job.mailbox, job.config.max_failures)],
        ),
    )
    try:
        return _beside_main_thread(trainer.fit)
    except ray.train.TrainingFailedError as error:
        failures = [*getattr(error, "worker_failures", {}).values(), getattr(error, "controller_failure", None)]
        for reason in (getattr(failure, "cause", failure) for failure in failures):
            if isinstance(reason, UserError):
                raise UserError(*reason.args) from None
            if isinstance(reason, OSError) and is_full(reason):
                raise full(job.storage) from None
        raise


class _Failures(ray.train.UserCallback):
    """Says what becomes of a training whose worker has failed; ends it where another try cannot help.

    It runs in Ray Train's controller.
    """

    def __init__(self, mailbox: Any, max_failures: int) -> None:
        self._mailbox, self._max_failures, self._num_failures = mailbox, max_failures, 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Ray Train's hook.

        Raises:
            UserError: A worker raised it: the data or the settings are at fault, and would be again.
        """
        for error in worker_exceptions.values():
            reason = getattr(error, "cause", error)
            if isinstance(reason, UserError):
                raise reason
        self._num_failures += 1
        who = ", ".join(f"{rank} ({type(error).__name__})" for rank, error in sorted(worker_exceptions.items()))
        what = f"training worker {who} failed"
        if self._num_failures <= self._max_failures:
            what += f"; going on from the last checkpoint, {self._num_failures} of {self._max_failures} times"
        self._mailbox.say.remote(what)


def _beside_main_thread(call: Callable[[], ray.train.Result]) -> ray.train.Result:
    """Runs `call` in a thread and waits for it.

    In the main thread Ray Train takes SIGINT over for good: Ctrl-C would then end the process with code 0, also in the
    stages that follow. Here it stays a KeyboardInterrupt of the main thread; leaving the Ray session ends the workers.
    """
    done: Future[ray.train.Result] = Future()

    def work() -> None:
        try:
            done.set_result(call())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=work, name="pretrain-fit", daemon=True).start()
    return done.result()


def _finish(
    job: Job, order: ReadingOrder, checkpoint: ray.train.Checkpoint, outcome: Outcome, bundle_path: Path
) -> PretrainResult:
    """Writes the bundle from the last checkpoint and the workers' outcome."""
    model = _trained(job.model, checkpoint)
    card = _card(job, order, outcome)
    origin = Origin.of(job.dataset)
    sha256 = save_encoder(bundle_path, model, outcome.stats, job.dataset.preprocess, card, origin)
    progress = outcome.progress
    return PretrainResult(
        bundle_path=bundle_path,
        sha256=sha256,
        elbo_nats=outcome.elbo_nats,
        bits_per_dim=outcome.bits_per_dim,
        has_heldout=outcome.has_heldout,
        active_units=outcome.stats.num_active,
        z_dim=job.model.z_dim,
        images_per_s=progress.frames / progress.train_s if progress.frames else 0.0,
        startup_s=outcome.startup_s,
        seconds=progress.total_s,
        steps=progress.step,
        steps_per_worker=outcome.steps_per_worker,
    )


def _trained(config: ModelConfig, checkpoint: ray.train.Checkpoint) -> LatentModel:
    model = models.build(config)
    with checkpoint.as_directory() as folder:
        model.load_state_dict(load_file(Path(folder) / MODEL_FILE))
    return model.eval()


def _card(job: Job, order: ReadingOrder, outcome: Outcome) -> dict[str, Any]:
    """Facts for the model card."""
    where = "held-out episodes" if outcome.has_heldout else "training frames (nothing was held out)"
    return {
        "Trained on": f"{order.num_frames} frames of dataset {job.dataset.digest[:16]}",
        "Training": f"{outcome.progress.step} updates of {order.batch_size} frames, seed {job.config.seed}",
        "ELBO": f"{outcome.elbo_nats:.1f} nats a frame, {outcome.bits_per_dim:.4f} bits/dim, on {where}",
        "beta": job.model.beta,
    }
