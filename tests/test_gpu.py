"""What computes on a GPU gives what the CPU gives, as far as rounding lets it. Skipped where torch sees no GPU."""

from __future__ import annotations

import math
from dataclasses import replace

import catch
import numpy as np
import pytest
import ray
import test_learner
import test_pretrain
import torch
from catch import catch_preprocess
from rl_toys import TOY_VAE, make_encoder, toy_config
from toy_frames import toy_dataset

from pipeline.artifact import load_encoder
from pipeline.errors import Terminated, UserError
from rllib_ext.settings import QConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


@pytest.fixture(scope="module", autouse=True)
def _session():
    ray.cloudpickle.register_pickle_by_value(catch)  # workers do not see this folder
    ray.init("local", num_cpus=3, object_store_memory=200 << 20, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(catch)


def both_learners(tmp_path, mode: str, q: QConfig, **training):
    """On the CPU and on the GPU, with the same weights; of several GPUs not on the one that torch takes by itself."""
    configs = [test_learner.make_config(tmp_path / name, mode, q, **training) for name in ("cpu", "gpu")]
    on_cpu = configs[0].build_learner(spaces=test_learner.spaces_of(mode))
    on_gpu = configs[1].learners(num_gpus_per_learner=1, local_gpu_idx=torch.cuda.device_count() - 1)
    on_gpu = on_gpu.build_learner(spaces=test_learner.spaces_of(mode))
    on_gpu.module["default_policy"].load_state_dict(on_cpu.module["default_policy"].state_dict())
    return on_cpu, on_gpu


@pytest.mark.parametrize("mode", ["frozen", "finetune", "pixels"])
@pytest.mark.parametrize("q", [QConfig((32,), dueling=True), test_learner.C51])
def test_a_gpu_learns_what_the_cpu_learns(tmp_path, mode, q):
    on_cpu, on_gpu = both_learners(tmp_path, mode, q, grad_clip=0.05, target_update_updates=3, adam_epsilon=1e-2)
    for seed in range(6):  # a few eager updates, then their record
        batch = test_learner.random_batch(mode, 32, seed)
        wanted, got = (test_learner.update(learner, batch, 2 * seed) for learner in (on_cpu, on_gpu))
        assert got.ids.tolist() == wanted.ids.tolist()
        np.testing.assert_allclose(got.td_errors, wanted.td_errors, atol=2e-3)
        assert got.figures["grad_norm"] == pytest.approx(wanted.figures["grad_norm"], rel=2e-2)
    assert {parameter.device.type for parameter in on_gpu.q_module.parameters()} == {"cuda"}
    learnt = test_learner.weights(on_cpu)
    for name, value in test_learner.weights(on_gpu).items():
        torch.testing.assert_close(value.cpu(), learnt[name], atol=1e-3, rtol=0, msg=name)


def test_the_state_of_a_gpu_goes_on_on_the_cpu_and_back(tmp_path):
    on_cpu, on_gpu = both_learners(tmp_path, "finetune", QConfig((32,)), adam_epsilon=1e-2)
    for seed in range(6):
        test_learner.update(on_gpu, test_learner.random_batch("finetune", 16, seed), seed)
    second = test_learner.random_batch("finetune", 16, 1)
    on_cpu.set_state(on_gpu.get_state())
    wanted = test_learner.update(on_cpu, second, 1)
    np.testing.assert_allclose(test_learner.update(on_gpu, second, 1).td_errors, wanted.td_errors, atol=2e-3)
    on_gpu.set_state(on_cpu.get_state())
    for seed in range(2, 8):
        batch = test_learner.random_batch("finetune", 16, seed)
        wanted = test_learner.update(on_cpu, batch, seed)
        np.testing.assert_allclose(test_learner.update(on_gpu, batch, seed).td_errors, wanted.td_errors, atol=2e-3)


def test_bf16_on_a_gpu_stays_close_to_float32(tmp_path):
    _, exact = both_learners(tmp_path / "a", "finetune", QConfig((32,), dueling=True))
    _, cast = both_learners(tmp_path / "b", "finetune", QConfig((32,), dueling=True), precision="bf16")
    cast.module["default_policy"].load_state_dict(exact.module["default_policy"].state_dict())
    batch = test_learner.random_batch("finetune", 16)
    wanted, got = test_learner.update(exact, batch), test_learner.update(cast, batch)
    np.testing.assert_allclose(got.td_errors, wanted.td_errors, atol=0.1)
    assert not np.array_equal(got.td_errors, wanted.td_errors), "nothing was cast"


def test_a_gpu_that_is_not_there_is_refused(tmp_path):
    config = toy_config("frozen", make_encoder(tmp_path / "encoder")).learners(num_gpus_per_learner=1)
    with pytest.raises(UserError, match=r"local_gpu_idx is 99, and torch sees \d+ GPUs"):
        config.learners(local_gpu_idx=99).check()


@pytest.mark.parametrize("num_learners", [0, 1])
def test_an_agent_trains_and_resumes_on_a_gpu(tmp_path, num_learners):
    config = toy_config("finetune", make_encoder(tmp_path / "encoder", catch_preprocess(), TOY_VAE))
    config.learners(num_learners=num_learners, num_gpus_per_learner=1).env_runners(num_env_runners=0)
    algorithm = config.latent(run_id="run").build_algo()
    while algorithm.updates < 20:
        algorithm.train()
    algorithm.save_to_path(tmp_path / "checkpoint")
    algorithm.stop()
    resumed = config.build_algo()
    resumed.restore_from_path(tmp_path / "checkpoint")
    assert resumed.updates >= 20
    while resumed.updates < 40:
        resumed.train()
    assert all(np.isfinite(value).all() for value in resumed.network_state().values())
    resumed.stop()


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 0.01), ("bf16", 0.03)])
def test_pretraining_on_a_gpu_ends_where_the_cpu_does(tmp_path, precision, tolerance):
    dataset = toy_dataset(tmp_path / "d", [60] * 12, num_files=3)
    on_cpu = test_pretrain.train(dataset, tmp_path / "cpu")
    config = replace(test_pretrain.CONFIG, num_gpus_per_worker=1, precision=precision)
    heard = []
    on_gpu = test_pretrain.train(dataset, tmp_path / "gpu", config, on_metrics=lambda values, step: heard.append(step))
    assert (on_gpu.steps, on_gpu.steps_per_worker) == (on_cpu.steps, on_cpu.steps_per_worker)
    assert on_gpu.elbo_nats == pytest.approx(on_cpu.elbo_nats, rel=tolerance)
    assert math.isfinite(on_gpu.images_per_s)
    assert heard == sorted(heard)
    assert load_encoder(on_gpu.bundle_path, expect_sha256=on_gpu.sha256).stats.num_active == on_gpu.active_units


def test_a_pretraining_goes_on_from_its_checkpoint_on_a_gpu(tmp_path):
    dataset = toy_dataset(tmp_path / "d", [60] * 12, num_files=3)
    config = replace(test_pretrain.CONFIG, num_gpus_per_worker=1)
    whole = test_pretrain.train(dataset, tmp_path / "whole", config)
    with pytest.raises(Terminated):
        test_pretrain.train(dataset, tmp_path / "cut", config, is_asked_to_stop=lambda: True)
    resumed = test_pretrain.train(dataset, tmp_path / "cut", config, resume=True)
    assert resumed.steps == whole.steps
    assert resumed.elbo_nats == pytest.approx(whole.elbo_nats, rel=0.01)
