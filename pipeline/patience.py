"""A call that takes no longer than its caller can wait, whatever the network or a disk does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def within(seconds: float, question: Callable[[], T], name: str = "question") -> T:
    """The answer of `question`, asked in a thread that is left behind if it takes longer.

    Args:
        seconds: The limit.
        question: Called without arguments.
        name: Of the thread.

    Raises:
        TimeoutError: No answer in time.
        BaseException: What `question` raised.
    """
    answers: list[T] = []
    failures: list[BaseException] = []

    def attempt() -> None:
        try:
            answers.append(question())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=attempt, name=name, daemon=True)
    thread.start()
    thread.join(seconds)
    if failures:
        raise failures[0]
    if not answers:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    return answers[0]
