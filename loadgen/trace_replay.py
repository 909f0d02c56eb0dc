"""Replay recorded LLM traffic with Locust, open loop.

    locust -f loadgen/ --host http://127.0.0.1:8000 --trace azure-code-2023 [--headless] [--processes N] [--master | --worker]

The one locustfile: it ties Locust's hooks to the sides of a replay. A *sender* (the local process, or each worker) replays its
share of the plan; the *leader* (the local process, or the master) starts the senders together and gathers what they say. What
is sent and when follows from the trace, so the one user that Locust wants does nothing.

Everything is imported as ``loadgen._x``: Locust loads this file by path, and ``import _x`` would be a second module object.
"""

from __future__ import annotations

import logging
import signal
import sys
from time import monotonic_ns, time_ns
from typing import Any

import gevent
from gevent.event import AsyncResult
from locust import LoadTestShape, User, events, task
from locust.runners import STATE_MISSING, MasterRunner, WorkerRunner

from loadgen._leader import DONE, GO, LOADED, STOP, Leader, load_plan, raise_file_limit
from loadgen._openai import resolve
from loadgen._outcomes import Clock, Spool
from loadgen._requests import PATHS, RequestWriter, Server
from loadgen._schedule import Sender
from loadgen._settings import Settings, add_arguments, api_key
from loadgen._webui import add_tab, progress_rows, table
from replay.errors import InputError
from replay.runs import RunDir
from replay.schedule import shard

log = logging.getLogger("tidegauge")


class Replay:
    """What one Locust process does in a run: lead, send, or both."""

    current: Replay | None = None

    def __init__(self, environment: Any) -> None:
        self.environment, self.runner = environment, environment.runner
        self.leads = not isinstance(self.runner, WorkerRunner)
        self.sends = not isinstance(self.runner, MasterRunner)
        self.name = self.runner.client_id if isinstance(self.runner, WorkerRunner) else "local"
        self.leader: Leader | None = None
        self.sender: Sender | None = None
        self.finished = False  # the leader's side of the current run is over
        self.error = ""
        self._conducting: gevent.Greenlet | None = None
        self._sending: gevent.Greenlet | None = None
        self._go: AsyncResult[dict[str, Any] | None] = AsyncResult()
        self._stopped = ""

    def start(self) -> None:
        """Locust's test_start: once in every process."""
        self.finished, self.leader, self.sender, self._go = False, None, None, AsyncResult()
        self.error = self._stopped = ""
        raise_file_limit()
        options = self.environment.parsed_options
        if self.leads:
            self.environment.process_exit_code = 1  # until a verdict says otherwise
            try:
                settings = Settings.read(options, self.environment.host)
                self.leader = Leader(settings, api_key(options), self.runner.send_message)
            except InputError as error:
                self.fail(error)
                return
            # What the leader resolved reaches the workers with Locust's spawn message.
            options.run_dir, options.run_id = settings.run_dir, settings.run_id
            log.info(
                "replaying %d requests over %.0f s, drain up to %.0f s, into %s; users, spawn rate and run time are set for you",
                len(self.leader.plan), self.leader.planned_ns / 1e9, settings.drain_s, settings.run_dir,
            )  # fmt: skip
            self._conducting = gevent.spawn(self._conduct, self.leader)
        if self.sends:
            self._sending = gevent.spawn(self._send)

    def stop(self, reason: str) -> None:
        """Locust's test_stop and quitting: end what still runs, and wait until it has left its rows."""
        if self.leader and self._conducting and not self.finished:
            self.leader.stop(reason)
            self._conducting.join()
        elif not self.leads and self._sending:
            self._end_sending(reason)
            self._sending.join()

    def _end_sending(self, reason: str) -> None:
        self._stopped = self._stopped or reason
        if self.sender:
            self.sender.stop(reason)
        elif not self._go.ready():
            self._go.set(None)  # it never gets its start

    def fail(self, error: InputError) -> None:
        """Bad input: one clear error, exit code 2, and the shape ends the test."""
        print(f"error: {error}", file=sys.stderr, flush=True)
        log.error("%s", error)
        self.environment.process_exit_code = 2
        self.error, self.finished = str(error), True

    # The leader's side.

    def _conduct(self, leader: Leader) -> None:
        senders = [self.name]
        if isinstance(self.runner, MasterRunner):
            senders = [name for name in self.runner.clients if not self._is_lost(name)]
        try:
            leader.conduct(senders, self._is_lost)
            if leader.validity and leader.validity["valid"]:
                self.environment.process_exit_code = 0
        except InputError as error:
            self.fail(error)
        finally:
            self.finished = True
        if self.environment.web_ui:
            self.print_summary(sys.stdout)

    def print_summary(self, file: Any) -> None:
        """The end of a run: at once beside a page, else as the last thing, below Locust's own tables."""
        if self.leader and self.leader.lines:
            print("\n".join(self.leader.lines), file=file, flush=True)
            self.leader.lines = []

    def _is_lost(self, sender: str) -> bool:
        if not isinstance(self.runner, MasterRunner):
            return False
        return sender not in self.runner.clients or self.runner.clients[sender].state == STATE_MISSING

    def hear(self, message: Any) -> None:
        """What a sender said: that it has read the trace, or that it is done."""
        if self.leader is None:
            return
        if error := message.data.get("error"):
            self.leader.failed[message.node_id] = error
        elif message.type == LOADED:
            self.leader.loaded[message.node_id] = message.data["rows"]
        else:
            self.leader.done[message.node_id] = message.data

    # The sender's side.

    def _send(self) -> None:
        try:
            options = self.environment.parsed_options
            settings = Settings.read(options, self.environment.host)
            plan = self.leader.plan if self.leader else load_plan(settings)
            self.runner.send_message(LOADED, {"rows": len(plan)})
            if (go := self._go.get()) is None:
                return
            self.sender = self._make_sender(settings, plan, go)
            if self._stopped:
                self.sender.stop(self._stopped)
            started = int(go["started_at_unix_ns"])
            self.sender.run(Clock(monotonic_ns() + started - time_ns(), started), settings.drain_s)
            self.runner.send_message(DONE, self.sender.figures())
        except InputError as error:
            self.runner.send_message(LOADED, {"error": str(error)})
        except Exception as error:  # whatever it was: the leader must not wait for a sender that is gone
            log.exception("the sender failed")
            self.runner.send_message(LOADED, {"error": f"failed: {error!r}"})

    def _make_sender(self, settings: Settings, plan: Any, go: dict[str, Any]) -> Sender:
        index, count = go["senders"].index(self.name), len(go["senders"])
        server = Server(**go["server"])
        target = resolve(settings.host)
        key = api_key(self.environment.parsed_options)
        spool = RunDir(go["run_dir"]).path / "spool"
        spool.mkdir(parents=True, exist_ok=True)  # a worker on another machine keeps its rows there
        return Sender(
            shard(plan, index, count),
            target,
            RequestWriter(target, settings.endpoint, settings.run_id, server, go["output_cap"], key),
            Spool(spool / f"worker-{index}.outcomes"),
            model=server.model,
            timeout_s=settings.timeout_s,
            on_ended=table(self.environment, PATHS[settings.endpoint]),
        )

    def obey(self, message: Any) -> None:
        """What the leader said: go, or stop."""
        if message.type == GO:
            self._go.set(message.data)
        else:
            self._end_sending(message.data["reason"])

    # What the page shows.

    def live(self) -> dict[str, Any]:
        """A sender's running totals."""
        return self.sender.figures() if self.sender else {}

    def hear_live(self, client_id: str, data: dict[str, Any], **_: Any) -> None:
        if self.leader and data.get("tidegauge"):
            self.leader.live[client_id] = data["tidegauge"]

    def progress(self) -> list[dict[str, str]]:
        """The rows of the page's tab."""
        if self.leader is None or self.error:
            return [{"name": "Replay", "value": self.error or "not started"}]
        if self.sends:
            self.leader.live[self.name] = self.live()
        return progress_rows(self.leader, self.runner.stats)


