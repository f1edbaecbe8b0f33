"""`latentrl evaluate`: whole greedy games on raw points, their mean with a 95% interval, and a film of one of them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs.progress import progress
from jobs.settings import save_resolved
from jobs.workspace import Workspace
from pipeline.artifact import Encoder, load_model
from pipeline.atari import preprocess_for
from pipeline.bootstrap import bootstrap_interval
from pipeline.disk import write_text
from pipeline.errors import UserError
from pipeline.gameplay import write_gameplay
from pipeline.gauges import Gauges
from pipeline.models.distributions import DEQUANTISATION_MEAN
from pipeline.plate import Pixels
from pipeline.play import EpisodeResults, Film, Flags, Ints, Player, RandomPlayer, Reconstruct, film, play
from pipeline.registry import Resolved, Run, Tracking, resolve
from pipeline.schema import Preprocess
from pipeline.scores import human_normalised
from rllib_ext.policy import ENCODER_FOLDER, Policy, load_policy

RANDOM_PREFIX = "random:"
FILM_MOMENTS = 420  # agent steps: 28 seconds of play
FILM_FILE = "gameplay.gif"
RECONSTRUCT_BATCH = 64


@dataclass(frozen=True)
class Evaluation:
    """The resolved settings of an evaluation.

    Attributes:
        policy: The address as it was given.
        policy_uri: The address that means this version for ever; None for a folder or the random agent.
        policy_sha256: Of the bundle; None for the random agent.
        game: ALE's id.
        protocol: The rules that the games are played by.
        episodes: How many.
        seed: With an episode's number, decides how it starts.
        has_video: Whether one game is filmed.
    """

    policy: str
    policy_uri: str | None
    policy_sha256: str | None
    game: str
    protocol: str
    episodes: int
    seed: int
    has_video: bool


@dataclass(frozen=True)
class Agent:
    """Whoever is evaluated: its name, its rules, how it acts, and how its latents are drawn where it has a decoder."""

    name: str
    preprocess: Preprocess
    player: Player
    reconstruct: Reconstruct | None
    resolved: Resolved | None = None
    policy: Policy | None = None


class GreedyPlayer:
    """A policy bundle at play: always the action of greatest value."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._num_envs = 0

    def act(self, frames: Pixels, is_first: Flags, seeds: Ints) -> Ints:
        """See pipeline.play.Player; the policy needs no randomness."""
        if len(frames) != self._num_envs:
            self._num_envs = len(frames)
            self._policy.reset(self._num_envs)
        return np.asarray(self._policy.act(frames, is_first), np.int64)


def run(
    workspace: Workspace,
    policy: str,
    *,
    episodes: int = 20,
    seed: int = 0,
    video: bool = False,
    parent_run_id: str | None = None,
) -> dict[str, Any]:
    """Plays `episodes` games and writes them, their score and on request a film into a run folder and to MLflow.

    Args:
        workspace: Where runs go.
        policy: A policy's folder or registry address, or `random:GAME` for the uniformly random agent.
        episodes: At least 1.
        seed: With an episode's number, decides how it starts; the same seed gives every agent the same starts.
        video: Whether to film one game, the one with the median return.
        parent_run_id: MLflow run to nest under.

    Returns:
        mean_return, ci95_low, ci95_high, episodes, human_normalised (None where no scores are published), and more.

    Raises:
        UserError: No such policy, or fewer than one episode.
        TrackingPending: Done, but the server has not received everything.
    """
    if episodes < 1:
        raise UserError(f"--episodes is {episodes}; it must be at least 1")
    if seed < 0:
        raise UserError(f"--seed is {seed}; it must not be negative")
    agent = _find_agent(workspace, policy)
    settings = _settings(agent, policy, episodes, seed, video)
    tracking = Tracking(workspace.tracking_uri, pipeline=workspace.pipeline)
    tracking.check()
    folder = workspace.new_run_folder("evaluate")
    with (
        _watched(workspace),
        tracking.start_run(
            folder.name, stage="evaluate", folder=folder, game=settings.game, parent_run_id=parent_run_id
        ) as tracked,
    ):
        save_resolved(folder, settings, "evaluate")
        _log_start(tracked, settings, agent)
        result = _evaluate(agent, settings, folder, tracked)
        _log_end(tracked, result, folder)
    return tracked.delivered(result)


def _settings(agent: Agent, address: str, episodes: int, seed: int, has_video: bool) -> Evaluation:
    uri, sha256 = (agent.resolved.uri, agent.resolved.sha256) if agent.resolved else (None, None)
    return Evaluation(address, uri, sha256, agent.preprocess.game, agent.preprocess.protocol, episodes, seed, has_video)


def _find_agent(workspace: Workspace, address: str) -> Agent:
    if address.startswith(RANDOM_PREFIX):
        preprocess = preprocess_for(address.removeprefix(RANDOM_PREFIX))
        return Agent("random agent", preprocess, RandomPlayer(preprocess), None)
    resolved = resolve(address, workspace.tracking_uri, workspace.cache)
    if resolved.kind != "policy":
        raise UserError(
            f"{address} is an {resolved.kind}, not a policy; give the address that `latentrl train` printed"
        )
    policy = load_policy(resolved.path)
    return Agent("trained agent", policy.preprocess, GreedyPlayer(policy), reconstructor(policy), resolved, policy)


