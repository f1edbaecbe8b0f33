"""From measured cells to the keys, the table and the plot."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from peers.rows import Row
from peers.running import ROOT, versions
from pipeline.machine import cores

# Key: row above, row below.
RATIOS = {
    "frozen_over_rllib": ("frozen", "rllib"),
    "frozen_over_sb3": ("frozen", "sb3"),
    "frozen_over_yardstick": ("frozen", "yardstick"),
    "frozen_same_features_over_rllib": ("frozen_as_rllib", "rllib"),
    "frozen_same_features_over_sb3": ("frozen_as_sb3", "sb3"),
    "pixels_over_rllib": ("pixels_as_rllib", "rllib"),
    "pixels_over_sb3": ("pixels_as_sb3", "sb3"),
    "pixels_best_over_sb3": ("pixels_best", "sb3"),
    "pixels_encoder_over_sb3": ("pixels_encoder", "sb3"),
    "scaling_16_workers": ("scaling_16", "scaling_1"),
}
REPLAY_KEYS = (
    *("replay_bytes_per_step_pixels", "replay_bytes_per_step_latent", "z_dim"),
    *("replay_share_of_update", "replay_growth_cost"),
)
# Key: required, target.
BARS = {
    "frozen_over_rllib": ("≥ 30", "≥ 50"),
    "frozen_over_sb3": ("≥ 7", "≥ 12"),
    "frozen_over_yardstick": ("≥ 0.9", "≥ 1.5"),
    "pixels_over_rllib": ("≥ 4", "≥ 8"),
    "pixels_over_sb3": ("≥ 0.9", "≥ 1.1"),
    "pixels_best_over_sb3": ("≥ 1.3", "≥ 2"),
    "replay_bytes_per_step_pixels": ("≤ 7,300", ""),
    "replay_bytes_per_step_latent": ("≤ 2 z_dim + 64", ""),
    "replay_share_of_update": ("≤ 0.25", "≤ 0.1"),
    "replay_growth_cost": ("≤ 1.6", "≤ 1.2"),
    "scaling_16_workers": ("≥ 11", "≥ 14"),
    "replay_ratio_error": ("≤ 0.01", ""),
}
_FIGURES = ("updates_per_agent_step", "cpu_s_per_agent_step", "resident_mb", "time_to_first_update_s")


def summarise_row(variant: str, measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over repeats, with every repeat's rate.

    Args:
        variant: The one that was measured.
        measured: One mapping of figures per repeat.
    """
    rates = [figures["agent_steps_per_s"] for figures in measured]
    medians = {name: _median([figures.get(name) for figures in measured]) for name in _FIGURES}
    return {
        "variant": variant,
        "agent_steps_per_s": _rounded(statistics.median(rates)),
        "agent_steps_per_s_repeats": [_rounded(rate) for rate in rates],
        **{name: _rounded(value) for name, value in medians.items()},
    }


def keys(
    rows: Mapping[str, Mapping[str, Any]], replay: Mapping[str, Any], ratio_error: float | None
) -> dict[str, float | None]:
    """The benchmark's figures by key; None where a row is missing.

    Args:
        rows: Made by `summarise_row`.
        replay: What `replay.measure()` gave; may be empty.
        ratio_error: Made by `replay_ratio_error`.
    """
    figures = {key: _ratio(rows.get(above), rows.get(below)) for key, (above, below) in RATIOS.items()}
    figures |= {key: replay.get(key) for key in REPLAY_KEYS}
    at_16 = rows.get("scaling_16")
    figures["scaling_16_workers_cpu_s_per_agent_step"] = at_16["cpu_s_per_agent_step"] if at_16 else None
    figures["replay_ratio_error"] = ratio_error
    return figures


def replay_ratio_error(measured: Sequence[Mapping[str, Any]], warmup: int, configured: float) -> float | None:
    """|updates / (agent steps - warm-up) / configured - 1| at the end of the run; the worst repeat."""
    errors = [abs(run["updates"] / (run["agent_steps"] - warmup) / configured - 1) for run in measured]
    return round(max(errors), 5) if errors else None


def _ratio(above: Mapping[str, Any] | None, below: Mapping[str, Any] | None) -> float | None:
    if above is None or below is None:
        return None
    return round(float(above["agent_steps_per_s"] / below["agent_steps_per_s"]), 3)


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


KEYS = tuple(keys({}, {}, None))  # in the order of the table


