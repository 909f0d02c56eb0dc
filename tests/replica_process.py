"""Starts one stand-in replica as a process for a test, and stops it by pid."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

FLEET = {"kind": "stand-in", "gpu": "h100_sxm", "cold_start": {}}


def command(fleet: dict[str, Any], **config: Any) -> list[str]:
    return [sys.executable, "-m", "stack.replica", "--config", json.dumps({"fleet": {**FLEET, **fleet}, **config})]


@contextlib.contextmanager
def replica(fleet: dict[str, Any] | None = None, **config: Any) -> Iterator[str]:
    """The base URL of a ready stand-in."""
    process = subprocess.Popen(command(fleet or {}, **config), stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        url = f"http://127.0.0.1:{json.loads(process.stdout.readline())['port']}"
        while get(url, "/health")[0] != 200:
            time.sleep(0.02)
        yield url
    finally:
        process.terminate()
        assert process.wait(10) == 0, "SIGTERM ends it cleanly"


def get(url: str, path: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(url + path, timeout=10) as answer:  # noqa: S310 (the server started above)
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
