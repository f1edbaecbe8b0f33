"""`latentrl collect` on a cluster whose workers, nodes and driver are taken away: the dataset is the same."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_rows import Record, measured
from nodes import RayCluster
from running import Stage, processes

pytestmark = pytest.mark.long

NAMES = ("one", "two")
WORKER = "ray::_Collector"
FRAMES = 40_000  # 8 lanes, two a worker at a time


@pytest.fixture
def cluster() -> Iterator[RayCluster]:
    """A head without CPUs to give, and two workers of one CPU each."""
    nodes = RayCluster(dict.fromkeys(NAMES, 1), {}, head_cpus=0)
    nodes.start()
    yield nodes
    nodes.remove()


class Collections:
    """Commands of one shared folder."""

    def __init__(self, cluster: RayCluster) -> None:
        self.cluster = cluster

    def start(self, name: str, *more: object, frames: int = FRAMES) -> Stage:
        out = ["--out", self.cluster.shared / name, "--num-workers", 2, "--ray-address", self.cluster.address]
        given = ["--game", "pong", "--frames", frames, *out, *more]
        return Stage(self.cluster.shared / "said", "collect", *given, node=self.cluster.head)


def written(root: Path) -> int:
    """Bytes of the dataset's files so far."""
    return sum(path.stat().st_size for path in root.rglob("*.parquet"))


def test_a_collection_is_the_same_whatever_is_taken_away(cluster: RayCluster, record_property: Record) -> None:
    commands = Collections(cluster)
    workers_and_nodes(commands, record_property)
    driver(commands, record_property)


def workers_and_nodes(commands: Collections, record_property: Record) -> None:
    shared, one, two = commands.cluster.shared, *(commands.cluster.workers[name] for name in NAMES)
    undisturbed = commands.start("undisturbed").result()
    stage = commands.start("disturbed")
    stage.wait_for(lambda: written(shared / "disturbed") > 100_000)
    processes(two, WORKER)[0].kill()
    noticed = stage.wait_for_line(r"collecting worker \d is lost")
    measured(
        record_property,
        "collecting worker killed",
        lost=f"{rows_of(stage, 0):,} rows, played again; no byte of the dataset",
        read=str(stage.line("is lost")),
        until_noticed=noticed,
    )
    stage.wait_for(lambda: processes(two, WORKER))
    written_before = written(shared / "disturbed")
    stage.wait_for(lambda: written(shared / "disturbed") > written_before)
    one.kill()
    noticed = stage.wait_for_line(r"collecting worker \d is lost", 1)
    result = stage.result()
    assert result["digest"] == undisturbed["digest"]
    assert result["frames"] == FRAMES
    measured(
        record_property,
        "node with a collecting worker killed",
        lost=f"{rows_of(stage, 1):,} rows, played again on the node that is left; no byte of the dataset",
        read=str(stage.line("is lost", 1)),
        until_noticed=noticed,
    )
    one.start()


def rows_of(stage: Stage, number: int) -> int:
    found = re.search(r"its (\d+) rows are played again", str(stage.line("is lost", number)))
    assert found
    return int(found[1])


def driver(commands: Collections, record_property: Record) -> None:
    shared, workers = commands.cluster.shared, list(commands.cluster.workers.values())
    stage = commands.start("terminated")
    stage.wait_for(lambda: written(shared / "terminated") > 50_000)
    stage.driver.send_signal(signal.SIGTERM)
    code, seconds = stage.end()
    assert code == 143
    assert seconds < 30.0
    assert not (shared / "terminated").exists()
    measured(
        record_property,
        "SIGTERM in collect",
        lost="all of it: a collection is whole or nothing",
        read=str(stage.line("^terminated")),
        until_exit_143=seconds,
    )

    stage = commands.start("killed", frames=8_000)
    stage.wait_for(lambda: written(shared / "killed") > 10_000)
    stage.kill()
    killed = time.monotonic()
    while any(processes(node, WORKER) for node in workers):
        assert time.monotonic() - killed < 60.0
        time.sleep(0.1)
    freed = time.monotonic() - killed
    refused = Stage(
        shared / "said", "pretrain", "--data", shared / "killed", "--register", "x", node=commands.cluster.head
    )
    assert refused.end()[0] == 2
    assert "unfinished" in str(refused.line("^error"))
    again = commands.start("killed", "--overwrite", frames=8_000).result()
    assert again["digest"] == commands.start("whole", frames=8_000).result()["digest"]
    measured(
        record_property,
        "driver killed in collect",
        lost="all of it; what is left has no manifest and is refused",
        read=str(refused.line("^error")),
        until_the_cluster_is_free_again=freed,
    )
