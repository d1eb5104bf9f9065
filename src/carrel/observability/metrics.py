"""What is counted, for Prometheus.

Counted from what was committed, in the event loop's thread, and never asked for by those who do the work. States (what
waits, which sandboxes there are) are read when the page is. No label has a session's, user's or key's name in it: a
page must not grow with what a server has done.
"""

from __future__ import annotations

import platform
import shutil
import time
from collections import Counter as Count
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from carrel import __version__, abc
from carrel.model import SandboxStatus, SessionStatus, Usage
from carrel.protocol.events import StoredEvent

__all__ = ["CONTENT_TYPE", "MeasuredStore", "Metrics", "States"]

T = TypeVar("T")

_MOST_MODELS = 50
_MOST_TURNS = 100_000
_OTHER = "other"
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "WEBSOCKET"})
_DELIVERY_PAUSE_SECONDS = 0.01

_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SLOW = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
_WIDE = (0.005, 0.01, 0.025, 0.05, *_SLOW)
_TINY = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)

CONTENT_TYPE = CONTENT_TYPE_LATEST


class _Turn:
    """What is remembered of a turn from its acceptance to its end."""

    __slots__ = ("accepted", "spoke", "started")

    def __init__(self, accepted: float | None) -> None:
        self.accepted = accepted
        self.started = False
        self.spoke = False


