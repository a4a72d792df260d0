"""Serve the page of a run on the loopback address, to browsers of this machine alone.

The server answers `GET /` and nothing else: no path of a request reaches the file system. A request whose Host is not this
address is refused, since a page elsewhere can have its name point here (DNS rebinding).
"""

from __future__ import annotations

import sys
import threading
import time
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from srcfast.errors import InputError
from srcfast.report.live_page import render_live

ADDRESS = "127.0.0.1"
MIN_INTERVAL = 1.0  # seconds for which a rendered page is served again: rendering takes time that the run needs
TIMEOUT = 10.0  # seconds in which a client has to send its request
HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class LivePage:
    """The page of a run, rendered at most once a second.

    Args:
        run: the run's directory.
    """

    def __init__(self, run: Path) -> None:
        self._run, self._lock = run, threading.Lock()
        self._html, self._rendered = b"", -MIN_INTERVAL

    def html(self) -> bytes:
        """Return the page in UTF-8."""
        with self._lock:  # matplotlib draws in one thread at a time
            if time.monotonic() - self._rendered >= MIN_INTERVAL:
                self._html = render_live(self._run).encode("utf-8", "backslashreplace")
                self._rendered = time.monotonic()
            return self._html


class Handler(BaseHTTPRequestHandler):
    """Answer one browser."""

    timeout = TIMEOUT
    server_version = "srcfast"
    sys_version = ""

    def __init__(self, page: LivePage, *arguments: Any) -> None:
        self.page = page
        super().__init__(*arguments)

    def do_GET(self) -> None:
        """Answer with the page, or refuse."""
        port = self.connection.getsockname()[1]
        hosts = self.headers.get_all("Host", [])
        names = [f"{name}{end}" for name in (ADDRESS, "localhost") for end in (f":{port}", *[""] * (port == 80))]
        if len(hosts) != 1 or hosts[0] not in names:
            self._answer(HTTPStatus.FORBIDDEN, b"expected this server's address as Host\n")
        elif self.path != "/":
            self._answer(HTTPStatus.NOT_FOUND, b"expected the path /\n")
        else:
            self._answer(HTTPStatus.OK, self.page.html())

    do_HEAD = do_GET

    def _answer(self, status: HTTPStatus, body: bytes) -> None:
        self.send_response(status)
        plain = {} if status == HTTPStatus.OK else {"Content-Type": "text/plain; charset=utf-8"}
        for name, value in {**HEADERS, **plain, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of requests."""


class LiveServer(ThreadingHTTPServer):
    """A server whose answers end with the process, and which says nothing of clients that go away."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Show an error, unless it is the client's."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def live_server(run: Path, port: int = 0) -> LiveServer:
    """Return a server of a run's page that listens on 127.0.0.1; `serve_forever` then answers.

    Args:
        run: the run's directory, which may still be empty.
        port: to listen on; 0: one that is free.

    Raises:
        InputError: there is no such directory.
        OSError: the port is in use.
    """
    if not run.is_dir():
        fix = "name the directory of a run, which is there once the run has started"
        raise InputError(file=run, expected="a directory", found="none", fix=fix)
    return LiveServer((ADDRESS, port), partial(Handler, LivePage(run)))
