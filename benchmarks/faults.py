"""What becomes of a run when something breaks: injects every fault, by the tests that do so, and makes the page.

A row's figures come from its test alone and are kept in `docs/results/faults.json`; rows that are not run keep theirs.

    python benchmarks/faults.py [--row NAME ...] [--write docs/results]
    python benchmarks/faults.py --list
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from peers.results import machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
PROPERTY = "fault"  # tests/fault_rows.py
TRAIN = "cluster/test_faults_train.py::test_a_training_goes_on_whatever_is_taken_away"
PRETRAIN = "cluster/test_faults_pretrain.py::test_a_pretraining_goes_on_whatever_is_taken_away"
COLLECT = "cluster/test_faults_collect.py::test_a_collection_is_the_same_whatever_is_taken_away"
BAD_FILE = "test_collect.py::test_check_names_every_bad_file"
DAMAGED = "test_pretrain.py::test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken"


@dataclass(frozen=True)
class Row:
    """A fault.

    Attributes:
        name: What happens; the test says the same one.
        test: That injects it, below tests/.
        survives: The promise.
        limits: Seconds that the promise allows, by what the test measures.
    """

    name: str
    test: str
    survives: str
    limits: dict[str, float]


def _row(name: str, test: str, survives: str, **limits: float) -> Row:
    return Row(name, test, survives, limits)


ROWS = (
    _row(
        "rollout worker killed", TRAIN,
        "all that had arrived in the replay; the others play on, and it is replaced",
        until_noticed=60, until_replaced=120,
    ),
    _row(
        "node with rollout workers killed", TRAIN,
        "all that had arrived; training goes on with the workers that are left, and with a new node when there is one",
        until_noticed=60, until_400_more_steps_without_it=120, from_a_new_node_until_it_is_used=120,
    ),
    _row(
        "all nodes with rollout workers killed", TRAIN,
        "all that had arrived; waits 3 minutes for a node, then keeps a checkpoint and ends with code 2",
        until_the_user_reads_why=60, from_a_new_node_until_it_goes_on=120,
    ),
    _row("SIGTERM in train", TRAIN, "everything, in a checkpoint; exit code 143", until_exit_143=30),
    _row(
        "`ray job stop` of train", "cluster/test_faults_job.py::test_a_stopped_job_keeps_its_state",
        "everything, in a checkpoint, where the job gives it time (`RAY_JOB_STOP_WAIT_TIME_S=60`; Ray's default is 3)",
        until_stopped=30,
    ),
    _row(
        "driver killed in train", TRAIN,
        "the last checkpoint, replay included; the cluster is free again by itself",
        until_the_cluster_is_free_again=60,
    ),
    _row(
        "Train worker killed", PRETRAIN,
        "the last checkpoint; goes on by itself, `train.max_failures` (3) times; the encoder is the same bit for bit",
        until_noticed=60, until_it_goes_on=120,
    ),
    _row(
        "node with a Train worker killed", PRETRAIN,
        "the last checkpoint; goes on by itself when there is room again; the encoder is the same bit for bit",
        until_noticed=60, until_the_user_reads_why_it_waits=120, from_a_new_node_until_it_goes_on=180,
    ),
    _row("SIGTERM in pretrain", PRETRAIN, "everything, also within an epoch; exit code 143", until_exit_143=30),
    _row(
        "driver killed in pretrain", PRETRAIN,
        "the last checkpoint; the encoder is the same bit for bit; the cluster is free again by itself",
        until_the_cluster_is_free_again=60,
    ),
    _row(
        "collecting worker killed", COLLECT,
        "the dataset, byte for byte: its rows are played again", until_noticed=60,
    ),
    _row(
        "node with a collecting worker killed", COLLECT,
        "the dataset, byte for byte: its rows are played again by whoever is left", until_noticed=60,
    ),
    _row("SIGTERM in collect", COLLECT, "nothing, and nothing half-written stays; exit code 143", until_exit_143=30),
    _row(
        "driver killed in collect", COLLECT,
        "nothing; what is left is refused as unfinished, and `--overwrite` replaces it",
        until_the_cluster_is_free_again=60,
    ),
    _row(
        "MLflow server down for a minute", "cluster/test_faults_tracking.py::test_a_server_that_is_down_for_a_minute",
        "everything: training does not wait, and is delivered later",
        until_noticed=60, from_its_return_until_delivery=60,
    ),
    _row(
        "MLflow server down until after the end",
        "cluster/test_faults_tracking.py::test_a_server_that_is_down_until_after_the_end",
        "everything, in the run's folder; exit code 3, and `latentrl sync` delivers it", sync_took=120,
    ),
    _row(
        "PostgreSQL killed and started again",
        "cluster/test_faults_tracking.py::test_its_database_restarts_and_its_store_goes_away",
        "everything: training does not wait, and is delivered later",
        until_noticed=60, from_its_return_until_delivery=60,
    ),
    _row(
        "artifact store away during an upload",
        "cluster/test_faults_tracking.py::test_its_database_restarts_and_its_store_goes_away",
        "everything, in the run's folder; exit code 3, and `latentrl sync` delivers it", sync_took=120,
    ),
    _row(
        "disk full in collect", "test_bad_input.py::test_full_disk",
        "nothing, and nothing half-written stays; exit code 2",
    ),
    _row(
        "disk full in a checkpoint of train", "cluster/test_faults_disk.py::test_a_disk_full_in_a_checkpoint_of_train",
        "the checkpoint before; exit code 2, and `--resume` goes on once there is space", until_exit_2=60,
    ),
    _row(
        "disk full in a checkpoint of pretrain",
        "cluster/test_faults_disk.py::test_a_disk_full_in_a_checkpoint_of_pretrain",
        "the checkpoint before; exit code 2, and `--resume` goes on once there is space", until_exit_2=60,
    ),
    _row(
        "disk full in an artifact upload", "cluster/test_faults_disk.py::test_a_disk_full_under_the_artifact_store",
        "everything, in the run's folder; exit code 3, and `latentrl sync` delivers it",
    ),
    *(
        _row(f"Parquet file {fault}", f"{BAD_FILE}[{fault}]", "nothing is trained on it: refused before training")
        for fault in ("truncated", "flipped", "deleted", "replaced")
    ),
    _row(
        "Parquet file damaged in the midst of a training",
        "test_pretrain.py::test_a_damaged_file_ends_training_in_one_clear_error",
        "nothing is trained on it: pages carry checksums; ends with code 2",
    ),
    _row(
        "object store of the data away in pretrain",
        "cluster/test_faults_store.py::test_a_pretraining_waits_for_its_data",
        "everything: waits 5 minutes for it, then ends with code 2, and `--resume` goes on from the last checkpoint",
        until_the_user_reads_why=60, from_its_return_until_the_end=120,
    ),
    _row("killed while a checkpoint of pretrain is stored", f"{DAMAGED}[unsealed]", "the checkpoint before"),
    _row("checkpoint of pretrain cut in half", f"{DAMAGED}[half]", "the checkpoint before"),
    _row("bit flipped in a checkpoint of pretrain", f"{DAMAGED}[a bit]", "the checkpoint before"),
    _row(
        "killed at any moment of a checkpoint of train",
        "test_state_files.py::test_a_run_killed_twice_at_any_moment_has_a_checkpoint_and_leaves_nothing",
        "the checkpoint before, or the new one",
    ),
    _row(
        "two runs started with one name", "cluster/test_faults_runs.py::test_two_runs_of_one_name",
        "both: names are numbered",
    ),
    _row(
        "a run resumed while it is still going on", "cluster/test_faults_runs.py::test_two_runs_of_one_name",
        "the first; the second is refused with code 2", until_refused=60,
    ),
    _row(
        "object store too small for the data stream",
        "cluster/test_faults_runs.py::test_an_object_store_too_small_for_the_stream", "everything, more slowly",
    ),
    _row(
        "shared memory too small for the object store",
        "cluster/test_faults_runs.py::test_shared_memory_too_small_for_the_object_store", "everything, more slowly",
    ),
)  # fmt: skip


class Collector:
    """A pytest plugin: takes what the tests have measured."""

    def __init__(self) -> None:
        self.measured: dict[str, dict[str, Any]] = {}
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """pytest's hook, after each phase of a test."""
        if report.failed:
            self.failed.append(report.nodeid)
        if report.when == "call" and report.passed:
            for name, value in report.user_properties:
                if name == PROPERTY and isinstance(value, dict):
                    self.measured[str(value["row"])] = {key: value[key] for key in value if key != "row"}


