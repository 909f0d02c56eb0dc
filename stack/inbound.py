"""A client's request as the gateway needs it: who asks, for what, how much, and what of it goes on to the replica.

The body is decoded once, into the few fields that are needed; everything else passes through untouched. No I/O here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Final, NamedTuple

import msgspec

from replay import wire
from replay.requests import PREFIX_BLOCK_BYTES, block_hashes
from stack.exchange import Exchange, HeaderList

# Not forwarded: what belongs to one connection (RFC 9110 7.6.1), what the gateway makes anew, and accept-encoding, since a
# compressed stream could be neither searched nor timed.
_NOT_FORWARDED: Final = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"proxy-authenticate", b"proxy-authorization", b"te", b"trailer",
     b"transfer-encoding", b"upgrade", b"http2-settings", b"host", b"content-length", b"expect", b"traceparent", b"x-request-id",
     b"accept-encoding")
)  # fmt: skip
_NOT_RETURNED: Final = frozenset(
    (b"connection", b"keep-alive", b"proxy-authenticate", b"trailer", b"transfer-encoding", b"upgrade", b"content-length",
     b"x-request-id", b"x-tidegauge-replica")
)  # fmt: skip
_TRACEPARENT: Final = re.compile(rb"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(?:-.*)?")
HASHED_BYTES_MAX: Final = 512 * PREFIX_BLOCK_BYTES  # 1 MiB of text, about 256k tokens: the longest context there is to share
TEXT_MAX: Final = 256  # of a header value that becomes a name (tenant, session, request id): what hostile ones may cost


class RefusedError(Exception):
    """The request is refused before it enters the fleet."""

    def __init__(self, status: int, message: str, code: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class _Part(msgspec.Struct):
    text: str = ""


class _Message(msgspec.Struct):
    content: str | list[_Part] | None = None


class _Controls(msgspec.Struct):
    model: str | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    tools: msgspec.Raw = msgspec.Raw(b"")


class _Body(_Controls):
    messages: list[_Message] | None = None
    prompt: str | list[str] | None = None


class _UnusualBody(_Controls):
    """Token ids for a prompt, content of a new kind: not for a gateway to judge."""

    messages: msgspec.Raw = msgspec.Raw(b"")
    prompt: msgspec.Raw = msgspec.Raw(b"")


_BODY: Final = msgspec.json.Decoder(_Body)
_UNUSUAL_BODY: Final = msgspec.json.Decoder(_UnusualBody)
_RAW_FIELDS: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])


class Inbound(NamedTuple):
    """What the gateway takes out of a request."""

    target: bytes
    body: bytes  # as it goes to the replica
    fields: bytes  # header lines as they go to the replica
    model: str
    stream: bool
    strip_usage: bool  # the client did not ask for the usage chunk that the gateway asks for
    prompt_bytes: int
    prefix_hashes: tuple[int, ...]
    output_cap: int | None
    tenant: str
    session: str
    priority: int
    run_id: str  # of our own load generator, else ""
    run_request: int | None  # its number in that run
    trace: int  # 0: the client sent no traceparent
    parent_span: int
    request_id: bytes  # x-request-id as the client sent it, else b""


class Tenants:
    """API keys and whose they are. Keys are looked up by their hash, so that no comparison's time says anything about them."""

    def __init__(self, api_keys: Mapping[str, str]) -> None:
        self._by_hash = {_hash(key.encode()): tenant for key, tenant in api_keys.items()}

    def __bool__(self) -> bool:
        return bool(self._by_hash)

    def of(self, exchange: Exchange) -> str:
        """The tenant; where no keys are configured, the one that a header names. RefusedError (401) for an unknown key."""
        if not self._by_hash:
            return _text(exchange.get(wire.H_TENANT))
        scheme, _, key = (exchange.get(b"authorization") or b"").partition(b" ")
        if scheme.lower() != b"bearer":
            key = exchange.get(b"x-api-key") or b""
        tenant = self._by_hash.get(_hash(key.strip()))
        if tenant is None:
            raise RefusedError(401, "missing or unknown API key", "invalid_api_key")
        return tenant


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def read(exchange: Exchange, tenants: Tenants, upstream_key: str | None) -> Inbound:
    """Everything the gateway wants to know of a completion request; RefusedError says why it cannot be served."""
    tenant = tenants.of(exchange)
    named = dict(reversed(exchange.headers))  # of a repeated header, the first
    body, text = _decoded(exchange.body)
    asked = body.stream_options is not None and bool(body.stream_options.include_usage)
    strip = bool(body.stream) and not asked
    trace, parent = _trace_context(named.get(b"traceparent"))
    cap = _number(named, wire.H_OUTPUT_CAP)
    return Inbound(
        target=exchange.target,
        body=_with_usage(exchange.body) if strip else exchange.body,
        fields=_forwarded(exchange.headers, upstream_key, keys=bool(tenants)),
        model=body.model or "",
        stream=bool(body.stream),
        strip_usage=strip,
        prompt_bytes=len(text),
        prefix_hashes=block_hashes(text[:HASHED_BYTES_MAX]),
        output_cap=cap if cap is not None else body.max_completion_tokens or body.max_tokens,
        tenant=tenant,
        session=_text(named.get(wire.H_SESSION)),
        priority=_number(named, wire.H_PRIORITY) or 0,
        run_id=_text(named.get(wire.H_RUN)),
        run_request=_number(named, wire.H_REQUEST),
        trace=trace,
        parent_span=parent,
        request_id=named.get(wire.H_REQUEST_ID, b"")[:TEXT_MAX],
    )


