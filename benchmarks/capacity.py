"""What each part of distributed Q-learning costs, and from that what one driver carries: figures for docs/scaling.md.

Parts are measured in one process, each alone, medians over repeats. What follows from them for simulated environments
is then held against runs with real rollout workers: workers that sleep, as many as the machine holds, and one that
never waits, so that the driver is the wall.

    python benchmarks/capacity.py [--json] [--write docs/results]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from peers import results
from peers.measuring import ray_here
from peers.ours import config_of
from peers.rows import Cell
from peers.running import Bench, versions
from peers.scaling import NUM_ENVS, STEP_S, UPDATES_PER_AGENT_STEP, simulated_config

from jobs.recipes import PRETRAIN_RECIPES
from pipeline import artifact
from pipeline.atari import preprocess_for
from pipeline.machine import cores
from rllib_ext.algorithm import LatentDQN
from rllib_ext.config import LatentDQNConfig

FRAGMENTS, UPDATES, REPEATS = 40, 64, 5
SHORT_WORKERS = 1
FRAMES, FRAMES_A_GPU = 64, 4096  # encoded at a time
FAST = {"sleeps": False, "envs_per_runner": 64}
RUNS = {  # name: workers, changes
    **{f"{n} sleeping worker{'s' * (n > 1)}": (n, {}) for n in (1, 2, 4, 8, 16, 24)},
    "1 tireless worker, an update for 16 agent steps": (1, FAST),
    "1 tireless worker, an update for 256 agent steps": (1, {**FAST, "updates_per_agent_step": 1 / 256}),
}


def parts(config: LatentDQNConfig) -> dict[str, Any]:
    """What an agent step, an update and a publication of weights cost. Environments run in this process."""
    algorithm: LatentDQN = config.build_algo()
    try:
        return _parts(algorithm)
    finally:
        algorithm.stop()


def _parts(algorithm: LatentDQN) -> dict[str, Any]:
    settings, runner = algorithm.settings, algorithm.env_runner_group.local_env_runner
    while algorithm.updates == 0:
        algorithm.train()
    algorithm._seconds = dict.fromkeys(["draw_s", "update_total_s", "priorities_s"], 0.0)
    seconds, fragments = [], []
    for _ in range(FRAGMENTS):
        started = time.perf_counter()
        fragments.append(runner.sample(agent_steps=algorithm.agent_steps))
        seconds.append(time.perf_counter() - started)
    steps = settings.fragment_steps
    state = algorithm.learners.inference_state()
    shared = ray.put(state)
    update_s = statistics.median(_timed(lambda: algorithm._learn(UPDATES)) / UPDATES for _ in range(REPEATS))
    return {
        "agent_steps_a_fragment": steps,
        "envs_a_worker": settings.envs_per_runner,
        "worker_s_per_step": statistics.median(seconds) / steps,
        **{
            f"worker_{part}_s_per_step": statistics.median(f.seconds[part] for f in fragments) / steps
            for part in ("environment", "observation", "action")
        },
        "bytes_per_step": round(_serialized_bytes(fragments[0]) / steps, 1),
        "take_s_per_step": statistics.median(_take(algorithm, fragment) for fragment in fragments) / steps,
        "update_s": update_s,
        "batch_size": settings.batch_size,
        "learner_threads": algorithm.config.learner_threads,
        "updates_per_agent_step": settings.updates_per_agent_step,
        "draw_s": statistics.median(_timed(lambda: algorithm._draw(1)) for _ in range(UPDATES)),
        "weights_bytes": sum(array.nbytes for array in state.values()),
        "publish_s": statistics.median(
            _timed(lambda: ray.put(algorithm.learners.inference_state())) for _ in range(20)
        ),
        "load_s": statistics.median(_timed(lambda: runner.module.set_state(ray.get(shared))) for _ in range(20)),
        "updates_a_publication": settings.max_updates_per_step,
    }


def _take(algorithm: LatentDQN, fragment: Any) -> float:
    """Seconds to fetch a fragment from this node's object store and put it into the replay."""
    reference = ray.put(fragment)
    algorithm._seconds = {"store_s": 0.0, **{f"{part}_s": 0.0 for part in fragment.seconds}}
    return _timed(lambda: algorithm._store([ray.get(reference)]))


def _timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _serialized_bytes(value: Any) -> int:
    """As Ray sends it."""
    context = ray._private.worker.global_worker.get_serialization_context()
    return int(context.serialize(value).total_bytes)


