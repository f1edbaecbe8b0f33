"""The learner: its updates against hand computation, targets, precision, and that several learners equal one."""

from __future__ import annotations

import catch
import gymnasium as gym
import numpy as np
import pytest
import ray
import torch
from ray.rllib.core import DEFAULT_MODULE_ID
from rl_toys import make_encoder, toy_config
from test_runner import LocalBundle

from pipeline.errors import UserError
from pipeline.models.vae import VAESettings
from rllib_ext.learner import LearnerReport, resolve_precision
from rllib_ext.losses import project_distribution
from rllib_ext.replay import Transitions
from rllib_ext.settings import QConfig

CONVOLUTIONS = VAESettings(z_dim=16, patch=3, widths=(8, 8), num_blocks=1)
C51 = QConfig(hidden=(32,), dueling=True, num_atoms=11, v_min=-3, v_max=3)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def make_config(tmp_path, mode: str, q: QConfig | None = None, num_learners: int = 0, **training):
    config = toy_config(mode, make_encoder(tmp_path / "encoder"), **training)
    if mode == "pixels":
        config.latent(encoder_config=CONVOLUTIONS)
    config.latent(q=q or QConfig(hidden=(32,))).learners(num_learners=num_learners).validate()
    if config.encoder_path is not None:
        config.bundle = LocalBundle(config.encoder_path, config.encoder_sha256)
    return config


def spaces_of(mode: str):
    shape = (2, 16) if mode == "frozen" else (2, 12, 12)
    return {DEFAULT_MODULE_ID: (gym.spaces.Box(-1, 1, shape), gym.spaces.Discrete(3))}


def make_learner(tmp_path, mode: str, q: QConfig | None = None, **training):
    return make_config(tmp_path, mode, q, **training).build_learner(spaces=spaces_of(mode))


def random_batch(mode: str, size: int, seed: int = 0) -> Transitions:
    rng = np.random.default_rng(seed)
    if mode == "frozen":
        obs = rng.normal(size=(2, size, 2, 16)).astype(np.float16)
    else:
        obs = rng.integers(0, 255, (2, size, 2, 12, 12), dtype=np.uint8)
    return Transitions(
        obs=obs[0],
        action=rng.integers(0, 3, size),
        returns=rng.normal(size=size).astype(np.float32),
        next_obs=obs[1],
        discount=rng.choice([0.0, 0.98], size).astype(np.float32),
        ids=rng.permutation(size) + 1000,
        weights=rng.uniform(0.2, 1.0, size).astype(np.float32),
    )


def rows(batch: Transitions, at) -> Transitions:
    return batch.of_each(lambda column: column[at])


def update(learner, batch: Transitions, updates_before: int = 0) -> LearnerReport:
    return learner.update_drawn(batch, updates_before=updates_before)


def weights(learner) -> dict[str, torch.Tensor]:
    module = learner.module["default_policy"].unwrapped()
    return {name: value.clone() for name, value in module.state_dict().items()}


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


@torch.no_grad()
def by_hand(module, batch: Transitions, is_double: bool):
    """Values of the rows' actions, and what they should be, in numpy."""
    rows = np.arange(len(batch.action))
    obs, next_obs = torch.from_numpy(batch.obs), torch.from_numpy(batch.next_obs)
    next_online = next_obs if batch.next_obs_online is None else torch.from_numpy(batch.next_obs_online)
    valued = module.target(next_obs).numpy()
    chosen = (module.network(next_online).numpy() if is_double else valued).argmax(1)
    target = batch.returns + batch.discount * valued[rows, chosen]
    return module.network(obs).numpy(), target, chosen


