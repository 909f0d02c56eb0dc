"""The real recorder process: fed by spools, asked over HTTP, killed, cut off, and left without a disk."""

from __future__ import annotations

import http.server
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from replay.records import FLEET_STATE_STRUCT, LIMITED, NS_PER_S, FleetState, Outcome, span_id, trace_id
from replay.runs import RunDir
from tests.tracing_support import MANIFEST, outcome, packed, quick

PATIENCE_S = 30.0


class Running:
    """A recorder process over a run directory."""

    def __init__(self, run: RunDir, *options: str, env: dict[str, str] | None = None, **popen: Any) -> None:
        quiet = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tracing.recorder", "--run", str(run.path), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**quiet, **(env or {})},
            **popen,
        )
        assert self.process.stdout is not None
        self.port = json.loads(self.process.stdout.readline())["metrics_port"]

    def scrape(self, accept: str = "text/plain") -> str:
        request = Request(f"http://127.0.0.1:{self.port}/metrics", headers={"Accept": accept})
        with urlopen(request, timeout=PATIENCE_S) as answer:  # noqa: S310 (our own process)
            return str(answer.read().decode())

    def total(self, name: str, **labels: str) -> float:
        found = [s for family in parse_text(self.scrape()) for s in family.samples if s.name == name]
        return sum(sample.value for sample in found if labels.items() <= sample.labels.items())

    def end(self) -> dict[str, Any]:
        """Close stdin, as a parent does that ends; returns the last line."""
        out, err = self.process.communicate(timeout=PATIENCE_S)
        assert not err, err
        return dict(json.loads(out.splitlines()[-1]))


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path / "run", MANIFEST)


@pytest.fixture
def start(run: RunDir) -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def starter(*options: str, **kwargs: Any) -> Running:
        started.append(Running(run, *options, **kwargs))
        return started[-1]

    yield starter
    for recorder in started:
        recorder.process.kill()
        recorder.process.wait()
        for pipe in (recorder.process.stdin, recorder.process.stdout, recorder.process.stderr):
            assert pipe is not None
            pipe.close()


def append(run: RunDir, rows: list[Outcome], spool: str = "w") -> None:
    with (run.path / "spool" / f"{spool}.outcomes").open("ab") as file:
        file.write(packed(rows))


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def read_ids(run: RunDir) -> list[int]:
    return sorted(run.outcomes()["request_id"].to_pylist())


def exported(run: RunDir) -> list[dict[str, Any]]:
    """The spans of spans.jsonl."""
    lines = (run.path / "spans.jsonl").read_text().splitlines()
    scopes = [scope for line in lines for resource in json.loads(line)["resourceSpans"] for scope in resource["scopeSpans"]]
    return [span for scope in scopes for span in scope["spans"]]


def test_records_become_rows_metrics_and_spans(run: RunDir, start: Callable[..., Running]) -> None:
    append(run, [quick(0), outcome(1)])
    recorder = start("--sample-one-in", "1")
    wait_for(lambda: recorder.total("tidegauge_requests_total") == 2)
    append(run, [quick(2)])
    append(run, [quick(3, status=LIMITED)], spool="later")  # a worker that starts late
    wait_for(lambda: recorder.total("tidegauge_traces_total", result="kept") == 4)
    assert recorder.total("tidegauge_slo_good_requests_total") == 2
    assert "trace_id=" not in recorder.scrape()
    families = parse_openmetrics(recorder.scrape("application/openmetrics-text; version=1.0.0"))
    named = {s.exemplar.labels["trace_id"] for family in families for s in family.samples if s.exemplar}
    assert named
    last = recorder.end()
    spans = exported(run)
    assert last == {"rows": 4, "spans_kept": len(spans), "spans_dropped": 0, "traces_kept": 4, "traces_dropped": 0}
    assert {span["traceId"] for span in spans} == {f"{trace_id('run-1', request):032x}" for request in range(4)} >= named
    assert sorted(part.name for part in (run.path / "requests").iterdir()) == ["part-later-0-1.parquet", "part-w-0-3.parquet"]
    assert read_ids(run) == [0, 1, 2, 3]
    assert recorder.process.returncode == 0


def test_parts_appear_while_the_run_is_on_and_become_one_at_the_end(run: RunDir, start: Callable[..., Running]) -> None:
    recorder = start("--part-s", "0.1")
    for request in range(3):
        append(run, [quick(request)])
        wait_for(lambda end=request + 1: (run.path / "requests" / f"part-w-{end - 1}-{end}.parquet").exists())
    assert read_ids(run) == [0, 1, 2]
    assert recorder.end()["rows"] == 3
    assert [part.name for part in (run.path / "requests").iterdir()] == ["part-w-0-3.parquet"]
    assert read_ids(run) == [0, 1, 2]


def test_killed_and_started_again_every_record_is_read_once(run: RunDir, start: Callable[..., Running]) -> None:
    first = start("--part-s", "0.1")
    append(run, [quick(request) for request in range(50)])
    wait_for(lambda: list((run.path / "requests").glob("part-*.parquet")))
    append(run, [quick(request) for request in range(50, 60)])
    with (run.path / "spool" / "w.outcomes").open("ab") as file:
        file.write(packed([quick(60)])[:100])  # the sender is killed too, within a record
    first.process.kill()
    first.process.wait()
    assert read_ids(run) == list(range(60))
    (run.path / "requests" / "part-w-50-60.parquet.tmp").write_bytes(b"PAR1")
    start().end()
    assert [part.name for part in (run.path / "requests").iterdir()] == ["part-w-0-60.parquet"]
    assert read_ids(run) == list(range(60))


