"""The commands beside the data's way: what watches runs, moves them or repairs them. Each is imported when run."""

from __future__ import annotations

from typing import Any

from jobs.options import Options, Result, facts, places, stage, workspace_of


def add_operations(commands: Any) -> None:
    """Adds every operation to the command line."""
    for add in (_sync,):
        add(commands)


def _sync(commands: Any) -> None:
    def run(o: Options) -> Result:
        from jobs import sync

        return sync.run(workspace_of(o), o.run_name)

    details = "For runs that ended while the tracking server was away (exit code 3)."
    p = stage(commands, "sync", "deliver to MLflow what a run could not", details, run, lambda r: facts(r, *r))
    p.add_argument("run_name", metavar="RUN", help="a run's folder, its name, or its MLflow run id")
    places(p)
