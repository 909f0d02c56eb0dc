"""One request inside the gateway: from its last byte read to the last byte written, whatever happens in between.

It is the sink of its replica's answer and the ear for its client; what to do is decided by the fleet, whose effects arrive here as
``dispatch``, ``refuse`` and ``abort``. Every path ends in exactly one ``Outcome``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from replay import sse, wire
from replay.effects import Dispatch, Reject, Shed
from replay.records import CANCELLED, ERROR, LIMITED, NS_PER_S, OK, SHED, Outcome, span_id, trace_id
from stack import inbound
from stack.exchange import Exchange, HeaderList, error_body
from stack.streams import Relay
from stack.upstream import Address, Pending

if TYPE_CHECKING:
    from stack.gateway import Gateway

BUFFERED_MAX: Final = 64 * 1024 * 1024  # of an answer that is no stream: it is sent whole, with its timing in the head
_MASK64: Final = (1 << 64) - 1
_NO_USAGE: Final = sse.Usage()
_REQUEST: Final = (
    b"POST %b%b HTTP/1.1\r\nhost: %b\r\n%btraceparent: 00-%032x-%016x-01\r\nx-request-id: %b\r\ncontent-length: %d\r\n\r\n%b"
)


def _forwarded(request: inbound.Inbound, address: Address, trace: int, parent: int, shown_id: bytes) -> bytes:
    """The request as it goes to a replica: the client's header lines, then ours. It leaves sampled (01), since what will be kept
    is decided at the end, and the engine's spans of a kept trace must exist."""
    return _REQUEST % (
        address.base_path.encode(), request.target, address.authority, request.fields, trace, parent, shown_id,
        len(request.body), request.body,
    )  # fmt: skip


