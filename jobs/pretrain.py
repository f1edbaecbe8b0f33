"""`latentrl pretrain`: frames in, a registered encoder out."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.cluster import ray_session
from jobs.figures import PICTURES_FOLDER, draw_figures, frames_to_look_at
from jobs.metrics import Metrics
from jobs.progress import Progress, progress
from jobs.recipes import PretrainRecipe
from jobs.resuming import Earlier, earlier_run
from jobs.settings import save_resolved, to_dict
from jobs.termination import deferred
from jobs.workspace import BUNDLE_FOLDER, CHECKPOINTS_FOLDER, RESULT_FILE, Workspace
from pipeline.card import describe
from pipeline.disk import write_text
from pipeline.pretrain_config import RECORD_FILE
from pipeline.registry import Registered, Run, Tracking, check_model_name, register_encoder
from pipeline.store import FramesDataset
from pipeline.stream import STREAM_BYTES
from pipeline.train import PretrainResult, num_steps, pretrain, resources_needed

NUM_EXAMPLES = 4


def run(
    workspace: Workspace,
    recipe: PretrainRecipe,
    data: str,
    register: str,
    *,
    resume: bool = False,
    resume_if_any: bool = False,
    promote: bool = False,
    parent_run_id: str | None = None,
) -> dict[str, Any]:
    """Pretrains an encoder on a frames dataset and registers it.

    Args:
        workspace: Where runs, registry and Ray are.
        recipe: Model and training.
        data: Folder or address of the dataset.
        register: Name of the registered model.
        resume: Goes on with the latest run of this name that was cut off.
        resume_if_any: The same, or starts one where there is none to go on with.
        promote: Makes the version champion whatever the present one's figures.
        parent_run_id: MLflow run to nest under.

    Returns:
        The keys of `result.json`.

    Raises:
        UserError: What cannot work, before anything is written.
        TrackingPending: Done, but the tracking server has not received everything.
    """
    check_model_name(register)
    dataset = FramesDataset.open(data if "://" in data else str(Path(data).expanduser().absolute()))
    total_steps = num_steps(recipe.train, dataset)
    dataset.require_sound_files()
    tracking = Tracking(workspace.tracking_uri, pipeline=workspace.pipeline)
    tracking.check()
    earlier = Earlier()
    if resume or resume_if_any:
        earlier = earlier_run(workspace, _run_name(register), to_dict(recipe), _has_started, is_required=resume)
    if earlier.result is not None:
        return earlier.result
    workers = recipe.train.num_workers
    what = f"{workers} training worker{'s' if workers > 1 else ''} and the data stream"
    with (
        ray_session(workspace, needs=resources_needed(recipe.train), what=what, object_bytes=STREAM_BYTES, data=data),
        _open_run(workspace, tracking, recipe, register, dataset, earlier.folder, parent_run_id) as opened,
    ):
        opened.log_dataset(dataset.facts(), "pretrain")
        session = _Session(opened, recipe, dataset, is_resumed=earlier.folder is not None)
        result = session.run(register, total_steps, promote=promote)
    return opened.delivered(result)


def _run_name(register: str) -> str:
    return f"pretrain-{register}"


def _has_started(folder: Path) -> bool:
    return (folder / CHECKPOINTS_FOLDER / RECORD_FILE).is_file()


def _open_run(
    workspace: Workspace,
    tracking: Tracking,
    recipe: PretrainRecipe,
    register: str,
    dataset: FramesDataset,
    folder: Path | None,
    parent_run_id: str | None,
) -> Run:
    if folder is not None:
        return tracking.resume_run(folder)
    folder = workspace.new_run_folder(_run_name(register))
    save_resolved(folder, recipe, "pretrain")
    opened = tracking.start_run(
        folder.name, stage="pretrain", folder=folder, game=dataset.preprocess.game, parent_run_id=parent_run_id
    )
    opened.log_params(to_dict(recipe))
    return opened


class _Session:
    """One sitting of a run: from the first step, or the last checkpoint, to the registered encoder."""

    def __init__(self, opened: Run, recipe: PretrainRecipe, dataset: FramesDataset, *, is_resumed: bool) -> None:
        self._run, self._recipe, self._dataset, self._is_resumed = opened, recipe, dataset, is_resumed
        self._folder = opened.folder

    def run(self, register: str, total_steps: int, *, promote: bool) -> dict[str, Any]:
        """Trains, draws, registers; returns the result."""
        began = time.monotonic()
        trained = self._train(total_steps)
        frames = self._draw(trained)
        registered = register_encoder(
            self._run,
            trained.bundle_path,
            register,
            bits_per_dim=trained.bits_per_dim,
            active_fraction=trained.active_units / trained.z_dim,
            has_heldout=trained.has_heldout,
            promote=promote,
            example_frames=frames[:NUM_EXAMPLES],
            dataset=self._dataset.facts(),
        )
        describe(self._run.outbox, trained.bundle_path, trained.sha256, [])
        result = self._result(trained, registered, time.monotonic() - began)
        write_text(self._folder / RESULT_FILE, json.dumps(result, indent=1) + "\n")
        return result

    def _train(self, total_steps: int) -> PretrainResult:
        label = f"pretrain {self._dataset.preprocess.game}"
        with deferred() as request, progress(total_steps, label, "updates", self._run.gauges) as bar:
            return pretrain(
                self._recipe.model,
                self._recipe.train,
                self._dataset,
                str(self._folder),
                CHECKPOINTS_FOLDER,
                self._folder / BUNDLE_FOLDER,
                resume=self._is_resumed,
                on_metrics=_Recorder(self._run, bar),
                is_asked_to_stop=lambda: request.is_made,
            )

    def _draw(self, trained: PretrainResult) -> NDArray[np.uint8]:
        frames, source = frames_to_look_at(self._dataset)
        draw_figures(trained.bundle_path, frames, source, self._folder / PICTURES_FOLDER)
        self._run.log_folder(self._folder / PICTURES_FOLDER, PICTURES_FOLDER)
        return frames

    def _result(self, trained: PretrainResult, registered: Registered | None, seconds: float) -> dict[str, Any]:
        return {
            "model_uri": registered.uri if registered else None,
            "version": registered.version if registered else None,
            "aliases": list(registered.aliases) if registered else [],
            "sha256": trained.sha256,
            "run_id": self._run.run_id,
            "elbo_nats": trained.elbo_nats,
            "bits_per_dim": trained.bits_per_dim,
            "has_heldout": trained.has_heldout,
            "active_units": trained.active_units,
            "z_dim": trained.z_dim,
            "images_per_s": round(trained.images_per_s, 1),
            "startup_s": round(trained.startup_s, 1),
            "seconds": round(seconds, 1),
            "updates": trained.steps,
            "num_train_workers": len(trained.steps_per_worker),
            "train_worker_steps": {str(rank): steps for rank, steps in enumerate(trained.steps_per_worker)},
            "game": self._dataset.preprocess.game,
            "protocol": self._dataset.preprocess.protocol,
            "dataset": self._dataset.uri,
            "digest": self._dataset.digest,
            "frames": self._dataset.num_frames,
            "bundle": str(trained.bundle_path),
            "run_folder": str(self._folder),
        }


class _Recorder:
    """Takes the training's figures: progress bar, metrics.jsonl, MLflow.

    A training that goes on repeats the steps since its last checkpoint; their old lines are dropped.
    """

    def __init__(self, opened: Run, bar: Progress) -> None:
        self._metrics, self._bar = Metrics(opened), bar
        self._step: int | None = None

    def __call__(self, values: dict[str, float], step: int) -> None:
        if self._step is None or step < self._step:
            self._metrics.forget(lambda recorded: recorded >= step)
        self._bar.advance(step - (self._step or 0))
        self._step = step
        if "loss" in values:
            self._bar.note(f"{values['bits_per_dim']:.3f} bits/dim, {values['images_per_s']:.0f} images/s")
        self._metrics.add([(step, values)])
