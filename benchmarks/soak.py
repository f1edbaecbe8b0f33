"""Does a long run grow? `latentrl train` with a full replay, sampled: memory, processes, open files, shared memory.

The run goes on until it has been watched for `--minutes` with a full replay. Samples are kept in `--work`: interrupted
and started again, the run goes on from its checkpoint and the samples with it. At its end it is sent SIGTERM, and what
it leaves behind is looked for.

    python benchmarks/soak.py --minutes 60 [--work FOLDER] [--replay ROWS] [--json] [--write docs/results]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray
from peers.ours import GAME, untrained_encoder
from peers.results import machine
from scipy import stats

from pipeline.atari import preprocess_for

MEGABYTE = 1_000_000
EXIT_WITHIN_S = 60.0
SETTLE_S = 60.0  # after the replay is full
MOST_GROWTH_PERCENT = 1.0  # an hour
BIN_S = 600.0
SHARED_MEMORY = Path("/dev/shm")
GAUGES = ("pss_mb", "rss_mb", "processes", "threads", "open_files", "shared_memory_mb")
ROLES = {
    "ray::LatentEnvRunner": "rollout workers",
    "raylet/raylet": "raylet",
    "gcs_server": "gcs",
    "jobs.cli": "driver",
}


class Soak:
    """The run and its samples, in one folder."""

    def __init__(self, work: Path, replay: int) -> None:
        self.work, self.replay = work.absolute(), replay
        self.work.mkdir(parents=True, exist_ok=True)
        self.samples_file = self.work / "samples.jsonl"
        self.samples = [json.loads(line) for line in _lines(self.samples_file)]
        self.sitting = 1 + max((sample["sitting"] for sample in self.samples), default=0)
        self.folder = self.work / "home" / "runs" / f"train-{GAME}-frozen-001"
        # Short, since the paths of Ray's sockets may have 107 characters.
        self.temporary = Path(tempfile.mkdtemp(prefix="soak-", dir="/tmp"))
        self.seen: dict[int, psutil.Process] = {}
        self.shared_before = _shared_memory()

    def start(self) -> subprocess.Popen[bytes]:
        """Starts the run, or goes on with it."""
        encoder = self.work / "encoder"
        if not encoder.exists():
            untrained_encoder(encoder, preprocess_for(GAME))
        command = [sys.executable, "-m", "jobs.cli", "train", "--game", GAME, "--encoder", str(encoder)]
        command += ["--agent-steps", str(10**9), "--set", f"train.replay_capacity={self.replay}"]
        command += ["--home", str(self.work / "home")]
        command += ["--resume"] if (self.folder / "checkpoint" / "SHA256SUMS").is_file() else []
        with (self.work / "stderr.txt").open("ab") as said:
            variables = {**os.environ, "TMPDIR": str(self.temporary)}
            return subprocess.Popen(command, stdout=said, stderr=said, env=variables, start_new_session=True)

    def watch(self, run: subprocess.Popen[bytes], minutes: float, interval_s: float) -> None:
        """Samples until the full replay has been watched for so long."""
        while self.watched_minutes() < minutes:
            time.sleep(interval_s)
            if run.poll() is not None:
                raise SystemExit(f"error: the run ended with code {run.returncode}; see {self.work}/stderr.txt")
            self.samples.append(self.sample(run.pid))
            with self.samples_file.open("a") as stream:
                stream.write(json.dumps(self.samples[-1]) + "\n")
            self._say(minutes)

    def sample(self, pid: int) -> dict[str, Any]:
        """Everything about the run now."""
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
        self.seen.update({process.pid: process for process in family})
        total: Counter[str] = Counter()
        roles: Counter[str] = Counter()
        for process in family:
            try:
                memory = process.memory_full_info()
                figures = {"pss_mb": memory.pss / MEGABYTE, "rss_mb": memory.rss / MEGABYTE, "processes": 1}
                figures |= {"threads": process.num_threads(), "open_files": process.num_fds()}
                roles[_role(process)] += figures["pss_mb"]
            except psutil.Error:
                continue
            total.update(figures)
        rest = {"shared_memory_mb": _shared_memory(), "agent_steps": self._agent_steps(), "roles_mb": dict(roles)}
        return {"time_s": time.time(), "sitting": self.sitting, **total, **rest}

    def full(self) -> list[dict[str, Any]]:
        """The samples of the time with a full replay, without each sitting's first minute of it."""
        kept, since = [], {}
        for sample in self.samples:
            if sample["agent_steps"] > 1.02 * self.replay:
                since.setdefault(sample["sitting"], sample["time_s"])
                if sample["time_s"] - since[sample["sitting"]] >= SETTLE_S:
                    kept.append(sample)
        return kept

    def watched_minutes(self) -> float:
        """How long the full replay has been watched, over all sittings."""
        spans: dict[int, list[float]] = {}
        for sample in self.full():
            spans.setdefault(sample["sitting"], []).append(sample["time_s"])
        return sum(max(times) - min(times) for times in spans.values()) / 60

    def end(self, run: subprocess.Popen[bytes]) -> dict[str, Any]:
        """SIGTERM, and what is left after it."""
        began = time.monotonic()
        run.send_signal(signal.SIGTERM)
        code = run.wait(EXIT_WITHIN_S)
        seconds = time.monotonic() - began
        _, alive = psutil.wait_procs(list(self.seen.values()), timeout=10)
        left = {
            "exit_code": code,
            "exit_s": round(seconds, 1),
            "processes": [" ".join(process.cmdline())[:100] for process in alive],
            "temporary_files": self._temporary_files(),
            "drafts": sorted(path.name for path in self.folder.glob(".*")),
            "shared_memory_mb": round(_shared_memory() - self.shared_before, 1),
        }
        shutil.rmtree(self.temporary, ignore_errors=True)
        return left

    def _temporary_files(self) -> list[str]:
        """Those besides Ray's logs; torch leaves an empty folder for what it may compile."""
        files = (path.relative_to(self.temporary) for path in self.temporary.rglob("*") if path.is_file())
        return sorted(str(path) for path in files if path.parts[0] != "ray")

    def _agent_steps(self) -> int:
        lines = _lines(self.folder / "metrics.jsonl", last_bytes=4_096)
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def _say(self, minutes: float) -> None:
        last = self.samples[-1]
        gauges = ", ".join(f"{last[name]:,.0f} {name}" for name in GAUGES)
        steps, watched = last["agent_steps"], self.watched_minutes()
        print(f"{watched:.1f} of {minutes:g} min with a full replay, {steps:,} agent steps: {gauges}", file=sys.stderr)