class Call:
    """One request. Instants are on the gateway's clock, -1 where nothing was seen."""

    __slots__ = (
        "_body", "_body_bytes", "_client_is_ours", "_dispatch", "_finder", "_headers", "_pending", "_relay", "_status",
        "_trace", "arrived_ns", "detail", "ended", "exchange", "first_chunk_ns", "first_token_ns", "gateway", "inbound",
        "last_token_ns", "left_ns", "longest_gap_ns", "request_id", "shown_id", "streaming",
    )  # fmt: skip

    def __init__(self, gateway: Gateway, exchange: Exchange, request: inbound.Inbound, request_id: int) -> None:
        self.gateway, self.exchange, self.inbound, self.request_id = gateway, exchange, request, request_id
        self.arrived_ns = exchange.received_at_ns - gateway.origin_ns
        self._client_is_ours = bool(request.run_id) and request.run_request is not None
        self._trace = request.trace or trace_id(
            request.run_id if self._client_is_ours else gateway.run_id,
            request.run_request if self._client_is_ours and request.run_request is not None else request_id,
        )
        self.shown_id = request.request_id or b"%032x" % self._trace
        self._dispatch: Dispatch | None = None
        self._pending: Pending | None = None
        self._relay: Relay | None = None
        self._finder = gateway.finder
        self.left_ns = self.first_chunk_ns = self.first_token_ns = self.last_token_ns = self.longest_gap_ns = -1
        self.ended = self.streaming = False
        self.detail = ""
        self._reset()
        exchange.on_gone, exchange.on_flow = self.client_gone, self.client_flow

    def _reset(self) -> None:
        """Nothing came back yet from the replica of this attempt."""
        self._status = 0
        self._headers: HeaderList = []
        self._body: list[bytes] = []
        self._body_bytes = 0

    # --- what the fleet decided

    def dispatch(self, effect: Dispatch, address: Address) -> None:
        self._dispatch, self.left_ns = effect, -1
        self._reset()
        parent = span_id(self._trace, "inference", None if self._client_is_ours else self.request_id)
        payload = _forwarded(self.inbound, address, self._trace, parent, self.shown_id)
        self._pending = self.gateway.upstreams.send(address, payload, self)

    def refuse(self, effect: Reject | Shed) -> None:
        """Not served: 429 from the limiter, 503 from the queue, with when to come back (in ms too: OpenAI's clients read it)."""
        limited = isinstance(effect, Reject)
        wait = [
            (b"retry-after", b"%d" % -(-effect.retry_after_ns // NS_PER_S)),
            (b"retry-after-ms", b"%d" % -(-effect.retry_after_ns // 1_000_000)),
        ]
        if isinstance(effect, Shed):
            waits = {name: getattr(effect, name) for name in ("queue_ns", "cold_start_ns", "retry_ns", "queue_reason")}
            self._dispatch = Dispatch(self.request_id, -1, self.attempts, limit_ns=effect.limit_ns, **waits)
        else:
            self._dispatch = Dispatch(self.request_id, -1, 0, limit_ns=effect.limit_ns)
        self.left_ns = self.gateway.now_ns()
        self.detail = effect.reason
        status, code = (429, "rate_limit_exceeded") if limited else (503, effect.reason.replace(" ", "_"))
        self.exchange.error(status, f"refused: {effect.reason}", code=code, headers=[*self._own_headers(), *wait])
        self._end(LIMITED if limited else SHED, status)

    def abort(self, why: str) -> None:
        """It failed for good. What the client is told depends on what it has already."""
        if self.ended:
            return
        if self._pending is not None:
            self._pending.abort()
        exchange, detail = self.exchange, self.detail or why
        http_status = self._status or 502
        if why == "client_error":  # the replica's own refusal goes back as it came
            exchange.respond(self._status, [*self._headers, *self._own_headers()], b"".join(self._body))
        elif why == "stream_error":
            pass  # the error event itself has been forwarded, to the stream's proper end
        elif exchange.started:
            # A blank line first: the stream may have broken in the middle of an event.
            exchange.write(b"\n\ndata: %b\n\n" % error_body(502, f"the replica failed: {detail}", code=why))
            exchange.break_off()
        else:
            http_status = 504 if why == "timeout" else 502
            exchange.error(http_status, f"the replica failed: {detail}", code=why, headers=self._own_headers())
        self._end(ERROR, http_status)

    def turn_away(self) -> None:
        """The gateway stops while this request still waits: nothing was sent for it."""
        self.detail = "the gateway stopped"
        retry = [(b"retry-after", b"1")]
        self.exchange.error(503, "the gateway is stopping", code="stopping", headers=[*self._own_headers(), *retry])
        self._end(CANCELLED, 503)

    # --- the client

    def client_gone(self) -> None:
        """The client closed its connection: after [DONE] that is how a stream ends, before it the request is cancelled."""
        if self.ended:
            return
        if self._pending is not None:
            self._pending.abort()
        if self._relay is not None and self._relay.done:
            self._finished_stream()
        else:
            self.gateway.cancelled(self)
            self._end(CANCELLED, self._status or -1)

    def client_flow(self, may_write: bool) -> None:
        if self._pending is not None:
            self._pending.flow(may_write)

    # --- the replica (upstream.Sink)

    def sent(self, now_ns: int) -> None:
        self.left_ns = now_ns - self.gateway.origin_ns

    def head(self, status: int, headers: HeaderList) -> None:
        self._status, self._headers = status, inbound.returned(headers)
        content_type = next((value for name, value in headers if name == b"content-type"), b"")
        self.streaming = status == 200 and content_type.startswith(b"text/event-stream")
        if self.streaming:
            self._relay = Relay(strip_usage=self.inbound.strip_usage)

    def data(self, data: bytes, last: bool) -> None:
        if self._relay is None:
            self._whole(data, last)
            return
        now_ns, relay, exchange = self.gateway.now_ns(), self._relay, self.exchange
        out = relay.feed(data, last)
        is_first_token = False
        if out and self._finder.find(out) >= 0:
            if self.first_token_ns < 0:
                self.first_token_ns, is_first_token = now_ns, True
            elif now_ns - self.last_token_ns > self.longest_gap_ns:
                self.longest_gap_ns = now_ns - self.last_token_ns
            self.last_token_ns = now_ns
        if not exchange.started and (out or last):
            self.first_chunk_ns = now_ns
            exchange.start(200, [*self._headers, *self._own_headers()])
        if self._client_is_ours and (relay.done_at >= 0 or (last and not relay.done)):
            out = self._with_report(out, relay.done_at, now_ns)
        # The client's bytes leave first; the fleet and the books are told after that.
        if last:
            exchange.end(out)
        else:
            exchange.write(out)
        if is_first_token:
            self.gateway.first_token(self)
        if last:
            self._stream_ended(relay)

    def _stream_ended(self, relay: Relay) -> None:
        """Complete as far as HTTP goes; the stream itself may say that it failed."""
        error = sse.stream_error(relay.kept)
        if error:
            self.detail = error
            self.gateway.failed(self, "stream_error", tokens_out=1)
        else:
            self._finished_stream()

    def _with_report(self, out: bytes, done_at: int, now_ns: int) -> bytes:
        """The phase comment goes before [DONE], or to the end of a stream that ends without it."""
        report = wire.encode_report(self._report(now_ns))
        if done_at >= 0:
            return out[:done_at] + report + out[done_at:]
        return out + report if not out or out.endswith(b"\n") else out + b"\n\n" + report

    def failed(self, kind: str, detail: str) -> None:
        self.detail = f"replica {self.replica_id}: {detail}"
        if self._relay is not None and self._relay.done:
            self.exchange.end()
            self._finished_stream()
            return
        self.gateway.failed(self, kind, tokens_out=1 if self.exchange.started else 0)

    @property
    def in_flight(self) -> bool:
        """Its replica owes an answer; otherwise it waits in the queue."""
        return self._pending is not None and not self._pending.closed

    def lost(self, detail: str) -> None:
        """Its replica is gone, or is not waited for any longer."""
        if self._pending is not None:
            self._pending.abort()
        self.failed("gone", detail)

    def _whole(self, data: bytes, last: bool) -> None:
        """An answer that is no stream: kept until it is complete, then sent in one piece, with its timing in the head."""
        self._body.append(data)
        self._body_bytes += len(data)
        if self._body_bytes > BUFFERED_MAX and self._pending is not None:
            self._pending.abort()
            self.failed("gone", f"answer above {BUFFERED_MAX} bytes")
            return
        if not last:
            return
        body, status = b"".join(self._body), self._status
        if status >= 500 or status == 429:
            self.detail = f"replica {self.replica_id}: HTTP {status} {sse.error_message(body)}".strip()
            self.gateway.failed(self, "http_5xx" if status >= 500 else "http_429", tokens_out=0)
        elif status >= 400:
            self.detail = sse.error_message(body)
            self.gateway.failed(self, "client_error", tokens_out=0)
        else:
            self.exchange.respond(status, [*self._headers, *self._own_headers()], body)
            self._finished(sse.usage_of(body), status)

    # --- the end

    def _finished_stream(self) -> None:
        assert self._relay is not None
        self._finished(sse.last_usage(self._relay.kept), 200)

    def _finished(self, usage: sse.Usage, http_status: int) -> None:
        self.gateway.finished(self, usage)
        self._end(OK, http_status, usage)

    @property
    def replica_id(self) -> int:
        return self._dispatch.replica_id if self._dispatch else -1

    @property
    def attempts(self) -> int:
        return self._dispatch.attempt if self._dispatch else 0

    def _report(self, now_ns: int) -> wire.PhaseReport:
        """The phases so far; they sum to ``total_ns`` (the route is what remains before the request left)."""
        # Without a dispatch the client left while it waited, or there is nothing to tell yet: all of it was queue.
        waits = self._dispatch or Dispatch(self.request_id, -1, 0, queue_ns=now_ns - self.arrived_ns)
        waited_ns = waits.limit_ns + waits.queue_ns + waits.cold_start_ns + waits.retry_ns
        left_ns = self.left_ns if self.left_ns >= 0 else now_ns
        first_ns = self.first_token_ns if self.first_token_ns >= 0 else now_ns
        went_out = waits.replica_id >= 0 and self.left_ns >= 0
        return wire.PhaseReport(
            gateway_at_unix_ns=self.gateway.started_at_unix_ns + self.arrived_ns,
            total_ns=now_ns - self.arrived_ns,
            limit_ns=waits.limit_ns,
            queue_ns=waits.queue_ns,
            cold_start_ns=waits.cold_start_ns,
            route_ns=max(left_ns - self.arrived_ns - waited_ns, 0),
            prefill_ns=first_ns - left_ns if went_out else -1,
            decode_ns=now_ns - first_ns if went_out and self.first_token_ns >= 0 else -1,
            retry_ns=waits.retry_ns,
            replica_id=waits.replica_id,
            attempts=waits.attempt,
            queue_reason=waits.queue_reason,
        )

    def _own_headers(self) -> HeaderList:
        """Ours in every answer. A stream's inference still lies ahead when its head leaves: it follows in the phase comment."""
        report = self._report(self.gateway.now_ns())
        if self.streaming:
            report = report._replace(prefill_ns=-1, decode_ns=-1)
        headers = [(wire.H_REQUEST_ID, self.shown_id), (wire.H_SERVER_TIMING, wire.encode_server_timing(report))]
        if report.replica_id >= 0:
            headers.append((wire.H_REPLICA, b"%d" % report.replica_id))
        return headers

    def _end(self, status: int, http_status: int, usage: sse.Usage = _NO_USAGE) -> None:
        """Write the record. The first to call it wins: every request ends once."""
        self.ended, self._pending = True, None  # no cycle of the two is left for the collector
        now_ns = self.gateway.now_ns()
        report, request = self._report(now_ns), self.inbound
        foreign_trace = request.trace if not self._client_is_ours else 0
        self.gateway.ended(
            self,
            Outcome(
                request_id=request.run_request if self._client_is_ours and request.run_request is not None else self.request_id,
                gateway_at_ns=self.arrived_ns,
                first_chunk_at_ns=self.first_chunk_ns,
                first_token_at_ns=self.first_token_ns,
                last_token_at_ns=self.last_token_ns,
                done_at_ns=now_ns,
                longest_gap_ns=self.longest_gap_ns,
                limit_ns=report.limit_ns,
                queue_ns=report.queue_ns,
                cold_start_ns=report.cold_start_ns,
                route_ns=report.route_ns,
                prefill_ns=report.prefill_ns,
                decode_ns=report.decode_ns,
                retry_ns=report.retry_ns,
                trace_hi=foreign_trace >> 64,
                trace_lo=foreign_trace & _MASK64,
                parent_span=request.parent_span if foreign_trace else 0,
                prompt_tokens=usage.prompt_tokens,
                output_tokens=usage.output_tokens,
                cached_tokens=usage.cached_tokens,
                replica_id=report.replica_id,
                http_status=http_status,
                attempts=report.attempts,
                status=status,
                queue_reason=report.queue_reason,
                kept_by_client=int(self._client_is_ours),
                tenant=request.tenant.encode(),
                model=request.model.encode(),
                session_id=request.session.encode(),
                detail=self.detail.encode()[:96],
            ),
        )
