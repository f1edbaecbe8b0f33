"""`latentrl pretrain` on a cluster whose Train workers, nodes and driver are taken away, one after the other."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterator

import pytest
from fault_rows import Record, measured
from nodes import RayCluster
from running import Stage, processes
from toy_frames import toy_dataset

pytestmark = pytest.mark.long

NAMES = ("one", "two")
WORKER = "TrainWorker"
SETTINGS = {
    "model.z_dim": 4,
    "model.patch": 2,
    "model.widths": "[8,8]",
    "train.epochs": 12,
    "train.frames_per_epoch": 400 * 16,  # a checkpoint every 400 updates
    "train.batch_size": 16,
    "train.num_workers": 2,
    "train.num_threads": 1,
    "train.log_every_steps": 5,
}
GOES_ON = r"goes on from its checkpoint after ([\d,]+) updates"


@pytest.fixture
def cluster() -> Iterator[RayCluster]:
    """A head with a CPU for Ray Data, and two workers of one CPU each."""
    nodes = RayCluster(dict.fromkeys(NAMES, 1), {}, head_cpus=1)
    nodes.start()
    yield nodes
    nodes.remove()


class Pretraining:
    """A run of `latentrl pretrain` with two Train workers, and what it has written."""

    def __init__(self, cluster: RayCluster, home: str, data: str | None = None) -> None:
        self.cluster, self.home = cluster, cluster.shared / home
        self.data = data or str(cluster.shared / "frames")
        self.folder = self.home / "runs" / "pretrain-toy-001"

    def start(self, *more: str) -> Stage:
        sets = [part for name, value in SETTINGS.items() for part in ("--set", f"{name}={value}")]
        given = ["--data", self.data, "--register", "toy", *sets]
        places = ["--home", self.home, "--ray-address", self.cluster.address]
        said = self.cluster.shared / "said"
        return Stage(said, "pretrain", *given, *places, *more, node=self.cluster.head)

    @property
    def recorded(self) -> int:
        """Updates of the last line of figures."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.is_file() else []
        return int(json.loads(lines[-1])["step"]) if lines else 0

    @property
    def kept(self) -> int:
        """Updates of the newest checkpoint that is whole."""
        sealed = (self.folder / "checkpoints").glob("step-*/SHA256SUMS")
        return max((int(path.parent.name.removeprefix("step-")) for path in sealed), default=0)

    def passes_a_checkpoint(self, stage: Stage) -> None:
        """Waits until the next checkpoint is there, and some updates more have been made."""
        kept = self.kept
        stage.wait_for(lambda: self.kept > kept and self.recorded > self.kept + 20)


def went_on_from(stage: Stage, number: int) -> int:
    """Updates of the checkpoint that the training went on from, the `number`th time in this sitting."""
    found = re.search(GOES_ON, str(stage.line(GOES_ON, number)))
    assert found
    return int(found[1].replace(",", ""))


def test_a_pretraining_goes_on_whatever_is_taken_away(cluster: RayCluster, record_property: Record) -> None:
    toy_dataset(cluster.shared / "frames", [60] * 12, num_files=3)
    undisturbed = Pretraining(cluster, "undisturbed").start().result()
    run = Pretraining(cluster, "disturbed")
    one, two = (run.cluster.workers[name] for name in NAMES)
    stage = run.start()
    run.passes_a_checkpoint(stage)
    (victim, *_) = processes(two, WORKER) or processes(one, WORKER)
    victim.kill()
    noticed = stage.wait_for_line("training worker .* failed")
    on = noticed + stage.wait_for_line(GOES_ON)
    measured(
        record_property,
        "Train worker killed",
        lost=f"{run.recorded - went_on_from(stage, 0):,} updates made again (400 between checkpoints), no more",
        read=str(stage.line("training worker .* failed")),
        until_noticed=noticed,
        until_it_goes_on=on,
    )

    run.passes_a_checkpoint(stage)
    node, waits = two if processes(two, WORKER) else one, stage.count("no progress for")
    node.kill()
    noticed = stage.wait_for_line("training worker .* failed", 1)
    silence = stage.wait_for_line("no progress for", waits)
    assert silence < 60.0
    recorded, started = run.recorded, time.monotonic()
    node.start()
    stage.wait_for_line(GOES_ON, 1)
    stage.wait_for(lambda: run.recorded > recorded)
    measured(
        record_property,
        "node with a Train worker killed",
        lost=f"{recorded - went_on_from(stage, 1):,} updates made again (400 between checkpoints), no more",
        read=str(stage.line("no progress for", waits)),
        until_noticed=noticed,
        until_the_user_reads_why_it_waits=noticed + silence,
        from_a_new_node_until_it_goes_on=time.monotonic() - started,
    )

    run.passes_a_checkpoint(stage)
    before = run.kept
    stage.driver.send_signal(signal.SIGTERM)
    code, seconds = stage.end()
    assert code == 143, stage.lines[-20:]
    assert seconds < 30.0
    assert before < run.kept < before + 400, "it did not wait for the end of the epoch"
    assert f"kept at {run.kept:,} updates" in str(stage.line("^terminated"))
    assert run.kept == run.recorded
    measured(
        record_property,
        "SIGTERM in pretrain",
        lost="0 updates",
        read=str(stage.line("^terminated")),
        until_exit_143=seconds,
    )

    stage = run.start("--resume")
    run.passes_a_checkpoint(stage)
    recorded, kept = run.recorded, run.kept
    stage.kill()
    killed = time.monotonic()
    while processes(one, WORKER) or processes(two, WORKER):
        assert time.monotonic() - killed < 60.0
        time.sleep(0.1)
    freed = time.monotonic() - killed
    result = run.start("--resume").result()
    assert result["updates"] == 12 * 400
    assert result["sha256"] == undisturbed["sha256"]
    measured(
        record_property,
        "driver killed in pretrain",
        lost=f"{recorded - kept:,} updates made again (400 between checkpoints), no more",
        read="the shell's own word; `--resume` goes on from the checkpoint",
        until_the_cluster_is_free_again=freed,
    )
