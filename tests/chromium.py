"""A headless Chromium for tests, driven through its DevTools pipe: no driver program and no network port."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
]
ANSWER_WITHIN_S = 60.0
_KEYS = {"ArrowRight": {"windowsVirtualKeyCode": 39}, "ArrowLeft": {"windowsVirtualKeyCode": 37}}


@dataclass(frozen=True)
class Visit:
    """What one visit of a page saw.

    Attributes:
        images: For each <img>: alt, whether it is complete, its natural width, its shown width, in CSS pixels.
        requests: Addresses asked for, the page's own and `data:` left out.
        overflow_px: How far the page is wider than the screen.
        small_texts: Text shown smaller than 9 CSS pixels.
        messages: What the browser complained of (blocked by policy, script errors).
        text: The text of the page.
        screenshot: PNG of the whole page.
    """

    images: list[dict[str, Any]]
    requests: list[str]
    overflow_px: int
    small_texts: list[str]
    messages: list[str]
    text: str
    screenshot: bytes


LOOK = """(async () => {
  document.querySelectorAll('details').forEach(d => d.open = true);
  await Promise.all([...document.images].map(i => i.decode().catch(() => null)));
  const small = [...document.querySelectorAll('svg text, p, td, th, dd, dt, li, figcaption, pre')].filter(e => {
    const scale = e.ownerSVGElement ? e.getCTM().a : 1;
    return e.textContent.trim() && parseFloat(getComputedStyle(e).fontSize) * scale < 9;
  });
  return {
    images: [...document.images].map(i => ({
      alt: i.alt, complete: i.complete, natural: i.naturalWidth, shown: i.width
    })),
    overflow_px: document.documentElement.scrollWidth - window.innerWidth,
    height: document.documentElement.scrollHeight,
    small_texts: small.map(e => e.textContent.trim()),
    text: document.body.innerText,
  };
})()"""


class Chromium:
    """A browser that lives as long as the `with` block."""

    def __init__(self) -> None:
        binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if binary is None:
            pytest.fail("Chromium is missing, and the report cannot be tested without it: apt-get install chromium")
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-profile-", ignore_cleanup_errors=True)
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        command = [binary, *FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"]
        self._process = _start_with_pipes(command, to_browser, from_browser)
        self._buffer = b""
        self._last_id = 0
        self._events: list[dict[str, Any]] = []

    def __enter__(self) -> Chromium:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._call("Browser.close")
            self._process.wait(timeout=20)
        except Exception:
            self._process.kill()
            self._process.wait()
        os.close(self._out)
        os.close(self._in)
        self._profile.cleanup()

    def visit(
        self, page: Path, *, width: int, height: int = 800, is_phone: bool = False, is_dark: bool = False
    ) -> Visit:
        """Opens a file as a device of that width would, in CSS pixels, and looks at it."""
        target, session = self._open(page, width=width, height=height, is_phone=is_phone, is_dark=is_dark)
        seen = self._call("Runtime.evaluate", session, expression=LOOK, awaitPromise=True, returnByValue=True)
        found = seen["result"]["value"]
        screenshot = self._screenshot(session, width, found.pop("height"))
        requests, messages = self._requests(page), self._messages()
        self._call("Target.closeTarget", targetId=target)
        return Visit(requests=requests, messages=messages, screenshot=screenshot, **found)

    def turn(self, page: Path, card: str, keys: Sequence[str]) -> list[tuple[bytes, str]]:
        """Puts the focus on the slider of a card and presses keys.

        Args:
            page: The file.
            card: Selector of the card.
            keys: Such as "ArrowRight".

        Returns:
            Before the first key and after each: a PNG of the card's first picture, and what the slider says.
        """
        target, session = self._open(page, width=1280, height=800, is_phone=False, is_dark=False)
        aim = f"(() => {{ const c = document.querySelector({json.dumps(card)}); c.querySelector('input').focus();"
        where = (
            "const r = c.querySelector('.strip').getBoundingClientRect(); return {x: r.x + scrollX, y: r.y + scrollY,"
        )
        ask = f"{aim} {where} width: r.width, height: r.height, said: c.querySelector('output').textContent}}; }})()"
        seen = []
        for key in ("", *keys):
            if key:
                for kind in ("rawKeyDown", "keyUp"):
                    self._call("Input.dispatchKeyEvent", session, type=kind, key=key, code=key, **_KEYS[key])
            clip = self._call("Runtime.evaluate", session, expression=ask, returnByValue=True)["result"]["value"]
            said = clip.pop("said")
            shot = self._call("Page.captureScreenshot", session, captureBeyondViewport=True, clip={**clip, "scale": 1})
            seen.append((base64.b64decode(shot["data"]), said))
        assert self._messages() == []
        self._call("Target.closeTarget", targetId=target)
        return seen

    def _open(self, page: Path, *, width: int, height: int, is_phone: bool, is_dark: bool) -> tuple[str, str]:
        """Loads a file in a new tab: its target's and its session's id."""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self._call(f"{domain}.enable", session)
        screen = {"width": width, "height": height, "deviceScaleFactor": 2 if is_phone else 1, "mobile": is_phone}
        self._call("Emulation.setDeviceMetricsOverride", session, **screen)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self._call("Emulation.setEmulatedMedia", session, features=[scheme])
        self._events.clear()
        self._call("Page.navigate", session, url=page.as_uri())
        self._wait_for("Page.loadEventFired")
        return target, session

    def _screenshot(self, session: str, width: int, height: int) -> bytes:
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        shot = self._call("Page.captureScreenshot", session, captureBeyondViewport=True, clip=clip)
        return base64.b64decode(shot["data"])

    def _requests(self, page: Path) -> list[str]:
        sent = [e["params"]["request"]["url"] for e in self._events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if url != page.as_uri() and not url.startswith("data:")]

    def _messages(self) -> list[str]:
        logged = [e["params"]["entry"]["text"] for e in self._events if e["method"] == "Log.entryAdded"]
        return logged + [str(e["params"]) for e in self._events if e["method"] == "Runtime.exceptionThrown"]

    def _call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._last_id:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return dict(answer["result"])
            self._events.append(answer)

    def _wait_for(self, event: str) -> None:
        while not any(seen.get("method") == event for seen in self._events):
            self._events.append(self._read())

    def _read(self) -> dict[str, Any]:
        deadline = time.monotonic() + ANSWER_WITHIN_S
        while b"\0" not in self._buffer:
            chunk = _read_before(self._in, deadline)
            assert chunk, "Chromium ended or gave no answer"
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))


def _read_before(descriptor: int, deadline: float) -> bytes:
    ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
    return os.read(descriptor, 1 << 20) if ready else b""


def _start_with_pipes(command: list[str], to_browser: int, from_browser: int) -> subprocess.Popen[bytes]:
    """Chromium reads DevTools commands from descriptor 3 and writes answers to 4; a shell puts the pipes there."""
    script = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}'
    process = subprocess.Popen(
        ["bash", "-c", script, *command],
        pass_fds=(to_browser, from_browser),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_browser)
    os.close(from_browser)
    return process
