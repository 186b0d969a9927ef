"""A local server that speaks the interfaces of AWS (moto), in a process of its own.

Its modules hold objects that may not be looked at outside of a request, and vLLM looks at all that
is imported where it starts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

_LOGIN = {"AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": "nobody's"}
_START_S = 60.0


@contextmanager
def aws_server(**environment: str) -> Iterator[str]:
    """Its address, ``host:port``, while it runs with these variables set for it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait(port)
        yield f"127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def log_in(monkeypatch) -> None:
    """Give this process what every request to the server needs."""
    for name, value in _LOGIN.items():
        monkeypatch.setenv(name, value)


def _wait(port: int) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
