"""The bytes of a request, and the few questions to a server before the first of them is sent."""

from __future__ import annotations

import http.client
import json
import re
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple

from loadgen._openai import Target
from replay.errors import InputError
from replay.prompts import Prompts
from replay.records import span_id, trace_id
from replay.sse import error_message
from replay.wire import H_OUTPUT_CAP, H_PRIORITY, H_REQUEST, H_RUN, H_SESSION, H_TENANT

PATHS: Final = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
ASSUMED_BYTES_PER_TOKEN: Final = 4.0  # English text under the tokenizers of 2024-26
PROBE_TOKENS: Final = (200, 1200)  # x 4 bytes: far enough apart that the rounding of either is below 1 %
PROBE_TIMEOUT_S: Final = 120.0
_UNFIT: Final = re.compile(rb"[^\x21-\x7e]")


@dataclass(frozen=True)
class Server:
    """What was learnt of the server before the first request."""

    model: str
    bytes_per_token: float = ASSUMED_BYTES_PER_TOKEN
    template_tokens: int = 0  # what the chat template adds to a prompt
    forced: bool = True  # whether min_tokens and ignore_eos may be asked for
    notes: tuple[str, ...] = field(default=())


class Row(NamedTuple):
    """What the plan says of one request; ``place`` is its place in the sender's share."""

    place: int
    request_id: int
    prompt_tokens: int
    output_tokens: int
    prefix_hashes: list[int] | None
    session: bytes
    tenant: bytes
    priority: int | None


class RequestWriter:
    """Whole HTTP requests, ready to be sent: head and body in one piece of bytes."""

    def __init__(self, target: Target, endpoint: str, run_id: str, server: Server, output_cap: int, key: str) -> None:
        self._run_id, self._server = run_id, server
        self._prompts = Prompts(run_id, server.bytes_per_token)
        lines = [
            f"POST {target.base}{PATHS[endpoint]} HTTP/1.1", f"host: {target.host}", "content-type: application/json",
            "accept: text/event-stream", f"{H_RUN.decode()}: {run_id}", f"{H_OUTPUT_CAP.decode()}: {output_cap}",
        ]  # fmt: skip
        if key:
            lines.append(f"authorization: Bearer {key}")
        self._head = "\r\n".join(lines).encode() + b"\r\n"
        model = json.dumps(server.model).encode()
        if endpoint == "chat":
            self._before = b'{"model":' + model + b',"messages":[{"role":"user","content":"'
            self._after = b'"}]'
        else:
            self._before, self._after = b'{"model":' + model + b',"prompt":"', b'"'
        length = b',"max_tokens":%d,"min_tokens":%d,"ignore_eos":true' if server.forced else b',"max_tokens":%d'
        self._length, self._forced = length, server.forced
        self._after_length = b',"stream":true,"stream_options":{"include_usage":true}}'

    def write(self, row: Row) -> bytes:
        """The request of one row; its text is as long as the row's prompt, less what the chat template adds."""
        tokens = max(1, row.prompt_tokens - self._server.template_tokens)
        output = max(1, row.output_tokens)
        body = b"".join(
            (
                self._before,
                self._prompts.text(row.request_id, tokens, row.prefix_hashes),
                self._after,
                self._length % ((output, output) if self._forced else (output,)),
                self._after_length,
            )
        )
        trace = trace_id(self._run_id, row.request_id)
        extra = b"%b: %d\r\ntraceparent: 00-%032x-%016x-01\r\n" % (H_REQUEST, row.request_id, trace, span_id(trace, "client"))
        if row.session:
            extra += b"%b: %b\r\n" % (H_SESSION, _UNFIT.sub(b"_", row.session))
        if row.tenant:
            extra += b"%b: %b\r\n" % (H_TENANT, _UNFIT.sub(b"_", row.tenant))
        if row.priority is not None:
            extra += b"%b: %d\r\n" % (H_PRIORITY, row.priority)
        return b"%b%bcontent-length: %d\r\n\r\n%b" % (self._head, extra, len(body), body)


class Reply(NamedTuple):
    status: int
    body: bytes

    @property
    def said(self) -> str:
        return error_message(self.body) or self.body[:200].decode("utf-8", "replace").strip()


