"""Contracts behind rllib_ext/compat.py: what RLlib does not promise and latentrl relies on."""

from __future__ import annotations

import inspect
from importlib import metadata

from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.core.learner.learner import Learner
from ray.rllib.core.learner.learner_group import LearnerGroup
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchDDPRLModule
from ray.rllib.env.env_runner_group import EnvRunnerGroup
from ray.rllib.utils.actor_manager import FaultTolerantActorManager
from ray.tune.trainable import Trainable

from rllib_ext.config import LatentDQNConfig
from rllib_ext.runner import LatentEnvRunner


def test_rllib_is_the_version_that_was_read():
    assert metadata.version("ray").startswith("2.60.")


def test_a_learner_of_a_group_knows_its_rank_before_it_is_built():
    assert "self._learner_index = 0" in inspect.getsource(Learner.__init__)
    source = inspect.getsource(LearnerGroup.__init__)
    assert source.index("learner_index=idx") < source.index("w.build.remote()")
    assert "enumerate(self._workers)" in source
    assert "self._learner_index = learner_index" in inspect.getsource(Learner._set_learner_index_and_placement_group)


def test_the_learner_counts_its_weights_by_weights_seq_no():
    assert "self._weights_seq_no += 1" in inspect.getsource(Learner.update)
    assert "self._weights_seq_no" in inspect.getsource(Learner.get_state)


def test_a_state_with_sequence_number_0_is_always_taken():
    source = inspect.getsource(Learner.set_state)
    assert "if weights_seq_no == 0 or self._weights_seq_no < weights_seq_no:" in source


def test_the_iteration_is_a_plain_attribute_of_a_trainable():
    assert "self._iteration = 0" in inspect.getsource(Trainable.__init__)
    assert isinstance(Trainable.iteration, property)


def test_a_group_calls_functions_on_its_local_learner_and_on_remote_ones_with_our_keywords():
    source = inspect.getsource(LearnerGroup.foreach_learner)
    assert "func(self._learner, **kwargs)" in source
    assert "func=partial(func, **kwargs)" in source


def test_several_learners_are_wrapped_with_the_configured_keywords_when_built():
    source = inspect.getsource(TorchLearner._make_modules_ddp_if_necessary)
    assert "if self.config.num_learners > 1:" in source
    assert "**self.config.torch_ddp_kwargs" in source
    assert "self._make_modules_ddp_if_necessary()" in inspect.getsource(TorchLearner.build)
    assert "return self(*args, **kwargs)" in inspect.getsource(TorchDDPRLModule._forward_train)


def test_a_group_keeps_its_requests_under_way_and_gives_back_errors_when_asked_directly():
    assert "self._worker_manager = FaultTolerantActorManager(" in inspect.getsource(EnvRunnerGroup.__init__)
    source = inspect.getsource(FaultTolerantActorManager)
    assert "self._in_flight_req_to_actor_id: Dict[ray.ObjectRef, int] = {}" in source
    parameters = inspect.signature(FaultTolerantActorManager.fetch_ready_async_reqs).parameters
    assert {"tags", "timeout_seconds"} <= set(parameters)


def test_weights_go_to_runners_through_set_state():
    source = inspect.getsource(EnvRunnerGroup.sync_weights)
    assert 'func="set_state"' in source
    assert "self.local_env_runner.set_state(rl_module_state)" in source
    assert "state" in inspect.signature(LatentEnvRunner.set_state).parameters


def test_without_merging_and_broadcasting_the_group_leaves_connector_states_alone():
    source = inspect.getsource(EnvRunnerGroup.sync_env_runner_states)
    assert "if not merge and not broadcast:\n            return" in source
    config = LatentDQNConfig()
    assert config.merge_env_runner_states is False
    assert config.broadcast_env_runner_states is False


def test_setup_reads_the_config_that_the_subclass_put_in_place():
    source = inspect.getsource(Algorithm.setup)
    assert "config=self.config," in source
    assert "self.setup(copy.deepcopy(self.config))" in inspect.getsource(Trainable.__init__)


def test_the_group_builds_runners_from_the_class_in_the_config():
    source = inspect.getsource(EnvRunnerGroup.__init__)
    assert "self.env_runner_cls = config.env_runner_cls" in source
    assert LatentDQNConfig().env_runner_cls is LatentEnvRunner