class TraceReplay(User):
    """The user that Locust wants; the schedule does the sending."""

    @task
    def wait(self) -> None:
        gevent.sleep(3600)


class UntilReplayed(LoadTestShape):
    """One user a worker until the replay is over: so Locust ends by itself, and asks for neither users nor run time."""

    runner: Any  # set by Locust
    users = 0

    def reset_time(self) -> None:
        """A test begins (a master says so twice: before and after test_start)."""
        self.users = 0

    def tick(self) -> tuple[int, float] | None:
        if self.users and Replay.current and Replay.current.finished:
            return None
        self.users = self.users or self.runner.worker_count
        if not self.users:
            return None  # a master without workers: Locust has said so
        return self.users, float(min(self.users, 100))  # Locust warns above 100 users a second


def add_options(parser: Any, **_: Any) -> None:
    add_arguments(parser)


def tie(environment: Any, **_: Any) -> None:
    """Once in every process, when runner and page exist."""
    replay = Replay.current = Replay(environment)
    on, runner, options = environment.events, environment.runner, environment.parsed_options
    on.test_start.add_listener(lambda **_: replay.start())
    on.test_stop.add_listener(lambda **_: replay.stop("the run was stopped by hand"))
    on.quitting.add_listener(lambda **_: replay.stop("Locust was told to quit"))
    if replay.leads:
        for message in (LOADED, DONE):
            runner.register_message(message, lambda msg, **_: replay.hear(msg))
        on.worker_report.add_listener(replay.hear_live)
        on.quit.add_listener(lambda **_: replay.print_summary(sys.stderr if options.json else sys.stdout))
    else:
        environment.process_exit_code = 0  # the verdict is the master's
        on.report_to_master.add_listener(lambda data, **_: data.update(tidegauge=replay.live()))
    if replay.sends:
        for message in (GO, STOP):
            runner.register_message(message, lambda msg, **_: replay.obey(msg))
    if environment.web_ui:
        add_tab(environment.web_ui, replay.progress)
    if replay.leads and options.headless:
        # Locust takes SIGTERM up only once a headless run with a shape has ended; until then it would die without its rows.
        gevent.signal_handler(signal.SIGTERM, gevent.kill, gevent.getcurrent(), KeyboardInterrupt)


hooks: Any = events
hooks.init_command_line_parser.add_listener(add_options)
hooks.init.add_listener(tie)
