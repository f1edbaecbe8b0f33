"""`latentrl train`: distributed Q-learning in RLlib on the latents of a pretrained encoder, or beside it on pixels."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.cluster import ray_session
from jobs.garbage import removal_note
from jobs.improving import improved_encoder
from jobs.keeping import KeptEncoders
from jobs.metrics import Metrics
from jobs.progress import progress
from jobs.resuming import Earlier, earlier_run
from jobs.settings import save_resolved, to_dict
from jobs.termination import deferred
from jobs.training import Training
from jobs.workspace import BUNDLE_FOLDER, CHECKPOINT_FOLDER, POLICY_FOLDER, RESULT_FILE, Workspace
from pipeline import models
from pipeline.artifact import load_preprocess
from pipeline.atari import preprocess_for
from pipeline.disk import write_text
from pipeline.errors import Terminated, UserError, reading
from pipeline.models.latent import ModelSettings
from pipeline.registry import Resolved, Run, Tracking, check_model_name, register_policy, resolve
from pipeline.schema import Preprocess
from pipeline.untrusted import converted, read_json
from rllib_ext.algorithm import RESULTS_KEY, LatentDQN
from rllib_ext.checkpoint import find_checkpoint
from rllib_ext.config import LatentDQNConfig
from rllib_ext.policy import PolicyConfig, save_policy
from rllib_ext.runner import EnvFactory, atari_factory
from rllib_ext.settings import MODES, ONLINE
from rllib_ext.workers import WorkersLost

if TYPE_CHECKING:
    from jobs.recipes import TrainRecipe

START_FILE = "start.json"  # the encoder's hashes before the first update
RECORD_EVERY_S = 2.0


def run(
    workspace: Workspace,
    recipe: TrainRecipe,
    *,
    game: str,
    encoder: str | None,
    mode: str,
    agent_steps: int,
    num_env_runners: int,
    num_learners: int = 0,
    num_gpus_per_learner: float = 0,
    protocol: str = "atari100k",
    seed: int = 0,
    register: str | None = None,
    resume: bool = False,
    resume_if_any: bool = False,
    parent_run_id: str | None = None,
) -> dict[str, Any]:
    """Trains an agent, writes its policy bundle and registers it.

    Args:
        workspace: Where runs, registry and Ray are.
        recipe: Networks and settings.
        game: In any usual spelling.
        encoder: Address of the encoder; None where it starts from nothing, in modes pixels and online.
        mode: "frozen", "finetune", "online" or "pixels".
        agent_steps: Decisions to take; the run ends with the first fragment that reaches them.
        num_env_runners: Remote rollout workers; 0 samples in the driver.
        num_learners: Remote learners; 0 learns in the driver.
        num_gpus_per_learner: More than 0 learns on a GPU; a share of one to a single remote learner only.
        protocol: The rules that the game is played by.
        seed: Of everything random.
        register: Name of the registered model; GAME-agent if None.
        resume: Goes on with the latest run of this game and mode.
        resume_if_any: The same, or starts one where there is none to go on with.
        parent_run_id: MLflow run to nest under.

    Returns:
        The keys of `result.json`.

    Raises:
        UserError: What cannot work, before anything is written.
        TrackingPending: Done, but the tracking server has not received everything.
    """
    resolved = _resolve_encoder(workspace, encoder, mode)
    preprocess = _environment(game, protocol, resolved)
    name = register or f"{preprocess.game}-agent"
    check_model_name(name)
    plan = Training(
        recipe=recipe.name,
        game=preprocess.game,
        protocol=preprocess.protocol,
        mode=mode,
        encoder=encoder,
        encoder_uri=resolved.uri if resolved else None,
        encoder_sha256=resolved.sha256 if resolved else None,
        agent_steps=agent_steps,
        num_env_runners=num_env_runners,
        num_learners=num_learners,
        num_gpus_per_learner=num_gpus_per_learner,
        seed=seed,
        q=recipe.q,
        train=recipe.train,
        model=recipe.model,
        elbo=recipe.elbo,
    )
    plan.check()
    config = build_config(plan, preprocess, resolved)
    config.check()
    earlier = Earlier()
    if resume or resume_if_any:
        earlier = earlier_run(
            workspace, _run_name(plan), to_dict(plan), _checkpoint, is_required=resume, extended_by="agent_steps"
        )
    if earlier.result is not None:
        return earlier.result
    plan.note_if_learning_nothing()
    tracking = Tracking(workspace.tracking_uri, pipeline=workspace.pipeline)
    tracking.check()
    logging.getLogger("ray.rllib").setLevel(logging.ERROR)
    logging.getLogger("ray.rllib.utils.actor_manager").setLevel(
        logging.CRITICAL
    )  # rllib_ext/workers.py says it in a line
    needs = {"CPU": config.cpus_needed} | ({"GPU": config.gpus_needed} if config.gpus_needed else {})
    with ray_session(workspace, needs=needs, what=plan.describe_workers()):
        config.validate()  # the cluster too, before the run's folder is made
        with _open_run(workspace, tracking, plan, earlier.folder, parent_run_id) as opened:
            result = _Session(opened, plan, preprocess, resolved).run(
                config, name, is_resumed=earlier.folder is not None
            )
    return opened.delivered(result)


def build_config(
    plan: Training, preprocess: Preprocess, resolved: Resolved | None, env_factory: EnvFactory = atari_factory
) -> LatentDQNConfig:
    """The RLlib configuration of a run."""
    config = LatentDQNConfig().latent(
        preprocess=preprocess,
        mode=plan.mode,
        encoder=resolved.path if resolved else None,
        encoder_sha256=resolved.sha256 if resolved else None,
        encoder_config=None if resolved else plan.model,
        q=plan.q,
        elbo=plan.elbo,
        env_factory=env_factory,
    )
    built: LatentDQNConfig = (
        config.training(plan.train)
        .env_runners(num_env_runners=plan.num_env_runners)
        .learners(num_learners=plan.num_learners, num_gpus_per_learner=plan.num_gpus_per_learner)
        .debugging(seed=plan.seed)
    )
    return built


def _resolve_encoder(workspace: Workspace, encoder: str | None, mode: str) -> Resolved | None:
    if mode not in MODES:
        raise UserError(f"unknown mode {mode!r}; choose one of {', '.join(MODES)}")
    if mode == "pixels":
        if encoder is not None:
            raise UserError(f"mode pixels trains its encoder from scratch; leave out --encoder {encoder}")
        return None
    if encoder is None and mode == ONLINE:
        return None
    if encoder is None:
        raise UserError(f"mode {mode} needs a pretrained encoder; give --encoder, for example models:/NAME@champion")
    resolved = resolve(encoder, workspace.tracking_uri, workspace.cache)
    if resolved.kind != "encoder":
        raise UserError(f"{encoder} is a {resolved.kind}, not an encoder; give the encoder's address")
    return resolved


def _environment(game: str, protocol: str, resolved: Resolved | None) -> Preprocess:
    """How the environment makes its frames: as the encoder's, which must have been trained for this game's."""
    if resolved is None:
        return preprocess_for(game, protocol)
    theirs = load_preprocess(resolved.path)
    mine = preprocess_for(game, protocol, (theirs.height, theirs.width))
    theirs.require_match(mine, mine=f"the encoder {resolved.address}", theirs="the environment")
    return mine


def _run_name(plan: Training) -> str:
    return f"train-{plan.game}-{plan.mode}"


def _checkpoint(folder: Path) -> Path | None:
    return find_checkpoint(folder / CHECKPOINT_FOLDER)


def _open_run(
    workspace: Workspace, tracking: Tracking, plan: Training, folder: Path | None, parent_run_id: str | None
) -> Run:
    if folder is not None:
        return tracking.resume_run(folder)
    folder = workspace.new_run_folder(_run_name(plan))
    save_resolved(folder, plan, "train")
    opened = tracking.start_run(folder.name, stage="train", folder=folder, game=plan.game, parent_run_id=parent_run_id)
    opened.log_params(to_dict(plan))
    return opened


class _Session:
    """One sitting of a run: from building or restoring the algorithm to the registered policy."""

    def __init__(self, opened: Run, plan: Training, preprocess: Preprocess, resolved: Resolved | None) -> None:
        self._run, self._plan, self._preprocess, self._resolved = opened, plan, preprocess, resolved
        self._folder, self._metrics = opened.folder, Metrics(opened)
        self._encoders = KeptEncoders(opened, plan, preprocess, resolved)
        self._started_at = self._recorded_at = time.monotonic()

    def run(self, config: LatentDQNConfig, name: str, *, is_resumed: bool) -> dict[str, Any]:
        """Trains to the end and returns the result."""
        if self._resolved is not None:
            self._run.log_model_input("encoder", self._resolved)
        algorithm: LatentDQN = config.latent(run_id=self._run.run_id).build_algo()
        algorithm.encoder_learning.on_start = lambda: self._encoders.keep(algorithm)
        try:
            if is_resumed:
                checkpoint = _checkpoint(self._folder)
                if checkpoint is None:
                    raise UserError(f"the checkpoint of {self._folder.name} has just gone{removal_note(self._folder)}")
                algorithm.restore_from_path(checkpoint)
                self._forget_after(algorithm.agent_steps)
            before = self._hashes_before(algorithm)
            rate = self._train(algorithm)
            self._save(algorithm)
            after = algorithm.encoder_sha256s()
            self._require_frozen(before, after)
            return self._finish(algorithm, name, rate, before, after)
        finally:
            algorithm.stop()

    def _train(self, algorithm: LatentDQN) -> float:
        """Trains to the end; agent steps per second over this sitting."""
        self._started_at, first = time.monotonic(), algorithm.agent_steps
        label = f"train {self._plan.game} ({self._plan.mode})"
        with (
            deferred() as request,
            progress(self._plan.agent_steps, label, "agent steps", self._run.gauges) as bar,
        ):
            bar.advance(first)
            while algorithm.agent_steps < self._plan.agent_steps:
                steps_before = algorithm.agent_steps
                figures = self._step(algorithm)
                bar.advance(algorithm.agent_steps - steps_before)
                bar.note(f"return {figures['episode_return_mean']:.1f}, {figures['agent_steps_per_s']:.0f}/s")
                is_end, is_asked = algorithm.agent_steps >= self._plan.agent_steps, request.is_heard()
                every = self._plan.train.checkpoint_agent_steps
                is_checkpoint = steps_before // every < algorithm.agent_steps // every or is_asked
                self._record(algorithm, figures, is_due=is_end or is_checkpoint)
                if is_checkpoint and (is_asked or not is_end):
                    self._save(algorithm)
                if is_asked:
                    raise Terminated(f"terminated; {self._kept(algorithm)}")
        return (algorithm.agent_steps - first) / max(time.monotonic() - self._started_at, 1e-9)

    def _step(self, algorithm: LatentDQN) -> dict[str, float]:
        """One training step's figures; what there is is kept where no worker is left to go on with."""
        try:
            figures: dict[str, float] = algorithm.train()[RESULTS_KEY]
        except WorkersLost as error:
            self._save(algorithm)
            raise UserError(f"{error}; {self._kept(algorithm)}") from None
        return figures

    def _kept(self, algorithm: LatentDQN) -> str:
        return f"{self._folder.name} is kept at {algorithm.agent_steps:,} agent steps: go on with --resume"

    def _record(self, algorithm: LatentDQN, figures: Mapping[str, float], *, is_due: bool) -> None:
        """Writes figures every few seconds, and every game that has ended by then on a line of its own."""
        if not is_due and time.monotonic() - self._recorded_at < RECORD_EVERY_S:
            return
        self._recorded_at = time.monotonic()
        lines = [(step, {"episode_return": value}) for step, value in algorithm.take_finished_games()]
        finite = {name: value for name, value in figures.items() if value is not None and math.isfinite(value)}
        lines.append((int(figures["agent_steps"]), {**finite, "seconds": time.monotonic() - self._started_at}))
        self._metrics.add(lines)

    def _forget_after(self, agent_steps: int) -> None:
        """Drops what a killed sitting recorded after its last checkpoint: it is played again."""
        self._metrics.forget(lambda recorded: recorded > agent_steps)
        self._encoders.forget_after(agent_steps)
        save_resolved(self._folder, self._plan, "train")  # its agent steps may be more

    def _save(self, algorithm: LatentDQN) -> None:
        self._encoders.keep(algorithm)  # first: what has no checkpoint is dropped by the next sitting
        algorithm.save_to_path(self._folder / CHECKPOINT_FOLDER)

    def _hashes_before(self, algorithm: LatentDQN) -> dict[str, str]:
        """The encoder's hashes before the run's first update, in whatever sitting that was."""
        path = self._folder / START_FILE
        if not path.is_file():
            write_text(path, json.dumps({"encoder_sha256s": algorithm.encoder_sha256s()}) + "\n")
        with reading(str(path), "restore it or start the run anew"):
            hashes: dict[str, str] = converted(read_json(path, str(path))["encoder_sha256s"], dict[str, str], "hashes")
        return hashes

    def _require_frozen(self, before: Mapping[str, str], after: Mapping[str, str]) -> None:
        if self._plan.mode == "frozen" and len({*before.values(), *after.values()}) != 1:
            raise RuntimeError(f"the frozen encoder is not the same everywhere: before {before}, after {after}")

    def _finish(
        self, algorithm: LatentDQN, name: str, rate: float, before: Mapping[str, str], after: Mapping[str, str]
    ) -> dict[str, Any]:
        figures = algorithm.figures()
        policy = self._write_policy(algorithm, figures)
        tags = {"game": self._plan.game, "mode": self._plan.mode, "agent_steps": algorithm.agent_steps}
        registered = register_policy(self._run, policy, name, encoder=self._resolved, tags=tags)
        improved = improved_encoder(self._run, algorithm, self._plan, self._preprocess, self._resolved)
        if improved:
            self._encoders.end_with(self._folder / BUNDLE_FOLDER, algorithm.agent_steps)
        has_games = math.isfinite(figures["episode_return_mean"])
        result = {
            "policy": str(policy),
            "model_uri": registered.uri if registered else None,
            "run_id": self._run.run_id,
            "agent_steps": algorithm.agent_steps,
            "updates": algorithm.updates,
            "agent_steps_per_s": round(rate, 1),
            "steps_per_worker": dict(algorithm.steps_per_runner),
            "encoder_sha256_before": _representative(before),
            "encoder_sha256_after": _representative(after),
            "num_remote_env_runners": self._plan.num_env_runners,
            "episode_return_mean": figures["episode_return_mean"] if has_games else None,
            **improved,
            "run_folder": str(self._folder),
        }
        write_text(self._folder / RESULT_FILE, json.dumps(result, indent=1) + "\n")
        return result

    def _write_policy(self, algorithm: LatentDQN, figures: Mapping[str, float]) -> Path:
        path = self._folder / POLICY_FOLDER
        if path.exists():  # of an earlier sitting, with fewer steps
            shutil.rmtree(path)
        config = PolicyConfig(
            mode=self._plan.mode,
            stack=self._plan.train.stack,
            z_shape=algorithm.config.z_shape,
            q=self._plan.q,
            action_names=self._preprocess.action_set,
            encoder=_origin(self._resolved),
            encoder_config=_architecture(algorithm, self._preprocess),
        )
        card = {
            "Agent steps": algorithm.agent_steps,
            "Updates": algorithm.updates,
            "Mean return of the last training games": f"{figures['episode_return_mean']:.1f}",
            "MLflow run": self._run.run_id,
        }
        encoder_bundle = self._resolved.path if self._resolved else None
        save_policy(path, config, self._preprocess, algorithm.network_state(), encoder_bundle=encoder_bundle, card=card)
        return path


def _representative(hashes: Mapping[str, str]) -> str:
    """One hash for the record: the learner's where it trains the encoder, else that of all runners."""
    return hashes.get("learner") or next(iter(hashes.values()))


def _origin(resolved: Resolved | None) -> dict[str, str | None] | None:
    if resolved is None:
        return None
    return {"address": resolved.uri or resolved.address, "version": resolved.version, "sha256": resolved.sha256}


def _architecture(algorithm: LatentDQN, preprocess: Preprocess) -> dict[str, Any] | None:
    settings: ModelSettings | None = algorithm.config.encoder_config
    return None if settings is None else models.to_record(settings.for_frames(preprocess.height, preprocess.width))
