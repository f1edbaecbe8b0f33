"""The sum tree against a cumulative sum over all weights."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rllib_ext.sum_tree import WIDTH, SumTree, tree_bytes

WEIGHTS = st.one_of(st.just(0.0), st.floats(1e-9, 1e9))


@st.composite
def trees(draw):
    """A tree and its weights, after several batches of changes in which places are named repeatedly."""
    capacity = draw(st.sampled_from([1, WIDTH, WIDTH + 1, WIDTH**2, WIDTH**2 + 1, 3 * WIDTH**2 - 5]))
    tree, weights = SumTree(capacity), np.zeros(capacity)
    changes = st.lists(st.tuples(st.integers(0, capacity - 1), WEIGHTS), min_size=1, max_size=40)
    for batch in draw(st.lists(changes, min_size=1, max_size=5)):
        for place, weight in batch:
            weights[place] = weight
        tree.set(np.array([place for place, _ in batch]), np.array([weight for _, weight in batch]))
    return tree, weights


@settings(max_examples=200, deadline=None)
@given(trees())
def test_the_last_weight_given_counts_and_sums_are_those_of_the_weights(tree_and_weights):
    tree, weights = tree_and_weights
    np.testing.assert_array_equal(tree.weights, weights)
    np.testing.assert_allclose(tree.total, weights.sum(), rtol=1e-12)


@settings(max_examples=200, deadline=None)
@given(trees(), st.integers(0, 2**32))
def test_shares_find_the_leaves_that_a_cumulative_sum_finds(tree_and_weights, seed):
    tree, weights = tree_and_weights
    if not weights.any():
        return
    shares = np.append(np.random.default_rng(seed).random(50), [0.0, np.nextafter(1.0, 0.0)])
    found = tree.find(shares)
    assert (weights[found] > 0).all()
    ends = weights.cumsum()
    slack = 1e-9 * ends[-1]  # a share may lie on the border of two leaves
    assert (shares * ends[-1] <= ends[found] + slack).all()
    assert (shares * ends[-1] >= ends[found] - weights[found] - slack).all()


def test_sums_do_not_drift():
    tree, rng = SumTree(1_000), np.random.default_rng(0)
    for _ in range(2_000):
        tree.set(rng.integers(0, 1_000, 64), 10.0 ** rng.uniform(-9, 9, 64))
    tree.set(np.arange(1_000), np.full(1_000, 1e-9))
    assert tree.total == pytest.approx(1e-6, rel=1e-12)


def test_a_tree_rebuilt_from_its_leaves_is_the_same_to_the_last_bit():
    rng = np.random.default_rng(0)
    tree, rebuilt = SumTree(5_000), SumTree(5_000)
    for _ in range(50):
        tree.set(rng.integers(0, 5_000, 300), rng.random(300))
    rebuilt.set(np.arange(5_000), tree.weights)
    shares = rng.random(10_000)
    np.testing.assert_array_equal(tree.find(shares), rebuilt.find(shares))
    assert tree.total == rebuilt.total


def test_bytes_are_those_of_its_arrays():
    for capacity in (1, 1_000, 1_000_000):
        tree = SumTree(capacity)
        assert tree_bytes(capacity) == tree._leaves.nbytes + tree._blocks.nbytes + tree._top.nbytes