def inject(rows: Iterable[Row]) -> Collector:
    """Runs the rows' tests, each once."""
    collector = Collector()
    tests = dict.fromkeys(str(ROOT / "tests" / row.test) for row in rows)
    pytest.main([*tests, "--rootdir", str(ROOT), "-p", "no:xdist"], plugins=[collector])
    return collector


def merged(kept: dict[str, Any], collector: Collector) -> dict[str, Any]:
    """The kept figures with the new ones in their place, each with the commit that it was measured at."""
    here = machine()
    commit = here.pop("commit")
    rows = dict(kept.get("rows", {}))
    for name, figures in collector.measured.items():
        rows[name] = {**figures, "commit": commit}
    known = {row.name: None for row in ROWS}
    return {"machine": here, "rows": {name: rows[name] for name in known if name in rows}}


def beyond_promise(result: dict[str, Any]) -> list[str]:
    """What took longer than promised, or has never been measured."""
    problems = []
    for row in ROWS:
        figures = result["rows"].get(row.name)
        if figures is None:
            problems.append(f"{row.name}: not measured")
            continue
        for what, limit in row.limits.items():
            seconds = figures["seconds"].get(what)
            if seconds is None or seconds > limit:
                problems.append(f"{row.name}: {_words(what)} {seconds} s, promised {limit:g}")
    return problems


