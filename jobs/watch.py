"""Whoever waits reads why: a stage that makes no progress says so, with what Ray has, at least once a minute."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

import ray
from tqdm import tqdm

from pipeline import storage
from pipeline.patience import within

SAY_EVERY_S = 40.0  # without progress
_ANSWER_WITHIN_S, _STORE_ANSWERS_WITHIN_S = 5.0, 14.0  # a store that hangs takes 13 s to be given up

_last_progress = 0.0
_is_watched = False


def sign_of_life() -> None:
    """Whatever moves on says so here."""
    global _last_progress
    _last_progress = time.monotonic()


@contextlib.contextmanager
def watched(what: str, needs: dict[str, float], data: str | None = None) -> Iterator[None]:
    """Says on stderr, from a thread, when there has been no sign of life for long; Ray must be running.

    Args:
        what: Who waits ("2 collecting workers").
        needs: The resources that it takes at once.
        data: Address that its workers read or write, which may be what is away.
    """
    global _is_watched
    if _is_watched:  # by an enclosing session
        yield
        return
    has_ended = threading.Event()

    def look() -> None:
        said_at = 0.0
        while not has_ended.wait(1.0):
            now = time.monotonic()
            if now - max(said_at, _last_progress) >= SAY_EVERY_S:
                said_at = now
                lines = [f"no progress for {now - _last_progress:.0f} s", _situation(what, needs), *_away(data)]
                tqdm.write("; ".join(lines), file=sys.stderr)

    sign_of_life()
    _is_watched = True
    thread = threading.Thread(target=look, name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        _is_watched = False
        has_ended.set()
        thread.join(2.0)


def _away(data: str | None) -> list[str]:
    """What is wrong with the store of the data, if anything."""
    if data is None:
        return []
    try:
        found = within(_STORE_ANSWERS_WITHIN_S, lambda: storage.complaint(data), "watch-data")
    except TimeoutError:
        found = f"{storage.shown(data)} does not answer"
    return [f"{found}; it is tried again and again"] if found else []


def _situation(what: str, needs: dict[str, float]) -> str:
    """What Ray has of what is needed; Ray itself may be what does not answer."""
    try:
        return within(_ANSWER_WITHIN_S, lambda: _resources(what, needs), "watch-ray")
    except Exception:
        return "Ray does not answer"


def _resources(what: str, needs: dict[str, float]) -> str:
    nodes, all_of, free = ray.nodes(), ray.cluster_resources(), ray.available_resources()
    num_dead = sum(not node["Alive"] for node in nodes)
    num_alive = len(nodes) - num_dead
    has = f"Ray has {num_alive} node{'s' * (num_alive != 1)} ({num_dead} lost)"
    if not needs:
        return has
    idle = ", ".join(f"{free.get(name, 0):g} of {all_of.get(name, 0):g} {name}s idle" for name in needs)
    wanted = " and ".join(f"{amount:g} {name}s" for name, amount in needs.items())
    missing = [name for name, amount in needs.items() if all_of.get(name, 0) < amount]
    waits = f"waiting for a node with {' and '.join(missing)}s" if missing else "those that they hold already included"
    return f"{has}, {idle}; {what} take {wanted}, {waits}"
