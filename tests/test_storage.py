"""What stores that do not answer make pyarrow say, and what is made of it."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable

import pyarrow.fs as pafs
import pytest
from registry_toys import free_port

from pipeline.storage import is_away, locate, reason


def s3(host: str) -> pafs.FileSystem:
    return locate(f"s3://k:s@b/x?endpoint_override={host}&scheme=http")[0]


def google(host: str) -> pafs.FileSystem:
    return locate(f"gs://anonymous@b/x?endpoint_override={host}&scheme=http&retry_limit_seconds=0.1")[0]


def azure(host: str) -> pafs.FileSystem:
    at = {"blob_storage_authority": host, "dfs_storage_authority": host}
    return pafs.AzureFileSystem(
        "account", account_key="a2V5", **at, blob_storage_scheme="http", dfs_storage_scheme="http"
    )


class Answer(http.server.BaseHTTPRequestHandler):
    """One status for every question."""

    status: int

    def do_HEAD(self) -> None:
        self.send_response(self.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *args: object) -> None:
        pass


def complaint(store: pafs.FileSystem) -> OSError:
    with pytest.raises(OSError) as caught:  # noqa: PT011  (what it says is what is looked at)
        store.open_input_file("b/x")
    return caught.value


@pytest.mark.parametrize(
    ("store", "words"),
    [(s3, "connection refused"), (google, "connection refused"), (azure, "no connection to the store")],
)
def test_a_store_where_nobody_listens_is_away(store: Callable[[str], pafs.FileSystem], words: str) -> None:
    error = complaint(store(f"127.0.0.1:{free_port()}"))
    assert is_away(error)
    assert words in reason(error)


@pytest.mark.parametrize("store", [s3, google])
@pytest.mark.parametrize(("status", "away"), [(503, True), (429, True), (404, False), (403, False)])
def test_a_store_that_has_too_much_to_do_is_away_and_one_that_refuses_is_not(
    store: Callable[[str], pafs.FileSystem], status: int, away: bool
) -> None:
    handler = type("Handler", (Answer,), {"status": status})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert is_away(complaint(store(f"127.0.0.1:{server.server_port}"))) == away
        server.shutdown()
