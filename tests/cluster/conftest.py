"""Services, started once for all tests of this folder that ask for them, and a Ray cluster for each file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from nodes import RayCluster
from running import Stage
from services import Mlflow, ObjectStore, Postgres


@pytest.fixture(autouse=True)
def no_stage_is_left() -> Iterator[None]:
    """Ends what a failed test leaves under way."""
    yield
    Stage.remove_all()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    database = Postgres()
    database.start()
    yield database
    database.remove()


@pytest.fixture(scope="session")
def store() -> Iterator[ObjectStore]:
    store = ObjectStore()
    store.start()
    yield store
    store.remove()


@pytest.fixture(scope="session")
def mlflow_server(postgres: Postgres, store: ObjectStore) -> Iterator[Mlflow]:
    server = Mlflow(postgres, store)
    server.start()
    yield server
    server.remove()


@pytest.fixture(scope="module")
def cluster(store: ObjectStore, mlflow_server: Mlflow) -> Iterator[RayCluster]:
    """A head on which only drivers run, and machines of one CPU each; keys and passwords lie in a file on each."""
    secrets = {**store.keys_of(store.owner), **mlflow_server.variables()}
    nodes = RayCluster(dict.fromkeys(("one", "two", "three"), 1), store.place(), secrets, head_cpus=0)
    nodes.start()
    yield nodes
    nodes.remove()