@pytest.mark.parametrize(("is_double", "has_own_next"), [(True, False), (True, True), (False, False)])
def test_loss_and_errors_are_weighted_huber_of_the_targets(tmp_path, is_double, has_own_next):
    learner = make_learner(tmp_path, "frozen", double=is_double)
    module = learner.module["default_policy"]
    for value in module.target.parameters():
        value.data.normal_()
    batch = random_batch("frozen", 16)
    if has_own_next:
        batch = batch._replace(next_obs_online=random_batch("frozen", 16, seed=1).next_obs)
    q, target, _ = by_hand(module, batch, is_double)
    error = q[np.arange(16), batch.action] - target
    huber = np.where(np.abs(error) < 1, 0.5 * error**2, np.abs(error) - 0.5)
    report = update(learner, batch)
    assert report.figures["td_loss"] == pytest.approx((batch.weights * huber).mean(), rel=1e-4)
    assert report.figures["q_mean"] == pytest.approx(q.mean(), rel=1e-4)
    assert report.figures["td_error_mean"] == pytest.approx(np.abs(error).mean(), rel=1e-4)
    np.testing.assert_allclose(report.td_errors, np.abs(error), rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(report.ids, batch.ids)
    assert (report.ids.dtype, report.td_errors.dtype) == (np.int64, np.float32)


@pytest.mark.parametrize("is_double", [True, False])
def test_the_errors_of_distributions_are_kl_divergences_from_the_projected_target(tmp_path, is_double):
    learner = make_learner(tmp_path, "frozen", q=C51, double=is_double)
    module = learner.module["default_policy"]
    for value in module.target.parameters():
        value.data.normal_()
    batch = random_batch("frozen", 16)
    _, _, chosen = by_hand(module, batch, is_double)
    with torch.no_grad():
        predicted = module.network.outputs(torch.from_numpy(batch.obs))[np.arange(16), batch.action]
        following = module.target.outputs(torch.from_numpy(batch.next_obs))[np.arange(16), chosen].softmax(-1)
        returns, discount = torch.from_numpy(batch.returns), torch.from_numpy(batch.discount)
        wanted = project_distribution(following, returns, discount, module.network.head.atoms)
    kl = torch.distributions.kl_divergence(
        torch.distributions.Categorical(probs=wanted), torch.distributions.Categorical(logits=predicted)
    )
    np.testing.assert_allclose(update(learner, batch).td_errors, kl.numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("q", [QConfig((32,), dueling=True), C51])
def test_the_value_stream_learns_within_an_update(tmp_path, q):
    learner = make_learner(tmp_path, "frozen", q=q)
    before = weights(learner)
    update(learner, random_batch("frozen", 16))
    after = weights(learner)
    step = {name: float((after[name] - before[name]).norm()) for name in before if name.startswith("network.head")}
    value, advantage = step["network.head.value.weight"], step["network.head.layers.3.weight"]
    assert value > 0
    head = learner.module["default_policy"].network.head
    assert 0.2 < float(head.value.weight.grad.norm() / head.layers[3].weight.grad.norm()) < 5
    assert advantage > 0


def test_rows_of_weight_0_teach_nothing(tmp_path):
    learner = make_learner(tmp_path, "frozen")
    before = weights(learner)
    update(learner, random_batch("frozen", 16)._replace(weights=np.zeros(16, np.float32)))
    assert not moved(before, weights(learner))


def test_the_encoder_has_its_own_optimizer_and_rate(tmp_path):
    learner = make_learner(tmp_path, "finetune", lr=1e-2, encoder_lr=1e-4)
    rates = {
        name: optimizer.param_groups[0]["lr"] for name, optimizer in learner.get_optimizers_for_module("default_policy")
    }
    assert rates == {"head": pytest.approx(1e-2), "encoder": pytest.approx(1e-4)}


def test_gradients_are_clipped_for_each_optimizer_and_the_norm_before_is_reported(tmp_path):
    learner = make_learner(tmp_path / "a", "finetune", grad_clip=1e-3)
    report = update(learner, random_batch("finetune", 16))
    for _, optimizer in learner.get_optimizers_for_module("default_policy"):
        grads = [p.grad for p in optimizer.param_groups[0]["params"] if p.grad is not None]
        assert float(torch.stack([g.norm() for g in grads]).norm()) == pytest.approx(1e-3, rel=1e-3)
    free = make_learner(tmp_path / "b", "finetune", grad_clip=0.0)
    assert "grad_norm" not in update(free, random_batch("finetune", 16)).figures
    grads = [p.grad for p in free.module["default_policy"].network.parameters() if p.grad is not None]
    assert report.figures["grad_norm"] == pytest.approx(float(torch.stack([g.norm() for g in grads]).norm()), rel=1e-3)


def test_the_target_is_copied_every_so_many_updates_across_calls(tmp_path):
    learner = make_learner(tmp_path, "frozen", target_update_updates=5)

    def is_copy() -> bool:
        module = learner.module["default_policy"]
        return not moved(module.network.state_dict(), module.target.state_dict())

    update(learner, random_batch("frozen", 3 * 16), updates_before=0)
    assert not is_copy()
    update(learner, random_batch("frozen", 2 * 16), updates_before=3)
    assert is_copy()
    update(learner, random_batch("frozen", 16), updates_before=5)
    assert not is_copy()


def test_several_updates_in_one_call_equal_single_calls(tmp_path):
    batch = random_batch("frozen", 48)
    together, single = make_learner(tmp_path / "a", "frozen"), make_learner(tmp_path / "b", "frozen")
    single.module["default_policy"].load_state_dict(together.module["default_policy"].state_dict())
    report = update(together, batch)
    reports = [update(single, rows(batch, slice(u * 16, u * 16 + 16)), updates_before=u) for u in range(3)]
    assert not moved(weights(together), weights(single))
    np.testing.assert_array_equal(report.td_errors, np.concatenate([r.td_errors for r in reports]))


def test_rates_fall_to_nothing_with_the_agent_steps_that_updates_answer_to(tmp_path):
    training = {"lr": 1e-2, "encoder_lr": 1e-4, "warmup_agent_steps": 100, "updates_per_agent_step": 0.5}
    learner = make_learner(tmp_path, "finetune", lr_decay_agent_steps=200, **training)
    batch = random_batch("finetune", 16)

    def rates_after(updates: int) -> list[float]:
        update(learner, batch, updates_before=updates)
        return [
            optimizer.param_groups[0]["lr"] for _, optimizer in learner.get_optimizers_for_module(DEFAULT_MODULE_ID)
        ]

    assert rates_after(0) == pytest.approx([5e-3, 5e-5])  # the warm-up has taken half of the agent steps
    assert rates_after(40) == pytest.approx([1e-3, 1e-5])
    before = weights(learner)
    assert rates_after(50) == rates_after(70) == [0.0, 0.0]
    assert not {name for name in moved(before, weights(learner)) if not name.startswith("target")}


def test_rllibs_own_update_is_refused(tmp_path):
    with pytest.raises(NotImplementedError, match="update_drawn"):
        make_learner(tmp_path, "frozen").compute_loss_for_module()


@pytest.mark.parametrize("native", [True, False])
def test_bf16_is_used_where_the_processor_has_it_and_refused_where_not(tmp_path, monkeypatch, native):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": native, "cpu_name": "toy"})
    assert resolve_precision("float32") is None
    assert resolve_precision("auto") is (torch.bfloat16 if native else None)
    if native:
        assert resolve_precision("bf16") is torch.bfloat16
    else:
        with pytest.raises(UserError, match=r"train\.precision is bf16, and this processor \(toy\)"):
            make_learner(tmp_path, "frozen", precision="bf16")


@pytest.mark.parametrize(
    ("processor", "gains"),
    [
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, False),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, True),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, True),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": False}, False),
    ],
)
def test_auto_takes_bf16_where_it_is_the_faster_one(monkeypatch, processor, gains):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor)
    assert resolve_precision("auto") is (torch.bfloat16 if gains else None)
    if processor["avx512_bf16"]:
        assert resolve_precision("bf16") is torch.bfloat16


