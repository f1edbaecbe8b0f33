"""`latentrl train` on a cluster whose rollout workers, nodes and driver are taken away, one after the other."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator

import numpy as np
import pytest
from fault_rows import Record, measured
from nodes import RayCluster
from rl_toys import make_encoder
from running import Stage, processes
from test_train_command import N_STEP, NUM_LANES, SETTINGS, TINY, replay_rows

from pipeline.atari import preprocess_for
from rllib_ext.checkpoint import find_checkpoint
from rllib_ext.state_files import load_state

pytestmark = pytest.mark.long

NAMES = ("one", "two")
RUNNER = "ray::LatentEnvRunner"


@pytest.fixture
def cluster() -> Iterator[RayCluster]:
    """A head without CPUs to give, and two workers of one CPU each."""
    nodes = RayCluster(dict.fromkeys(NAMES, 1), {}, head_cpus=0)
    nodes.start()
    yield nodes
    nodes.remove()


class Training:
    """A run of `latentrl train` with two rollout workers, and what it has written."""

    def __init__(self, cluster: RayCluster) -> None:
        self.cluster, self.home = cluster, cluster.shared / "home"
        self.encoder = make_encoder(cluster.shared / "encoder", preprocess_for("pong"), TINY, standardise=False)
        self.folder = self.home / "runs" / "train-pong-frozen-001"
        self.checkpoint = self.folder / "checkpoint"

    def arguments(self, agent_steps: int, *more: str) -> list[str]:
        """Of `latentrl`."""
        settings = {**SETTINGS, "checkpoint_agent_steps": 2_000}
        sets = [part for name, value in settings.items() for part in ("--set", f"train.{name}={value}")]
        given = ["train", "--game", "pong", "--encoder", self.encoder, "--agent-steps", agent_steps]
        given += ["--num-env-runners", len(NAMES), "--home", self.home, "--ray-address", self.cluster.address]
        return [*map(str, given), *sets, *more]

    def start(self, agent_steps: int, *more: str) -> Stage:
        """On the head."""
        arguments = self.arguments(agent_steps, *more)
        return Stage(self.cluster.shared / "said", *arguments, node=self.cluster.head)

    @property
    def recorded_steps(self) -> int:
        """Agent steps of the last line of figures."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.is_file() else []
        return max((json.loads(line)["step"] for line in lines), default=0)

    @property
    def kept_steps(self) -> int:
        """Agent steps of the checkpoint."""
        found = find_checkpoint(self.checkpoint)
        return int(load_state(found, "state")["agent_steps"]) if found else 0

    def moves_on(self, stage: Stage, agent_steps: int = 200) -> float:
        """Waits for so many more agent steps; seconds that they took."""
        target = self.recorded_steps + agent_steps
        return stage.wait_for(lambda: self.recorded_steps >= target)


@pytest.fixture
def training(cluster: RayCluster) -> Training:
    return Training(cluster)


def test_a_training_goes_on_whatever_is_taken_away(training: Training, record_property: Record) -> None:
    one, two = (training.cluster.workers[name] for name in NAMES)
    stage = training.start(10**9)
    stage.wait_for(lambda: training.recorded_steps > 500)
    assert len(processes(one, RUNNER)) == len(processes(two, RUNNER)) == 1

    processes(two, RUNNER)[0].kill()
    noticed, before = stage.wait_for_line(r"rollout worker \d is lost"), training.recorded_steps
    back = noticed + stage.wait_for_line(r"rollout worker \d is back")
    training.moves_on(stage)
    measured(
        record_property,
        "rollout worker killed",
        lost=f"its fragments under way and the rest of at most {NUM_LANES} open games",
        read=str(stage.line("is lost")),
        until_noticed=noticed,
        until_replaced=back,
    )

    two.kill()
    noticed, before = stage.wait_for_line(r"rollout worker \d is lost", 1), training.recorded_steps
    alone = training.moves_on(stage, 400)  # on the node that is left
    assert training.recorded_steps >= before + 400
    two.start()
    started = time.monotonic()
    stage.wait_for_line(r"rollout worker \d is back", 1)
    measured(
        record_property,
        "node with rollout workers killed",
        lost=f"the fragments under way there and the rest of at most {NUM_LANES} open games",
        read=str(stage.line("is lost", 1)),
        until_noticed=noticed,
        until_400_more_steps_without_it=noticed + alone,
        from_a_new_node_until_it_is_used=time.monotonic() - started,
    )

    waits = stage.count("no progress for")
    one.kill()
    two.kill()
    silence = stage.wait_for_line("no progress for", waits)
    assert silence < 60.0
    before = training.recorded_steps
    one.start()
    started = time.monotonic()
    stage.wait_for(lambda: training.recorded_steps > before)
    measured(
        record_property,
        "all nodes with rollout workers killed",
        lost=f"the fragments under way and the rest of at most {2 * NUM_LANES} open games",
        read=str(stage.line("no progress for", waits)),
        until_the_user_reads_why=silence,
        from_a_new_node_until_it_goes_on=time.monotonic() - started,
    )

    stage.driver.send_signal(signal.SIGTERM)
    code, seconds = stage.end()
    assert code == 143
    assert seconds < 30.0
    assert training.kept_steps == training.recorded_steps
    assert f"kept at {training.kept_steps:,} agent steps" in str(stage.line("^terminated"))
    rows = replay_rows(training.checkpoint)
    written = json.loads((training.checkpoint / "replay" / "replay.json").read_text())["written"]
    assert sum(written) >= training.kept_steps
    measured(
        record_property,
        "SIGTERM in train",
        lost="0 agent steps that had arrived",
        read=str(stage.line("^terminated")),
        until_exit_143=seconds,
    )

    two.start()
    stage = training.start(10**9, "--resume")
    stage.wait_for(lambda: training.recorded_steps > 500 + training.kept_steps)
    recorded, kept = training.recorded_steps, training.kept_steps
    stage.kill()
    killed = time.monotonic()
    while processes(one, RUNNER) or processes(two, RUNNER):
        assert time.monotonic() - killed < 60.0
        time.sleep(0.1)
    freed = time.monotonic() - killed
    result = training.start(kept + 1_000, "--resume").result()
    assert result["agent_steps"] >= kept + 1_000
    assert result["encoder_sha256_before"] == result["encoder_sha256_after"]
    after = replay_rows(training.checkpoint)
    for name, held in rows.items():
        for lane, num_rows in enumerate(written):
            decided = num_rows - 1 - N_STEP  # the last rows have become cuts, and wait for nothing any more
            np.testing.assert_array_equal(after[name][lane, :decided], held[lane, :decided], err_msg=name)
    measured(
        record_property,
        "driver killed in train",
        lost=f"{recorded - kept:,} agent steps since the last checkpoint (one every 2,000 here)",
        read="the shell's own word; `--resume` goes on from the checkpoint",
        until_the_cluster_is_free_again=freed,
    )
