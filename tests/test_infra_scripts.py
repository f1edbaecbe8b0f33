"""The scripts under infra/, run with stand-ins for what a cluster has."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

from infra_files import INFRA, LAUNCHER, README, commands, understood


def stand_in(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def test_scripts_and_command_lines_are_bash() -> None:
    texts = [(INFRA / "slurm/latentrl.sbatch").read_text()]
    texts += re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    texts += [line for key, lines in LAUNCHER.items() if key.endswith("_commands") for line in lines]
    assert len(texts) > 10
    for text in texts:
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def run_sbatch(tmp_path: Path, *arguments: str, symmetric_run: str) -> subprocess.CompletedProcess[str]:
    """The script as SLURM starts it on two nodes, of which the stand-in for srun is the first."""
    checkout, bin_ = tmp_path / "checkout", tmp_path / "checkout" / ".venv" / "bin"
    bin_.mkdir(parents=True)
    stand_in(bin_ / "scontrol", '[ "$*" = "show hostnames node[1-2]" ] && printf "node1\\nnode2\\n"')
    stand_in(bin_ / "srun", 'while [[ "$1" == --* ]]; do shift; done; exec "$@"')
    token = "mkdir -p ~/.ray; echo the-token | tee ~/.ray/auth_token; exit"
    stand_in(bin_ / "ray", f'[ "$1" = get-auth-token ] && {{ {token}; }}\n{symmetric_run}')
    stand_in(bin_ / "latentrl", f'printf "%s\\n" "$@" > {tmp_path}/stage; exit 0')
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "LATENTRL_HOME": str(tmp_path / "shared"),
        "LATENTRL_TRACKING_URI": "http://tracking:5000",
        "SLURM_SUBMIT_DIR": str(checkout),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "16",
    }
    command = ["bash", INFRA / "slurm" / "latentrl.sbatch", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_slurm_script_calls_ray_and_the_stage_as_they_want_it(tmp_path: Path) -> None:
    from ray.scripts.scripts import start
    from ray.scripts.symmetric_run import curate_and_validate_ray_start_args, symmetric_run

    record = f'shift; printf "%s\\n" "$@" > {tmp_path}/ray; while [ "$1" != -- ]; do shift; done; shift; exec "$@"'
    arguments = shlex.split(commands(README, "latentrl.sbatch")[0])
    ended = run_sbatch(tmp_path, *arguments, symmetric_run=record)
    assert ended.returncode == 0, ended.stderr
    assert "the-token" not in ended.stdout + ended.stderr
    assert (tmp_path / ".ray" / "auth_token").stat().st_mode & 0o077 == 0
    called = (tmp_path / "ray").read_text().split("\n")[:-1]
    options = called[: called.index("--")]
    parsed = symmetric_run.make_context("symmetric-run", [*options, "--", "true"]).params
    assert (parsed["address"], parsed["min_nodes"]) == ("node1:6379", 2)
    passed_on = start.make_context("start", ["--head", *curate_and_validate_ray_start_args(options)]).params
    assert passed_on["num_cpus"] == 16
    stage = (tmp_path / "stage").read_text().split("\n")[:-1]
    assert stage[: len(arguments)] == arguments
    chosen = understood(stage)
    assert chosen.resume_if_any
    assert (chosen.home, chosen.ray_address) == (f"{tmp_path}/shared/slurm-7", "node1:6379")
    assert chosen.tracking_uri == "http://tracking:5000"


def test_the_slurm_script_fails_where_ray_ended_without_the_stage(tmp_path: Path) -> None:
    ended = run_sbatch(tmp_path, "recipes", symmetric_run="exit 0")
    assert ended.returncode == 1
    assert "the stage was not run" in ended.stderr
    assert not (tmp_path / "stage").exists()