class Questions:
    """Asked one after the other, each on a connection of its own, before the run begins."""

    def __init__(self, target: Target, endpoint: str, key: str) -> None:
        self._target, self._path = target, PATHS[endpoint]
        self._headers = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}

    def ask(self, method: str, path: str, payload: Any = None) -> Reply:
        """InputError where nobody answers."""
        connection = http.client.HTTPConnection(*self._target.address, timeout=PROBE_TIMEOUT_S)
        try:
            body = None if payload is None else json.dumps(payload).encode()
            connection.request(method, self._target.base + path, body, {**self._headers, "host": self._target.host})
            response = connection.getresponse()
            return Reply(response.status, response.read())
        except (OSError, http.client.HTTPException) as error:
            raise InputError(
                f"{self._target.host} does not answer: {error}", where="--host", fix="start the server, or check name and port"
            ) from error
        finally:
            connection.close()

    def model(self) -> tuple[str, tuple[str, ...]]:
        """(the only model the server lists, notes)."""
        reply = self.ask("GET", "/v1/models")
        try:
            names = [str(entry["id"]) for entry in json.loads(reply.body)["data"]] if reply.status == 200 else []
        except (ValueError, KeyError, TypeError):
            names = []
        if len(names) > 1:
            raise InputError(
                f"the server has {len(names)} models: {', '.join(names[:10])}", where="--model", fix=f"--model {names[0]}"
            )
        if reply.status in (401, 403):
            raise InputError(f"the server answered {reply.status}: {reply.said}", where="--api-key", fix="set OPENAI_API_KEY")
        return (
            (names[0], ())
            if names
            else ("default", (f"/v1/models names none (http {reply.status}): asking for the model 'default'",))
        )

    def calibrate(self, server: Server, salt: str) -> Server:
        """Bytes per token and the template's tokens, from the usage of two short answers that are no streams.

        Where the server refuses min_tokens and ignore_eos (OpenAI's own does), lengths are measured, not forced.
        """
        prompts = Prompts(f"{salt}/probe", ASSUMED_BYTES_PER_TOKEN)
        texts = [prompts.text(index, tokens) for index, tokens in enumerate(PROBE_TOKENS)]
        counts = []
        for text in texts:
            reply = self._complete(text, server)
            if reply.status == 400 and server.forced:
                server = replace(server, forced=False, notes=(*server.notes, f"output length measured, not forced: {reply.said}"))
                reply = self._complete(text, server)
            if reply.status in (429, 503):
                return replace(
                    server,
                    notes=(
                        *server.notes,
                        f"no calibration (http {reply.status}): assuming {server.bytes_per_token} bytes per token",
                    ),
                )
            if reply.status != 200:
                raise InputError(
                    f"a first request got http {reply.status}: {reply.said}", where=self._path, fix=_advice(reply.status)
                )
            counts.append(_prompt_tokens(reply.body))
        few, many = counts
        if few is None or many is None or many <= few:
            return replace(
                server, notes=(*server.notes, f"the server reports no usage: assuming {server.bytes_per_token} bytes per token")
            )
        ratio = (len(texts[1]) - len(texts[0])) / (many - few)
        ratio = min(max(ratio, 0.5), 64.0)  # what Prompts can write
        return replace(server, bytes_per_token=ratio, template_tokens=max(0, round(few - len(texts[0]) / ratio)))

    def _complete(self, text: bytes, server: Server) -> Reply:
        prompt = text.decode()
        asked: dict[str, Any] = {"model": server.model, "max_tokens": 1}
        asked |= {"messages": [{"role": "user", "content": prompt}]} if self._path == PATHS["chat"] else {"prompt": prompt}
        if server.forced:
            asked |= {"min_tokens": 1, "ignore_eos": True}
        return self.ask("POST", self._path, asked)


def _prompt_tokens(body: bytes) -> int | None:
    try:
        return int(json.loads(body)["usage"]["prompt_tokens"])
    except (ValueError, KeyError, TypeError):
        return None


def _advice(status: int) -> str:
    if status in (401, 403):
        return "set OPENAI_API_KEY"
    return "check --model, --endpoint and the base path in --host; one request by hand shows what the server wants"
