"""The journal: ordered, durable, delivered at least once and recorded once, whatever dies in between."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.journal import DONE_FILE, JOURNAL_FILE, Body, Journal, Operation
from pipeline.outbox import REFUSED_FILE, Outbox, Refused, Unreachable, read_results

BATCHED = frozenset({"metrics"})


class Server:
    """Stands in for the other side: remembers what arrives; can be away, or refuse some."""

    def __init__(self) -> None:
        self.is_away = False
        self.calls: list[list[int]] = []
        self.refuses: Callable[[Operation], bool] = lambda operation: False

    def __call__(self, operations: Sequence[Operation]) -> Body | None:
        if self.is_away:
            raise Unreachable("the server is away")
        if any(map(self.refuses, operations)):
            raise Refused("never")
        self.calls.append([operation.seq for operation in operations])
        return {"answer": operations[0].seq} if operations[0].kind == "ask" else None

    @property
    def received(self) -> list[int]:
        return [seq for call in self.calls for seq in call]


def outbox_of(folder: Path, server: Server) -> Outbox:
    outbox = Outbox(folder, server, batched=BATCHED, slow=frozenset({"upload"}))
    outbox.start()
    return outbox


def metrics(outbox: Outbox, step: int, num: int = 1) -> int:
    seq = outbox.append("metrics", {"step": step, "values": {f"m{i}": 1.0 for i in range(num)}})
    assert seq is not None
    return seq


def test_everything_arrives_once_and_in_order(tmp_path: Path) -> None:
    server = Server()
    outbox = outbox_of(tmp_path, server)
    for step in range(200):
        metrics(outbox, step)
        if step % 50 == 0:
            outbox.append("file", {"path": "x"})
    assert outbox.close(5) == 0
    assert server.received == list(range(1, 205))
    assert all(len(call) == 1 for call in server.calls if call[0] in (2, 53, 104, 155))


def test_neighbouring_metrics_share_a_request_of_at_most_1000_values(tmp_path: Path) -> None:
    server = Server()
    server.is_away = True
    outbox = outbox_of(tmp_path, server)
    for step in range(300):
        metrics(outbox, step, num=7)
    server.is_away = False
    assert outbox.close(5) == 0
    assert max(len(call) for call in server.calls) == 1000 // 7
    assert len(server.calls) <= 5


def test_nothing_is_lost_while_the_server_is_away(tmp_path: Path) -> None:
    server = Server()
    outbox = outbox_of(tmp_path, server)
    metrics(outbox, 0)
    assert outbox.wait(1, 5)
    server.is_away = True
    started = time.monotonic()
    for step in range(1, 50):
        metrics(outbox, step)
    assert time.monotonic() - started < 1.0
    assert not outbox.wait(50, 0.5)
    assert outbox.last_error == "the server is away"
    server.is_away = False
    assert outbox.wait(50, 5)
    assert outbox.close(1) == 0
    assert server.received == list(range(1, 51))


def test_close_gives_up_in_bounded_time_and_the_next_process_delivers_the_rest(tmp_path: Path) -> None:
    server = Server()
    server.is_away = True
    outbox = outbox_of(tmp_path, server)
    for step in range(10):
        metrics(outbox, step)
    started = time.monotonic()
    assert outbox.close(0.5) == 10
    assert time.monotonic() - started < 4
    server.is_away = False
    later = Outbox(tmp_path, server, batched=BATCHED)
    assert later.num_pending == 10
    assert later.drain() == 10
    assert later.drain() == 0
    later.close(0)
    assert server.received == list(range(1, 11))


def test_a_server_that_hangs_does_not_hold_close(tmp_path: Path) -> None:
    release = threading.Event()

    def hang(operations: Sequence[Operation]) -> None:
        release.wait(20)

    outbox = Outbox(tmp_path, hang)
    outbox.start()
    outbox.append("file", {"path": "x"})
    started = time.monotonic()
    assert outbox.close(0.3) == 1
    assert time.monotonic() - started < 4
    release.set()


def test_a_refused_operation_is_set_aside_and_the_others_arrive(tmp_path: Path) -> None:
    server = Server()
    server.is_away = True
    server.refuses = lambda operation: operation.body.get("step") == 3
    outbox = outbox_of(tmp_path, server)
    for step in range(6):
        metrics(outbox, step)
    server.is_away = False
    assert outbox.close(5) == 0
    assert server.received == [1, 2, 3, 5, 6]
    assert outbox.refusal(4) == "never"
    assert outbox.refusal(1) is None
    assert json.loads((tmp_path / REFUSED_FILE).read_text())["body"]["step"] == 3


def test_answers_are_kept(tmp_path: Path) -> None:
    outbox = outbox_of(tmp_path, Server())
    seq = outbox.append("ask", {})
    assert seq is not None
    assert outbox.wait(seq, 5)
    assert outbox.result(seq) == {"answer": seq}
    outbox.close(1)
    assert read_results(tmp_path) == [(seq, {"answer": seq})]


def test_an_unexpected_error_in_delivery_is_retried_not_fatal(tmp_path: Path) -> None:
    calls = []

    def flaky(operations: Sequence[Operation]) -> None:
        calls.append(operations)
        if len(calls) == 1:
            raise ZeroDivisionError("a bug")

    outbox = Outbox(tmp_path, flaky)
    outbox.start()
    outbox.append("file", {"path": "x"})
    assert outbox.close(5) == 0
    assert "ZeroDivisionError" in outbox.last_error


def test_two_processes_do_not_deliver_one_journal(tmp_path: Path) -> None:
    outbox = outbox_of(tmp_path, Server())
    with pytest.raises(UserError, match="another process"):
        Outbox(tmp_path, Server())
    outbox.close(1)
    Outbox(tmp_path, Server()).close(0)


@pytest.mark.parametrize(
    "tail", [b'{"seq": 4, "time_', b'{"seq": 4, "time_ms": 1, "kind": "metrics", "body": {}}', b"\x00" * 70_000]
)
def test_a_half_written_last_line_is_dropped(tmp_path: Path, tail: bytes) -> None:
    journal = Journal(tmp_path)
    for step in range(3):
        journal.append("metrics", {"step": step, "values": {}})
    journal.close()
    with (tmp_path / JOURNAL_FILE).open("ab") as file:
        file.write(tail)
    journal = Journal(tmp_path)
    assert [operation.seq for operation in journal.pending()] == [1, 2, 3]
    assert journal.append("metrics", {"step": 3, "values": {}}) == 4
    assert [operation.seq for operation in journal.pending()] == [1, 2, 3, 4]
    journal.close()


def test_a_damaged_line_costs_only_itself(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for step in range(3):
        journal.append("metrics", {"step": step, "values": {}})
    journal.close()
    lines = (tmp_path / JOURNAL_FILE).read_text().splitlines(keepends=True)
    (tmp_path / JOURNAL_FILE).write_text(lines[0] + "{damaged\n" + lines[2])
    journal = Journal(tmp_path)
    assert [operation.seq for operation in journal.pending()] == [1, 3]
    journal.close()


@pytest.mark.parametrize("content", ["", "{", '{"seq": 99, "offset": 1000000}'])
def test_an_unusable_position_means_delivering_again(tmp_path: Path, content: str) -> None:
    journal = Journal(tmp_path)
    journal.append("metrics", {"step": 0, "values": {}})
    journal.close()
    (tmp_path / DONE_FILE).write_text(content)
    journal = Journal(tmp_path)
    assert (journal.done_seq, journal.last_seq) == (0, 1)
    assert len(journal.pending()) == 1
    journal.close()


def test_a_full_disk_does_not_reach_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server()
    outbox = outbox_of(tmp_path, server)
    write = os.write

    def half_write(fd: int, data: bytes) -> int:
        write(fd, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.journal.os.write", half_write)
        assert outbox.append("metrics", {"step": 0, "values": {}}) is None
        assert outbox.append("metrics", {"step": 1, "values": {}}) is None
    assert metrics(outbox, 2) == 1
    assert outbox.close(5) == 0
    assert server.received == [1]
    assert sum("tracking is incomplete" in record.message for record in caplog.records) == 1


KILLED_WRITER = """
import sys
from pathlib import Path
from pipeline.outbox import Outbox

num_calls = 0

def deliver(operations):
    global num_calls
    num_calls += 1
    if num_calls == 3:
        print("go", flush=True)
    with open(sys.argv[1] + "/received", "a") as file:
        file.writelines(f"{operation.seq}\\n" for operation in operations)

outbox = Outbox(Path(sys.argv[1]), deliver, batched=frozenset({"metrics"}))
outbox.start()
for step in range(1_000_000):
    outbox.append("metrics", {"step": step, "values": {"a": 1.0}})
"""


def test_killed_at_any_moment_nothing_is_lost_and_at_most_one_request_repeats(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED_WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    process.wait()
    received = [int(line) for line in (tmp_path / "received").read_text().split()]
    server = Server()
    outbox = Outbox(tmp_path, server, batched=BATCHED)
    outbox.drain()
    last_seq = len((tmp_path / JOURNAL_FILE).read_text().splitlines())
    assert sorted({*received, *server.received}) == list(range(1, last_seq + 1))
    assert len(set(received) & set(server.received)) <= 1000
    outbox.close(0)
