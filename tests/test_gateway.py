"""The gateway as clients, replicas and operators see it. Real sockets; the replicas answer what a test tells them to."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import pytest

from replay import wire
from replay.records import CANCELLED, ERROR, LIMITED, OK, SHED, span_id, trace_id
from stack import httpd
from tests.gateway_rig import DONE, JSON, SSE, STREAM, Replica, completion, event, gateway_of, task, usage_event
from tests.http_client import Client, ask, request_bytes, scenario, until

CHAT = "/v1/chat/completions"
OURS = {"x-tidegauge-run": "run-7", "x-tidegauge-request": "42"}
ASKS_USAGE = {"stream_options": {"include_usage": True}}


@scenario
async def test_a_stream_reaches_its_client_byte_for_byte(tmp_path: Path) -> None:
    async with gateway_of(tmp_path, Replica()) as rig:
        answer = await ask(rig.port, CHAT, completion(**ASKS_USAGE))
        assert answer.body == STREAM + usage_event() + DONE
        assert answer.whole
        assert answer.headers["x-tidegauge-replica"] == "0"
        assert re.fullmatch(r"gateway;dur=[\d.]+, queue;dur=[\d.]+", answer.headers["server-timing"])
        record = await rig.record()
        assert (record.status, record.prompt_tokens, record.output_tokens, record.http_status) == (OK, 9, 2, 200)
        assert record.first_token_at_ns > record.gateway_at_ns > 0


@scenario
async def test_usage_is_asked_for_and_taken_out_again_for_a_client_that_did_not_ask(tmp_path: Path) -> None:
    replica = Replica()
    async with gateway_of(tmp_path, replica) as rig:
        for options in ({}, {"stream_options": None}, {"stream_options": {"include_usage": False, "x": 1}}):
            answer = await ask(rig.port, CHAT, completion(seed=7, **options))
            assert answer.body == STREAM + DONE
        sent = [json.loads(exchange.body) for exchange in replica.seen]
        assert [body["stream_options"] for body in sent] == [
            {"include_usage": True},
            {"include_usage": True},
            {"include_usage": True, "x": 1},
        ]
        assert all(body["seed"] == 7 for body in sent)
        assert (await rig.record(2)).output_tokens == 2


@scenario
async def test_an_answer_that_is_no_stream_comes_whole_with_its_inference_time(tmp_path: Path) -> None:
    async with gateway_of(tmp_path, Replica()) as rig:
        for path in (CHAT, "/v1/completions"):
            answer = await ask(rig.port, path, completion(stream=False))
            assert json.loads(answer.body)["choices"][0]["message"]["content"] == "Hello"
            assert "inference;dur=" in answer.headers["server-timing"]
        record = await rig.record()
        assert (record.status, record.prompt_tokens, record.output_tokens) == (OK, 9, 2)
        assert (record.first_token_at_ns, record.decode_ns) == (-1, -1)  # it cannot be known


@scenario
async def test_unknown_fields_and_headers_pass_untouched_and_those_of_one_connection_do_not(tmp_path: Path) -> None:
    replica = Replica()
    raw = (
        b'{"model":"m", "messages":[{"role":"user","content":"x"}],"top_p":1e-7,"vendor":{"a":[1.00]},"n":12345678901234567890123}'
    )
    headers = {
        "X-Custom": "kept", "Authorization": "Bearer theirs", "Connection": "keep-alive, x-hop", "X-Hop": "dropped",
        "TE": "trailers", "X-Tidegauge-Tenant": "t", "Accept-Encoding": "gzip", "tracestate": "a=b",
    }  # fmt: skip
    async with gateway_of(tmp_path, replica) as rig:
        await ask(rig.port, CHAT + "?x=1", raw, headers=headers)
        seen = replica.seen[0]
        assert seen.body == raw
        assert seen.target == b"/v1/chat/completions?x=1"
        assert seen.get(b"x-custom") == b"kept"
        assert seen.get(b"authorization") == b"Bearer theirs"
        assert seen.get(b"tracestate") == b"a=b"
        assert not [name for name in (b"x-hop", b"te", b"x-tidegauge-tenant", b"accept-encoding") if seen.get(name)]
        assert [value for name, value in seen.headers if name == b"host"] == [f"127.0.0.1:{replica.server.port}".encode()]


@scenario
async def test_trace_context_goes_in_and_out(tmp_path: Path) -> None:
    replica = Replica()
    theirs, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    async with gateway_of(tmp_path, replica) as rig:
        answers = [
            await ask(rig.port, CHAT, completion(), headers=headers)
            for headers in (
                {"traceparent": f"00-{theirs}-{parent}-00", "x-request-id": "mine"},
                {},
                OURS,
                {"traceparent": "00-00000000000000000000000000000000-00f067aa0ba902b7-01"},
            )
        ]
        traces = [int(theirs, 16), trace_id(rig.gateway.run_id, 1), trace_id("run-7", 42), trace_id(rig.gateway.run_id, 2)]
        for trace, number, exchange in zip(traces, (0, 1, None, 2), replica.seen, strict=True):
            assert exchange.get(b"traceparent") == b"00-%032x-%016x-01" % (trace, span_id(trace, "inference", number))
        assert answers[0].headers["x-request-id"] == "mine"
        assert replica.seen[0].get(b"x-request-id") == b"mine"
        assert answers[1].headers["x-request-id"] == f"{traces[1]:032x}"
        foreign, derived, ours, _ = [await rig.record(number) for number in range(4)]
        assert (foreign.trace_hi << 64 | foreign.trace_lo, foreign.parent_span) == (int(theirs, 16), int(parent, 16))
        assert (derived.trace_lo, derived.kept_by_client) == (0, 0)
        assert (ours.request_id, ours.kept_by_client) == (42, 1)


def report_of(body: bytes) -> wire.PhaseReport:
    (found,) = [report for line in body.split(b"\n") if (report := wire.decode_report(line))]
    return found


@scenario
async def test_our_own_client_gets_the_phases_before_done(tmp_path: Path) -> None:
    async with gateway_of(tmp_path, Replica()) as rig:
        body = (await ask(rig.port, CHAT, completion(**ASKS_USAGE), headers=OURS)).body
        report = report_of(body)
        comment = wire.encode_report(report)
        assert body == STREAM + usage_event() + comment + DONE
        assert (report.replica_id, report.attempts) == (0, 1)
        phases = (
            report.limit_ns,
            report.queue_ns,
            report.cold_start_ns,
            report.route_ns,
            report.prefill_ns,
            report.decode_ns,
            report.retry_ns,
        )
        assert sum(phases) == report.total_ns
        assert min(phases) >= 0


@pytest.mark.parametrize(
    "pieces",
    [
        [STREAM, usage_event(), b"data: [DO", b"NE]\n\n"],
        [STREAM, usage_event(), b"data: [DONE]"],
        [(STREAM + usage_event() + DONE)[i : i + 1] for i in range(len(STREAM + usage_event() + DONE))],
        [(STREAM + usage_event() + DONE).replace(b"\n", b"\r\n")],
        [STREAM + usage_event()],
        [STREAM + usage_event().rstrip()],
    ],
    ids=["done split", "no line end", "byte by byte", "crlf", "no done", "no done, no line end"],
)
def test_the_phase_comment_comes_once_and_not_after_done_however_the_stream_is_cut(tmp_path: Path, pieces: list[bytes]) -> None:
    def cut(exchange: httpd.Exchange) -> None:
        async def send() -> None:
            exchange.start(200, SSE)
            for piece in pieces:
                exchange.write(piece)
                await asyncio.sleep(0.0001)
            exchange.end()

        task(send())

    @scenario
    async def run() -> None:
        async with gateway_of(tmp_path, Replica(cut)) as rig:
            body = (await ask(rig.port, CHAT, completion(**ASKS_USAGE), headers=OURS)).body
            comment = wire.encode_report(report_of(body))
            before, after = body.split(comment)
            assert before + after in (b"".join(pieces), b"".join(pieces) + b"\n\n")
            assert b"[DONE]" not in before
            assert (await rig.record()).output_tokens == 2

    run()


@scenario
async def test_first_token_is_the_first_that_is_not_empty(tmp_path: Path) -> None:
    gate = asyncio.Event()

    def role_first(exchange: httpd.Exchange) -> None:
        async def send() -> None:
            exchange.start(200, SSE)
            exchange.write(event(""))
            await gate.wait()
            exchange.end(event("Hello") + usage_event() + DONE)

        task(send())

    replica = Replica(role_first)
    async with gateway_of(tmp_path, replica) as rig:
        client = await Client.connect(rig.port)
        client.send(request_bytes(CHAT, completion(**ASKS_USAGE)))
        await client.reader.readuntil(event(""))
        opened_ns = rig.gateway.now_ns()
        gate.set()
        record = await rig.record()
        assert record.first_chunk_at_ns < opened_ns < record.first_token_at_ns
        client.leave()


@scenario
async def test_a_client_that_leaves_is_cancelled_at_the_replica(tmp_path: Path) -> None:
    def begin(exchange: httpd.Exchange) -> None:
        exchange.start(200, SSE)
        exchange.write(event("Hel"))

    replica = Replica(begin)
    async with gateway_of(tmp_path, replica) as rig:
        client = await Client.connect(rig.port)
        client.send(request_bytes(CHAT, completion(**ASKS_USAGE)))
        await client.reader.readuntil(b"Hel")
        client.leave()
        await until(lambda: replica.gone)
        assert (await rig.record()).status == CANCELLED
        assert rig.statuses() == {"cancelled": 1}


@scenario
async def test_a_client_that_leaves_while_it_waits_frees_its_place(tmp_path: Path) -> None:
    replica = Replica()
    replica.answer = replica.hold
    async with gateway_of(tmp_path, replica, policy_spec={"slots_per_replica": 1}) as rig:
        first, second = await Client.connect(rig.port), await Client.connect(rig.port)
        first.send(request_bytes(CHAT, completion()))
        await until(lambda: replica.seen)
        second.send(request_bytes(CHAT, completion()))
        await until(lambda: len(rig.gateway.calls) == 2)
        second.leave()
        await until(lambda: len(rig.gateway.calls) == 1)
        replica.stream(replica.seen[0])
        assert (await first.answer()).body == STREAM + DONE
        assert len(replica.seen) == 1
        assert rig.statuses() == {"ok": 1, "cancelled": 1}
        waited = (await rig.record(0)).queue_ns
        assert waited > 0
        first.leave()


@scenario
async def test_leaving_after_done_is_not_leaving(tmp_path: Path) -> None:
    def without_end(exchange: httpd.Exchange) -> None:
        exchange.start(200, SSE)
        exchange.write(STREAM + usage_event() + DONE)

    async with gateway_of(tmp_path, Replica(without_end)) as rig:
        client = await Client.connect(rig.port)
        client.send(request_bytes(CHAT, completion()))
        await client.reader.readuntil(b"[DONE]\n\n")
        client.leave()
        record = await rig.record()
        assert (record.status, record.output_tokens) == (OK, 2)


@scenario
async def test_the_queue_sheds_with_503_and_the_limiter_limits_with_429(tmp_path: Path) -> None:
    replica = Replica()
    replica.answer = replica.hold
    spec = {
        "slots_per_replica": 1,
        "queue": {"kind": "fifo", "length_max": 1, "timeout_s": 0.2},
        "limiter": {"kind": "token_bucket", "requests_per_min": 1, "burst_requests": 3},
    }
    async with gateway_of(tmp_path, replica, policy_spec=spec) as rig:
        running = task(ask(rig.port, CHAT, completion()))
        await until(lambda: replica.seen)
        waiting = task(ask(rig.port, CHAT, completion(), headers={"x-request-id": "waits"}))
        await until(lambda: len(rig.gateway.calls) == 2)
        full, limited = await ask(rig.port, CHAT, completion()), await ask(rig.port, CHAT, completion())
        too_late = await waiting
        for answer, status, kind, code in (
            (full, 503, "server_error", "queue_full"),
            (limited, 429, "rate_limit_error", "rate_limit_exceeded"),
            (too_late, 503, "server_error", "queue_timeout"),
        ):
            error = json.loads(answer.body)["error"]
            assert (answer.status, error["type"], error["code"]) == (status, kind, code)
            assert set(error) == {"message", "type", "code", "param"}
            assert int(answer.headers["retry-after"]) >= 1
            assert "server-timing" in answer.headers
        assert 30_000 < int(limited.headers["retry-after-ms"]) <= 60_000
        assert too_late.headers["x-request-id"] == "waits"
        replica.stream(replica.seen[0])
        assert (await running).status == 200
        by_status = {record.status: record for record in rig.records()}
        assert set(by_status) == {OK, SHED, LIMITED}
        assert by_status[SHED].queue_ns >= 0.2e9


@scenario
async def test_a_replica_that_dies_in_the_middle_ends_the_stream_with_an_error(tmp_path: Path) -> None:
    def half(exchange: httpd.Exchange) -> None:
        exchange.start(200, SSE)
        exchange.write(event("Hel"))

    replica = Replica(half)
    async with gateway_of(tmp_path, replica) as rig:
        client = await Client.connect(rig.port)
        client.send(request_bytes(CHAT, completion(**ASKS_USAGE)))
        await client.reader.readuntil(b"Hel")
        rig.pool.kill(0)
        answer = await client.rest()
        assert b'data: {"error": {"message": "the replica failed' in answer
        assert b"[DONE]" not in answer
        assert not answer.endswith(b"0\r\n\r\n")  # no proper end: nobody takes it for a whole answer
        record = await rig.record()
        assert (record.status, record.attempts) == (ERROR, 1)
        assert b"connection lost" in record.detail or b"SIGKILL" in record.detail


@scenario
async def test_a_request_that_was_not_answered_yet_goes_to_another_replica(tmp_path: Path) -> None:
    dying, other = Replica(), Replica()
    dying.answer = dying.hold
    async with gateway_of(tmp_path, dying, other) as rig:
        asked = task(ask(rig.port, CHAT, completion(**ASKS_USAGE), headers=OURS))
        await until(lambda: dying.seen or other.seen)
        rig.pool.kill(0)
        answer = await asked
        assert (answer.status, answer.headers["x-tidegauge-replica"]) == (200, "1")
        report = report_of(answer.body)
        assert report.attempts == 2
        assert report.retry_ns > 0
        assert (await rig.record()).attempts == 2


@pytest.mark.parametrize("first", ["http_5xx", "http_429", "connect", "garbage", "role only"])
def test_failures_before_the_first_byte_are_tried_elsewhere(tmp_path: Path, first: str) -> None:
    def garbage(exchange: httpd.Exchange) -> None:
        assert exchange._conn is not None
        exchange._conn.transport.write(b"\x00\x01 no http\r\n\r\n")

    answers = {
        "http_5xx": lambda exchange: exchange.error(503, "engine is loading"),
        "http_429": lambda exchange: exchange.error(429, "engine is full"),
        "connect": None,
        "garbage": garbage,
        "role only": lambda exchange: (exchange.start(200, SSE), exchange.flush(), exchange.break_off()),
    }

    @scenario
    async def run() -> None:
        bad, good = Replica(answers[first]), Replica()
        async with gateway_of(tmp_path, bad, good) as rig:
            if first == "connect":
                bad.close()
            answer = await ask(rig.port, CHAT, completion())
            assert (answer.status, answer.headers["x-tidegauge-replica"]) == (200, "1")
            record = await rig.record()
            assert (record.status, record.attempts) == (OK, 2)

    run()


@scenario
async def test_when_every_attempt_fails_the_client_is_told_why(tmp_path: Path) -> None:
    broken = [Replica(lambda exchange: exchange.error(500, "CUDA error")) for _ in range(2)]
    async with gateway_of(tmp_path, *broken) as rig:
        answer = await ask(rig.port, CHAT, completion())
        error = json.loads(answer.body)["error"]
        assert (answer.status, error["code"]) == (502, "http_5xx")
        assert "CUDA error" in error["message"]
        assert (await rig.record()).status == ERROR


@scenario
async def test_a_refusal_of_the_replica_comes_back_as_it_is_and_is_not_tried_again(tmp_path: Path) -> None:
    said = b'{"object":"error","message":"maximum context length is 8192"}'
    replicas = [Replica(lambda exchange: exchange.respond(400, [*JSON, (b"x-engine", b"yes")], said)) for _ in range(2)]
    async with gateway_of(tmp_path, *replicas) as rig:
        answer = await ask(rig.port, CHAT, completion())
        assert (answer.status, answer.body, answer.headers["x-engine"]) == (400, said, "yes")
        record = await rig.record()
        assert (record.status, record.http_status, record.attempts) == (ERROR, 400, 1)


@scenario
async def test_an_error_inside_a_stream_is_forwarded_and_counted(tmp_path: Path) -> None:
    def fails(exchange: httpd.Exchange) -> None:
        exchange.start(200, SSE)
        exchange.end(event("Hel") + event(error={"message": "out of memory", "code": 500}) + DONE)

    async with gateway_of(tmp_path, Replica(fails)) as rig:
        answer = await ask(rig.port, CHAT, completion(**ASKS_USAGE))
        assert answer.body.endswith(DONE)
        assert answer.whole
        record = await rig.record()
        assert (record.status, record.detail) == (ERROR, b"out of memory")


@scenario
async def test_a_silent_replica_times_out(tmp_path: Path) -> None:
    replica = Replica()
    replica.answer = replica.hold
    async with gateway_of(tmp_path, replica, policy_spec={"attempts_max": 1}, limits={"silence_s": 0.3}) as rig:
        answer = await ask(rig.port, CHAT, completion())
        assert (answer.status, json.loads(answer.body)["error"]["code"]) == (504, "timeout")
        await until(lambda: replica.gone)


@scenario
async def test_an_idle_connection_that_the_replica_closed_is_no_failure(tmp_path: Path) -> None:
    replica = Replica()
    async with gateway_of(tmp_path, replica) as rig:
        assert (await ask(rig.port, CHAT, completion())).status == 200
        assert replica.server is not None
        for connection in list(replica.server.connections):
            connection.transport.abort()
        assert (await ask(rig.port, CHAT, completion())).status == 200
        assert (await rig.record(1)).attempts == 1
        assert not rig.gateway.upstreams.busy


@scenario
async def test_connections_to_a_replica_are_reused(tmp_path: Path) -> None:
    replica = Replica()
    async with gateway_of(tmp_path, replica) as rig:
        for _ in range(5):
            assert (await ask(rig.port, CHAT, completion())).status == 200
        assert replica.server is not None
        assert len(replica.server.connections) == 1


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"[]", {}, 400),
        (b'{"stream": "yes"}', {}, 400),
        (b'{"model": "\xff"}', {}, 400),
        (completion(), {"x-tidegauge-request": "-1"}, 400),
        (completion(), {"x-tidegauge-output-cap": "many"}, 400),
    ],
)
def test_a_request_that_cannot_be_read_is_refused(tmp_path: Path, body: bytes, headers: dict[str, str], status: int) -> None:
    @scenario
    async def run() -> None:
        replica = Replica()
        async with gateway_of(tmp_path, replica) as rig:
            answer = await ask(rig.port, CHAT, body, headers=headers)
            assert answer.status == status
            assert json.loads(answer.body)["error"]["type"] == "invalid_request_error"
            assert not replica.seen
            assert rig.gateway.refused == 1

    run()


@scenario
async def test_paths_and_methods(tmp_path: Path) -> None:
    async with gateway_of(tmp_path, Replica()) as rig:
        assert json.loads((await ask(rig.port, "/v1/models")).body)["data"][0]["id"] == "m"
        assert (await ask(rig.port, "/v1/embeddings", b"{}")).status == 404
        wrong = await ask(rig.port, CHAT)
        assert (wrong.status, wrong.headers["allow"]) == (405, "POST")


@scenario
async def test_keys_name_tenants_and_never_reach_the_replica_or_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    replica = Replica()
    async with gateway_of(tmp_path, replica, api_keys={"sk-alpha-secret": "alpha"}) as rig:
        for headers in ({}, {"Authorization": "Bearer sk-wrong"}, {"Authorization": "sk-alpha-secret"}, {"x-api-key": "sk-alpha"}):
            answer = await ask(rig.port, CHAT, completion(), headers=headers)
            error = json.loads(answer.body)["error"]
            assert (answer.status, error["type"], error["code"]) == (401, "authentication_error", "invalid_api_key")
        assert (await ask(rig.port, "/v1/models")).status == 401
        assert not replica.seen
        for headers in (
            {"Authorization": "Bearer sk-alpha-secret"},
            {"x-api-key": "sk-alpha-secret", "x-tidegauge-tenant": "beta"},
        ):
            assert (await ask(rig.port, CHAT, completion(), headers=headers)).status == 200
        assert [record.tenant for record in rig.records()] == [b"alpha", b"alpha"]
        assert not [exchange for exchange in replica.seen if exchange.get(b"authorization") or exchange.get(b"x-api-key")]
    written = b"".join(path.read_bytes() for path in (tmp_path / "gateway").rglob("*") if path.is_file())
    assert b"sk-alpha-secret" not in written
    assert "sk-alpha" not in caplog.text


@scenario
async def test_the_fleets_own_key_takes_the_clients_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEET_KEY", "sk-fleet")
    replica = Replica()
    async with gateway_of(tmp_path, replica, fleet={"kind": "stand-in", "api_key_env": "FLEET_KEY"}) as rig:
        await ask(rig.port, CHAT, completion(), headers={"Authorization": "Bearer theirs"})
        assert [value for name, value in replica.seen[0].headers if name == b"authorization"] == [b"Bearer sk-fleet"]


@scenario
async def test_the_fleet_sees_what_is_on_the_wire_and_not_the_forced_length(tmp_path: Path) -> None:
    replica = Replica(lambda exchange: exchange.respond(200, JSON, b"{}"))
    async with gateway_of(tmp_path, replica) as rig:
        seen: list[object] = []
        arrive = rig.gateway.fleet.arrive
        rig.gateway.fleet.arrive = lambda now_ns, request: (seen.append(request), arrive(now_ns, request))  # type: ignore[method-assign]
        text = "a shared prefix " * 300  # 4800 bytes: two whole blocks
        headers = {
            **OURS,
            "x-tidegauge-output-cap": "700",
            "x-tidegauge-session": "s1",
            "x-tidegauge-priority": "-2",
            "x-tidegauge-tenant": "t1",
        }
        for output_tokens in (3, 300):
            messages = [{"role": "user", "content": text}]
            await ask(rig.port, CHAT, completion(messages=messages, max_tokens=output_tokens), headers=headers)
        first, second = seen
        assert first == second  # rows that differ only in the recorded output length look the same
        assert (first.tenant, first.session, first.priority, first.output_cap) == ("t1", "s1", -2, 700)
        assert (first.prompt_bytes, len(first.prefix_hashes)) == (4800, 2)
        parts = [{"type": "text", "text": text[:2000]}, {"type": "image_url"}, {"type": "text", "text": text[2000:]}]
        await ask(rig.port, CHAT, completion(messages=[{"role": "user", "content": parts}], max_completion_tokens=5))
        await ask(rig.port, "/v1/completions", completion(messages=None, prompt=text))
        await ask(rig.port, "/v1/completions", completion(messages=None, prompt=[1, 2, 3]))
        assert seen[2].prefix_hashes == seen[3].prefix_hashes == first.prefix_hashes
        assert (seen[2].output_cap, seen[3].output_cap) == (5, None)
        assert seen[4].prompt_bytes == len(b"[1, 2, 3]")
