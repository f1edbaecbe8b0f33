"""Contracts behind rllib_ext/compat.py: what RLlib does not promise and latentrl relies on."""

from __future__ import annotations

import inspect
import os
import signal
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import catch
import pytest
import ray
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.core.learner import learner_group
from ray.rllib.core.learner.learner import Learner
from ray.rllib.core.learner.learner_group import LearnerGroup
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchDDPRLModule
from ray.rllib.env.env_runner_group import EnvRunnerGroup
from ray.tune.trainable import Trainable
from rl_toys import make_encoder, toy_config

from pipeline.rendezvous import OneMachine
from rllib_ext import compat
from rllib_ext.algorithm import LatentDQN
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


def test_a_group_asks_a_function_of_its_module_how_its_learners_meet():
    assert "backend_config = _get_backend_config(learner_class)" in inspect.getsource(LearnerGroup.__init__)
    theirs, ours = learner_group._get_backend_config, OneMachine()
    with compat.learners_meet_by(ours):
        assert learner_group._get_backend_config(TorchLearner) is ours
    assert learner_group._get_backend_config is theirs


def test_workers_that_are_lost_leave_no_place_where_they_met(tmp_path):
    class Lost(list):
        def execute_async(self, *arguments, **options):
            raise ray.exceptions.RayActorError

    meeting = OneMachine(folder=str(tmp_path / "meeting"))
    (tmp_path / "meeting").mkdir()
    with pytest.raises(ray.exceptions.RayActorError):
        meeting.backend_cls().on_shutdown(Lost("ab"), meeting)
    assert not (tmp_path / "meeting").exists()


def test_several_learners_are_wrapped_with_the_configured_keywords_when_built():
    source = inspect.getsource(TorchLearner._make_modules_ddp_if_necessary)
    assert "if self.config.num_learners > 1:" in source
    assert "**self.config.torch_ddp_kwargs" in source
    assert "self._make_modules_ddp_if_necessary()" in inspect.getsource(TorchLearner.build)
    assert "return self(*args, **kwargs)" in inspect.getsource(TorchDDPRLModule._forward_train)


@pytest.fixture(scope="module")
def algorithm(tmp_path_factory) -> Iterator[LatentDQN]:
    """Two remote runners and one learner in this process."""
    encoder = make_encoder(tmp_path_factory.mktemp("encoder") / "bundle")
    ray.cloudpickle.register_pickle_by_value(catch)  # workers do not see this folder
    ray.init("local", num_cpus=2, object_store_memory=200 * 2**20, include_dashboard=False, log_to_driver=False)
    algorithm = toy_config("frozen", encoder).env_runners(num_env_runners=2).build_algo()
    yield algorithm
    algorithm.stop()
    ray.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(catch)


def ask(algorithm: LatentDQN, runner: int, function: Callable[[LatentEnvRunner], Any]) -> None:
    algorithm.env_runner_group.foreach_env_runner_async(function, tag="test", remote_worker_ids=[runner])


def answers(algorithm: LatentDQN, num: int) -> list[tuple[int, Any]]:
    """Waits for so many, however few come at once."""
    got: list[tuple[int, Any]] = []
    until = time.monotonic() + 30
    while len(got) < num and time.monotonic() < until:
        compat.wait_for_any_request(algorithm.env_runner_group, 1.0)
        got += compat.ready_requests(algorithm.env_runner_group, "test")
    return got


def test_the_first_request_that_is_done_ends_the_wait_and_only_its_result_is_there(algorithm):
    def slow(runner):
        time.sleep(3)
        return "slow"

    ask(algorithm, 1, slow)
    ask(algorithm, 2, lambda runner: "quick")
    assert answers(algorithm, 1) == [(2, "quick")]
    assert compat.ready_requests(algorithm.env_runner_group, "another tag") == []
    assert answers(algorithm, 1) == [(1, "slow")]


def test_a_wait_ends_in_time_where_nothing_comes(algorithm):
    began = time.monotonic()
    compat.wait_for_any_request(algorithm.env_runner_group, 60.0)  # nobody was asked
    assert time.monotonic() - began < 30
    ask(algorithm, 1, lambda runner: time.sleep(2))
    compat.wait_for_any_request(algorithm.env_runner_group, 0.2)
    assert compat.ready_requests(algorithm.env_runner_group, "test") == []
    assert answers(algorithm, 1) == [(1, None)]


def test_a_runner_that_dies_answers_with_errors_alone_and_what_else_it_was_asked_is_forgotten(algorithm):
    """One error or one for each request: RLlib drops what is under way at a runner when it sees the first."""
    ask(algorithm, 1, lambda runner: os.kill(os.getpid(), signal.SIGKILL))
    ask(algorithm, 1, lambda runner: "never")
    ask(algorithm, 2, lambda runner: "well")
    got = answers(algorithm, 2)
    while len({runner for runner, _ in got}) < 2 and (more := answers(algorithm, 1)):
        got += more
    lost = [result for runner, result in got if runner == 1]
    assert 1 <= len(lost) <= 2
    assert all(isinstance(result, ray.exceptions.RayError) for result in lost)
    assert [answer for answer in got if answer[0] != 1] == [(2, "well")]
    assert algorithm.env_runner_group.healthy_env_runner_ids() == [2]
    assert not algorithm.env_runner_group.num_in_flight_async_reqs("test")


def test_the_rank_the_sequence_number_and_the_iteration_are_what_rllib_goes_by(algorithm):
    def number(learner: Learner) -> int:
        return learner.get_state(["rl_module"])["weights_seq_no"]

    def counted(learner: Learner) -> tuple[int, int, int]:
        before = number(learner)
        compat.count_call(learner)
        return compat.learner_rank(learner), before, number(learner)

    ((rank, before, after),) = [result.get() for result in algorithm.learner_group.foreach_learner(counted)]
    assert (rank, after) == (0, before + 1)
    compat.set_iteration(algorithm, 41)
    assert algorithm.iteration == algorithm.training_iteration == 41


def test_a_config_knows_whether_it_is_frozen():
    config = LatentDQNConfig()
    assert config._is_frozen is False
    config.freeze()
    assert config._is_frozen is True
    assert config.copy(copy_frozen=False)._is_frozen is False


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
