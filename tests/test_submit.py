"""Submitting without a cluster: what is refused before anything is sent, what is sent, how a log is put together."""

from __future__ import annotations

import contextlib
import os
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.job_submission import JobDetails, JobStatus, JobType
from ray.runtime_env import RuntimeEnv

from jobs import submission, submit
from jobs.cli import main, parser
from jobs.job_log import Shown
from jobs.job_server import JobServer
from jobs.package import MAX_BYTES, own_checkout, packed, pinned_environment
from jobs.submission import Submission, ready_for_a_cluster, understood
from jobs.workspace import JOB_VARIABLE, Workspace
from pipeline.errors import UserError
from pipeline.secrets import SECRETS_FILE_VARIABLE

PARSERS = next(action.choices for action in parser()._actions if action.choices)
COLLECT = "collect --game pong --frames 100 --out /shared/frames --home /shared/home"
PLANTED = "the-planted-password"


@pytest.fixture(autouse=True)
def nobodys_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS", SECRETS_FILE_VARIABLE, JOB_VARIABLE, "LATENTRL_HOME"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.chdir(tmp_path)


def stage(command: str) -> submission.Stage:
    return understood(command.split(), PARSERS)


def refused(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    with contextlib.suppress(SystemExit):
        assert main([str(argument) for argument in arguments]) == 2
    (complaint,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    return complaint


# --- what is refused before anything is sent: there is nobody at this address


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "name the stage to run"),
        ("--bogus", "name the stage to run"),
        ("pretain --data /d --register r", "did you mean pretrain?"),
        ("submit -- recipes", "no stage that can be submitted"),
        ("jobs list", "no stage that can be submitted; there are: collect, data, pretrain"),
        ("pretrain --data /d", "arguments are required: --register"),
        ("data chek /d", "invalid choice: 'chek'"),
        (f"{COLLECT} --frames many", "invalid int value: 'many'"),
        (f"{COLLECT} --game pongo", "did you mean pong"),
        ("pretrain vea --data /d --register r", "did you mean vae?"),
        ("pretrain --data /d --register r --set train.lrr=1", "did you mean train.lr"),
        ("pretrain --data /d --register r --config no.yaml", "cannot read --config no.yaml"),
        ("train --game pong --resume --resume-if-any", "not allowed with argument"),
        (COLLECT.replace("/shared/home", "home"), "--home home is relative"),
        (COLLECT.replace("/shared/home", "~/home"), "--home ~/home is relative"),
        (COLLECT.replace("/shared/frames", "frames"), "--out frames is relative"),
        ("demo", "--out latentrl-demo is relative"),
        ("data check frames", "--data frames is relative"),
        ("train --game pong --encoder bundle", "encoder bundle is a folder of this machine"),
        ("evaluate bundle", "policy bundle is a folder of this machine"),
        (f"{COLLECT} --tracking-uri sqlite:///mlflow.db", "--tracking-uri sqlite:///mlflow.db is relative"),
        ("pretrain --data /d --register r --config mine.yaml", "--config mine.yaml is not in what is sent"),
    ],
)
def test_bad_stages_are_refused_at_once(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, command: str, message: str
) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "mine.yaml").write_text("train: {lr: 0.1}\n")
    assert message in refused(capfd, "submit", "--address", "http://127.0.0.1:9", "--", *command.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-cpus", "-1"], "--num-cpus is -1"),
        (["--memory-gib", "nan"], "--memory-gib is nan"),
        (["--num-gpus", "inf"], "--num-gpus is inf"),
        (["--name", "a/b"], "--name 'a/b' is not usable"),
        (["--secrets-file", "secrets.env"], "--secrets-file secrets.env is relative"),
        (["--env", "A"], "write it as NAME=VALUE"),
        (["--cluster-code", "--working-dir", "/"], "leave out --working-dir"),
        (["--cluster-code", "--install"], "--install needs pyproject.toml and constraints.txt"),
        (["--working-dir", "nowhere"], "is not a folder"),
        (["--address", "10.0.0.1:6379"], "give --address http://10.0.0.1:8265"),
        (["--address", "ray://head:10001"], "give --address http://head:8265"),
        (["--address", "auto"], "give --address http://HOST:8265"),
    ],
)
def test_bad_wishes_are_refused_at_once(capfd: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert message in refused(capfd, "submit", *arguments, "--", *COLLECT.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--", *COLLECT.split(), "--tracking-uri", f"http://me:{PLANTED}@tracking:5000"],
        ["--", *COLLECT.split(), f"--tracking-uri=https://{PLANTED}@tracking"],
        ["--", *COLLECT.split(), "--out", f"s3://bucket/frames?X-Amz-Signature={PLANTED}"],
        ["--env", f"MLFLOW_TRACKING_PASSWORD={PLANTED}", "--", *COLLECT.split()],
        ["--env", f"AWS_SECRET_ACCESS_KEY={PLANTED}", "--", *COLLECT.split()],
        ["--env", f"DATABASE=postgresql://me:{PLANTED}@db/mlflow", "--", *COLLECT.split()],
    ],
)
def test_planted_secrets_are_refused_and_not_repeated(capfd: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    complaint = refused(capfd, "submit", "--address", "http://127.0.0.1:9", *arguments)
    assert "holds a secret" in complaint
    assert "--secrets-file" in complaint
    assert PLANTED not in complaint


# --- what is sent


def test_a_stage_joins_the_cluster_and_takes_its_config_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tmp_path / "project"
    (project / "settings").mkdir(parents=True)
    (project / "settings" / "mine.yaml").write_text("train: {lr: 0.1}\n")
    monkeypatch.chdir(project / "settings")
    with packed(project) as package:
        given = stage("pretrain --data s3://b/d --register r --config mine.yaml")
        ready = ready_for_a_cluster(given, package)
    options = PARSERS["pretrain"].parse_args(ready.words[1:])
    assert (options.config, options.ray_address) == ("settings/mine.yaml", "auto")
    assert ready_for_a_cluster(stage("data info s3://b/d"), None).words == ("data", "info", "s3://b/d")
    own = ready_for_a_cluster(stage(f"{COLLECT} --ray-address head:6379"), None)
    assert PARSERS["collect"].parse_args(own.words[1:]).ray_address == "head:6379"


def test_a_full_path_of_a_config_is_the_nodes_own() -> None:
    ready = ready_for_a_cluster(stage("pretrain --data /d --register r --config /only/there.yaml"), None)
    assert PARSERS["pretrain"].parse_args(ready.words[1:]).config == "/only/there.yaml"


def test_the_same_submission_has_the_same_name_and_another_has_another(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("a = 1")
    with packed(tmp_path) as package:
        what = Submission(stage(COLLECT), package, {"A": "1"}, None, False)
        assert what.name == Submission(stage(COLLECT), package, {"A": "1"}, None, False).name
        others = [
            replace(what, stage=stage(f"{COLLECT} --seed 1")),
            replace(what, package=replace(package, digest="other")),
            replace(what, package=None),
            replace(what, variables={"A": "2"}),
            replace(what, secrets_file="/s"),
            replace(what, is_pinned=True),
        ]
        assert len({what.name, *(other.name for other in others)}) == 1 + len(others)
        assert what.name.startswith("collect-pong-")


def job(name: str, status: JobStatus) -> JobDetails:
    return JobDetails(type=JobType.SUBMISSION, submission_id=name, status=status, entrypoint="")


@pytest.mark.parametrize(
    ("statuses", "is_again", "expected"),
    [
        ([], False, "a"),
        ([JobStatus.FAILED], False, "a-2"),
        ([JobStatus.STOPPED, JobStatus.FAILED], False, "a-3"),
        ([JobStatus.RUNNING], False, "is running already: a;"),
        ([JobStatus.PENDING], False, "is pending already: a;"),
        ([JobStatus.FAILED, JobStatus.SUCCEEDED], False, "has succeeded already: a-2;"),
        ([JobStatus.SUCCEEDED], True, "a-2"),
    ],
)
def test_a_job_is_repeated_when_it_failed_and_not_doubled(
    statuses: list[JobStatus], is_again: bool, expected: str
) -> None:
    jobs = [job("a" if not number else f"a-{number + 1}", status) for number, status in enumerate(statuses)]
    jobs += [job("a-b", JobStatus.RUNNING), job("a-9", JobStatus.RUNNING)]
    if "already" in expected:
        with pytest.raises(UserError, match=expected) as caught:
            submit.free_id("a", jobs, is_again=is_again)
        assert "jobs logs a" in str(caught.value)
        assert "--again" in str(caught.value)
    else:
        assert submit.free_id("a", jobs, is_again=is_again) == expected


KEPT = ("jobs/cli.py", "settings/mine.yaml", "pyproject.toml", "constraints.txt", "data.json")
LEFT_OUT = (
    *(".git/HEAD", ".venv/bin/python", "latentrl-runs/runs/a/run.json", "latentrl-demo-2/x", "a/__pycache__/b.pyc"),
    *("frames/part-0.parquet", "bundle/model.safetensors", "replay/obs.npy", "mlruns/1/meta.yaml", "dist/a.whl"),
    *(".env", "infra/.env", "tls/server.pem", ".ray/auth_token", "ignored.txt", "deep/also.txt", "mine/x.big"),
)


def project_in(root: Path) -> Path:
    for name in (*KEPT, *LEFT_OUT):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"content of {name}")
    (root / ".gitignore").write_text("ignored.txt\n")
    (root / "deep" / ".rayignore").write_text("also.txt\n")
    return root


def test_code_and_settings_are_sent_and_nothing_else(tmp_path: Path) -> None:
    with packed(project_in(tmp_path / "p"), ["*.big"]) as package:
        assert set(package.files) == {*KEPT, ".gitignore", "deep/.rayignore"}
        with zipfile.ZipFile(package.archive) as archive:
            assert {name: archive.read(name).decode() for name in KEPT} == {n: f"content of {n}" for n in KEPT}
            assert set(archive.namelist()) == package.files
    assert not package.archive.exists()


def test_a_package_is_known_by_what_is_in_it(tmp_path: Path) -> None:
    root = project_in(tmp_path / "p")
    with packed(root) as package:
        first, content = package.digest, package.archive.read_bytes()
    os.utime(root / "jobs" / "cli.py", (1, 1))
    (root / ".env").write_text("PASSWORD=other")
    with packed(root) as package:
        assert (package.digest, package.archive.read_bytes()) == (first, content)
    (root / "jobs" / "cli.py").write_text("changed")
    with packed(root) as package:
        assert package.digest != first


def test_a_folder_that_is_too_large_names_its_largest_files(tmp_path: Path) -> None:
    for name, size in (("big.bin", MAX_BYTES - 1000), ("half.bin", MAX_BYTES // 2)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
    with pytest.raises(UserError, match=r"149 MiB.*takes 100; .*big.bin \(99 MiB\), half.bin \(50 MiB\).*--exclude"):
        packed(tmp_path).__enter__()
    with packed(tmp_path, ["big.bin"]) as package:
        assert package.files == {"half.bin"}


def test_this_checkout_is_small_and_whole() -> None:
    root = own_checkout()
    assert root is not None
    with packed(root) as package:
        assert {"jobs/cli.py", "pyproject.toml", "constraints.txt"} <= package.files
        page = [path for ending in ("j2", "css", "js") for path in (root / "pipeline").glob(f"*.{ending}")]
        assert len(page) >= 5
        assert {f"pipeline/{path.name}" for path in page} <= package.files
        assert not any(name.endswith((".parquet", ".db", ".env")) for name in package.files)
        assert package.num_bytes < 10 << 20


def test_pinned_environments_are_rays_and_another_one_for_other_pins(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "p"\ndependencies = ["numpy>=2", "ray[default]>=2.60"]')
    fields = []
    for pins in ("numpy==2.1.0\n", "numpy==2.2.0\n"):
        (tmp_path / "constraints.txt").write_text(pins)
        with packed(tmp_path) as package:
            fields.append(pinned_environment(package))
    validated = RuntimeEnv(pip=fields[0]).to_dict()["pip"]["packages"]
    assert validated[:2] == ["numpy>=2", "ray[default]>=2.60"]
    assert "-c ${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/constraints.txt" in validated
    assert RuntimeEnv(pip=fields[0]).pip_uri() != RuntimeEnv(pip=fields[1]).pip_uri()


def test_what_surprises_on_a_cluster_is_said() -> None:
    def notes(command: str, **variables: str) -> str:
        return "\n".join(submission.notes(stage(command), variables))

    server = "--tracking-uri http://tracking:5000"
    assert notes(f"{COLLECT} {server}") == ""
    assert "ends with an error where they have none" in notes(f"collect --game pong --frames 9 --out /f {server}")
    assert notes(f"collect --game pong --frames 9 --out /f {server}", LATENTRL_HOME="/shared") == ""
    assert "sqlite" in notes(COLLECT)
    assert "on the node that the job's driver runs on" in notes(f"{COLLECT} --tracking-uri http://localhost:5000")
    assert notes("data info /d") == ""


def test_drivers_that_compute_ask_for_a_processor() -> None:
    def cpus(command: str) -> int:
        options = stage(command).options
        return int(options.driver_cpus(options))

    assert cpus("train --game pong") == cpus("train --game pong --num-learners 1 --num-env-runners 0") == 1
    assert cpus("evaluate random:pong") == 1
    assert cpus("train --game pong --num-learners 1") == cpus(COLLECT) == cpus("pretrain --data /d --register r") == 0


# --- logs


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(max_size=8), max_size=12), st.lists(st.integers(0, 12), max_size=6))
def test_a_log_read_again_from_its_start_is_shown_once(pieces: list[str], cuts: list[int]) -> None:
    """Connections that end after any number of pieces, then the whole log at the end."""
    parts: list[str] = []
    shown = Shown(parts.append)
    longest = 0
    for cut in cuts:
        position, longest = 0, max(longest, cut)
        for piece in pieces[:cut]:
            position = shown.take(position, piece)
        assert "".join(parts) == "".join(pieces[:longest])
    shown.take(0, "".join(pieces))
    assert "".join(parts) == "".join(pieces)


# --- the server


@contextlib.contextmanager
def website(status: int, body: bytes) -> Iterator[str]:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("status", "body"), [(200, b"<html>"), (200, b"{}"), (404, b""), (302, b""), (500, b"")])
def test_another_server_is_told_from_rays(capfd: pytest.CaptureFixture[str], status: int, body: bytes) -> None:
    with website(status, body) as address:
        assert "not as Ray's dashboard" in refused(capfd, "jobs", "list", "--address", address)


def test_the_address_given_comes_before_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:11")
    for option, asked in ((None, 11), ("http://127.0.0.1:13", 13)):
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
        with pytest.raises(UserError, match=f"answers at http://127.0.0.1:{asked}"):
            JobServer(option)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://me:planted@127.0.0.1:17")
    with pytest.raises(UserError, match=r"answers at http://\*\*\*@127.0.0.1:17"):
        JobServer()
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    monkeypatch.setenv("RAY_ADDRESS", "")
    with pytest.raises(UserError, match=r"answers at http://127\.0\.0\.1:8265"):
        JobServer()


# --- in the job


def test_a_job_without_a_home_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Workspace.at(None).home == tmp_path / "latentrl-runs"
    monkeypatch.setenv(JOB_VARIABLE, "collect-1")
    with pytest.raises(UserError, match="give --home, a folder that every node sees"):
        Workspace.at(None)
    assert Workspace.at("/shared").home == Path("/shared")
    monkeypatch.setenv("LATENTRL_HOME", "/nodes")
    assert Workspace.at(None).home == Path("/nodes")
