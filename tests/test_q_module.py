"""The Q module and its learner: targets against hand computation, what moves in which mode, and that it learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rl_toys import make_encoder, toy_config
from test_runner import LocalBundle

from pipeline.errors import UserError
from rllib_ext.learner import UPDATES_KEY, double_q_targets, to_training_data
from rllib_ext.networks import QHead, blend
from rllib_ext.replay import Transitions
from rllib_ext.settings import DQNSettings, QConfig


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def make_learner(tmp_path, mode: str, **training):
    import gymnasium as gym
    from ray.rllib.core import DEFAULT_MODULE_ID

    config = toy_config(mode, make_encoder(tmp_path / "encoder"), **training)
    config.validate()
    if config.encoder_path is not None:
        config.bundle = LocalBundle(config.encoder_path, config.encoder_sha256)
    shape = (2, 16) if mode == "frozen" else (2, 12, 12)
    spaces = {DEFAULT_MODULE_ID: (gym.spaces.Box(-1, 1, shape), gym.spaces.Discrete(3))}
    return config.build_learner(spaces=spaces)


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
    )


def update(learner, batch: Transitions, updates_before: int = 0, minibatch_size: int = 16):
    return learner.update(
        training_data=to_training_data(batch),
        minibatch_size=minibatch_size,
        timesteps={UPDATES_KEY: updates_before},
    )


def weights(learner) -> dict[str, torch.Tensor]:
    module = learner.module["default_policy"]
    return {name: value.clone() for name, value in module.state_dict().items()}


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_double_q_targets_by_hand():
    online = torch.tensor([[1.0, 3.0], [5.0, 2.0]])
    target = torch.tensor([[10.0, 20.0], [30.0, 40.0]])
    got = double_q_targets(torch.tensor([0.5, -1.0]), torch.tensor([0.9, 0.0]), online, target)
    torch.testing.assert_close(got, torch.tensor([0.5 + 0.9 * 20.0, -1.0]))


def test_the_loss_is_huber_on_double_q_targets(tmp_path):
    learner = make_learner(tmp_path, "frozen")
    module = learner.module["default_policy"]
    for value in module.target.parameters():
        value.data.normal_()
    batch = random_batch("frozen", 16)
    with torch.no_grad():
        q = module.network(torch.from_numpy(batch.obs)).numpy()
        chosen = module.network(torch.from_numpy(batch.next_obs)).argmax(1).numpy()
        valued = module.target(torch.from_numpy(batch.next_obs)).numpy()
    rows = np.arange(16)
    error = q[rows, batch.action] - (batch.returns + batch.discount * valued[rows, chosen])
    huber = np.where(np.abs(error) < 1, 0.5 * error**2, np.abs(error) - 0.5)
    result = update(learner, batch)
    assert result["default_policy"]["td_loss"].peek() == pytest.approx(huber.mean(), rel=1e-4)


def test_which_weights_move_in_which_mode(tmp_path):
    for mode in ("frozen", "finetune", "pixels"):
        learner = make_learner(tmp_path / mode, mode)
        before = weights(learner)
        update(learner, random_batch(mode, 64))
        changed = moved(before, weights(learner))
        assert any(name.startswith("network.head.") for name in changed)
        assert not any(name.startswith("target.") for name in changed)
        trained = {name for name in changed if name.startswith("network.encoder.")}
        if mode == "frozen":
            assert not any("encoder" in name for name in before), "the frozen encoder is not in the module at all"
        else:
            assert {name for name in trained if name.endswith("weight")}
            assert not {"network.encoder.mean", "network.encoder.scale"} & changed


def test_the_td_gradient_reaches_every_layer_of_the_encoder_that_the_mean_depends_on(tmp_path):
    learner = make_learner(tmp_path, "finetune")
    update(learner, random_batch("finetune", 16))
    encoder = learner.module["default_policy"].network.encoder
    reached = {name: p.grad is not None and bool(p.grad.abs().sum() > 0) for name, p in encoder.named_parameters()}
    with torch.enable_grad():
        encoder.zero_grad()
        encoder(torch.randint(0, 255, (4, 12, 12), dtype=torch.uint8)).square().sum().backward()
    needed = {name for name, p in encoder.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert needed
    assert all(reached[name] for name in needed)


def test_the_encoder_has_its_own_optimizer_and_rate(tmp_path):
    learner = make_learner(tmp_path, "finetune", lr=1e-2, encoder_lr=1e-4)
    rates = {
        name: optimizer.param_groups[0]["lr"] for name, optimizer in learner.get_optimizers_for_module("default_policy")
    }
    assert rates == {"head": pytest.approx(1e-2), "encoder": pytest.approx(1e-4)}


def test_gradients_are_clipped_for_each_optimizer(tmp_path):
    learner = make_learner(tmp_path, "finetune", grad_clip=1e-3)
    update(learner, random_batch("finetune", 16))
    for _, optimizer in learner.get_optimizers_for_module("default_policy"):
        grads = [p.grad for p in optimizer.param_groups[0]["params"] if p.grad is not None]
        assert torch.stack([g.norm() for g in grads]).norm() == pytest.approx(1e-3, rel=1e-3)


def test_next_values_need_no_gradient(tmp_path):
    learner = make_learner(tmp_path, "finetune")
    module = learner.module["default_policy"]
    batch = random_batch("finetune", 4)
    outputs = module.forward_train({"obs": torch.from_numpy(batch.obs), "new_obs": torch.from_numpy(batch.next_obs)})
    assert {name: value.requires_grad for name, value in outputs.items()} == {
        "qf_preds": True,
        "qf_next_preds": False,
        "qf_target_next_preds": False,
    }


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


def test_polyak_averaging_moves_the_target_a_share_of_the_way():
    online, target = QHead(2, 3, 2, QConfig((4,))), QHead(2, 3, 2, QConfig((4,)))
    expected = [t + 0.25 * (o - t) for t, o in zip(target.parameters(), online.parameters(), strict=True)]
    blend(target, online, 0.25)
    for got, wanted in zip(target.parameters(), expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_several_updates_in_one_call_equal_single_calls(tmp_path):
    batch = random_batch("frozen", 48)
    together, single = make_learner(tmp_path / "a", "frozen"), make_learner(tmp_path / "b", "frozen")
    single.module["default_policy"].load_state_dict(together.module["default_policy"].state_dict())
    update(together, batch)
    for u in range(3):
        update(single, Transitions(*(column[u * 16 : u * 16 + 16] for column in batch)), updates_before=u)
    assert not moved(weights(together), weights(single))


def test_exploration_is_epsilon_greedy(tmp_path):
    module = make_learner(tmp_path, "frozen", epsilon_start=0.5, epsilon_end=0.5).module["default_policy"]
    obs = {"obs": torch.randn(6000, 2, 16)}
    greedy = module.forward_inference(obs)["actions"]
    explored = module.forward_exploration(obs, t=0, generator=torch.Generator().manual_seed(0))["actions"]
    assert (greedy != explored).float().mean() == pytest.approx(0.5 * 2 / 3, abs=0.03)


def test_layer_norm_and_widths_are_what_was_asked_for():
    head = QHead(4, 8, 6, QConfig(hidden=(32, 16), layer_norm=False))
    assert [tuple(p.shape) for p in head.parameters() if p.ndim == 2] == [(32, 32), (16, 32), (6, 16)]
    assert not any(isinstance(layer, torch.nn.LayerNorm) for layer in head.modules())


def test_the_replay_ratio_counts_from_the_end_of_the_warm_up():
    settings = DQNSettings(updates_per_agent_step=0.25, warmup_agent_steps=100)
    assert [settings.due_updates(n) for n in (0, 100, 103, 104, 1100)] == [0, 0, 0, 1, 250]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"replay_capacity": 8}, "replay_capacity is 8, less than one batch"),
        ({"n_step": 9}, "n_step is 9, longer than a fragment of 8"),
        ({"replay_capacity": 60}, "raise it to at least 64"),
        ({"warmup_agent_steps": 1}, "warmup_agent_steps is 1"),
        ({"gamma": 1.5}, "gamma is 1.5; it must lie between 0 and 1"),
        ({"target_tau": 0.1}, "set exactly one"),
        ({"lr": 0.0}, "lr is 0.0; it must be above 0"),
    ],
)
def test_bad_settings_are_one_clear_line(tmp_path, changes, message):
    config = toy_config("frozen", make_encoder(tmp_path / "encoder"), **changes)
    with pytest.raises(UserError, match=message) as caught:
        config.validate()
    assert "\n" not in str(caught.value)


def test_unknown_and_unsupported_settings_are_errors(tmp_path):
    config = toy_config("frozen", make_encoder(tmp_path / "encoder"))
    with pytest.raises(UserError, match="unknown setting 'n_steps'; the nearest is 'n_step'"):
        config.training(n_steps=3)
    with pytest.raises(UserError, match="unknown choice 'encoders'"):
        config.latent(encoders=3)
    with pytest.raises(UserError, match="does not support the setting num_learners=2"):
        config.copy().learners(num_learners=2).validate()
    with pytest.raises(UserError, match="does not support the setting evaluation_interval=1"):
        config.copy().evaluation(evaluation_interval=1).validate()
    with pytest.raises(UserError, match="does not support the setting num_envs_per_env_runner=3"):
        config.copy().env_runners(num_envs_per_env_runner=3).validate()


def test_modes_and_encoders_must_fit(tmp_path):
    encoder = make_encoder(tmp_path / "encoder")
    with pytest.raises(UserError, match="mode frozen needs an encoder"):
        toy_config("frozen", None).validate()
    with pytest.raises(UserError, match="mode pixels takes no encoder"):
        toy_config("pixels", None).latent(encoder=encoder).validate()
    with pytest.raises(UserError, match="unknown mode 'thawed'"):
        toy_config("frozen", encoder).latent(mode="thawed").validate()
    with pytest.raises(UserError, match="sha256"):
        toy_config("frozen", encoder).latent(encoder_sha256="0" * 64).validate()


def test_a_checked_configuration_stands_another_check(tmp_path):
    config = toy_config("frozen", make_encoder(tmp_path / "encoder"))
    config.validate()
    config.validate()
    config.training(lr=2e-3).validate()
    assert config.lr == 2e-3
