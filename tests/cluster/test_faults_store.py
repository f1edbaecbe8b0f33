"""`latentrl pretrain` on a cluster, from data in an object store that goes away for a while."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import started
from fault_rows import Record, measured
from nodes import RayCluster
from services import ObjectStore
from test_faults_pretrain import NAMES, Pretraining
from toy_frames import toy_dataset

pytestmark = pytest.mark.long


@pytest.fixture
def cluster(store: ObjectStore) -> Iterator[RayCluster]:
    """A head with a CPU for Ray Data, and two workers of one CPU each."""
    with started(RayCluster(dict.fromkeys(NAMES, 1), store.variables(), head_cpus=1)) as nodes:
        yield nodes


def test_a_pretraining_waits_for_its_data(
    cluster: RayCluster, store: ObjectStore, tmp_path: Path, record_property: Record
) -> None:
    toy_dataset(tmp_path / "frames", [60] * 12, num_files=3)
    for path in (tmp_path / "frames").rglob("*.*"):
        store.put(f"waits/{path.relative_to(tmp_path / 'frames')}", path.read_bytes())
    run = Pretraining(cluster, "home", store.uri("waits"))
    stage = run.start()
    run.passes_a_checkpoint(stage)
    store.kill()
    try:
        # Toy frames are all read ahead: the training goes on to where it takes its statistics.
        stage.wait_for_line("no progress for .*connection refused; .* it is tried again")
        line = str(stage.line("no progress for .*connection refused; .* it is tried again"))
        told = float(re.findall(r"no progress for (\d+) s", line)[0])
        assert told < 60
    finally:
        store.start()
    back = time.monotonic()
    assert stage.result()["updates"] == 12 * 400
    ended = time.monotonic() - back
    assert not stage.line("training worker .* failed")
    measured(
        record_property,
        "object store of the data away in pretrain",
        lost="0 updates",
        read=line,
        until_the_user_reads_why=told,
        from_its_return_until_the_end=ended,
    )