class Metrics(abc.Observer):
    """Every number of one server, in a registry of its own."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Make them, all zero. `clock`: seconds, never going back."""
        self._clock = clock
        self._turns: dict[str, _Turn] = {}
        self._starting: dict[str, float] = {}
        self._models: set[str] = set()
        self._stored_at: tuple[float, dict[str, int]] = (0.0, {})
        self._delivered_at = 0.0
        self.registry = CollectorRegistry(auto_describe=True)
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._define_requests()
        self._define_turns()
        self._define_sandboxes()
        self._define_store()
        build = self._gauge("carrel_build_info", "1, with the release in its labels.", ["version", "python"])
        build.labels(__version__, platform.python_version()).set(1)
        self._started = self._gauge("carrel_start_time_seconds", "When this server was started, as a Unix time.")
        self._started.set(time.time())

    # ------------------------------------------------------------------------------------------------- what there is

    def _counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
        return Histogram(name, text, labels, registry=self.registry, buckets=buckets)

    def _define_requests(self) -> None:
        by = ["route", "method"]
        self._requests = self._counter("carrel_http_requests", "Requests answered.", [*by, "status"])
        self._request_seconds = self._histogram(
            "carrel_http_request_seconds", "From a request to the first byte of its answer.", _FAST, by
        )
        self._open = self._gauge(
            "carrel_http_requests_open", "Requests and connections being served, by kind.", ["kind"]
        )
        self._audit_lost = self._counter("carrel_audit_records_lost", "Records that could not be stored.")
        self._egress = self._counter(
            "carrel_egress_requests", "Requests of sandboxes at the egress proxy, by verdict.", ["verdict", "reason"]
        )
        self._model_requests = self._counter(
            "carrel_model_requests", "Requests of agents at the model gateway, by status.", ["status"]
        )
        self._model_seconds = self._histogram(
            "carrel_model_request_seconds", "From an agent's model request to the first byte of its answer.", _FAST
        )

    def _define_turns(self) -> None:
        self._turns_ended = self._counter(
            "carrel_turns", "Turns that ended, by how.", ["status", "stop_reason", "error"]
        )
        self._turn_seconds = self._histogram(
            "carrel_turn_seconds", "From a turn's start to its end.", _SLOW, ["status"]
        )
        self._wait_seconds = self._histogram(
            "carrel_turn_wait_seconds", "From a turn's acceptance to its start.", _WIDE
        )
        self._first_token_seconds = self._histogram(
            "carrel_turn_first_token_seconds", "From a turn's acceptance to its first piece of an answer.", _WIDE
        )
        self._waiting = self._gauge("carrel_turns_waiting", "Turns that wait to be started.")
        self._running = self._gauge(
            "carrel_sessions_busy", "Sessions with a turn at work, or a sandbox starting for one."
        )
        self._sessions = self._gauge("carrel_sessions", "Sessions that are not deleted.")
        self._tokens = self._counter("carrel_tokens", "Tokens of model requests.", ["kind", "model"])
        self._cost = self._counter("carrel_cost_usd", "Cost of model requests whose price is known.", ["model"])
        self._unpriced = self._counter("carrel_unpriced_requests", "Model requests without a known price.", ["model"])

    def _define_sandboxes(self) -> None:
        self._sandboxes = self._gauge("carrel_sandboxes", "Sandboxes that are not gone.", ["state"])
        self._launches = self._counter("carrel_sandbox_launches", "Sandboxes whose start was begun for a session.")
        self._launch_failures = self._counter(
            "carrel_sandbox_launch_failures", "Starts after which no agent was connected."
        )
        self._launch_seconds = self._histogram(
            "carrel_sandbox_launch_seconds", "From a launch to a connected agent.", _FAST
        )
        self._lost = self._counter("carrel_sandboxes_lost", "Turns whose sandbox was lost under them.")
        self._memory = self._gauge(
            "carrel_memory_bytes", "Memory of sandboxes: in all, the largest one, the limit.", ["kind"]
        )
        self._disk = self._gauge("carrel_disk_bytes", "The filesystem of the data folder.", ["kind"])
        self._database = self._gauge("carrel_database_bytes", "The database's files, where it is SQLite.")
        self._links = self._gauge("carrel_links", "Connected runners.")
        self._link_connects = self._counter("carrel_link_connects", "Runners that connected.")
        self._link_reconnects = self._counter(
            "carrel_link_reconnects", "Of these, those that had been connected before."
        )

    def _define_store(self) -> None:
        self._events = self._counter("carrel_events_stored", "Events stored.")
        self._lag = self._histogram(
            "carrel_event_lag_seconds", "From the commit of an event to its hand-over to a viewer; a sample.", _TINY
        )
        self._store_seconds = self._histogram(
            "carrel_store_transaction_seconds", "Transactions, the wait for their turn included.", _TINY, ["kind"]
        )

    # ------------------------------------------------------------------------------------------------ what is counted

    def request(self, method: str, route: str | None, status: int, seconds: float) -> None:
        """A request was answered. `route`: its template; None where there is none."""
        method = method if method in _METHODS else _OTHER
        route = route or "unmatched"
        self._requests.labels(route, method, str(status)).inc()
        self._request_seconds.labels(route, method).observe(seconds)

    def open(self, kind: str, change: int) -> None:
        """So many more (or fewer) requests or WebSockets are open."""
        self._open.labels(kind).inc(change)

    def model_request(self, status: int, seconds: float) -> None:
        """An agent's model request was answered."""
        self._model_requests.labels(str(status)).inc()
        self._model_seconds.observe(seconds)

    def egress(self, verdict: str, reason: str) -> None:
        """A sandbox's request at the egress proxy was allowed or refused."""
        self._egress.labels(verdict, reason).inc()

    def transaction(self, kind: str, seconds: float) -> None:
        """A transaction is over. `kind`: `read` or `write`."""
        self._store_seconds.labels(kind).observe(seconds)

    def audit_lost(self, count: int) -> None:
        """So many records of the audit log could not be stored."""
        self._audit_lost.inc(count)

    def stored(self, events: Sequence[StoredEvent]) -> None:
        """Count what was committed."""
        now = self._clock()
        self._events.inc(len(events))
        self._stored_at = (now, {event.session_id: event.seq for event in events})
        for event in events:
            match event.type:
                case "turn.queued":
                    self._accepted(event, now)
                case "turn.started":
                    self._begun(event, now)
                case "turn.completed":
                    self._completed(event)
                case "usage.recorded":
                    self._used(event.data)
                case "session.status_changed":
                    self._moved(event, now)
                case "session.deleted":
                    self._starting.pop(event.session_id, None)

    def _accepted(self, event: StoredEvent, now: float) -> None:
        if event.turn_id is None:
            return
        if len(self._turns) >= _MOST_TURNS:  # of sessions that were deleted with turns in their queues
            self._turns.pop(next(iter(self._turns)))
        self._turns[event.turn_id] = _Turn(now)

    def _begun(self, event: StoredEvent, now: float) -> None:
        turn = self._turns.get(event.turn_id or "")
        if turn is None or turn.started or turn.accepted is None:
            return
        turn.started = True
        self._wait_seconds.observe(now - turn.accepted)

    def first_delta(self, session_id: str, turn_id: str | None) -> None:
        """Measure how long a turn's author waited for the first word."""
        turn = self._turns.get(turn_id or "")
        if turn is None or turn.spoke or turn.accepted is None:
            return
        turn.spoke = True
        self._first_token_seconds.observe(self._clock() - turn.accepted)

    def _completed(self, event: StoredEvent) -> None:
        self._turns.pop(event.turn_id or "", None)
        data = event.data
        error = (data.get("error") or {}).get("code") or ""
        reason = data.get("stop_reason") or ""
        self._turns_ended.labels(data["status"], reason, error).inc()
        if data.get("duration_ms") is not None:
            self._turn_seconds.labels(data["status"]).observe(data["duration_ms"] / 1000)
        if reason == "sandbox_lost":
            self._lost.inc()

    def _used(self, data: Mapping[str, Any]) -> None:
        model = self._model(data["model"])
        for kind in Usage.model_fields:
            if count := data["usage"].get(kind):
                self._tokens.labels(kind.removesuffix("_tokens"), model).inc(count)
        cost = data.get("cost_usd")
        if cost is None:
            self._unpriced.labels(model).inc()
        else:
            self._cost.labels(model).inc(cost)

    def _model(self, name: str) -> str:
        """The model as a label: an upstream may say anything, and a label must not."""
        if name not in self._models:
            if len(self._models) >= _MOST_MODELS:
                return _OTHER
            self._models.add(name)
        return name

    def _moved(self, event: StoredEvent, now: float) -> None:
        data = event.data
        if data["status"] == SessionStatus.STARTING:
            self._launches.inc()
            self._starting[event.session_id] = now
        elif data["previous"] == SessionStatus.STARTING:
            begun = self._starting.pop(event.session_id, None)
            if data["status"] in (SessionStatus.FAILED, SessionStatus.IDLE):
                self._launch_failures.inc()
            elif data["status"] == SessionStatus.READY and begun is not None:
                self._launch_seconds.observe(now - begun)

    def delivered(self, frames: Sequence[abc.Frame]) -> None:
        """Measure how far behind the commit a viewer is; at most a hundred times a second, however many watch."""
        now = self._clock()
        if now - self._delivered_at < _DELIVERY_PAUSE_SECONDS:
            return
        stored_at, newest = self._stored_at
        last = frames[-1]
        if isinstance(last, StoredEvent) and newest.get(last.session_id) == last.seq:
            self._delivered_at = now
            self._lag.observe(now - stored_at)

    def linked(self, session_id: str, *, again: bool) -> None:
        """Count a runner's connection."""
        self._link_connects.inc()
        if again:
            self._link_reconnects.inc()

    # ------------------------------------------------------------------------------------------------------- the page

    async def page(self, states: States) -> bytes:
        """The page that Prometheus reads."""
        await states.read(self)
        return generate_latest(self.registry)

    def show(self, *, waiting: int, busy: int, sessions: int, sandboxes: Mapping[str, int], links: int) -> None:
        """Set what is read from the rows."""
        self._waiting.set(waiting)
        self._running.set(busy)
        self._sessions.set(sessions)
        for state in SandboxStatus:
            if state is not SandboxStatus.GONE:
                self._sandboxes.labels(state).set(sandboxes.get(state, 0))
        self._links.set(links)

    def show_bytes(self, *, memory: Mapping[str, int], disk: Mapping[str, int], database: int | None) -> None:
        """Set what is read from the machine."""
        for kind, value in memory.items():
            self._memory.labels(kind).set(value)
        for kind, value in disk.items():
            self._disk.labels(kind).set(value)
        if database is not None:
            self._database.set(database)


