"""`latentrl submit` and `latentrl jobs`: options, and what each prints. The work is done in jobs/submit.py."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from jobs.options import Options, Result, stage


def add_job_commands(commands: Any) -> None:
    """Adds the commands about jobs of a cluster to the command line."""
    for add in (_submit, _jobs):
        add(commands)


def _submit(commands: Any) -> None:
    def run(o: Options) -> Result:
        from jobs import submit

        wishes = submit.Wishes(
            name=o.name,
            is_again=o.again,
            num_cpus=o.num_cpus,
            num_gpus=o.num_gpus,
            memory_gib=o.memory_gib,
            working_dir=o.working_dir,
            is_cluster_code=o.cluster_code,
            excludes=o.exclude,
            is_pinned=o.install,
            variables=o.env,
            secrets_file=o.secrets_file,
        )
        result = submit.run(o.command, commands.choices, o.address, wishes)
        if not o.watch:
            return result
        print(submitted(result), file=sys.stderr, flush=True)
        return {**result, **submit.watch(o.address, result["job"], submit.printing(as_json=o.json))}

    def submitted(r: Result) -> str:
        sent = (
            f"{r['num_files']} files, {r['package_bytes'] / 2**20:.1f} MiB" if r["num_files"] else "the cluster's own"
        )
        lines = [f"note: {note}" for note in r["notes"]]
        return "\n".join([*lines, f"submitted {r['job']} (CPUs for its driver: {r['num_cpus']:g}; code: {sent})"])

    def present(r: Result) -> str:
        return ended(r) if "status" in r else f"{submitted(r)}\nnext: {r['watch']}"

    details = (
        "The stage's arguments are checked here, before anything is sent. The code of this checkout, or of\n"
        "--working-dir, goes with it, without data, checkpoints, environments and secrets. Packages are those of the\n"
        "cluster's nodes, or with --install the project's pinned ones. The same command on the same code is the same\n"
        "job: it is not started twice unless it failed, was stopped, or --again is given.\n\n"
        "  latentrl submit --watch -- collect --game pong --frames 100000 --out /shared/frames --home /shared/latentrl"
    )
    p = stage(commands, "submit", "run a stage as a job of a cluster that runs", details, run, present)
    _address(p)
    p.add_argument("--watch", action="store_true", help="show its output to the end; exit code 0 succeeded, 1 failed")
    p.add_argument("--name", help="the job's name (made of the command and the code)")
    p.add_argument("--again", action="store_true", help="start it although it runs or has succeeded")
    needs = p.add_argument_group("what its driver needs")
    needs.add_argument("--num-cpus", type=float, metavar="N", help="(1 where the driver learns or plays, else 0)")
    needs.add_argument("--num-gpus", type=float, default=0, metavar="N", help="(0)")
    needs.add_argument("--memory-gib", type=float, default=0, metavar="N", help="(0: not counted)")
    code = p.add_argument_group("what it runs with")
    code.add_argument("--working-dir", metavar="DIR", help="folder whose code runs (this latentrl's checkout)")
    code.add_argument("--cluster-code", action="store_true", help="send no code: run the nodes' own latentrl")
    code.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help="leave out, as in a .gitignore")
    code.add_argument("--install", action="store_true", help="have Ray install the dependencies by constraints.txt")
    code.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="variable of all its processes")
    code.add_argument("--secrets-file", metavar="PATH", help="file of lines NAME=VALUE on the nodes, its owner's alone")
    p.add_argument("command", nargs=argparse.REMAINDER, metavar="-- STAGE ...", help="the stage, as on this machine")


def ended(r: Result) -> str:
    """How a job that was watched has ended."""
    return "\n".join(r.get("errors", [])) or f"{r['job']} {r['status'].lower()}"


def _jobs(commands: Any) -> None:
    def listed(o: Options) -> Result:
        from jobs import submit

        return submit.listed(o.address)

    def logs(o: Options) -> Result:
        from jobs import submit

        return (
            submit.watch(o.address, o.job, submit.printing(as_json=o.json))
            if o.follow
            else submit.log(o.address, o.job)
        )

    def stop(o: Options) -> Result:
        from jobs import submit

        return submit.stop(o.address, o.job)

    def table(r: Result) -> str:
        rows = [("job", "status", "started", "seconds")]
        rows += [(row["job"], row["status"], row["started"], str(row["seconds"])) for row in r["jobs"]]
        widths = [max(map(len, column)) for column in zip(*rows)]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)

    root = commands.add_parser("jobs", help="list, read and stop jobs", description="The jobs of a cluster.")
    verbs = root.add_subparsers(title="verbs", metavar="VERB", required=True, parser_class=type(root))
    _address(stage(verbs, "list", "list the jobs of a cluster", "The latest last.", listed, table))
    details = (
        "With --follow to its end, through lost connections; exit code 0 succeeded, 1 failed. Ctrl-C leaves it alone."
    )
    p = stage(
        verbs, "logs", "print what a job has printed", details, logs, lambda r: r["log"] if "log" in r else ended(r)
    )
    _address(p)
    p.add_argument("--follow", action="store_true", help="and what it goes on to print")
    p.add_argument("job", metavar="JOB", help="its name, as `latentrl jobs list` has it")
    p = stage(verbs, "stop", "end a job", "It has a minute to write its checkpoint, then Ray kills it.", stop, ended)
    _address(p)
    p.add_argument("job", metavar="JOB", help="its name, as `latentrl jobs list` has it")


def _address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address",
        metavar="URL",
        help="of the cluster's dashboard ($RAY_API_SERVER_ADDRESS, $RAY_ADDRESS, http://127.0.0.1:8265)",
    )
