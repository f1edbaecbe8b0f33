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

EPOCHS = 40  # more than the stream reads ahead


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
    run = Pretraining(cluster, "home", store.uri("waits"), epochs=EPOCHS)
    stage = run.start()
    run.passes_a_checkpoint(stage)
    store.kill()
    try:
        told = stage.wait_for_line("no progress for .*connection refused; it is tried again", within_s=180)
        line = str(stage.line("no progress for .*connection refused; it is tried again"))
        assert int(re.findall(r"no progress for (\d+) s", line)[0]) < 60
        recorded = run.recorded
        assert run.kept > 0
    finally:
        store.start()
    back = time.monotonic()
    stage.wait_for(lambda: run.recorded > recorded)
    on = time.monotonic() - back
    assert stage.result()["updates"] == EPOCHS * 400
    assert not stage.line("training worker .* failed")
    measured(
        record_property,
        "object store of the data away in pretrain",
        lost="0 updates",
        read=line,
        until_the_user_reads_why=told,
        from_its_return_until_it_goes_on=on,
    )
