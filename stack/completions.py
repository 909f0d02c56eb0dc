"""OpenAI's completion requests and answers as vLLM words them: what the stand-in reads and writes.

Pure: bytes in, bytes out. A chunk of a stream is two pieces joined, one made once per request and one once per process,
because a thousand streams write a chunk each in every step.
"""

from __future__ import annotations

import math
from typing import Final

import msgspec
import xxhash

BYTES_PER_TOKEN: Final = 4  # the stand-in's tokenizer
MEAN_ANSWER_TOKENS: Final = 256  # of answers whose length is not forced
COMPLETION_MAX_TOKENS: Final = 16  # OpenAI's default for /v1/completions

# The text of an answer: four bytes a word, so that the next turn's prompt counts as many tokens as were generated.
_WORDS: Final = (
    " the",
    " and",
    " for",
    " you",
    " not",
    " are",
    " all",
    " new",
    " can",
    " one",
    " use",
    " now",
    " day",
    " see",
    " way",
    " may",
)


class RequestError(Exception):
    """What the client asked for cannot be done (HTTP 400); the text is the answer's message."""


class StreamOptions(msgspec.Struct):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class _Part(msgspec.Struct):
    type: str = "text"
    text: str = ""


class _Message(msgspec.Struct):
    content: str | list[_Part] | None = None


class _Body(msgspec.Struct, kw_only=True):
    """Fields that both kinds of request share; unknown ones are ignored, as vLLM does."""

    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    n: int | None = 1
    seed: int | None = None


class _ChatBody(_Body):
    messages: list[_Message]


class _TextBody(_Body):
    prompt: str | list[str | int | list[int]]


_CHAT: Final = msgspec.json.Decoder(_ChatBody)
_TEXT: Final = msgspec.json.Decoder(_TextBody)
_encode: Final = msgspec.json.encode


class Ask:
    """A checked request: ``prompt_tokens`` in, exactly ``output_tokens`` out, ending for ``finish_reason``."""

    __slots__ = (
        "chat", "continuous_usage", "finish_reason", "include_usage", "model", "output_tokens", "prompt_tokens", "stream",
    )  # fmt: skip

    def __init__(self, body: bytes, *, chat: bool, model: str, context_max: int, seed: int) -> None:
        """``model`` is the server's own, ``context_max`` the tokens that prompt and answer share. Raises RequestError."""
        try:
            asked = (_CHAT if chat else _TEXT).decode(body)
        except msgspec.MsgspecError as error:
            raise RequestError(f"the body is not a valid request: {error}") from error
        if (asked.n or 1) != 1:
            raise RequestError("n must be 1: the stand-in generates one choice")
        text, self.prompt_tokens = _prompt(asked)
        options = asked.stream_options or StreamOptions()
        self.chat, self.model, self.stream = chat, asked.model or model, bool(asked.stream)
        self.include_usage, self.continuous_usage = options.include_usage, options.continuous_usage_stats
        room = context_max - self.prompt_tokens
        caps = (asked.max_completion_tokens, asked.max_tokens, room if chat else COMPLETION_MAX_TOKENS)
        cap = next(declared for declared in caps if declared is not None)
        if not 1 <= cap <= room:
            raise RequestError(
                f"This model's maximum context length is {context_max} tokens. However, you requested {cap} output tokens and your"
                f" prompt contains {self.prompt_tokens} input tokens. Please reduce the length of either one."
            )
        if not 0 <= asked.min_tokens <= cap:
            raise RequestError(f"min_tokens must be between 0 and max_tokens={cap}, got {asked.min_tokens}")
        drawn = cap if asked.ignore_eos else _drawn_length(text, seed if asked.seed is None else asked.seed)
        self.output_tokens = min(max(drawn, asked.min_tokens), cap)
        self.finish_reason = "length" if self.output_tokens == cap else "stop"


