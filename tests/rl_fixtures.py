"""Fixtures of the algorithm's tests: an encoder of the toys' frames, and algorithms that are stopped at the end."""

from __future__ import annotations

import pytest
from rl_toys import make_encoder

from rllib_ext.algorithm import LatentDQN


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return make_encoder(tmp_path_factory.mktemp("encoder") / "bundle")


@pytest.fixture
def build():
    built: list[LatentDQN] = []

    def make(config) -> LatentDQN:
        built.append(config.build_algo())
        return built[-1]

    yield make
    for algorithm in built:
        algorithm.stop()
