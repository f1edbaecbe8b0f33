"""Fixtures of the registry's tests: a real sqlite store, a bundle, a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient
from registry_toys import make_encoder

from pipeline.registry import (
    Run,
    Tracking,
)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('a folder')}/mlflow.db"


@pytest.fixture(scope="module")
def client(uri: str) -> MlflowClient:
    Tracking(uri).check()
    return MlflowClient(uri, uri)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("bundle") / "encoder")


@pytest.fixture
def run(uri: str, client: MlflowClient, tmp_path: Path) -> Run:
    run = Tracking(uri).start_run("pretrain-001", stage="pretrain", folder=tmp_path / "pretrain-001")
    yield run
    run.close()


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A registered model's name that no other test uses."""
    return request.node.name.replace("[", "-").replace("]", "")[-90:]
