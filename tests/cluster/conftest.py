"""Services and a Ray cluster, started once for all tests of this folder that ask for them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from nodes import RayCluster
from services import Mlflow, ObjectStore, Postgres


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


@pytest.fixture(scope="session")
def cluster(store: ObjectStore, mlflow_server: Mlflow) -> Iterator[RayCluster]:
    """Head, `one` and `two`, of one CPU each; every node has the keys of the store and of the tracking server."""
    nodes = RayCluster({"one": 1, "two": 1}, {**store.variables(), **mlflow_server.variables()})
    nodes.start()
    yield nodes
    nodes.remove()
