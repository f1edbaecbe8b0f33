"""Figures for whoever watches the cluster: what runs record, also as Prometheus metrics of the Ray node they run on.

Ray serves them on every node (`ray_` goes before each name) beside its own. A figure that is not named here goes to
MLflow and `metrics.jsonl` only, so that no name or label can grow with a run's length.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PREFIX = "latentrl_"
LABELS = ("stage", "run", "game")


@dataclass(frozen=True)
class Figure:
    """A metric as Prometheus knows it.

    Attributes:
        name: Without `latentrl_`; ends with its unit, in Prometheus' words, where it has one.
        unit: In words.
        text: What it is.
    """

    name: str
    unit: str
    text: str


# By the name that the figure has in metrics.jsonl and MLflow; the last value recorded.
GAUGES: dict[str, Figure] = {
    "progress": Figure("progress_ratio", "share of 1", "how much of the stage is done"),
    # pretrain
    "loss": Figure("loss_nats", "nats a frame", "what pretraining minimises"),
    "elbo_nats": Figure("elbo_nats", "nats a frame", "evidence lower bound, training frames"),
    "kl_nats": Figure("kl_nats", "nats a frame", "divergence of the posterior from the prior"),
    "log_likelihood_nats": Figure("log_likelihood_nats", "nats a frame", "of the frames under the decoder"),
    "bits_per_dim": Figure("bits_per_dim", "bits a pixel", "the bound again, training frames"),
    "heldout/elbo_nats": Figure("heldout_elbo_nats", "nats a frame", "evidence lower bound, held-out frames"),
    "heldout/bits_per_dim": Figure("heldout_bits_per_dim", "bits a pixel", "the bound again, held-out frames"),
    "heldout/active_units": Figure("heldout_active_units", "latents", "latents that carry something"),
    "lr": Figure("learning_rate", "", "of Adam"),
    "epoch": Figure("epoch", "epochs", "epochs done"),
    "frames": Figure("trained_frames", "frames", "frames trained on"),
    "images_per_s": Figure("images_per_second", "frames a second", "rate of pretraining"),
    # train
    "agent_steps": Figure("agent_steps", "agent steps", "decisions taken, all workers"),
    "updates": Figure("updates", "updates", "gradient updates"),
    "agent_steps_per_s": Figure("agent_steps_per_second", "agent steps a second", "rate of sampling"),
    "updates_per_s": Figure("updates_per_second", "updates a second", "rate of learning"),
    "replay_ratio": Figure("updates_per_agent_step", "updates an agent step", "replay ratio since the warm-up"),
    "episodes": Figure("episodes", "games", "games that ended"),
    "episode_return": Figure("episode_return_points", "points", "raw return of the newest game that ended"),
    "episode_return_mean": Figure("episode_return_mean_points", "points", "the same, mean of the last 20 games"),
    "epsilon": Figure("epsilon_ratio", "share of 1", "random actions of the schedule"),
    "td_loss": Figure("td_loss", "", "loss of the Q network"),
    "td_error_mean": Figure("td_error_mean_points", "points, clipped", "mean of the temporal-difference errors"),
    "q_mean": Figure("q_mean_points", "points, clipped", "mean value of the actions taken"),
    "grad_norm": Figure("grad_norm", "", "norm of the gradient before it is clipped"),
    "staleness_updates": Figure("staleness_updates", "updates", "how many updates behind a fragment's weights were"),
    "runner_idle_share": Figure("runner_idle_ratio", "share of 1", "of a worker's time, waiting for the learner"),
    "learner_idle_share": Figure("learner_idle_ratio", "share of 1", "of the driver's time, waiting for fragments"),
    "cut_episodes": Figure("cut_episodes", "games", "games cut off, their worker lost or a run resumed"),
    "lost_runners": Figure("lost_runners", "workers", "rollout workers lost so far"),
    "q_divergences": Figure("diverged_updates", "updates", "updates with values that no return can have"),
    "elbo": Figure("replay_elbo_nats", "nats a frame", "evidence lower bound, replayed frames"),
    "elbo_kl": Figure("replay_kl_nats", "nats a frame", "divergence of their posteriors from the prior"),
    "elbo_fresh": Figure("fresh_elbo_nats", "nats a frame", "evidence lower bound, newest frames"),
    "elbo_old": Figure("old_elbo_nats", "nats a frame", "evidence lower bound, oldest frames held"),
    "active_units": Figure("active_units", "latents", "latents that carry something"),
    "elbo_updates": Figure("elbo_updates", "updates", "gradient updates on the bound"),
    "encoder_version": Figure("encoder_version", "versions", "versions of the encoder so far"),
    "stale_share": Figure("stale_latents_ratio", "share of 1", "latents held that an earlier version made"),
    "latent_drift": Figure("latent_drift", "units of z", "how far latents had moved that were made anew"),
    "seconds": Figure("sitting_seconds", "seconds", "since this sitting began"),
    "step_s": Figure("step_seconds", "seconds", "one training step, of which the following are parts"),
    "wait_s": Figure("step_wait_seconds", "seconds", "waiting for fragments"),
    "store_s": Figure("step_store_seconds", "seconds", "putting fragments into the replay"),
    "encode_s": Figure("step_encode_seconds", "seconds", "encoding new frames"),
    "elbo_s": Figure("step_elbo_seconds", "seconds", "updating on the bound"),
    "draw_s": Figure("step_draw_seconds", "seconds", "drawing batches"),
    "update_total_s": Figure("step_update_seconds", "seconds", "updating"),
    "priorities_s": Figure("step_priorities_seconds", "seconds", "setting priorities"),
    "publish_s": Figure("step_publish_seconds", "seconds", "publishing weights"),
    "update_s": Figure("update_seconds", "seconds", "one update"),
    "environment_s": Figure("fragment_environment_seconds", "seconds", "of a fragment, in the emulators"),
    "observation_s": Figure("fragment_observation_seconds", "seconds", "of a fragment, encoding and stacking"),
    "action_s": Figure("fragment_action_seconds", "seconds", "of a fragment, choosing actions"),
    "busy_s": Figure("fragment_busy_seconds", "seconds", "of a fragment, all work"),
    "idle_s": Figure("fragment_idle_seconds", "seconds", "before a fragment, waiting to be asked"),
    # evaluate
    "episode_agent_steps": Figure("episode_agent_steps", "agent steps", "length of the newest game"),
    "mean_return": Figure("return_mean_points", "points", "mean raw return of the games"),
    "ci95_low": Figure("return_ci95_low_points", "points", "lower end of its 95% interval"),
    "ci95_high": Figure("return_ci95_high_points", "points", "upper end of its 95% interval"),
    "human_normalised": Figure("human_normalised_ratio", "share of 1", "0 as a random agent, 1 as a human"),
}
# By the unit of a stage's progress; they only rise, from 0 in each process.
COUNTERS: dict[str, Figure] = {
    "frames": Figure("frames_total", "frames", "frames stored (collect) or encoded (encode)"),
    "games": Figure("games_total", "games", "whole games played (evaluate)"),
}


class Gauges:
    """The figures of one run. Nothing happens, silently, while Ray is not running in this process.

    Args:
        stage: "collect", "pretrain", ...
        run: The run's folder, or the dataset's, by name.
        game: ALE's id; "" where there is none.
    """

    def __init__(self, stage: str, run: str, game: str = "") -> None:
        self.labels = dict(zip(LABELS, (stage, run, game), strict=True))

    def show(self, figures: Mapping[str, float]) -> None:
        """Shows the newest values; names that are not in GAUGES are left out. 33 figures take less than 1 ms."""
        if not _is_ray_running():
            return
        for key, value in figures.items():
            if key in GAUGES:
                _gauge(key).set(value, self.labels)

    def count(self, unit: str, amount: float) -> None:
        """Adds to a counter; units that are not in COUNTERS are left out."""
        if unit in COUNTERS and amount > 0 and _is_ray_running():
            _counter(unit).inc(amount, self.labels)


def _is_ray_running() -> bool:
    ray = sys.modules.get("ray")  # imported here, it would cost a second where there is no Ray
    return ray is not None and ray.is_initialized()


@functools.cache
def _gauge(key: str) -> Any:
    from ray.util.metrics import Gauge

    return Gauge(PREFIX + GAUGES[key].name, _help(GAUGES[key]), LABELS)


@functools.cache
def _counter(unit: str) -> Any:
    from ray.util.metrics import Counter

    return Counter(PREFIX + COUNTERS[unit].name, _help(COUNTERS[unit]), LABELS)


def _help(figure: Figure) -> str:
    return f"{figure.text} ({figure.unit})" if figure.unit else figure.text
