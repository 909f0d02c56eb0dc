"""The input log of a Fleet: every input in order, and a checksum of the effects it had.

Fed to a fresh Fleet of the same policy and seed, it must give the same effects to the last one (parity). Format: one JSON header
line, then frames of a little-endian u32 length and a MessagePack array [input, now_ns, crc32 of the effects, *arguments].
Requests are logged as policies see them: sizes and hashes, never text.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import msgspec

from replay.effects import Effect
from replay.errors import InputError
from replay.fleet import Fleet
from replay.policies import spec
from replay.policies.protocols import Signals
from replay.requests import Request

FORMAT: Final = "tidegauge-fleet-log"
VERSION: Final = 1
INPUTS: Final = (
    "start",
    "arrive",
    "charged",
    "first_token",
    "finish",
    "fail",
    "cancel",
    "signals",
    "replica_ready",
    "replica_refused",
    "replica_notice",
    "replica_gone",
    "wake",
)
_LENGTH: Final = struct.Struct("<I")
_encoder = msgspec.msgpack.Encoder()


def header(policy: spec.PolicySpec, seed: int) -> bytes:
    return json.dumps({"format": FORMAT, "version": VERSION, "policy": spec.to_dict(policy), "seed": seed}).encode() + b"\n"


def _checksum(effects: list[Effect]) -> int:
    # The type's name is part of it: Shed and Reject may carry equal fields.
    return zlib.crc32(_encoder.encode([(type(effect).__name__, *effect) for effect in effects])) if effects else 0


class LoggedFleet:
    """A Fleet whose inputs go to ``write``: same methods, same effects.

    They are encoded by ``log``, which the driver calls once it has carried out the effects: a dispatch does not wait for its log.
    """

    def __init__(self, policy: spec.PolicySpec, seed: int, write: Callable[[bytes], object]) -> None:
        self.fleet = Fleet(spec.build(policy, seed))
        self._write = write
        self._effects: list[Effect] = []
        self._unwritten: list[tuple[int, int, list[Effect], tuple[Any, ...]]] = []
        self._methods = [getattr(self.fleet, name) for name in INPUTS]
        write(header(policy, seed))

    def _input(self, code: int, now_ns: int, *arguments: Any) -> None:
        self._methods[code](now_ns, *arguments)
        effects = self.fleet.drain()
        self._effects += effects
        self._unwritten.append((code, now_ns, effects, arguments))

    def log(self) -> None:
        """Encode and write the inputs since the last call."""
        for code, now_ns, effects, arguments in self._unwritten:
            frame = _encoder.encode((code, now_ns, _checksum(effects), *arguments))
            self._write(_LENGTH.pack(len(frame)) + frame)
        self._unwritten.clear()

    def start(self, now_ns: int) -> None:
        self._input(0, now_ns)

    def arrive(self, now_ns: int, request: Request) -> None:
        self._input(1, now_ns, request)

    def charged(self, now_ns: int, request_id: int, retry_ns: int) -> None:
        self._input(2, now_ns, request_id, retry_ns)

    def first_token(self, now_ns: int, request_id: int) -> None:
        self._input(3, now_ns, request_id)

    def finish(self, now_ns: int, request_id: int, prompt_tokens: int, output_tokens: int) -> None:
        self._input(4, now_ns, request_id, prompt_tokens, output_tokens)

    def fail(self, now_ns: int, request_id: int, kind: str, tokens_out: int) -> None:
        self._input(5, now_ns, request_id, kind, tokens_out)

    def cancel(self, now_ns: int, request_id: int) -> None:
        self._input(6, now_ns, request_id)

    def signals(self, now_ns: int, replica_id: int, signals: Signals) -> None:
        self._input(7, now_ns, replica_id, signals)

    def replica_ready(self, now_ns: int, replica_id: int) -> None:
        self._input(8, now_ns, replica_id)

    def replica_refused(self, now_ns: int, replica_id: int, reason: str, retry_ns: int) -> None:
        self._input(9, now_ns, replica_id, reason, retry_ns)

    def replica_notice(self, now_ns: int, replica_id: int, deadline_at_ns: int) -> None:
        self._input(10, now_ns, replica_id, deadline_at_ns)

    def replica_gone(self, now_ns: int, replica_id: int, reason: str) -> None:
        self._input(11, now_ns, replica_id, reason)

    def wake(self, now_ns: int) -> None:
        self._input(12, now_ns)

    def drain(self) -> list[Effect]:
        effects, self._effects = self._effects, []
        return effects

    def next_wake_ns(self) -> int | None:
        return self.fleet.next_wake_ns()


class Divergence(NamedTuple):
    """The first input whose effects differ: its place in the log, its instant, its name, and what a fresh fleet does."""

    place: int
    now_ns: int
    input: str
    effects: list[Effect]


def frames(log: bytes) -> Iterator[list[Any]]:
    """The frames after the header; half a frame at the end (a killed gateway) is left out."""
    at = log.index(b"\n") + 1
    while at + _LENGTH.size <= len(log):
        (length,) = _LENGTH.unpack_from(log, at)
        at += _LENGTH.size
        if at + length > len(log):
            return
        yield msgspec.msgpack.decode(log[at : at + length])
        at += length


def verify(log: bytes) -> Divergence | None:
    """Feed the log to a fresh Fleet; the first input whose effects differ from those of the live one, or None."""
    try:
        head = json.loads(log[: log.index(b"\n")])
        known = head["format"] == FORMAT and head["version"] == VERSION
    except (ValueError, KeyError, TypeError) as error:
        raise InputError("is no input log of a fleet", rule=f"{FORMAT} version {VERSION}") from error
    if not known:
        raise InputError(f"is {head['format']} version {head['version']}", rule=f"{FORMAT} version {VERSION}")
    fleet = Fleet(spec.build(spec.from_dict(head["policy"]), head["seed"]))
    for place, (code, now_ns, checksum, *arguments) in enumerate(frames(log)):
        if INPUTS[code] == "arrive":
            request = Request._make(arguments[0])
            arguments = [request._replace(prefix_hashes=tuple(request.prefix_hashes))]
        elif INPUTS[code] == "signals":
            arguments[1] = Signals(*arguments[1])
        getattr(fleet, INPUTS[code])(now_ns, *arguments)
        effects = fleet.drain()
        if _checksum(effects) != checksum:
            return Divergence(place, now_ns, INPUTS[code], effects)
    return None
