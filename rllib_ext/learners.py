"""The learners as the algorithm sees them: updates on shared minibatches, weights for the workers, state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.rllib.core import COMPONENT_LEARNER, COMPONENT_METRICS_LOGGER, DEFAULT_MODULE_ID
from ray.rllib.core.learner.learner_group import LearnerGroup
from ray.rllib.utils.metrics import WEIGHTS_SEQ_NO

from pipeline.errors import UserError
from rllib_ext.learner import LatentDQNLearner, LearnerReport
from rllib_ext.replay import Transitions

Arrays = dict[str, np.ndarray[Any, Any]]


class Learners:
    """A group of remote learners, or the one learner in this process. The first error of one is raised."""

    def __init__(self, group: LearnerGroup) -> None:
        """Takes RLlib's group."""
        self._group = group

    def update(self, drawn: Transitions, updates_before: int) -> list[LearnerReport]:
        """Updates on all minibatches of a draw; one report a learner."""
        return self._everywhere(_update, drawn, updates_before)

    def initialise_model(self, frames: NDArray[np.uint8]) -> None:
        """Sets what a model that starts from nothing takes from frames (N, H, W)."""
        self._everywhere(LatentDQNLearner.initialise_model, frames)

    def update_bound(self, frames: NDArray[np.uint8], lr: float) -> dict[str, float]:
        """Updates on the bound, by U * B frames (N, H, W) in all; the first learner's figures."""
        return self._everywhere(LatentDQNLearner.update_bound, frames, lr)[0]

    def publish_encoder(self, fresh: NDArray[np.uint8], old: NDArray[np.uint8], tau: float) -> dict[str, float]:
        """See LatentDQNLearner.publish_encoder; the first learner's figures."""
        return self._everywhere(LatentDQNLearner.publish_encoder, fresh, old, tau)[0]

    def reading_encoders(self) -> tuple[Arrays, Arrays]:
        """Parameters of the encoders that online and target network read with."""
        both: tuple[Arrays, Arrays] = self._of_first(LatentDQNLearner.reading_encoders)
        return both

    def model_weights(self) -> Arrays:
        """Of the model that learns on its bound, parameter name to array."""
        weights: Arrays = self._of_first(_model_weights)
        return weights

    def _everywhere(self, function: Callable[..., Any], large: Any, *others: Any) -> list[Any]:
        """Of each learner; what is large goes through the object store once."""
        shared = ray.put(large) if self._group.is_remote else large
        return _values(self._group.foreach_learner(_call, function=function, large=shared, others=others))

    def _of_first(self, function: Callable[[LatentDQNLearner], Any]) -> Any:
        (value,) = _values(self._group.foreach_learner(function, remote_actor_ids=[0]))
        return value

    def inference_state(self) -> Arrays:
        """The online network: parameter name to array."""
        state: Arrays = self._of_first(_inference_state)
        return state

    def encoder_sha256s(self) -> list[str | None]:
        """Hash of the encoder's parameters in each learner; None where it holds none."""
        return _values(self._group.foreach_learner(_encoder_sha256))

    def state(self) -> dict[str, Any]:
        """Weights, target and optimizers."""
        state: dict[str, Any] = self._group.get_state()[COMPONENT_LEARNER]
        state.pop(COMPONENT_METRICS_LOGGER, None)
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Takes over what `state` gave."""
        self._everywhere(LatentDQNLearner.set_state, {**state, WEIGHTS_SEQ_NO: 0})


def _values(results: Any) -> list[Any]:
    for result in results:
        error = None if result.ok else result.get()
        if isinstance(error, ray.exceptions.RayActorError):
            raise UserError(f"a learner is lost ({type(error).__name__}); go on from the last checkpoint with --resume")
        if error is not None:
            raise error
    return [result.get() for result in results]


def _update(learner: LatentDQNLearner, drawn: Transitions, updates_before: int) -> LearnerReport:
    return learner.update_drawn(drawn, updates_before=updates_before)


def _call(learner: LatentDQNLearner, function: Callable[..., Any], large: Any, others: tuple[Any, ...]) -> Any:
    return function(learner, ray.get(large) if isinstance(large, ray.ObjectRef) else large, *others)


def _model_weights(learner: LatentDQNLearner) -> Arrays:
    assert learner.bound is not None
    weights: Arrays = learner.bound.state()["weights"]
    return weights


def _inference_state(learner: LatentDQNLearner) -> Arrays:
    module = learner.module[DEFAULT_MODULE_ID].unwrapped()
    state: Arrays = module.get_state(inference_only=True)
    return state


def _encoder_sha256(learner: LatentDQNLearner) -> str | None:
    return learner.weights_sha256()
