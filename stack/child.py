"""What a replica process owes the pool that started it: one line when its socket is bound, and an end when the pool is gone."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading


def announce(port: int) -> None:
    """Print ``{"port":..,"pid":..}``, the only line on stdout. What is printed later goes to stderr, the replica's log:
    nobody reads that pipe any more, and a full one would block the process."""
    print(json.dumps({"port": port, "pid": os.getpid()}), flush=True)
    os.dup2(2, 1)
    sys.stdout = sys.stderr


def follow_parent() -> None:
    """End this process (as by SIGTERM) when its stdin closes: the other end lives in the pool's process, which may be killed
    without a chance to stop anyone. A pipe instead of PR_SET_PDEATHSIG: that one fires when a parent's *thread* ends, and
    only on Linux."""

    def wait() -> None:
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="follow-parent", daemon=True).start()
