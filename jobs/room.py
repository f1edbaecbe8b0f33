"""Whether Ray has what a stage needs, and the wait until it has."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping

import ray
from tqdm import tqdm

from jobs.autoscaler import Autoscaler, asked_for, autoscaler
from pipeline.errors import UserError

DRIVER_CPUS_VARIABLE = "LATENTRL_DRIVER_CPUS"  # what Ray keeps for this process, where it is a job's driver
AUTOSCALER_WAIT_S = 600.0  # where --wait says nothing and there is an autoscaler; a machine may have to be bought
NOTHING_COMES_S = 60.0  # then that autoscaler is taken to be at its limit
SAY_EVERY_S = 15.0
_LOOK_EVERY_S = 1.0


def require(needs: Mapping[str, float], what: str, wait_s: float | None = None, *, is_cluster: bool = True) -> None:
    """Makes sure that the Ray that is joined has what is needed, and waits for it where that may help.

    Args:
        needs: Resources, for example {"CPU": 3}.
        what: Who needs them, in words ("2 collecting workers").
        wait_s: How long to wait. None: not at all, but where there is an autoscaler, up to AUTOSCALER_WAIT_S as long
            as that brings nodes.
        is_cluster: Whether it could grow at all.

    Raises:
        UserError: They are not there, after the wait.
    """
    if not _missing(needs):
        return
    limit_s = wait_s if wait_s is not None else AUTOSCALER_WAIT_S if autoscaler() else 0.0
    began = time.monotonic()
    if limit_s:
        with asked_for(needs):
            _wait(needs, what, limit_s, is_patient=wait_s is not None)
    if _missing(needs):
        waited = f" after {time.monotonic() - began:.0f} s" if limit_s else ""
        ways = "add nodes, or wait for them with --wait SECONDS" if is_cluster else "or give --ray-address"
        advice = f"ask for fewer, {ways}"
        raise UserError(f"{_shortage(needs, what)}{waited}; {advice}")


def free_cpus() -> int:
    """CPUs that nobody on the cluster uses now, whole ones, at least 1."""
    return max(1, int(ray.available_resources().get("CPU", 0)))


def _wait(needs: Mapping[str, float], what: str, limit_s: float, *, is_patient: bool) -> None:
    """Returns when all is there, when the time is over, or, unless it is patient, when nothing more comes."""
    began = said_at = moved_at = time.monotonic()
    had: dict[str, float] = {}
    _say(needs, what, limit_s, autoscaler())
    while (missing := _missing(needs)) and (now := time.monotonic()) < began + limit_s:
        scaler = autoscaler()
        if missing != had or (scaler is not None and scaler.num_coming):
            had, moved_at = missing, now
        if not is_patient and now - moved_at >= NOTHING_COMES_S:
            _tell(f"the autoscaler has brought nothing for {NOTHING_COMES_S:.0f} s and is starting no node")
            return
        if now - said_at >= SAY_EVERY_S:
            said_at = now
            _say(needs, what, began + limit_s - now, scaler)
        time.sleep(_LOOK_EVERY_S)


def _say(needs: Mapping[str, float], what: str, left_s: float, scaler: Autoscaler | None) -> None:
    coming = f", {scaler.num_coming} nodes are being started" if scaler is not None else ""
    _tell(f"waiting: {_shortage(needs, what)}{coming}; {left_s:.0f} s left")


def _tell(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


def _shortage(needs: Mapping[str, float], what: str) -> str:
    has, missing = _has(), _missing(needs)
    parts = (f"{needs[name]:g} {name}s, Ray has {has.get(name, 0):g} for them" for name in missing)
    return f"{what} need {' and '.join(parts)}"


def _missing(needs: Mapping[str, float]) -> dict[str, float]:
    has = _has()
    return {name: amount - has.get(name, 0) for name, amount in needs.items() if amount > has.get(name, 0)}


def _has() -> dict[str, float]:
    has: dict[str, float] = ray.cluster_resources()
    return {**has, "CPU": has.get("CPU", 0) - float(os.environ.get(DRIVER_CPUS_VARIABLE, 0))}
