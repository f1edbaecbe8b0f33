"""The rollout worker's columns: flags at every kind of ending, stacks, one encoding per step, no autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from catch import VectorCatch, catch_with_lives_factory
from rl_toys import make_encoder, toy_config

from rllib_ext.connectors import EncodeObservations
from rllib_ext.runner import LatentEnvRunner
from rllib_ext.shared_bundle import SharedBundle
from rllib_ext.stacking import RollingStack


class LocalBundle(SharedBundle):
    """Loads from disk, so that runners can be tested without Ray."""

    def load(self, preprocess):
        from pipeline import artifact

        return artifact.load_encoder(self.ref, expect_sha256=self.sha256, preprocess=preprocess)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def make_runner(tmp_path, mode: str = "frozen", factory=None, **training) -> LatentEnvRunner:
    config = toy_config(mode, make_encoder(tmp_path / "encoder"), **training)
    if factory is not None:
        config.latent(env_factory=factory)
    config.validate()
    if config.encoder_path is not None:
        config.bundle = LocalBundle(config.encoder_path, config.encoder_sha256)
    config.freeze()
    return LatentEnvRunner(config=config, worker_index=0, num_workers=0)


def joined(fragments):
    """Columns of consecutive fragments, one after the other."""
    return type(fragments[0].rows)(*(np.concatenate(parts) for parts in zip(*(f.rows for f in fragments), strict=True)))


def test_rows_of_catch_games(tmp_path):
    runner = make_runner(tmp_path, fragment_length=30)
    rows = runner.sample().rows
    assert rows.obs.shape == (30, 4, 16)
    assert rows.obs.dtype == np.float16
    # a game is 11 actions, then the row of the final observation, then the next game's first row
    expected = np.arange(30) % 12
    np.testing.assert_array_equal(rows.is_first[:, 0], expected == 0)
    np.testing.assert_array_equal(rows.terminated[:, 0], expected == 10)
    np.testing.assert_array_equal(rows.is_last[:, 0], expected == 11)
    assert not rows.truncated.any()
    assert set(rows.reward[rows.terminated]) <= {-1.0, 1.0}
    assert not rows.reward[~rows.terminated].any()


def test_fragments_continue_one_another(tmp_path):
    whole = make_runner(tmp_path / "a", fragment_length=40).sample().rows
    parted = make_runner(tmp_path / "b", fragment_length=10, warmup_agent_steps=64)
    parts = joined([parted.sample(agent_steps=0), *(parted.sample(agent_steps=10 * i * 4) for i in range(1, 4))])
    for name, mine, theirs in zip(whole._fields, whole, parts, strict=True):
        np.testing.assert_array_equal(mine, theirs, err_msg=name)


def test_a_lost_life_ends_the_bootstrap_but_not_the_game(tmp_path):
    runner = make_runner(tmp_path, factory=catch_with_lives_factory)
    fragments = [runner.sample(agent_steps=0) for _ in range(30)]
    rows = joined(fragments)
    following = {name: getattr(rows, name)[1:] for name in ("is_first", "is_last")}
    lost = rows.terminated[:-1] & ~following["is_last"]
    assert lost.any(), "the toy must lose lives"
    assert not following["is_first"][lost].any()
    np.testing.assert_array_equal(rows.reward[:-1][lost], -1.0)  # clipped from -5
    over = rows.terminated[:-1] & following["is_last"]
    assert over.any()
    assert (rows.is_last[:-1] == np.roll(rows.is_first, -1, 0)[:-1]).all()


def test_life_losses_can_be_ignored(tmp_path):
    runner = make_runner(tmp_path, factory=catch_with_lives_factory, life_loss_ends_bootstrap=False)
    rows = joined([runner.sample() for _ in range(30)])
    assert rows.is_last[1:][rows.terminated[:-1]].all()


def test_truncation_is_kept_apart(tmp_path):
    runner = make_runner(tmp_path, factory=catch_with_lives_factory)
    rows = joined([runner.sample(agent_steps=10**6) for _ in range(40)])
    cut = rows.truncated[:-1]
    assert cut.any(), "the toy must be cut at 40 steps"
    assert not (rows.terminated & rows.truncated).any()
    assert rows.is_last[1:][cut].all()


def test_returns_are_raw_and_steps_leave_out_final_rows(tmp_path):
    runner = make_runner(tmp_path, factory=catch_with_lives_factory)
    fragments = [runner.sample() for _ in range(40)]
    returns = [r for f in fragments for r in f.episode_returns]
    assert returns
    assert all(r % 5 == 0 for r in returns)
    assert min(returns) <= -10
    assert sum(f.agent_steps for f in fragments) == (~joined(fragments).is_last).sum()
    lengths = [n for f in fragments for n in f.episode_lengths]
    assert max(lengths) == 40


def test_it_acts_on_the_stack_that_its_rows_describe(tmp_path):
    runner = make_runner(tmp_path)
    seen = []
    act = runner._act
    runner._act = lambda now, *rest: seen.append(now.stacked) or act(now, *rest)
    rows = joined([runner.sample() for _ in range(5)])
    rolling = RollingStack(runner.settings.stack)
    for t, stacked in enumerate(seen):
        np.testing.assert_array_equal(stacked, rolling.push(rows.obs[t], rows.is_first[t]))


def test_every_frame_is_encoded_exactly_once_and_without_autograd(tmp_path):
    runner = make_runner(tmp_path)
    encoder = runner._env_to_module[EncodeObservations][0].encoder
    sizes, modes = [], []

    def spy(module, args, output):
        sizes.append(len(args[0]))
        modes.append(torch.is_inference_mode_enabled() and not output.requires_grad)

    encoder.register_forward_hook(spy)
    for _ in range(3):
        runner.sample()
    assert sizes == [4] * (1 + 3 * 8)  # the reset, and every vector step
    assert all(modes)
    assert not any(p.requires_grad for p in encoder.parameters())


@pytest.mark.parametrize("mode", ["finetune", "online", "pixels"])
def test_an_encoder_inside_sees_a_frame_once_and_the_whole_stack_after_new_weights(tmp_path, mode):
    runner = make_runner(tmp_path, mode, fragment_length=30)
    network, sizes, read, whole = runner.module.network, [], [], []
    act, forward = runner._act, runner.module.forward_exploration
    runner._act = lambda now, *rest: whole.append(network.features(torch.from_numpy(now.stacked))) or act(now, *rest)
    runner.module.forward_exploration = lambda batch, **how: read.append(batch["obs"]) or forward(batch, **how)
    runner.sample()
    network.encoder.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    runner._act = act
    runner.sample()
    assert sizes == [4] * 30
    for values in network.encoder.parameters():
        values.data.mul_(1.1)
    runner.set_state(runner.get_state())
    runner.sample()
    assert sizes[30:] == [8] + [4] * 29
    for seen, made in zip(read, whole, strict=False):
        torch.testing.assert_close(seen, made, rtol=1e-4, atol=1e-5)
    stacked = torch.from_numpy(runner._obs.stacked)
    torch.testing.assert_close(torch.from_numpy(runner._read(runner._obs)), network.features(stacked))


@pytest.mark.parametrize("mode", ["frozen", "finetune", "pixels"])
def test_acting_records_no_gradient(tmp_path, mode):
    runner = make_runner(tmp_path, mode)
    outputs = []
    runner.module.network.register_forward_hook(lambda m, a, out: outputs.append(out))
    runner.sample()
    assert outputs
    assert not any(out.requires_grad for out in outputs)


def test_frames_are_stored_where_the_encoder_is_trained(tmp_path):
    rows = make_runner(tmp_path, "finetune").sample().rows
    assert rows.obs.shape == (8, 4, 12, 12)
    assert rows.obs.dtype == np.uint8
    assert {0, 128, 255} == set(np.unique(rows.obs))


def test_same_seed_same_fragment_and_exploration_follows_the_schedule(tmp_path):
    first = make_runner(tmp_path / "a", fragment_length=50)
    again = make_runner(tmp_path / "b", fragment_length=50)
    np.testing.assert_array_equal(first.sample().rows.action, again.sample().rows.action)
    late = make_runner(tmp_path / "c", fragment_length=50, epsilon_end=0.0)
    greedy = make_runner(tmp_path / "d", fragment_length=50)
    greedy.module.set_state(late.module.get_state())
    np.testing.assert_array_equal(late.sample(agent_steps=10**6).rows.action, greedy.sample(explore=False).rows.action)


def test_stop_closes_the_environments(tmp_path):
    made = []

    def factory(preprocess, num_envs, num_threads):
        made.append(VectorCatch(num_envs))
        return made[-1]

    runner = make_runner(tmp_path, factory=factory)
    runner.stop()
    assert [env.num_closed for env in made] == [1]