def page(result: dict[str, Any]) -> str:
    """The table in Markdown."""
    where, rows = result["machine"], result["rows"]
    lines = [
        "# Faults",
        "",
        "What becomes of a run when something breaks. Each row is injected by a test on real components (below "
        "`tests/`), and its figures are that test's: `python benchmarks/faults.py --write docs/results`. Three "
        "promises are made for all rows: nothing acknowledged is lost, nothing half-written is used, and nobody waits "
        "for more than 60 seconds without a message. A row that is not measured has its test and no figure yet; one "
        "that is *late* took longer than promised.",
        "",
        f"Measured on {where['cores']} cores ({where['processor']}), {where['memory_gib']} GiB, beside other work; "
        "nodes are processes of one machine, each with a disk, an address and processes of its own.",
        "",
        "| fault | what survives | seconds (promised) | lost |",
        "|---|---|---|---|",
    ]
    for row in ROWS:
        figures = rows.get(row.name)
        if figures is None:
            lines.append(f"| {row.name} | {row.survives} | not measured | |")
            continue
        seconds = [
            f"{_words(what)} {value:,.1f}{_promised(value, row.limits.get(what))}"
            for what, value in figures["seconds"].items()
        ]
        lines.append(f"| {row.name} | {row.survives} | {'; '.join(seconds)} | {figures['lost']} |")
    lines += ["", "## What the user reads, and which test injects it", ""]
    for row in ROWS:
        figures = rows.get(row.name)
        if figures is None:
            lines += [f"- **{row.name}** (`{row.test}`): not measured"]
        else:
            lines += [f"- **{row.name}** (`{row.test}`, at {figures['commit']}): {_shown(figures['read'])}"]
    return "\n".join([*lines, ""])


def _words(name: str) -> str:
    return name.replace("_", " ")


def _promised(seconds: float, limit: float | None) -> str:
    return "" if limit is None else f" (≤ {limit:g})" if seconds <= limit else f" (≤ {limit:g}, *late*)"


def _shown(line: str) -> str:
    return f"`` {line} ``" if "`" in line else f"`{line}`"


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 where a test failed or took longer than promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--row", nargs="+", metavar="NAME", help="only these rows, and what their tests measure besides"
    )
    parser.add_argument("--list", action="store_true", help="names the rows")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="faults.json and faults.md")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(f"{row.name:55} {row.test}" for row in ROWS))
        return 0
    unknown = set(options.row or ()) - {row.name for row in ROWS}
    if unknown:
        parser.error(f"no row {', '.join(sorted(unknown))}; see --list")
    collector = inject(row for row in ROWS if not options.row or row.name in options.row)
    kept = RESULTS / "faults.json"
    result = merged(json.loads(kept.read_text()) if kept.is_file() else {}, collector)
    print(page(result))
    if options.write is not None:
        options.write.mkdir(parents=True, exist_ok=True)
        (options.write / "faults.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        (options.write / "faults.md").write_text(page(result))
    for problem in [*collector.failed, *beyond_promise(result)]:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if collector.failed or beyond_promise(result) else 0


if __name__ == "__main__":
    sys.exit(main())
