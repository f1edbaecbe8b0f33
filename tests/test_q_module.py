"""The Q module: what it holds in which mode, what moves, how it explores; and which settings are refused."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch
from catch import catch_preprocess
from hypothesis import given, settings
from hypothesis import strategies as st
from ray import tune
from rl_toys import make_encoder, toy_config
from test_learner import CONVOLUTIONS, make_learner, moved, random_batch, update, weights

from pipeline.errors import UserError
from pipeline.models import to_record
from rllib_ext.networks import GridConvolution, QHead, blend
from rllib_ext.policy import PolicyConfig, load_policy, save_policy
from rllib_ext.settings import DQNSettings, QConfig


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def the_module(learner):
    return learner.module["default_policy"]


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


def test_the_target_shares_the_frozen_encoder_and_has_a_copy_of_a_trained_one(tmp_path):
    frozen = the_module(make_learner(tmp_path / "frozen", "frozen"))
    assert frozen.network.encoder is None
    assert frozen.target.encoder is None, "both read the latents that the one frozen encoder made"
    trained = the_module(make_learner(tmp_path / "finetune", "finetune"))
    pairs = zip(trained.network.encoder.parameters(), trained.target.encoder.parameters(), strict=True)
    for online, target in pairs:
        assert torch.equal(online, target)
        assert online.data_ptr() != target.data_ptr()
        assert not target.requires_grad


@pytest.mark.parametrize("is_double", [True, False])
@pytest.mark.parametrize("num_atoms", [1, 7])
def test_only_the_values_that_are_learned_have_a_gradient_and_double_decides_who_chooses(
    tmp_path, is_double, num_atoms
):
    q = QConfig(hidden=(32,), dueling=True, num_atoms=num_atoms)
    module = the_module(make_learner(tmp_path, "finetune", q=q, double=is_double))
    for value in module.target.head.parameters():
        value.data.normal_()
    batch = random_batch("finetune", 4)
    seen = {"obs": torch.from_numpy(batch.obs), "new_obs": torch.from_numpy(batch.next_obs)}
    target = module.target_outputs(seen["new_obs"])
    assert not target.requires_grad
    outputs = module.forward_train({**seen, "qf_target_next_outputs": target})
    assert {name: value.requires_grad for name, value in outputs.items()} == {
        "qf_outputs": True,
        "qf_next_chooser": False,
    }
    chooser = module.network if is_double else module.target
    torch.testing.assert_close(outputs["qf_next_chooser"], chooser(seen["new_obs"]).detach())
    torch.testing.assert_close(module.forward_target(seen), module.target(seen["new_obs"]))


@pytest.mark.parametrize("q", [QConfig((32,), dueling=True), QConfig((32,), dueling=True, num_atoms=7)])
def test_acting_needs_no_target_and_is_greedy_on_expected_values(tmp_path, q):
    module = the_module(make_learner(tmp_path, "frozen", q=q))
    state = module.get_state(inference_only=True)
    assert {name.split(".")[0] for name in state} == {"network"}
    obs = torch.randn(64, 2, 16)
    greedy = module.forward_inference({"obs": obs})["actions"]
    assert torch.equal(greedy, module.network(obs).argmax(1))
    assert greedy.unique().numel() > 1


def test_a_policy_saved_from_the_module_has_its_values_whatever_the_layout_in_memory(tmp_path):
    module = the_module(make_learner(tmp_path, "pixels"))
    state = {name.removeprefix("network."): value for name, value in module.get_state(inference_only=True).items()}
    assert not all(value.flags.c_contiguous for value in state.values())
    preprocess, record = catch_preprocess(), to_record(CONVOLUTIONS.for_frames(12, 12))
    config = PolicyConfig("pixels", 2, (16,), QConfig(hidden=(32,)), preprocess.action_set, None, record)
    save_policy(tmp_path / "policy", config, preprocess, state, encoder_bundle=None, card={})
    frames = np.random.default_rng(0).integers(0, 255, (5, 12, 12), dtype=np.uint8)
    got = load_policy(tmp_path / "policy").values(frames, np.ones(5, bool))
    stacked = torch.from_numpy(frames)[:, None].repeat(1, 2, 1, 1)
    torch.testing.assert_close(got, module.network(stacked).detach(), rtol=1e-4, atol=1e-5)


def test_exploration_is_epsilon_greedy_with_one_rate_or_one_for_each_row(tmp_path):
    module = the_module(make_learner(tmp_path, "frozen"))
    obs = {"obs": torch.randn(6000, 2, 16)}
    greedy = module.forward_inference(obs)["actions"]

    def differing(epsilon) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return (module.forward_exploration(obs, epsilon=epsilon, generator=generator)["actions"] != greedy).float()

    assert float(differing(0.5).mean()) == pytest.approx(0.5 * 2 / 3, abs=0.03)
    each = differing(torch.tensor([0.0, 1.0]).repeat(3000))
    assert float(each[::2].sum()) == 0
    assert float(each[1::2].mean()) == pytest.approx(2 / 3, abs=0.03)


def test_polyak_averaging_moves_the_target_a_share_of_the_way():
    online, target = QHead(2, (3,), 2, QConfig((4,))), QHead(2, (3,), 2, QConfig((4,)))
    expected = [t + 0.25 * (o - t) for t, o in zip(target.parameters(), online.parameters(), strict=True)]
    blend(target, online, 0.25)
    for got, wanted in zip(target.parameters(), expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_layer_norm_and_widths_are_what_was_asked_for():
    head = QHead(4, (8,), 6, QConfig(hidden=(32, 16), layer_norm=False))
    assert [tuple(p.shape) for p in head.parameters() if p.ndim == 2] == [(32, 32), (16, 32), (6, 16)]
    assert not any(isinstance(layer, torch.nn.LayerNorm) for layer in head.modules())


@settings(max_examples=25, deadline=None)
@given(st.tuples(st.integers(1, 3), st.integers(4, 7), st.integers(4, 7)), st.integers(1, 3), st.sampled_from([1, 2]))
def test_what_moves_by_one_cell_has_its_features_moved_by_one_cell(z_shape, stack, axis):
    """Away from the border, where the padding begins."""
    grid, z = GridConvolution(stack, z_shape, 5), torch.randn(3, stack, *z_shape)

    def features(z_BKChw: torch.Tensor) -> torch.Tensor:
        return grid(z_BKChw.flatten(2)).view(3, *z_shape[1:], 5).detach()  # (B, h, w, channels)

    here, there = features(z).movedim(axis, 0), features(z.roll(1, 2 + axis)).movedim(axis, 0)
    torch.testing.assert_close(there[2:-1], here[1:-2])
    assert not torch.equal(there, here)


@pytest.mark.parametrize("num_atoms", [1, 7])
def test_a_head_on_a_grid_convolves_the_unflattened_stack(num_atoms):
    head = QHead(2, (3, 4, 5), 6, QConfig((7,), grid_channels=8, num_atoms=num_atoms))
    z = torch.randn(9, 2, 60)
    maps = torch.stack([torch.cat([latent.view(3, 4, 5) for latent in stack]) for stack in z])
    features = torch.nn.functional.conv2d(maps, head.grid.conv.weight, head.grid.conv.bias, padding=1).relu()
    expected = head.layers(features.permute(0, 2, 3, 1).reshape(9, -1)).view(head.outputs(z).shape)
    torch.testing.assert_close(head.outputs(z), expected)
    torch.testing.assert_close(head(z.half()), head(z.half().float()))
    assert head(z).shape == (9, 6)


def test_a_convolution_is_refused_where_there_is_no_grid(tmp_path):
    q = QConfig((8,), grid_channels=4)
    with pytest.raises(UserError, match=r"q.grid_channels is 4, and the encoder's latents lie on no grid"):
        QHead(2, (16,), 3, q)
    with pytest.raises(UserError, match="lie on no grid"):
        toy_config("frozen", make_encoder(tmp_path / "encoder")).latent(q=q).validate()
    with pytest.raises(UserError, match=r"q.grid_channels is 4, and q.torso nature has no grid"):
        toy_config("pixels", None).latent(q=dataclasses.replace(q, torso="nature")).validate()
    with pytest.raises(ValueError, match=r"q.grid_channels is -1"):
        QConfig(grid_channels=-1)


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


NAN, INFINITY = float("nan"), float("inf")
OF_ANOTHER_TYPE = {
    "int": (1.5, "1", None, True, NAN),
    "float": ("1", None, True, NAN, INFINITY, -INFINITY),
    "bool": ("no", 1, None),
    "str": (1, None, True),
    "tuple[int, ...]": (None, 3, "1", (1.5,), (None,), ("1",), (True,)),
}


def wrong_values(settings: type) -> list:
    """(name, value of another type than is declared or not finite) for every field there is."""
    fields = dataclasses.fields(settings)
    return [pytest.param(f.name, v, id=f"{f.name}={v!r}") for f in fields for v in OF_ANOTHER_TYPE[f.type]]


@pytest.mark.parametrize(("name", "value"), wrong_values(DQNSettings))
def test_every_setting_of_the_training_must_have_its_type(name, value):
    with pytest.raises(UserError, match=re.escape(f"train.{name} is {value!r}; it must be ")) as caught:
        DQNSettings(**{name: value}).check(16)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "value"), wrong_values(QConfig))
def test_every_setting_of_the_head_must_have_its_type(name, value):
    with pytest.raises(ValueError, match=re.escape(f"q.{name} is ")) as caught:
        QConfig(**{name: value})
    assert repr(value).strip("(),") in str(caught.value)
    assert re.search(r"(must be|choose|give) \S", str(caught.value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seed", [-1, 2**32, 1.0, "1", NAN])
def test_a_seed_that_no_generator_takes_is_refused(tmp_path, seed):
    config = toy_config("frozen", make_encoder(tmp_path / "encoder"))
    with pytest.raises(UserError, match=re.escape(f"the seed is {seed!r}; give a whole number from 0 to 4294967295")):
        config.debugging(seed=seed).validate()
    for sound in (0, 2**32 - 1, None):
        config.debugging(seed=sound).validate()


def test_a_search_space_of_tune_is_checked_when_it_has_become_a_value(tmp_path):
    searched = toy_config("frozen", make_encoder(tmp_path / "encoder"))
    searched.training(
        max_lead_fragments=tune.choice([1, 2]), grad_clip=tune.uniform(0.0, 1.0), lr=tune.grid_search([1])
    )
    drawn = searched.copy().update_from_dict({"max_lead_fragments": 2, "grad_clip": 0.5, "lr": 1})
    drawn.validate()
    assert drawn.settings.max_lead_fragments == 2
    with pytest.raises(UserError, match=r"train.lr is .*; it must be a number"):
        searched.validate()


def test_unknown_and_unsupported_settings_are_errors(tmp_path):
    config = toy_config("frozen", make_encoder(tmp_path / "encoder"))
    with pytest.raises(UserError, match="unknown setting 'n_steps'; did you mean n_step"):
        config.training(n_steps=3)
    with pytest.raises(UserError, match="unknown choice 'encoders'"):
        config.latent(encoders=3)
    with pytest.raises(UserError, match="does not support the setting num_aggregator_actors_per_learner=1"):
        config.copy().learners(num_aggregator_actors_per_learner=1).validate()
    with pytest.raises(UserError, match="does not support the setting evaluation_interval=1"):
        config.copy().evaluation(evaluation_interval=1).validate()
    with pytest.raises(UserError, match="does not support the setting num_envs_per_env_runner=3"):
        config.copy().env_runners(num_envs_per_env_runner=3).validate()


@pytest.mark.parametrize("num_learners", [0, 1])
def test_a_gpu_that_no_machine_has_is_refused(tmp_path, monkeypatch, num_learners):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    config = toy_config("frozen", make_encoder(tmp_path / "encoder")).learners(num_learners=num_learners)
    for gpus, told in ((1, "0 GPUs"), (0.5, "0 GPUs"), (2, "give 0, 1 or a share"), (-1, "give 0, 1 or a share")):
        with pytest.raises(UserError, match=f"num_gpus_per_learner is {gpus}.*{told}") as caught:
            config.copy().learners(num_gpus_per_learner=gpus).validate()
        assert "\n" not in str(caught.value)


def test_several_learners_cannot_share_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    config = toy_config("frozen", make_encoder(tmp_path / "encoder")).learners(num_learners=2, num_gpus_per_learner=0.5)
    with pytest.raises(UserError, match=r"is 0\.5; give 0, 1 or a share of one, that to a single"):
        config.check()
    config.learners(num_learners=1).check()
    config.learners(num_learners=2, num_gpus_per_learner=1).check()


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


def test_a_learner_takes_the_cores_only_where_it_trains_an_encoder(tmp_path, monkeypatch):
    encoder = make_encoder(tmp_path / "encoder")
    for cores, finetune, of_two in ((1, 1, 1), (2, 2, 1), (6, 4, 3), (64, 4, 4)):
        monkeypatch.setattr("rllib_ext.config.cores", lambda cores=cores: cores)
        assert toy_config("frozen", encoder).learner_threads == 1
        assert toy_config("finetune", encoder).learner_threads == finetune
        assert toy_config("finetune", encoder).learners(num_learners=2).learner_threads == of_two
        assert toy_config("frozen", encoder, learner_threads=3).learner_threads == 3
        assert toy_config("pixels", None, learner_threads=1).learner_threads == 1
