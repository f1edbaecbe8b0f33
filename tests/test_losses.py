"""Targets and losses: hand computation, a slow loop for the projection, Monte Carlo, and where the gradient goes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rllib_ext.losses import (
    cross_entropy_loss,
    distribution_targets,
    expected_values,
    huber_loss,
    project_distribution,
    q_targets,
)
from rllib_ext.networks import QHead
from rllib_ext.settings import QConfig

ATOMS = torch.linspace(-2.0, 3.0, 11)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def random_inputs(seed: int, size: int = 7, *, reach: float = 4.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Probabilities, returns and one discount a row, some of them 0."""
    g = torch.Generator().manual_seed(seed)
    probs = (3 * torch.randn(size, len(ATOMS), generator=g)).softmax(-1)
    returns = reach * (2 * torch.rand(size, generator=g) - 1)
    return probs, returns, torch.rand(size, generator=g) * (torch.rand(size, generator=g) > 0.3)


def slow_projection(probs, returns, discount, atoms) -> np.ndarray:
    """Bellemare et al. (2017), algorithm 1, as it stands there."""
    out = np.zeros(probs.shape)
    low, high, gap = float(atoms[0]), float(atoms[-1]), float(atoms[1] - atoms[0])
    for row in range(len(probs)):
        for j, atom in enumerate(atoms.tolist()):
            moved = min(max(float(returns[row]) + float(discount[row]) * atom, low), high)
            position = (moved - low) / gap
            nearest = round(position)
            position = nearest if abs(position - nearest) < 1e-5 else position
            below, above = int(np.floor(position)), int(np.ceil(position))
            if below == above:
                out[row, below] += float(probs[row, j])
            else:
                out[row, below] += float(probs[row, j]) * (above - position)
                out[row, above] += float(probs[row, j]) * (position - below)
    return out


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000))
def test_the_projection_is_that_of_the_slow_loop_and_conserves_mass(seed):
    probs, returns, discount = random_inputs(seed)
    got = project_distribution(probs, returns, discount, ATOMS)
    np.testing.assert_allclose(got.numpy(), slow_projection(probs, returns, discount, ATOMS), atol=2e-5)
    torch.testing.assert_close(got.sum(1), torch.ones(len(got)))
    assert (got >= 0).all()


def test_the_projected_mean_is_that_of_samples_moved_and_clipped():
    probs, returns, discount = random_inputs(3, reach=0.4)
    discount = 0.8 * discount
    got = project_distribution(probs, returns, discount, ATOMS)
    drawn = ATOMS[torch.multinomial(probs, 200_000, replacement=True, generator=torch.Generator().manual_seed(0))]
    samples = (returns[:, None] + discount[:, None] * drawn).clamp(ATOMS[0], ATOMS[-1])
    torch.testing.assert_close((got * ATOMS).sum(1), samples.mean(1), atol=0.02, rtol=0)
    inside = returns + discount * (probs * ATOMS).sum(1)
    torch.testing.assert_close((got * ATOMS).sum(1), inside, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("value", "atom"), [(50.0, -1), (-50.0, 0), (3.0, -1), (-2.0, 0), (0.5, 5)])
def test_after_a_termination_all_mass_is_at_the_return_or_the_nearest_end(value, atom):
    probs, _, _ = random_inputs(0, size=1)
    got = project_distribution(probs, torch.tensor([value]), torch.zeros(1), ATOMS)[0]
    assert got[atom] == pytest.approx(1.0, abs=1e-5)


def test_q_targets_by_hand():
    online = torch.tensor([[1.0, 3.0], [5.0, 2.0]])
    target = torch.tensor([[10.0, 20.0], [40.0, 30.0]])
    returns, discount = torch.tensor([0.5, -1.0]), torch.tensor([0.9, 0.0])
    torch.testing.assert_close(q_targets(returns, discount, online, target), torch.tensor([0.5 + 0.9 * 20.0, -1.0]))
    own = q_targets(returns, torch.ones(2), target, target)
    torch.testing.assert_close(own, returns + target.max(1).values)


def test_distribution_targets_take_the_distribution_of_the_action_that_the_chooser_likes_best():
    probs, returns, discount = random_inputs(1, size=4)
    others = torch.randn(4, 3, len(ATOMS))
    chooser = torch.randn(4, 3)
    best = chooser.argmax(1)
    others[torch.arange(4), best] = probs.log()
    got = distribution_targets(returns, discount, chooser, others, ATOMS)
    torch.testing.assert_close(got, project_distribution(probs, returns, discount, ATOMS))


