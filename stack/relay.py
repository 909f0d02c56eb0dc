"""A GET passed on as it is: the model list of a replica, the metrics of the recorder."""

from __future__ import annotations

from typing import Final

from stack.exchange import Exchange, HeaderList
from stack.inbound import returned
from stack.upstream import Address, Upstreams

ANSWER_MAX: Final = 16 * 1024 * 1024


class _Get:
    """The sink of one such answer: small, so it is sent in one piece."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.status, self.headers = 502, HeaderList()
        self.body = b""

    def sent(self, now_ns: int) -> None:
        pass

    def head(self, status: int, headers: HeaderList) -> None:
        self.status, self.headers = status, returned(headers)

    def data(self, data: bytes, last: bool) -> None:
        if len(self.body) <= ANSWER_MAX:
            self.body += data
        if last and len(self.body) > ANSWER_MAX:
            self.exchange.error(502, f"answer above {ANSWER_MAX} bytes", code="bad_gateway")
        elif last:
            self.exchange.respond(self.status, self.headers, self.body)

    def failed(self, kind: str, detail: str) -> None:
        self.exchange.error(502, f"no answer: {detail}", code=kind)


def relay_get(upstreams: Upstreams, address: Address, exchange: Exchange, *, key: str | None = None) -> None:
    """Send the exchange's GET on to ``address`` and its answer back; the fleet's own key where it has one."""
    accept = exchange.get(b"accept") or b"*/*"
    authorization = b"authorization: Bearer %b\r\n" % key.encode() if key else b""
    payload = b"GET %b%b HTTP/1.1\r\nhost: %b\r\naccept: %b\r\n%b\r\n" % (
        address.base_path.encode(), exchange.target, address.authority, accept, authorization,
    )  # fmt: skip
    exchange.on_gone = upstreams.send(address, payload, _Get(exchange)).abort