@pytest.mark.parametrize("q", [QConfig((32,), dueling=True), C51])
def test_under_bf16_every_layer_learns_and_parameters_and_errors_stay_float32(tmp_path, monkeypatch, q):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    exact = make_learner(tmp_path / "a", "finetune", q=q)
    cast = make_learner(tmp_path / "b", "finetune", q=q, precision="bf16")
    cast.module["default_policy"].load_state_dict(exact.module["default_policy"].state_dict())
    batch = random_batch("finetune", 16)
    before, wanted, got = weights(cast), update(exact, batch), update(cast, batch)
    after = weights(cast)
    assert moved(before, after) == moved(before, weights(exact))
    assert {value.dtype for value in after.values()} == {torch.float32}
    assert got.td_errors.dtype == np.float32
    np.testing.assert_allclose(got.td_errors, wanted.td_errors, atol=0.1)
    assert not np.array_equal(got.td_errors, wanted.td_errors), "nothing was cast"


@pytest.fixture(scope="module")
def _ray_session():
    ray.cloudpickle.register_pickle_by_value(catch)  # workers do not see this folder
    ray.init("local", num_cpus=3, object_store_memory=200 * 2**20, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(catch)


def learn(config, mode: str, batches: list[Transitions]) -> tuple[list[LearnerReport], list[dict[str, np.ndarray]]]:
    """Reports on the last batch and final parameters, one of each a learner; all in Ray where there are learners."""
    config.bundle = None if mode == "frozen" else config.bundle
    group = config.build_learner_group(spaces=spaces_of(mode))
    try:
        for u, batch in enumerate(batches):
            shared = ray.put(batch) if group.is_remote else batch

            def learn_shared(learner, drawn=shared, before=2 * u):
                drawn = ray.get(drawn) if isinstance(drawn, ray.ObjectRef) else drawn
                return learner.update_drawn(drawn, updates_before=before)

            results = list(group.foreach_learner(learn_shared))
        states = list(group.foreach_learner(lambda learner: learner.get_state()["rl_module"]["default_policy"]))
        return [result.get() for result in results], [state.get() for state in states]
    finally:
        group.shutdown()


@pytest.mark.usefixtures("_ray_session")
@pytest.mark.parametrize(("mode", "q"), [("frozen", C51), ("pixels", QConfig((32,), dueling=True))])
def test_no_one_and_two_learners_learn_the_same_and_know_whose_errors_they_report(tmp_path, mode, q):
    batches = [random_batch(mode, 32, seed) for seed in range(2)]
    settings = {"target_update_updates": 3, "grad_clip": 0.05, "adam_epsilon": 1e-2}
    outcomes = {n: learn(make_config(tmp_path / str(n), mode, q, n, **settings), mode, batches) for n in (0, 1, 2)}
    (expected,), (parameters,) = outcomes[0]
    wanted = dict(zip(expected.ids.tolist(), expected.td_errors.tolist(), strict=True))
    assert expected.ids.tolist() == batches[-1].ids.tolist()
    for num_learners in (1, 2):
        reports, states = outcomes[num_learners]
        assert len(reports) == len(states) == num_learners
        for state in states:
            assert state.keys() == parameters.keys()
            for name, value in state.items():
                np.testing.assert_allclose(value, parameters[name], atol=1e-6, rtol=0, err_msg=name)
        got = {i: e for r in reports for i, e in zip(r.ids.tolist(), r.td_errors.tolist(), strict=True)}
        assert got == pytest.approx(wanted, abs=1e-4)
        norms = {round(report.figures["grad_norm"], 5) for report in reports}
        assert norms == {round(expected.figures["grad_norm"], 5)}
    shares = [set(report.ids.tolist()) for report in outcomes[2][0]]
    assert shares[0] | shares[1] == set(wanted)
    assert set(batches[-1].ids[[0, 7, 16, 23]].tolist()) <= shares[0], "each takes its part of every minibatch"