def test_huber_loss_by_hand_with_weights_and_errors():
    values = torch.tensor([[0.0, 2.0], [1.0, 9.0]])
    td = huber_loss(values, torch.tensor([1, 0]), torch.tensor([1.5, 4.0]), torch.tensor([1.0, 0.5]))
    assert float(td.loss) == pytest.approx((0.5 * 0.5**2 + 0.5 * (3 - 0.5)) / 2)
    torch.testing.assert_close(td.errors, torch.tensor([0.5, 3.0]))


def test_cross_entropy_is_kl_plus_entropy_and_its_error_is_0_at_the_target():
    target, _, _ = random_inputs(5, size=6)
    actions = torch.randint(0, 3, (6,))
    logits = torch.randn(6, 3, len(ATOMS), requires_grad=True)
    weights = torch.rand(6)
    td = cross_entropy_loss(logits, actions, target, weights)
    predicted = torch.distributions.Categorical(logits=logits[torch.arange(6), actions])
    wanted = torch.distributions.Categorical(probs=target)
    kl = torch.distributions.kl_divergence(wanted, predicted)
    torch.testing.assert_close(td.errors, kl.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(td.loss, (weights * (kl + wanted.entropy())).mean())
    exact = target.log()[:, None].repeat(1, 3, 1)
    assert cross_entropy_loss(exact, actions, target, weights).errors.max() < 1e-5


def test_expected_values_are_means_of_the_distributions():
    logits = torch.randn(2, 3, len(ATOMS))
    torch.testing.assert_close(expected_values(logits, ATOMS), torch.einsum("ban,n->ba", logits.softmax(-1), ATOMS))


@pytest.mark.parametrize("num_atoms", [1, 51])
def test_both_dueling_streams_learn(num_atoms):
    torch.manual_seed(0)
    head = QHead(2, (8,), 6, QConfig(hidden=(32,), dueling=True, num_atoms=num_atoms))
    z, actions, weights = torch.randn(64, 2, 8), torch.randint(0, 6, (64,)), torch.ones(64)
    outputs = head.outputs(z)
    if num_atoms == 1:
        loss = huber_loss(outputs, actions, torch.ones(64), weights).loss
    else:
        target = project_distribution(torch.full((64, 51), 1 / 51), torch.ones(64), torch.zeros(64), head.atoms)
        loss = cross_entropy_loss(outputs, actions, target, weights).loss
    loss.backward()
    value, advantage = head.value.weight.grad.norm(), head.layers[-1].weight.grad.norm()
    assert 0.2 < value / advantage < 5


@pytest.mark.parametrize("num_atoms", [1, 5])
def test_dueling_outputs_average_to_the_value_stream_over_actions(num_atoms):
    torch.manual_seed(0)
    head = QHead(2, (8,), 6, QConfig(hidden=(32,), dueling=True, num_atoms=num_atoms))
    z = torch.randn(4, 2, 8)
    features = head.layers[:-1](z.flatten(1))
    torch.testing.assert_close(head.outputs(z).mean(1).view(4, num_atoms), head.value(features))
    assert head(z).shape == (4, 6)


def test_a_distributional_dueling_head_learns_a_distribution_and_its_mean():
    """Returns of +-1 at even odds for action 0, and always 0.5 for action 1."""
    torch.manual_seed(0)
    head = QHead(1, (4,), 2, QConfig(hidden=(32,), dueling=True, num_atoms=21, v_min=-2, v_max=2))
    optimizer = torch.optim.Adam(head.parameters(), 3e-3)
    for _ in range(400):
        actions = torch.randint(0, 2, (64,))
        returns = torch.where(actions == 0, 2.0 * torch.randint(0, 2, (64,)) - 1, torch.tensor(0.5))
        target = project_distribution(torch.full((64, 21), 1 / 21), returns, torch.zeros(64), head.atoms)
        loss = cross_entropy_loss(head.outputs(torch.randn(64, 1, 4)), actions, target, torch.ones(64)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        outputs = head.outputs(torch.randn(256, 1, 4)).softmax(-1).mean(0)
        means = head(torch.randn(256, 1, 4)).mean(0)
    assert float(outputs[0, 5]) == pytest.approx(0.5, abs=0.1)
    assert float(outputs[0, 15]) == pytest.approx(0.5, abs=0.1)
    assert means.tolist() == pytest.approx([0.0, 0.5], abs=0.15)