def encoder_rates() -> dict[str, float]:
    """Frames per second of the encoder alone: of one core, 64 at a time, and of a GPU where there is one."""
    preprocess = preprocess_for("pong")
    encoder = artifact.from_scratch(PRETRAIN_RECIPES["vae"].model, preprocess).eval()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rates = {"encoder_frames_per_s_a_core": _encoder_rate(encoder, FRAMES, "cpu")}
    finally:
        torch.set_num_threads(threads)
    if torch.cuda.is_available():
        rates["encoder_frames_per_s_a_gpu"] = _encoder_rate(encoder.to("cuda"), FRAMES_A_GPU, "cuda")
    return rates


def _encoder_rate(encoder: artifact.Encoder, num_frames: int, device: str) -> float:
    preprocess = encoder.preprocess
    shape = (num_frames, preprocess.height, preprocess.width)
    frames = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    return num_frames / float(np.median([_timed(lambda: encoder.encode(frames).cpu()) for _ in range(100)]))


def driver_rate(part: dict[str, Any], ratio: float | None = None) -> float:
    """Agent steps per second that one driver with the learner in it takes, if workers bring enough."""
    return 1 / driver_s_per_step(part, ratio)


def driver_s_per_step(part: dict[str, Any], ratio: float | None = None) -> float:
    """Seconds of the driver for an agent step: taking it over, and its share of updates and publications."""
    ratio = part["updates_per_agent_step"] if ratio is None else ratio
    return part["take_s_per_step"] + ratio * (part["update_s"] + part["publish_s"] / part["updates_a_publication"])


def predicted(part: dict[str, Any], num_workers: int, sleep_s: float, ratio: float, cores: int) -> float:
    """Agent steps per second by the parts: the least of what workers, driver and the machine's cores give.

    Args:
        part: Its `worker_s_per_step` is measured in the same environment, what that sleeps included.
        num_workers: Rollout workers.
        sleep_s: Seconds of an agent step in which the worker sleeps and takes no core.
        ratio: Updates an agent step.
        cores: The machine's.
    """
    by_workers = num_workers / part["worker_s_per_step"]
    by_cores = cores / (part["worker_s_per_step"] - sleep_s + driver_s_per_step(part, ratio))
    return min(by_workers, driver_rate(part, ratio), by_cores)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All parts, and the runs that they are held against."""
    measured = {}
    with tempfile.TemporaryDirectory() as folder, ray_here(4):
        root = Path(folder)
        configs = {
            "frozen": config_of(root / "a", "frozen", {}, {}, num_workers=0),
            "efficient": config_of(root / "b", "frozen", {}, {}, "efficient", num_workers=0),
            "pixels": config_of(root / "c", "pixels", {}, {}, num_workers=0),
            "sleeping": simulated_config(root / "d", 0),
            "tireless": simulated_config(root / "e", 0, **FAST),
        }
        for name, config in configs.items():
            measured[name] = parts(config)
            print(f"{name}: {driver_rate(measured[name]):,.0f} agent steps/s a driver", file=sys.stderr, flush=True)
    settle_s = 0.0 if options.short else 3.0
    bench, num_cores, runs = Bench(options.results, is_fresh=options.fresh), cores(), {}
    for name, (num_workers, changes) in RUNS.items():
        if options.short and num_workers > SHORT_WORKERS:
            continue
        part, sleep_s = (measured["tireless"], 0.0) if changes else (measured["sleeping"], STEP_S / NUM_ENVS)
        ratio = changes.get("updates_per_agent_step", UPDATES_PER_AGENT_STEP)
        found = bench.figures(Cell("scaling", {"num_workers": num_workers, **changes}, options.seconds, settle_s, 0))
        rate = predicted(part, num_workers, sleep_s, ratio, num_cores)
        runs[name] = {"predicted": rate, "measured": found["agent_steps_per_s"], "cpu_s": found["cpu_s_per_agent_step"]}
        print(f"{name}: {runs[name]['measured']:,.0f}/s, predicted {rate:,.0f}/s", file=sys.stderr, flush=True)
    return {
        "parts": measured,
        **encoder_rates(),
        "driver_agent_steps_per_s": {name: round(driver_rate(part)) for name, part in measured.items()},
        "runs": runs,
        "machine": results.machine(),
        "versions": versions(),
    }


def _workers_a_driver(part: dict[str, Any]) -> float:
    return driver_rate(part) * float(part["worker_s_per_step"])


def _wall(part: dict[str, Any]) -> str:
    """What the driver's time goes into first: the wall that more workers run into."""
    ratio = part["updates_per_agent_step"]
    shares = {
        "taking steps over": part["take_s_per_step"],
        "updates": ratio * part["update_s"],
        "publishing": ratio * part["publish_s"] / part["updates_a_publication"],
    }
    first = max(shares, key=lambda name: shares[name])
    return f"{first}, {shares[first] / sum(shares.values()):.0%}"


