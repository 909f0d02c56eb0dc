"""One timer to absolute instants of CLOCK_MONOTONIC, finer than the event loop's milliseconds.

uvloop and asyncio round every ``call_at`` to 1 ms, a tenth of a decode step. A timerfd in the same epoll wakes within
some 50 us; where there is none (not Linux) the loop's own timer has to do.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Callable
from typing import Final

CLOCK_MONOTONIC: Final = 1  # linux/time.h; also what time.monotonic_ns() reads
TFD_NONBLOCK_CLOEXEC: Final = os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0)
TFD_TIMER_ABSTIME: Final = 1


class _ItimerSpec(ctypes.Structure):
    _fields_ = (  # interval and first expiry, each a struct timespec
        ("interval_s", ctypes.c_long), ("interval_ns", ctypes.c_long), ("value_s", ctypes.c_long), ("value_ns", ctypes.c_long),
    )  # fmt: skip


class _TimerFd:
    """Calls ``fire`` in the loop at the instant set last; setting again replaces it."""

    def __init__(self, fire: Callable[[], None]) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._spec = _ItimerSpec()
        self._spec_at = ctypes.byref(self._spec)
        self._fire = fire
        self._set_ns: int | None = None
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._fd, self._expired)

    def set(self, at_ns: int | None) -> None:
        """Fire at ``at_ns`` of time.monotonic_ns(), at once where that has passed; None: not at all."""
        if at_ns == self._set_ns:
            return
        self._set_ns = at_ns
        # zero would disarm it, and an instant in the past fires at once
        self._spec.value_s, self._spec.value_ns = (0, 0) if at_ns is None else divmod(max(at_ns, 1), 1_000_000_000)
        if self._libc.timerfd_settime(self._fd, TFD_TIMER_ABSTIME, self._spec_at, None) < 0:
            raise OSError(ctypes.get_errno(), "timerfd_settime")

    def close(self) -> None:
        self._loop.remove_reader(self._fd)
        os.close(self._fd)

    def _expired(self) -> None:
        with contextlib.suppress(BlockingIOError):  # set anew between the wake-up and this read
            os.read(self._fd, 8)
            self._set_ns = None
            self._fire()


class _LoopTimer:
    """The same by the loop's own timer."""

    def __init__(self, fire: Callable[[], None]) -> None:
        self._loop, self._fire = asyncio.get_running_loop(), fire
        self._handle: asyncio.TimerHandle | None = None

    def set(self, at_ns: int | None) -> None:
        self.close()
        if at_ns is not None:
            self._handle = self._loop.call_later(max(at_ns - time.monotonic_ns(), 0) / 1e9, self._fire)

    def close(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None


def precise_timer(fire: Callable[[], None]) -> _TimerFd | _LoopTimer:
    """A timer of the running loop that calls ``fire()``."""
    return _TimerFd(fire) if sys.platform == "linux" else _LoopTimer(fire)
