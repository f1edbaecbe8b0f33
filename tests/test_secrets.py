"""Secrets by reference: what is taken for one by its name or look, and the file that they come from."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from jobs.cli import main
from pipeline.secrets import SECRETS_FILE_VARIABLE, is_secret_name, load_secrets, secret_in

PLANTED = "the-planted-password"
SECRET_NAMES = "PGPASSWORD MY_TOKEN aws_secret_access_key AWS_ACCESS_KEY_ID api.key HF_TOKEN GOOGLE_CREDENTIALS"
OTHER_NAMES = (
    "MONKEY TOKENIZERS_PARALLELISM MLFLOW_TRACKING_USERNAME RAY_AUTH_TOKEN_PATH LATENTRL_SECRETS_FILE train.lr"
)


def test_names_of_secrets_are_told_from_others() -> None:
    assert [name for name in SECRET_NAMES.split() if not is_secret_name(name)] == []
    assert [name for name in OTHER_NAMES.split() if is_secret_name(name)] == []
    for harmless in (
        "models:/pong-encoder@champion",
        "http://tracking:5000",
        "s3://bucket/a",
        "train.lr=1e-4",
        "a@b:c",
    ):
        assert secret_in(harmless) is None, harmless
    assert secret_in("AKIAIOSFODNN7EXAMPLE") is not None


def test_secrets_come_from_a_file_that_only_its_owner_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secrets.env"
    path.write_text(f"# mine\nexport PLANTED_PASSWORD='{PLANTED}'\nPLANTED_KEY=$HOME\n")
    path.chmod(0o600)
    monkeypatch.setenv("PLANTED_PASSWORD", "the environment's")
    monkeypatch.setenv("PLANTED_KEY", "")
    monkeypatch.setenv(SECRETS_FILE_VARIABLE, "")
    load_secrets()
    assert os.environ["PLANTED_PASSWORD"] == "the environment's"
    monkeypatch.setenv(SECRETS_FILE_VARIABLE, str(path))
    load_secrets()
    assert (os.environ["PLANTED_PASSWORD"], os.environ["PLANTED_KEY"]) == (PLANTED, "$HOME")


@pytest.mark.parametrize(
    ("mode", "content", "message"),
    [
        (0o640, f"PASSWORD={PLANTED}", "can be read by others .mode 640.; chmod 600"),
        (0o604, f"PASSWORD={PLANTED}", "can be read by others"),
        (0o600, f"{PLANTED}\n", "without NAME=VALUE"),
        (0o600, "", "without NAME=VALUE"),
        (0o600, None, "cannot read the secrets file .*No such file"),
    ],
)
def test_bad_secrets_files_end_every_stage_with_one_line(
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: int,
    content: str | None,
    message: str,
) -> None:
    path = tmp_path / "secrets.env"
    if content is not None:
        path.write_text(content)
        path.chmod(mode)
    monkeypatch.setenv(SECRETS_FILE_VARIABLE, str(path))
    assert main(["recipes"]) == 2
    (complaint,) = capfd.readouterr().err.splitlines()
    assert complaint.startswith("error: ")
    assert re.search(message, complaint)
    assert PLANTED not in complaint
