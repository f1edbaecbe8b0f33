"""Services, started once for all tests of this folder that ask for them, and a Ray cluster for each file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeVar

import pytest
from nodes import RayCluster
from running import Stage
from services import Mlflow, ObjectStore, Postgres

Service = TypeVar("Service", Postgres, ObjectStore, Mlflow, RayCluster)


@contextlib.contextmanager
def started(service: Service) -> Iterator[Service]:
    """Starts it, and removes it at the end, also where it did not come up."""
    try:
        service.start()
        yield service
    finally:
        service.remove()


@pytest.fixture(autouse=True)
def no_stage_is_left() -> Iterator[None]:
    """Ends what a failed test leaves under way."""
    yield
    Stage.remove_all()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    with started(Postgres()) as database:
        yield database


@pytest.fixture(scope="session")
def store() -> Iterator[ObjectStore]:
    with started(ObjectStore()) as store:
        yield store


@pytest.fixture(scope="session")
def mlflow_server(postgres: Postgres, store: ObjectStore) -> Iterator[Mlflow]:
    with started(Mlflow(postgres, store)) as server:
        yield server


@pytest.fixture(scope="module")
def cluster(store: ObjectStore, mlflow_server: Mlflow) -> Iterator[RayCluster]:
    """A head on which only drivers run, and machines of one CPU each; keys and passwords lie in a file on each."""
    secrets = {**store.keys_of(store.owner), **mlflow_server.variables()}
    nodes = RayCluster(dict.fromkeys(("one", "two", "three"), 1), store.place(), secrets, head_cpus=0)
    with started(nodes):
        yield nodes
