"""Which processes a test has started, whoever their parent is now: they inherit a mark in their environment."""

from __future__ import annotations

import contextlib
import os
import time
import uuid

import psutil

NAME = "TIDEGAUGE_TEST_MARK"


def new_mark() -> str:
    return uuid.uuid4().hex


def marked(mark: str, word: str = "") -> list[psutil.Process]:
    """Live processes that carry the mark, beside this one; with ``word``, those that have it in their command line."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            ours = process.pid != os.getpid() and process.environ().get(NAME) == mark
            if ours and process.status() != psutil.STATUS_ZOMBIE and word in " ".join(process.cmdline()):
                found.append(process)
    return found


def none_left(mark: str, within_s: float = 10.0) -> bool:
    """Whether all that carried the mark are gone; a kill takes the kernel a moment."""
    deadline = time.monotonic() + within_s
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not left