def machine() -> dict[str, Any]:
    """Where it was measured: processor, cores, memory, and the commit."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "processor": _processor(),
        "cores": cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": platform.platform(),
        "commit": commit.stdout.strip() or None,
    }


def _processor() -> str:
    """Its name, and the family and model that tell one "AMD EPYC" from another."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = [line.partition(":") for line in cpuinfo.read_text().splitlines()] if cpuinfo.is_file() else []
    said = {name.strip(): value.strip() for name, _, value in lines}
    if "model name" not in said:
        return platform.processor()
    bf16 = ", bf16" if {"avx512_bf16", "amx_bf16"} & set(said.get("flags", "").split()) else ""
    return f"{said['model name']} (family {said.get('cpu family')}, model {said.get('model')}{bf16})"


def table(result: Mapping[str, Any], rows: Mapping[str, Row]) -> str:
    """Rows and keys in Markdown."""
    lines = [
        "| | set up | agent steps/s | repeats | updates a step | CPU ms a step | resident MB | first update, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        cpu = row["cpu_s_per_agent_step"]
        cells = [
            *(rows[name].what, row["variant"], f"{row['agent_steps_per_s']:,.0f}"),
            ", ".join(f"{rate:,.0f}" for rate in row["agent_steps_per_s_repeats"]),
            *(_shown(row["updates_per_agent_step"], 3), _shown(cpu and cpu * 1000, 2)),
            *(_shown(row["resident_mb"], 0), _shown(row["time_to_first_update_s"], 1)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| figure | measured | required | target |", "|---|---|---|---|"]
    for key in KEYS:
        required, target = BARS.get(key, ("", ""))
        lines.append(f"| `{key}` | {_shown(result[key])} | {required} | {target} |")
    return "\n".join(lines)


def _shown(value: float | None, digits: int | None = None) -> str:
    if value is None:
        return ""
    return f"{value:,.{digits}f}" if digits is not None else f"{value:.4g}"


def write(folder: Path, result: Mapping[str, Any], rows: Mapping[str, Row], command: str) -> None:
    """q_learning.md, q_learning.png and q_learning.json into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "q_learning.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(folder / "q_learning.png", result, rows)
    at, used = result["machine"], ", ".join(f"{name} {version}" for name, version in versions().items())
    (folder / "q_learning.md").write_text(
        _PAGE.format(command=command, table=table(result, rows), used=used, **at, **result["plan"])
    )


def plot(path: Path, result: Mapping[str, Any], rows: Mapping[str, Row]) -> None:
    """Medians as bars on a logarithmic axis, every repeat as a point."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = {name: row for name, row in result["rows"].items() if not name.startswith("scaling")}
    figure, axes = pyplot.subplots(figsize=(9, 0.4 * len(shown) + 1.2), layout="constrained")
    for position, (name, row) in enumerate(shown.items()):
        is_ours = rows[name].loop == "latentrl"
        axes.barh(position, row["agent_steps_per_s"], color="#3b6fb6" if is_ours else "#b8bec8")
        repeats = row["agent_steps_per_s_repeats"]
        axes.plot(repeats, [position] * len(repeats), "k|", markersize=8)
        axes.annotate(f" {row['agent_steps_per_s']:,.0f}", (max(repeats), position), va="center", fontsize=9)
    axes.set_yticks(range(len(shown)), [rows[name].what for name in shown])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.set_xlabel("agent steps per second, Pong, batch 32, one update per 4 agent steps")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


_PAGE = """# Speed of Q-learning

Pong (atari100k), batch 32, one update per 4 agent steps, {warmup_agent_steps:,} agent steps before the first update.
Each row runs in a process of its own, one at a time and in turn; medians over {repeats} turns of {seconds:g} s, begun
{settle_s:g} s after the first update. Where a row can be set up in several ways, the fastest of the first turn stands
for it.

`{command}`, commit {commit}.
{processor}, {cores} cores, {memory_gib} GiB; {used}.

{table}

![Agent steps per second of every row](q_learning.png)

`pixels_over_*` and `frozen_same_features_over_*` give latentrl the peer's features (RLlib: double, dueling,
prioritised; Stable-Baselines3: plain DQN, one step, uniform); the other `frozen_*` ratios are of the shipped recipe,
which updates in bf16 where the processor computes in it; with a peer's features all is float32.
In these pairs pixels are read by the convolutions of Mnih et al. (2015), as in Stable-Baselines3; RLlib runs with its
default convolutions or with those, whichever is faster. `pixels_encoder_over_sb3` is with the architecture of the
shipped encoder instead, every frame of the stack on its own. Preprocessing is each side's own: 84x84 grey frames, four
stacked, through the peers' own Atari wrappers (float32 in RLlib, uint8 in Stable-Baselines3).

Resident memory is of the process and all below it, pages that several share counted once, when the measured window
ends, so a faster row has filled more of its replay. Seconds to the first update count from the start of the process,
imports and Ray included. The simulated environment sleeps 10 ms per vector step of four environments and gives 128
floats; one update per 16 agent steps, fragments of 32 steps, 18 declared CPUs.
"""