class States:
    """What there is at this moment: read when the page is."""

    def __init__(
        self,
        store: abc.Store,
        *,
        data: Path,
        links: Callable[[], int],
        memory: Callable[[], Mapping[str, int]],
        run_blocking: Callable[..., Awaitable[Any]],
    ) -> None:
        """Read from these.

        Args:
            store: the rows.
            data: the data folder.
            links: how many runners are connected.
            memory: bytes of sandboxes as they were last measured, by `used`, `largest`, `limit`; may be empty.
            run_blocking: runs a function that waits for the disk in another thread.
        """
        self._store = store
        self._data = data
        self._links = links
        self._memory = memory
        self._run_blocking = run_blocking

    async def read(self, metrics: Metrics) -> None:
        """Read, and set the gauges of `metrics`."""
        waiting, busy, sessions, sandboxes = await self._store.read(_counts)
        metrics.show(waiting=waiting, busy=busy, sessions=sessions, sandboxes=sandboxes, links=self._links())
        disk, database = await self._run_blocking(_disk, self._data)
        metrics.show_bytes(memory=self._memory(), disk=disk, database=database)


def _counts(tx: abc.Transaction) -> tuple[int, int, int, Mapping[str, int]]:
    states = Count(str(sandbox.status) for sandbox in tx.sandboxes.not_gone())
    return tx.counts.queued_turns(), tx.counts.busy(), tx.counts.sessions(), states


def _disk(data: Path) -> tuple[Mapping[str, int], int | None]:
    usage = shutil.disk_usage(data)
    files = [path for path in data.glob("carrel.db*") if path.is_file()]
    return {"free": usage.free, "total": usage.total}, sum(path.stat().st_size for path in files) if files else None


class MeasuredStore(abc.Store):
    """A store whose transactions are timed."""

    def __init__(self, store: abc.Store, metrics: Metrics) -> None:
        """Time the transactions of `store`."""
        self._store = store
        self._metrics = metrics

    async def start(self, exit_stack: AsyncExitStack) -> None:
        """Start the store."""
        await self._store.start(exit_stack)

    async def read(self, work: Callable[[abc.Transaction], T]) -> T:
        """Read, timed."""
        return await self._timed("read", self._store.read(work))

    async def write(self, work: Callable[[abc.Transaction], T]) -> T:
        """Write, timed."""
        return await self._timed("write", self._store.write(work))

    async def _timed(self, kind: str, transaction: Awaitable[T]) -> T:
        begun = time.perf_counter()
        try:
            return await transaction
        finally:
            self._metrics.transaction(kind, time.perf_counter() - begun)
