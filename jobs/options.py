"""What all commands' options and results have in common: types of arguments, places, figures in words."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from jobs.workspace import DEFAULT_HOME, HOME_VARIABLE, PIPELINE_VARIABLE, Workspace

Options = argparse.Namespace
Result = dict[str, Any]


def stage(
    stages: Any,
    name: str,
    help_line: str,
    details: str,
    run: Callable[[Options], Result],
    present: Callable[[Result], str],
    *,
    check: Callable[[Options], object] = lambda o: None,
    driver_cpus: Callable[[Options], int] = lambda o: 0,
) -> argparse.ArgumentParser:
    """Adds a command with what all have.

    Args:
        stages: Where it is added.
        name: Of the command.
        help_line: One line on it.
        details: More lines.
        run: Makes its result of the options.
        present: Says the result in words.
        check: Refuses options that can be seen to be wrong without places and Ray, before the command is submitted.
        driver_cpus: How many CPUs the command's own process keeps busy, where it runs as a job of a cluster.
    """
    parser: argparse.ArgumentParser = stages.add_parser(
        name,
        help=help_line,
        description=f"{help_line}\n\n{details}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, present=present, check=check, driver_cpus=driver_cpus)
    common = parser.add_argument_group("common options")
    common.add_argument("--json", action="store_true", help="make the last line of stdout one JSON object")
    return parser


def seed(text: str) -> int:
    """Type of every --seed: a whole number that every generator takes."""
    number = int(text) if text.lstrip("+-").isdigit() else -1
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is no seed; give a whole number from 0 to {2**32 - 1}")
    return number


def share(text: str) -> float:
    """Type of a share of one."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share; give a number from 0 to 1")
    return number


def seconds(text: str) -> float:
    """Type of a duration."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no duration; give a number of seconds, 0 or more")
    return number


def places(parser: argparse.ArgumentParser, *, uses_ray: bool = True, has_workers: bool = False) -> None:
    """Adds the options that say where everything lies, and how long workers wait for room on a cluster."""
    group = parser.add_argument_group("places")
    group.add_argument(
        "--home", help=f"folder for runs, tracking database and artifacts (${HOME_VARIABLE}, {DEFAULT_HOME})"
    )
    group.add_argument("--tracking-uri", help="MLflow server instead of a sqlite file under --home")
    if uses_ray:
        group.add_argument("--ray-address", help="running Ray cluster (HOST:PORT or auto) instead of a local one")
    if has_workers:
        waiting(group)


def waiting(group: Any) -> None:
    """Adds the option of stages that need more of a cluster than it may have at their start."""
    group.add_argument(
        "--wait",
        type=seconds,
        metavar="SECONDS",
        help="wait so long for room on the cluster, made by its autoscaler or by nodes that you add (0; with an "
        "autoscaler 600, as long as nodes come)",
    )


def gathered(parser: argparse.ArgumentParser) -> None:
    """Adds the option that gathers the runs of several commands under one."""
    parser.add_argument(
        "--pipeline",
        metavar="NAME",
        help=f"nest this run in MLflow under the run NAME, made if need be (${PIPELINE_VARIABLE})",
    )


def workspace_of(options: Options) -> Workspace:
    """The places that the options name."""
    given = (getattr(options, name, None) for name in ("home", "tracking_uri", "ray_address", "pipeline", "wait"))
    return Workspace.at(*given)


def facts(result: Result, *keys: str) -> str:
    """Some of a result, one line a key, without those that are None; figures have six digits, all are in --json."""
    width = max(map(len, keys))
    shown = {key: result[key] for key in keys if result.get(key) is not None}
    return "\n".join(
        f"  {key.replace('_', ' '):<{width}}  {f'{value:.6g}' if isinstance(value, float) else value}"
        for key, value in shown.items()
    )
