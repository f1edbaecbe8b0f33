"""What does an update of Q cost while its encoder goes on learning? Side by side, in turn, on Pong's frames.

    frozen    latents that the replay holds
    cache     latents that the replay keeps for its frames, some made anew beside every update (mode online)
    exact     the same, but drawn frames are encoded anew (`elbo.q_reads=exact`)
    finetune  drawn frames through an encoder that the TD error trains

Recipes `dqn` and `online`, encoder of recipe `vae` with random weights (they do not change the time), one process.

    python benchmarks/online.py [--rounds 15] [--threads 1] [--json] [--write docs/results]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from atariari.keeping import exit_code
from peers.measuring import ray_here
from peers.ours import config_of

from jobs.recipes import train_recipe
from rllib_ext.algorithm import LatentDQN

UPDATES, BOUND_UPDATES = 16, 4  # of a turn
MODES = {"frozen": "frozen", "cache": "online", "exact": "online", "finetune": "finetune"}

Turn = Callable[[], int]


@contextlib.contextmanager
def algorithms(threads: int, agent_steps: int) -> Iterator[dict[str, LatentDQN]]:
    """One of each row, past its first update, with as many agent steps behind it; bound updates come by call only."""
    with tempfile.TemporaryDirectory() as folder, ray_here(2):
        built = {}
        for name, mode in MODES.items():
            train = {"learner_threads": threads, "warmup_agent_steps": agent_steps // 2}
            reads = name if name == "exact" else "cache"
            elbo = replace(train_recipe("online").elbo, q_reads=reads, warmup_agent_steps=sys.maxsize)
            config = config_of(Path(folder) / name, mode, train, {}, num_workers=0)
            built[name] = (config.latent(elbo=elbo) if mode == "online" else config).build_algo()
            while built[name].agent_steps < agent_steps:
                built[name].train()
        torch.set_num_threads(threads)
        yield built
        for algorithm in built.values():
            algorithm.stop()


def turns(built: dict[str, LatentDQN]) -> dict[str, Turn]:
    """By row: makes some updates and says how many."""

    def of_q(algorithm: LatentDQN) -> Turn:
        def updates() -> int:
            algorithm._seconds = defaultdict(float)
            algorithm._learn(UPDATES)
            return UPDATES

        return updates

    def of_bound() -> int:
        built["cache"].encoder_learning._update(BOUND_UPDATES)
        return BOUND_UPDATES

    return {**{name: of_q(algorithm) for name, algorithm in built.items()}, "bound": of_bound}


def milliseconds(rows: dict[str, Turn], rounds: int) -> dict[str, float]:
    """Median of an update of each, over rounds in which each has one turn."""
    found: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(rounds + 1):
        for name, turn in rows.items():
            started = time.perf_counter()
            updates = turn()
            if number:  # the first is not counted
                found[name].append(1e3 * (time.perf_counter() - started) / updates)
    return {name: round(statistics.median(values), 2) for name, values in found.items()}


def page(found: dict[str, float], threads: int) -> str:
    """As Markdown."""
    processor = torch.cpu.get_capabilities().get("cpu_name", "an unknown processor")
    lines = ["# What an update of Q costs while its encoder learns", ""]
    lines += [
        f"`python benchmarks/online.py`, {threads} thread(s), {processor}; medians of turns of {UPDATES} updates."
    ]
    lines += ["", "| Q reads | ms an update | over frozen |", "|---|---|---|"]
    lines += [f"| {name} | {found[name]:.2f} | {found[name] / found['frozen']:.2f} |" for name in MODES]
    batch = train_recipe("online").elbo.batch_size
    lines += [f"| (an update on the bound, {batch} frames) | {found['bound']:.2f} | |"]
    return "\n".join(lines) + "\n"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--agent-steps", type=int, default=8_000, help="played before; rows of the replay")
    parser.add_argument("--json", action="store_true", help="ends with one JSON object")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="page of the figures")
    options = parser.parse_args(arguments)
    for name in ("rounds", "threads", "agent_steps"):
        if (value := getattr(options, name)) < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}; give 1 or more")
    if options.write and not options.write.is_dir():
        parser.error(f"--write {options.write} is no folder")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measures and says."""
    options = parse(arguments)
    with algorithms(options.threads, options.agent_steps) as built:
        found = milliseconds(turns(built), options.rounds)
    print(page(found, options.threads), file=sys.stderr)
    if options.write:
        (options.write / "online.md").write_text(page(found, options.threads))
    if options.json:
        print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
