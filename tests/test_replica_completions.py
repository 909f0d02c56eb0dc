"""Requests in, bytes out: what the stand-in understands and how it words its answers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stack.completions import Answer, Ask, RequestError


def ask(chat: bool = True, context_max: int = 1000, seed: int = 0, **body: Any) -> Ask:
    body = {"messages": [{"role": "user", "content": "four"}], **body} if chat else {"prompt": "four", **body}
    return Ask(json.dumps(body).encode(), chat=chat, model="m", context_max=context_max, seed=seed)


def events(*pieces: bytes) -> list[dict[str, Any]]:
    lines = b"".join(pieces).decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


@given(st.lists(st.one_of(st.text(), st.lists(st.text())), min_size=1))
def test_prompt_tokens_are_a_quarter_of_the_bytes_however_the_text_is_cut(contents: list[str | list[str]]) -> None:
    messages = [
        {"role": "user", "content": content if isinstance(content, str) else [{"type": "text", "text": part} for part in content]}
        for content in contents
    ]
    size = len("".join("".join(content) for content in contents).encode())
    if size == 0:
        with pytest.raises(RequestError, match="empty"):
            ask(messages=messages)
    else:
        assert ask(messages=messages, context_max=10**9).prompt_tokens == -(-size // 4)


def test_token_ids_count_themselves() -> None:
    assert ask(chat=False, prompt=[5, 6, 7]).prompt_tokens == 3
    assert ask(chat=False, prompt=[[5, 6, 7, 8]]).prompt_tokens == 4
    assert ask(chat=False, prompt=["eight by"]).prompt_tokens == 2


def test_the_length_is_forced_by_ignore_eos_or_drawn_once_for_all() -> None:
    forced = ask(max_tokens=77, min_tokens=77, ignore_eos=True)
    assert (forced.output_tokens, forced.finish_reason) == (77, "length")
    assert ask(max_tokens=5, max_completion_tokens=6, ignore_eos=True).output_tokens == 6
    assert ask(chat=False, ignore_eos=True).output_tokens == 16
    prompts = [[{"role": "user", "content": f"question {number}"}] for number in range(400)]
    drawn = [ask(messages=messages, context_max=10**6).output_tokens for messages in prompts]
    assert drawn == [ask(messages=messages, context_max=10**6).output_tokens for messages in prompts]
    assert drawn != [ask(messages=messages, context_max=10**6, seed=1).output_tokens for messages in prompts]
    assert 200 < sum(drawn) / len(drawn) < 320  # 256 with a standard error of 13
    short = [ask(messages=messages, max_tokens=100, min_tokens=20) for messages in prompts]
    assert {one.finish_reason for one in short} == {"length", "stop"}
    assert {one.output_tokens for one in short} <= set(range(20, 101))
    assert min(one.output_tokens for one in short) == 20


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"max_tokens": 1000}, "maximum context length"),
        ({"max_tokens": 0}, "maximum context length"),
        ({"max_tokens": 5, "min_tokens": 6}, "min_tokens"),
        ({"n": 2}, "n must be 1"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"content": [{"type": "image_url"}]}]}, "image_url"),
        ({"max_tokens": "many"}, "max_tokens"),
    ],
)
def test_what_cannot_be_served_is_said(body: dict[str, Any], word: str) -> None:
    with pytest.raises(RequestError, match=word):
        ask(**body)


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("continuous", [True, False])
@pytest.mark.parametrize("include", [True, False])
def test_a_stream_has_one_token_a_chunk_and_exact_usage(chat: bool, continuous: bool, include: bool) -> None:
    options = {"include_usage": include, "continuous_usage_stats": continuous}
    one = ask(chat, stream=True, max_tokens=20, ignore_eos=True, stream_options=options, model='a "model"')
    answer = Answer(one, 'id "quoted"', 1)
    role, *tokens = events(answer.role() or b'data: {"choices":[]}\n\n', *map(answer.token, range(19)), answer.ending(b'{"x":1}'))
    texts = [chunk["choices"][0] for chunk in tokens if chunk["choices"]]
    assert [choice["finish_reason"] for choice in texts] == [None] * 19 + ["length"]
    words = [choice["delta"]["content"] if chat else choice["text"] for choice in texts]
    assert all(len(word.encode()) == 4 for word in words)
    if chat:
        assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    if continuous:
        assert [chunk["usage"]["completion_tokens"] for chunk in tokens][:20] == list(range(1, 21))
    if include:
        assert tokens[-1]["choices"] == []
        assert tokens[-1]["usage"] == {
            "prompt_tokens": 1,
            "total_tokens": 21,
            "completion_tokens": 20,
            "prompt_tokens_details": None,
        }
    assert ("usage" in tokens[-1]) == (include or continuous)
    assert [chunk.get("metrics") for chunk in tokens][-2:] == [None, {"x": 1}]
    assert {(chunk["id"], chunk["model"]) for chunk in tokens} == {('id "quoted"', 'a "model"')}


def test_the_whole_answer_is_the_streams_text() -> None:
    one = ask(max_tokens=40, ignore_eos=True)
    answer = Answer(one, "x", 1)
    whole = json.loads(answer.whole(b""))
    streamed = [event["choices"][0]["delta"]["content"] for event in events(*map(answer.token, range(40)), b"data: [DONE]\n\n")]
    assert whole["choices"][0]["message"]["content"] == "".join(streamed)
    assert whole["usage"]["completion_tokens"] == 40