def table(result: dict[str, Any]) -> str:
    """Parts by recipe, and runs beside what the parts say."""
    names = ("frozen", "efficient", "pixels")
    rows = [
        ("a rollout worker's core, agent steps/s", lambda p: 1 / p["worker_s_per_step"], ",.0f"),
        ("... environment, us a step", lambda p: 1e6 * p["worker_environment_s_per_step"], ".0f"),
        ("... encoding and stacking, us a step", lambda p: 1e6 * p["worker_observation_s_per_step"], ".0f"),
        ("... choosing actions, us a step", lambda p: 1e6 * p["worker_action_s_per_step"], ".0f"),
        ("bytes over the network, a step", lambda p: p["bytes_per_step"], ",.0f"),
        ("driver takes a step over, us", lambda p: 1e6 * p["take_s_per_step"], ".1f"),
        ("an update of 32, ms", lambda p: 1e3 * p["update_s"], ".2f"),
        ("... drawing it from the replay, ms", lambda p: 1e3 * p["draw_s"], ".2f"),
        ("threads of the learner", lambda p: p["learner_threads"], "d"),
        ("weights, kB a push to a node", lambda p: p["weights_bytes"] / 1e3, ",.0f"),
        ("... driver publishes, ms", lambda p: 1e3 * p["publish_s"], ".2f"),
        ("... worker loads, ms", lambda p: 1e3 * p["load_s"], ".2f"),
        ("updates an agent step", lambda p: p["updates_per_agent_step"], "g"),
        ("one driver with its learner, agent steps/s", driver_rate, ",.0f"),
        ("... emulator frames/s", lambda p: preprocess_for("pong").frame_skip * driver_rate(p), ",.0f"),
        ("... MB/s that reach it", lambda p: driver_rate(p) * p["bytes_per_step"] / 1e6, ".2f"),
        ("... is kept busy by so many workers' cores", _workers_a_driver, ".1f"),
        ("... and so many games at once", lambda p: _workers_a_driver(p) * p["envs_a_worker"], ".0f"),
        ("... most of its time goes into", _wall, "s"),
    ]
    lines = [f"| | {' | '.join(names)} |", "|---|---|---|---|"]
    for what, figure, form in rows:
        cells = [format(figure(result["parts"][name]), form) for name in names]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    for place in ("core", "gpu"):
        rate = result.get(f"encoder_frames_per_s_a_{place}")
        measured = f"{rate:,.0f} frames/s a {place}" if rate else f"not measured on a {place}"
        lines += ["", f"The encoder alone: {measured}."]
    lines += [
        "",
        "| simulated environments | predicted, agent steps/s | measured | CPU ms a step |",
        "|---|---|---|---|",
    ]
    for name, run in result["runs"].items():
        lines.append(f"| {name} | {run['predicted']:,.0f} | {run['measured']:,.0f} | {1e3 * run['cpu_s']:.2f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="measured window of a run (10)")
    parser.add_argument(
        "--short", action="store_true", help="few workers, to see that it runs; the figures say nothing"
    )
    parser.add_argument("--results", type=Path, default=Path("latentrl-runs/bench/capacity"), help="kept runs")
    parser.add_argument("--fresh", action="store_true", help="measures again what has been kept")
    parser.add_argument("--json", action="store_true", help="ends with one JSON object")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="capacity.json and capacity.md")
    options = parser.parse_args(arguments)
    result = measure(options)
    shown = table(result)
    print(shown)
    if options.write:
        (options.write / "capacity.json").write_text(json.dumps(result, indent=1) + "\n")
        (options.write / "capacity.md").write_text(f"{HEAD.format(**result['machine'])}\n{shown}\n")
    if options.json:
        print(json.dumps(result))
    return 0


HEAD = """# Parts of distributed Q-learning, and what follows from them

`python benchmarks/capacity.py --write docs/results` on {processor}, {cores} cores, {memory_gib} GiB, commit {commit}.
What it means for a cluster: [scaling](../scaling.md).
"""


if __name__ == "__main__":
    sys.exit(main())