def test_it_ends_when_its_parent_is_killed(run: RunDir) -> None:
    append(run, [quick(0)])
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-m', 'tracing.recorder', '--run', sys.argv[1]], stdin=subprocess.PIPE)\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(run.path)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout:
        lines = [parent.stdout.readline(), parent.stdout.readline()]  # the pid, and the recorder's own first line
        assert json.loads(next(line for line in lines if line.startswith("{")))["metrics_port"]
        parent.kill()
        parent.wait()
        rest = parent.stdout.read()  # ends when the recorder, who holds the other end, has ended
    assert json.loads(rest)["rows"] == 1
    assert read_ids(run) == [0]


def test_sigterm_ends_it_after_the_last_record(run: RunDir, start: Callable[..., Running]) -> None:
    recorder = start()
    append(run, [quick(0), quick(1)])
    recorder.process.send_signal(signal.SIGTERM)
    out, _ = recorder.process.communicate(timeout=PATIENCE_S)
    assert json.loads(out.splitlines()[-1])["rows"] == 2
    assert recorder.process.returncode == 0


def test_ctrl_c_is_left_to_the_parent_whose_requests_are_still_draining(run: RunDir, start: Callable[..., Running]) -> None:
    recorder = start()
    recorder.process.send_signal(signal.SIGINT)
    append(run, [quick(0)])
    wait_for(lambda: recorder.total("tidegauge_requests_total") == 1)
    assert recorder.end()["rows"] == 1


def test_a_gateways_recorder_counts_all_and_keeps_only_what_no_client_keeps(run: RunDir, start: Callable[..., Running]) -> None:
    recorder = start("--role", "gateway")
    foreign = outcome(9, trace_hi=0xA, trace_lo=0xB, parent_span=0xC, scheduled_at_ns=-1)
    append(run, [outcome(1, kept_by_client=1), foreign])
    state = FleetState(
        NS_PER_S, queued=4, running=2, wanted=3, starting=1, ready=2, draining=0, arrived=6, ended=2, usd_per_hour=5.0
    )
    (run.path / "spool" / "g.states").write_bytes(FLEET_STATE_STRUCT.pack(*state))
    wait_for(lambda: recorder.total("tidegauge_queued_requests") == 4)
    assert recorder.total("tidegauge_requests_total", side="gateway") == 2
    assert recorder.total("tidegauge_cost_usd_per_hour") == 5
    last = recorder.end()
    assert (last["rows"], last["traces_kept"]) == (1, 1)
    spans = exported(run)
    assert {span["traceId"] for span in spans} == {f"{0xA:016x}{0xB:016x}"}
    assert [span["parentSpanId"] for span in spans if span["name"] == "gateway"] == [f"{0xC:016x}"]
    assert read_ids(run) == [9]


class Receiver(http.server.BaseHTTPRequestHandler):
    """An OTLP/HTTP endpoint: decodes what it is sent and answers as a collector does."""

    requests: list[ExportTraceServiceRequest]

    def do_POST(self) -> None:
        assert self.path == "/v1/traces"
        assert self.headers["Content-Type"] == "application/x-protobuf"
        self.requests.append(ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


def test_spans_go_to_the_otlp_endpoint_of_the_environment(run: RunDir, start: Callable[..., Running]) -> None:
    handler = type("Handler", (Receiver,), {"requests": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        recorder = start(env={"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{server.server_port}"})
        append(run, [outcome(7)])
        last = recorder.end()
        server.shutdown()
    resources = [resource for request in handler.requests for resource in request.resource_spans]
    spans = {span.name: span for resource in resources for scope in resource.scope_spans for span in scope.spans}
    assert len(spans) == last["spans_kept"] == 9
    assert spans["inference"].trace_id == trace_id("run-1", 7).to_bytes(16, "big")
    assert spans["inference"].span_id == span_id(trace_id("run-1", 7), "inference").to_bytes(8, "big")
    assert spans["inference"].parent_span_id == spans["gateway"].span_id
    services = {a.value.string_value for resource in resources for a in resource.resource.attributes if a.key == "service.name"}
    assert services == {"tidegauge-client", "tidegauge-gateway"}
    assert not (run.path / "spans.jsonl").exists()


def test_an_endpoint_that_hangs_costs_spans_and_never_rows(run: RunDir, start: Callable[..., Running]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        recorder = start(env={"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_EXPORTER_OTLP_TIMEOUT": "1"})
        append(run, [outcome(request) for request in range(5)])
        wait_for(lambda: recorder.total("tidegauge_requests_total") == 5)
        last = recorder.end()
    assert last == {"rows": 5, "spans_kept": 0, "spans_dropped": 45, "traces_kept": 0, "traces_dropped": 5}
    assert recorder.process.returncode == 0
    assert read_ids(run) == list(range(5))


def test_without_room_for_parquet_it_says_so_and_the_spool_still_has_every_row(run: RunDir, start: Callable[..., Running]) -> None:
    def no_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # as a full disk: a write beyond it fails

    recorder = start("--part-s", "0.1", preexec_fn=no_room)
    append(run, [quick(request) for request in range(200)])
    wait_for(lambda: recorder.total("tidegauge_requests_total") == 200)
    last = recorder.end()
    assert recorder.process.returncode == 1
    assert last["rows"] == 0
    assert "w: rows from 0 on are in the spool only" in last["error"]
    assert not list((run.path / "requests").iterdir())
    assert read_ids(run) == list(range(200))


def test_no_run_is_one_clear_error(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "tracing.recorder", "--run", str(tmp_path)], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("recorder: ")
    assert "run.json" in ended.stderr
    assert "Traceback" not in ended.stderr
