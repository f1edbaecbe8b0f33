"""`latentrl doctor` run in this process, and its findings sorted."""

from __future__ import annotations

import json

import pytest

from jobs.cli import main

Found = dict[str, list[dict[str, str]]]  # check -> its findings


def doctor(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Found]:
    """Exit code and findings of the command, run in this process."""
    code = main(["doctor", "--json", *map(str, arguments)])
    return code, findings(capfd.readouterr().out)


def findings(output: str) -> Found:
    """What the command printed, by check."""
    result = json.loads(output.splitlines()[-1])
    found: Found = {}
    for row in result["checks"]:
        found.setdefault(row["check"], []).append(row)
        assert row["seconds"] <= row["limit_s"], row
        assert bool(row["advice"]) == (row["state"] != "ok"), row
    assert len(result["errors"]) == sum(row["state"] == "bad" for row in result["checks"])
    return found


def states(found: Found) -> dict[str, str]:
    """The worst state of each check."""
    order = ("ok", "warn", "bad")
    return {check: max((row["state"] for row in rows), key=order.index) for check, rows in found.items()}


def said(found: Found, check: str, state: str) -> str:
    return "\n".join(f"{row['seen']}; {row['advice']}" for row in found[check] if row["state"] == state)
