"""A stage that needs more than the cluster has: its autoscaler is asked, or nodes that are added are waited for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from secrets import token_hex

import pytest
from conftest import started
from growing import GrowingCluster
from nodes import RayCluster
from running import Stage

from jobs import room


@pytest.fixture(scope="module", params=["v1", "v2"])
def autoscaled(request: pytest.FixtureRequest) -> Iterator[GrowingCluster]:
    with started(GrowingCluster(2, is_v2=request.param == "v2")) as nodes:
        yield nodes


@pytest.fixture
def growing(autoscaled: GrowingCluster) -> GrowingCluster:
    """The cluster without the nodes that a test before this one, maybe a failed one, has asked for."""
    autoscaled.wait_for(lambda: autoscaled.num_nodes == 1)
    return autoscaled


@pytest.fixture
def by_hand() -> Iterator[RayCluster]:
    with started(RayCluster({}, {})) as nodes:
        yield nodes


def collect(cluster: RayCluster, tmp_path: Path, num_workers: int, *more: object) -> Stage:
    out = cluster.shared / token_hex(4)
    arguments = ("collect", "--game", "pong", "--frames", 60, "--num-workers", num_workers, "--out", out)
    return Stage(tmp_path, *arguments, "--home", cluster.shared, "--ray-address", "auto", *more, node=cluster.head)


def is_asked(cluster: RayCluster) -> bool:
    """Whether somebody waits for resources."""
    return any(group["state"] in ("PENDING", "CREATED") for group in cluster.state("placement_groups"))


def test_an_autoscaler_makes_room_and_takes_it_back(growing: GrowingCluster, tmp_path: Path) -> None:
    result = collect(growing, tmp_path, 3).result()
    assert len(result["rows_per_worker"]) == 3
    growing.wait_for(lambda: growing.num_nodes == 1)
    assert not is_asked(growing)


def test_who_waits_reads_for_what(growing: GrowingCluster, tmp_path: Path) -> None:
    stage = collect(growing, tmp_path, 3)
    stage.wait_for_line(r"waiting: 3 collecting workers need 3 CPUs, Ray has 1 for them, \d nodes are being started; ")
    assert is_asked(growing)
    stage.kill()
    growing.wait_for(lambda: not is_asked(growing))
    growing.wait_for(lambda: growing.num_nodes == 1)


@pytest.mark.long
def test_an_autoscaler_at_its_limit_is_not_waited_for(growing: GrowingCluster, tmp_path: Path) -> None:
    stage = collect(growing, tmp_path, 4)
    code, seconds = stage.end()
    assert code == 2
    assert seconds < room.AUTOSCALER_WAIT_S / 2
    assert stage.line("the autoscaler has brought nothing for 60 s and is starting no node")
    line = str(stage.line(r"error: 4 collecting workers need 4 CPUs, Ray has \d for them after \d+ s; ask for fewer"))
    assert room.NOTHING_COMES_S <= int(re.findall(r"after (\d+) s", line)[0]) <= seconds
    assert not is_asked(growing)


def test_nodes_that_are_added_by_hand(by_hand: RayCluster, tmp_path: Path) -> None:
    refused = collect(by_hand, tmp_path, 2)
    assert refused.end()[0] == 2
    assert refused.line(
        "error: 2 collecting workers need 2 CPUs, Ray has 1 for them; ask for fewer, add nodes, or wait"
    )
    refused = collect(by_hand, tmp_path, 2, "--wait", 3)
    assert refused.end()[0] == 2
    assert refused.line(r"error: 2 collecting workers need 2 CPUs, Ray has 1 for them after [3-9] s; ")
    stage = collect(by_hand, tmp_path, 2, "--wait", 300)
    stage.wait_for_line("waiting: 2 collecting workers need 2 CPUs, Ray has 1 for them; 300 s left")
    stage.wait_for_line(r"waiting: .*; 28\d s left")
    by_hand.add("late")
    assert len(stage.result()["rows_per_worker"]) == 2
    default = Stage(
        tmp_path,
        *("collect", "--game", "pong", "--frames", 60, "--out", by_hand.shared / "all", "--home", by_hand.shared),
        *("--ray-address", "auto"),
        node=by_hand.head,
    )
    assert len(default.result()["rows_per_worker"]) == 2  # the cluster's CPUs, however many this machine has