def reconstructor(policy: Policy) -> Reconstruct | None:
    """What a policy's latents keep of frames, by the decoder that came with its encoder; None where none came.

    A finetuned encoder has moved since its decoder was trained, which the pictures then show.
    """
    if policy.bundle_path is None or policy.config.encoder is None:
        return None
    decoder, encoder = load_model(policy.bundle_path / ENCODER_FOLDER), policy.encoder
    assert isinstance(encoder, Encoder), "a policy with a bundle of an encoder reads frames with it"

    @torch.inference_mode()
    def reconstruct(frames: Pixels) -> Pixels:
        z = encoder.encode(torch.from_numpy(frames)) * encoder.scale + encoder.mean
        parts = [decoder.decode(part).mean for part in torch.split(z, RECONSTRUCT_BATCH)]
        return (torch.cat(parts) - DEQUANTISATION_MEAN).round().clamp(0, 255).to(torch.uint8).numpy()

    return reconstruct


@contextlib.contextmanager
def _watched(workspace: Workspace) -> Iterator[None]:
    """Joins the Ray cluster that was named, so that it shows the figures; the games are played in this process."""
    if workspace.ray_address is None:
        yield
        return
    from jobs.cluster import ray_session  # a second's import that no other evaluation needs

    with ray_session(workspace, needs={}, what="an evaluation"):
        yield


def _evaluate(agent: Agent, settings: Evaluation, folder: Path, tracked: Run) -> dict[str, Any]:
    started = time.perf_counter()
    with _one_torch_thread():
        games = _play(agent, settings, tracked.gauges)
        video = _film(agent, games, folder) if settings.has_video else None
    seconds = round(time.perf_counter() - started, 3)
    made_by = {"seconds": seconds, "video": video, "run_id": tracked.run_id, "run_folder": str(folder)}
    result = summarise(games, settings) | made_by
    _write_json(folder / "episodes.json", _episode_rows(games))
    _write_json(folder / "result.json", result)
    _write_metrics(folder / "metrics.jsonl", games)
    return result


def _play(agent: Agent, settings: Evaluation, gauges: Gauges) -> EpisodeResults:
    with progress(settings.episodes, f"evaluate {agent.name} on {settings.game}", "games", gauges) as bar:
        return play(agent.player, agent.preprocess, settings.episodes, settings.seed, on_finished=bar.advance)


def summarise(games: EpisodeResults, settings: Evaluation) -> dict[str, Any]:
    """Mean return with its 95% bootstrap interval (10,000 resamples), and what it was measured on."""
    low, high = bootstrap_interval(games.returns)
    mean = float(games.returns.mean())
    return {
        "mean_return": mean,
        "ci95_low": low,
        "ci95_high": high,
        "episodes": len(games.returns),
        "human_normalised": human_normalised(settings.game, mean),
        "returns": games.returns.tolist(),
        "lengths": games.lengths.tolist(),
        "truncated": int(games.truncated.sum()),
        **{
            name: value for name, value in dataclasses.asdict(settings).items() if name not in ("episodes", "has_video")
        },
    }


@contextlib.contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Keeps torch's threads, which spin while they wait, off the cores of the emulators' threads.

    Measured on two busy cores, 20 games of Pong side by side: 93 ms a step with one thread of torch, 435 ms with two.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _film(agent: Agent, games: EpisodeResults, folder: Path) -> dict[str, Any]:
    """Films the game whose return is the median: neither the best nor the worst."""
    episode = int(np.argsort(games.returns, kind="stable")[(len(games.returns) - 1) // 2])
    shot: Film = film(
        agent.player,
        agent.preprocess,
        int(games.seeds[episode]),
        num_moments=FILM_MOMENTS,
        reconstruct=agent.reconstruct,
    )
    num_moments = write_gameplay(shot.moments, folder / FILM_FILE)
    return {
        "file": FILM_FILE,
        "episode": episode,
        "return": shot.game_return,
        "agent_steps": shot.game_length,
        "first_agent_step": shot.first_agent_step,
        "shown_agent_steps": num_moments,
        "has_reconstruction": agent.reconstruct is not None,
        "mode": agent.policy.mode if agent.policy else "random",
    }


def _episode_rows(games: EpisodeResults) -> list[dict[str, Any]]:
    columns = zip(games.seeds, games.returns, games.lengths, games.truncated, strict=True)
    return [
        {"episode": i, "seed": int(s), "return": float(r), "agent_steps": int(n), "truncated": bool(t)}
        for i, (s, r, n, t) in enumerate(columns)
    ]


def _write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def _write_metrics(path: Path, games: EpisodeResults) -> None:
    lines = [
        json.dumps({"step": step, **figures}) for step, figures in _metrics_by_episode(games.returns, games.lengths)
    ]
    path.write_text("\n".join(lines) + "\n")


def _metrics_by_episode(returns: Any, lengths: Any) -> list[tuple[int, dict[str, float]]]:
    pairs = zip(returns, lengths, strict=True)
    return [(i, {"episode_return": float(r), "episode_agent_steps": float(n)}) for i, (r, n) in enumerate(pairs)]


def _log_start(tracked: Run, settings: Evaluation, agent: Agent) -> None:
    tracked.log_params(dataclasses.asdict(settings))
    if agent.resolved:
        tracked.log_model_input("policy", agent.resolved)
    else:
        tracked.set_tags({"policy.address": settings.policy})


def _log_end(tracked: Run, result: Mapping[str, Any], folder: Path) -> None:
    for step, figures in _metrics_by_episode(result["returns"], result["lengths"]):
        tracked.log_metrics(figures, step)
    names = ("mean_return", "ci95_low", "ci95_high", "human_normalised")
    tracked.log_metrics({name: result[name] for name in names if result[name] is not None}, step=result["episodes"])
    for name in ("config.yaml", "episodes.json", "result.json", FILM_FILE):
        if (folder / name).exists():
            tracked.log_file(folder / name)
