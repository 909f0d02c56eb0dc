"""What gateway and load generator say to each other beside the OpenAI protocol: headers and the phase comment.

Pure: bytes in, bytes out. Both sides import this file, so they cannot disagree.
"""

from __future__ import annotations

from typing import Final, NamedTuple

# Request headers of our own load generator. The gateway acts on them and removes every ``x-tidegauge-*`` before it forwards.
H_RUN: Final = b"x-tidegauge-run"  # the run's id: the client keeps the row, so the gateway makes no spans for it
H_REQUEST: Final = b"x-tidegauge-request"  # the request's number in the run (decimal)
H_OUTPUT_CAP: Final = b"x-tidegauge-output-cap"  # the declared output cap, since max_tokens is forced to the recorded length
H_TENANT: Final = b"x-tidegauge-tenant"  # honoured only where the gateway has no API keys configured
H_SESSION: Final = b"x-tidegauge-session"
H_PRIORITY: Final = b"x-tidegauge-priority"
H_PREFIX: Final = b"x-tidegauge-"

# Response headers.
H_REPLICA: Final = b"x-tidegauge-replica"  # number of the replica that answered
H_REQUEST_ID: Final = b"x-request-id"
H_SERVER_TIMING: Final = b"server-timing"


class PhaseReport(NamedTuple):
    """The gateway's side of a request, sent as one SSE comment at the end of the stream to clients that sent ``H_RUN``.

    Durations in ns; ``gateway_at_unix_ns`` is the gateway's wall clock when the request's last byte had arrived.
    ``total_ns`` runs from there to the moment this comment is written. -1: does not apply.
    """

    gateway_at_unix_ns: int
    total_ns: int
    limit_ns: int
    queue_ns: int
    cold_start_ns: int
    route_ns: int
    prefill_ns: int
    decode_ns: int
    retry_ns: int
    replica_id: int
    attempts: int
    queue_reason: int


COMMENT_PREFIX: Final = b": tidegauge "


def encode_report(report: PhaseReport) -> bytes:
    """One SSE comment line with its blank line: integers in field order."""
    return COMMENT_PREFIX + b" ".join(b"%d" % value for value in report) + b"\n\n"


def decode_report(line: bytes) -> PhaseReport | None:
    """The report in a comment line (with or without line end); None for any other or malformed comment.

    >>> decode_report(b": ping\\n") is None
    True
    """
    if not line.startswith(COMMENT_PREFIX):
        return None
    try:
        return PhaseReport(*(int(value) for value in line[len(COMMENT_PREFIX) :].split()))
    except (TypeError, ValueError):
        return None


def encode_server_timing(report: PhaseReport) -> bytes:
    """What is known when the headers leave, as a Server-Timing value in ms (W3C); ``gateway`` is limit + route.

    For an answer that is not a stream, this is all there is: it then carries ``inference`` too.
    """
    gateway = max(report.limit_ns, 0) + max(report.route_ns, 0)
    parts = [b"gateway;dur=%.3f" % (gateway / 1e6), b"queue;dur=%.3f" % (max(report.queue_ns, 0) / 1e6)]
    if report.cold_start_ns > 0:
        parts.append(b"cold_start;dur=%.3f" % (report.cold_start_ns / 1e6))
    if report.retry_ns > 0:
        parts.append(b"retry;dur=%.3f" % (report.retry_ns / 1e6))
    if report.prefill_ns >= 0:
        parts.append(b"inference;dur=%.3f" % ((report.prefill_ns + max(report.decode_ns, 0)) / 1e6))
    return b", ".join(parts)