def slope_per_hour(samples: list[dict[str, Any]], gauge: str) -> tuple[float, float, float]:
    """Least-squares growth of a gauge, one slope for all sittings, each with a level of its own.

    What memory does lasts for minutes, so neighbouring samples are no independent ones: the line goes through the means
    of `BIN_S` seconds, whose scatter gives Student's interval.

    Returns:
        The slope in percent of the mean an hour, and its 95% interval; all NaN where there are too few means.
    """
    times, values, sittings = _means(samples, gauge)
    mean = float(np.mean([sample[gauge] for sample in samples]))
    spread, freedom = float(times @ times), len(times) - sittings - 1
    if freedom < 1 or not spread:
        return np.nan, np.nan, np.nan
    slope = float(times @ values) / spread
    error = float(np.sqrt(np.sum((values - slope * times) ** 2) / freedom / spread))
    reach = float(stats.t.ppf(0.975, freedom)) * error
    scale = 100.0 / mean if mean else 0.0
    return slope * scale, (slope - reach) * scale, (slope + reach) * scale


def _means(samples: list[dict[str, Any]], gauge: str) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
    """Hours and values of every bin, without each sitting's own mean, and the number of sittings."""
    columns: tuple[list[float], list[float]] = ([], [])
    sittings = sorted({sample["sitting"] for sample in samples})
    for sitting in sittings:
        times, values = np.array([(s["time_s"], s[gauge]) for s in samples if s["sitting"] == sitting], float).T
        bins = ((times - times[0]) // BIN_S).astype(int)
        for column, of in zip(columns, (times / 3600.0, values), strict=True):
            means = np.array([of[bins == number].mean() for number in np.unique(bins)])
            column.extend(means - means.mean())
    return np.array(columns[0]), np.array(columns[1]), len(sittings)


def summarise(soak: Soak, left: dict[str, Any]) -> dict[str, Any]:
    """The JSON object."""
    samples = soak.full()
    gauges = {}
    for name in GAUGES:
        slope, low, high = slope_per_hour(samples, name)
        is_known = bool(np.isfinite(slope))
        gauges[name] = {
            "first": round(samples[0][name], 1),
            "last": round(samples[-1][name], 1),
            "percent_an_hour": round(slope, 3) if is_known else None,
            "ci95": [round(low, 3), round(high, 3)] if is_known else None,
        }
    is_clean = not left["processes"] and not left["temporary_files"] and not left["drafts"]
    return {
        "minutes": round(soak.watched_minutes(), 1),
        "samples": len(samples),
        "sittings": len({sample["sitting"] for sample in samples}),
        "replay_rows": soak.replay,
        "agent_steps": samples[-1]["agent_steps"] - samples[0]["agent_steps"],
        "gauges": gauges,
        "roles_mb": {name: round(value, 1) for name, value in samples[-1]["roles_mb"].items()},
        "left_behind": left,
        "has_passed": (growth := gauges["pss_mb"]["percent_an_hour"]) is not None
        and growth < MOST_GROWTH_PERCENT
        and is_clean
        and left["exit_code"] == 143,
        "machine": machine(),
    }


def page(result: dict[str, Any], command: str) -> str:
    """The result in Markdown."""
    where = result["machine"]
    rows = []
    for name, gauge in result["gauges"].items():
        what = name.removesuffix("_mb").replace("_", " ") + (", MB" if name.endswith("_mb") else "")
        growth = "not known: too short"
        if gauge["ci95"] is not None:
            growth = "{:+.2f} [{:+.2f}, {:+.2f}]".format(gauge["percent_an_hour"], *gauge["ci95"])
        rows.append(f"| {what} | {gauge['first']:,.1f} | {gauge['last']:,.1f} | {growth} |")
    roles = ", ".join(f"{name} {value:,.0f}" for name, value in sorted(result["roles_mb"].items()))
    left = result["left_behind"]
    return "\n".join(
        [
            "# A long run",
            "",
            f"`{command}` on {where['cores']} cores ({where['processor']}), {where['memory_gib']} GiB; commit "
            f"{where['commit']}.",
            "",
            f"`latentrl train` with one rollout worker, watched for {result['minutes']:.0f} minutes with a full replay "
            f"of {result['replay_rows']:,} rows: {result['agent_steps']:,} agent steps, {result['samples']} samples in "
            f"{result['sittings']} sitting{'s' * (result['sittings'] != 1)}, summed over all its processes. Asked for: "
            f"memory grows by less than {MOST_GROWTH_PERCENT:g}% an hour.",
            "",
            "| | first | last | growth, % an hour [95% interval] |",
            "|---|---|---|---|",
            *rows,
            "",
            "PSS counts a page that several processes share once; the interval is Student's, from "
            f"means of {BIN_S / 60:g} minutes. At the end (PSS, MB): {roles}.",
            "",
            f"After SIGTERM it ended with code {left['exit_code']} in {left['exit_s']} s and left behind: "
            f"{len(left['processes'])} processes, {len(left['temporary_files'])} temporary files besides Ray's logs, "
            f"{len(left['drafts'])} half-written checkpoints, {left['shared_memory_mb']:+.1f} MB of shared memory.",
            "",
        ]
    )


def _role(process: psutil.Process) -> str:
    title = " ".join(process.cmdline())
    return next((role for sign, role in ROLES.items() if sign in title), "Ray's others")


def _shared_memory() -> float:
    """Megabytes taken in /dev/shm, by whomever."""
    return shutil.disk_usage(SHARED_MEMORY).used / MEGABYTE if SHARED_MEMORY.is_dir() else 0.0


def _lines(path: Path, last_bytes: int = 0) -> list[str]:
    """The whole lines of a file, or of its last bytes."""
    if not path.is_file():
        return []
    with path.open("rb") as stream:
        if last_bytes:
            stream.seek(max(0, path.stat().st_size - last_bytes))
        text = stream.read().decode(errors="replace")
    lines = text.split("\n")[:-1]
    return lines[1:] if last_bytes and path.stat().st_size > last_bytes else lines


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 where memory grew too fast or something was left behind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="with a full replay (60)")
    parser.add_argument("--interval", type=float, default=10.0, help="seconds between samples (10)")
    parser.add_argument("--replay", type=int, default=50_000, help="rows of the replay (50000)")
    parser.add_argument("--work", type=Path, default=Path("latentrl-runs/soak"), help="the run and its samples")
    parser.add_argument("--json", action="store_true", help="ends with one JSON object")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="soak.md and soak.json")
    options = parser.parse_args(arguments)
    soak = Soak(options.work, options.replay)
    run = soak.start()
    try:
        soak.watch(run, options.minutes, options.interval)
        left = soak.end(run)
    finally:
        if run.poll() is None:
            run.send_signal(signal.SIGTERM)
            run.wait(EXIT_WITHIN_S)
    result = summarise(soak, left)
    text = page(result, f"python benchmarks/soak.py --minutes {options.minutes:g} --replay {options.replay}")
    print(text)
    if options.write is not None:
        options.write.mkdir(parents=True, exist_ok=True)
        (options.write / "soak.json").write_text(json.dumps(result, indent=1) + "\n")
        (options.write / "soak.md").write_text(text)
    if options.json:
        print(json.dumps(result))
    return 0 if result["has_passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