def _text(value: bytes | None) -> str:
    return value[:TEXT_MAX].decode("utf-8", "replace") if value else ""


def _number(named: dict[bytes, bytes], name: bytes) -> int | None:
    value = named.get(name)
    if value is None:
        return None
    if not re.fullmatch(rb"[0-9]{1,18}" if name != wire.H_PRIORITY else rb"-?[0-9]{1,18}", value):
        raise RefusedError(400, f"header {name.decode()} is not a number", "invalid_header")
    return int(value)


def _decoded(raw: bytes) -> tuple[_Controls, bytes]:
    """The body's fields, and the text that the engine will read as far as it matters for sizes and shared prefixes: tools, then
    messages or prompt. Where their shape is unusual, their JSON stands for the text."""
    try:
        try:
            body = _BODY.decode(raw)
        except msgspec.ValidationError:
            unusual = _UNUSUAL_BODY.decode(raw)
            return unusual, bytes(unusual.tools) + bytes(unusual.messages or unusual.prompt)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RefusedError(400, f"the body is no request: {error}", "invalid_json") from error
    if body.messages is not None:
        text = "\n".join(map(_message_text, body.messages))
    else:
        text = body.prompt if isinstance(body.prompt, str) else "\n".join(body.prompt or ())
    return body, bytes(body.tools) + text.encode("utf-8", "surrogatepass")


def _message_text(message: _Message) -> str:
    content = message.content
    return content if isinstance(content, str) else "".join(part.text for part in content or ())


def _with_usage(body: bytes) -> bytes:
    """The same body with ``stream_options.include_usage`` set; every other value keeps its very bytes."""
    fields = _RAW_FIELDS.decode(body)
    present = fields.get("stream_options")
    options = _RAW_FIELDS.decode(present) if present and present != b"null" else {}
    options["include_usage"] = msgspec.Raw(b"true")
    fields["stream_options"] = msgspec.Raw(msgspec.json.encode(options))
    return msgspec.json.encode(fields)


def _trace_context(value: bytes | None) -> tuple[int, int]:
    """(trace id, parent span id) of a W3C traceparent; (0, 0) where there is none or it is malformed, as the standard asks."""
    match = _TRACEPARENT.fullmatch(value) if value else None
    trace, parent = (int(match[1], 16), int(match[2], 16)) if match else (0, 0)
    return (trace, parent) if trace and parent else (0, 0)


def _forwarded(headers: HeaderList, upstream_key: str | None, *, keys: bool) -> bytes:
    """The header lines that go on. A key of ours never does; the fleet's own key, where there is one, takes its place."""
    dropped = _NOT_FORWARDED
    for name, value in headers:
        if name == b"connection" and value.lower() not in (b"keep-alive", b"close"):
            dropped |= {token.strip().lower() for token in value.split(b",")}
    if keys or upstream_key:
        dropped |= {b"authorization", b"x-api-key"}
    lines = [b"%b: %b\r\n" % field for field in headers if field[0] not in dropped and not field[0].startswith(wire.H_PREFIX)]
    if upstream_key:
        lines.append(b"authorization: Bearer %b\r\n" % upstream_key.encode())
    return b"".join(lines)


def returned(headers: HeaderList) -> HeaderList:
    """The replica's headers that go back to the client."""
    return [field for field in headers if field[0] not in _NOT_RETURNED]