def _prompt(body: _ChatBody | _TextBody) -> tuple[bytes, int]:
    """The text and its tokens: ceil(UTF-8 bytes / 4), except where the client sends token ids."""
    if isinstance(body, _ChatBody):
        text = b"".join(_content(message.content) for message in body.messages)
    elif isinstance(body.prompt, str):
        text = body.prompt.encode()
    else:
        items = body.prompt[0] if len(body.prompt) == 1 and not isinstance(body.prompt[0], int) else body.prompt
        if isinstance(items, list) and items and all(isinstance(item, int) for item in items):
            return _encode(items), len(items)
        if not isinstance(items, str):
            raise RequestError("prompt must be one string or one list of token ids")
        text = items.encode()
    if not text:
        raise RequestError("the prompt is empty")
    return text, -(-len(text) // BYTES_PER_TOKEN)


def _content(content: str | list[_Part] | None) -> bytes:
    if isinstance(content, str):
        return content.encode()
    for part in content or ():
        if part.type != "text":
            raise RequestError(f"a content part of type {part.type!r}: the stand-in reads text only")
    return "".join(part.text for part in content or ()).encode()


def _drawn_length(text: bytes, seed: int) -> int:
    """A geometric answer length that depends on prompt and seed alone: the same request asks the same work of every policy."""
    uniform = (xxhash.xxh3_64_intdigest(text, seed % 2**64) + 0.5) / 2**64
    return math.ceil(-MEAN_ANSWER_TOKENS * math.log(uniform))


# A chunk is head (with the request's id) + tail (with the token's text).
_UNFINISHED: Final = b',"logprobs":null,"finish_reason":null}]}\n\n'
_CHAT_TAILS: Final = tuple(b'{"content":%b}' % _encode(word) + _UNFINISHED for word in _WORDS)
_TEXT_TAILS: Final = tuple(_encode(word) + _UNFINISHED for word in _WORDS)
_MASK: Final = len(_WORDS) - 1  # a power of two less one


class Answer:
    """Makes the bytes of one answer. ``number`` counts tokens from 0."""

    __slots__ = ("_envelope", "_head", "_tails", "ask")

    def __init__(self, ask: Ask, completion_id: str, created_unix_s: int) -> None:
        self.ask = ask
        kind = b"chat.completion" if ask.chat else b"text_completion"
        self._envelope = b'{"id":%b,"object":"%b%b","created":%d,"model":%b,' % (
            _encode(completion_id), kind, b".chunk" if ask.chat and ask.stream else b"", created_unix_s, _encode(ask.model),
        )  # fmt: skip
        self._head = b'data: %b"choices":[{"index":0,"%b":' % (self._envelope, b"delta" if ask.chat else b"text")
        self._tails = _CHAT_TAILS if ask.chat else _TEXT_TAILS

    def role(self) -> bytes:
        """The empty delta that opens a chat stream."""
        if not self.ask.chat:
            return b""
        return self._head + b'{"role":"assistant","content":""}' + _UNFINISHED

    def token(self, number: int) -> bytes:
        chunk = self._head + self._tails[number & _MASK]
        if self.ask.continuous_usage:
            return b'%b,"usage":%b}\n\n' % (chunk.removesuffix(b"}\n\n"), self._usage(number + 1))
        return chunk

    def ending(self, metrics: bytes) -> bytes:
        """The last token with its finish_reason, usage where asked for, and [DONE]. ``metrics`` (JSON) goes into the last chunk."""
        ask = self.ask
        extra = b',"metrics":%b' % metrics if metrics else b""
        usage = b',"usage":%b' % self._usage(ask.output_tokens)
        last = (self._head + self._tails[(ask.output_tokens - 1) & _MASK]).removesuffix(b"null}]}\n\n")
        last += b'%b,"stop_reason":null}]' % _encode(ask.finish_reason)
        if ask.continuous_usage:
            last += usage
        if not ask.include_usage:
            return last + extra + b"}\n\ndata: [DONE]\n\n"
        return b'%b}\n\ndata: %b"choices":[]%b%b}\n\ndata: [DONE]\n\n' % (last, self._envelope, usage, extra)

    def whole(self, metrics: bytes) -> bytes:
        """The answer that is not a stream."""
        count = self.ask.output_tokens
        text = _encode("".join(_WORDS[number & _MASK] for number in range(count)))
        content = b'"message":{"role":"assistant","content":%b}' % text if self.ask.chat else b'"text":%b' % text
        reason = _encode(self.ask.finish_reason)
        choice = b'{"index":0,%b,"logprobs":null,"finish_reason":%b,"stop_reason":null}' % (content, reason)
        extra = b',"metrics":%b' % metrics if metrics else b""
        return b'%b"choices":[%b],"usage":%b%b}' % (self._envelope, choice, self._usage(count), extra)

    def _usage(self, completion_tokens: int) -> bytes:
        prompt_tokens = self.ask.prompt_tokens
        return b'{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d,"prompt_tokens_details":null}' % (
            prompt_tokens, prompt_tokens + completion_tokens, completion_tokens,
        )  # fmt: skip
