"""Numbers follow from what was committed, and their labels do not grow with what a server has done."""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from carrel.model import utc_now
from carrel.observability import MeasuredStore, Metrics
from carrel.observability.metrics import States
from carrel.protocol.events import Delta, StoredEvent
from carrel.store import SqliteStore
from carrel.testing import FakeGateway, FakeHost


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def metrics(clock):
    return Metrics(clock=clock)


def event(type, data="{}", *, seq=1, session="s1", turn="t1"):
    return StoredEvent(session_id=session, seq=seq, turn_id=turn, type=type, at=utc_now(), raw_data=data)


def completed(status="succeeded", reason="end_turn", error="null"):
    data = f'{{"status":"{status}","stop_reason":"{reason}","error":{error},"duration_ms":1500}}'
    return event("turn.completed", data)


def test_a_turn_s_life(metrics, clock):
    value = metrics.registry.get_sample_value
    metrics.stored([event("turn.queued", '{"number":1,"ahead":0}')])
    clock.now += 2
    metrics.stored([event("turn.started", '{"attempt":1}')])
    clock.now += 3
    metrics.first_delta("s1", "t1")
    clock.now += 1
    metrics.first_delta("s1", "t1")  # of another attempt; the first word is what was waited for
    metrics.stored([completed()])
    assert value("carrel_turn_wait_seconds_sum") == 2
    assert value("carrel_turn_first_token_seconds_sum") == 5
    assert value("carrel_turn_first_token_seconds_count") == 1
    assert value("carrel_turn_seconds_sum", {"status": "succeeded"}) == 1.5
    assert value("carrel_turns_total", {"status": "succeeded", "stop_reason": "end_turn", "error": ""}) == 1
    assert value("carrel_events_stored_total") == 3
    metrics.stored([completed("failed", "sandbox_lost", '{"code":"sandbox_lost","message":"m"}')])
    lost = {"status": "failed", "stop_reason": "sandbox_lost", "error": "sandbox_lost"}
    assert value("carrel_turns_total", lost) == 1
    assert value("carrel_sandboxes_lost_total") == 1
    assert metrics._turns == {}


def test_launches_and_failures(metrics, clock):
    def moves(previous, status):
        data = f'{{"status":"{status}","previous":"{previous}","stop_reason":null,"error":null}}'
        return event("session.status_changed", data, turn=None)

    metrics.stored([moves("idle", "starting")])
    clock.now += 0.5
    metrics.stored([moves("starting", "ready"), moves("ready", "idle")])
    metrics.stored([moves("idle", "starting"), moves("starting", "failed")])
    value = metrics.registry.get_sample_value
    assert value("carrel_sandbox_launches_total") == 2
    assert value("carrel_sandbox_launch_failures_total") == 1
    assert value("carrel_sandbox_launch_seconds_sum") == 0.5


def test_tokens_and_cost_by_model_and_models_are_bounded(metrics):
    usage = '"usage":{"input_tokens":10,"output_tokens":5,"cache_read_input_tokens":0}'
    for i in range(200):
        cost = "null" if i % 2 else "0.25"
        metrics.stored([event("usage.recorded", f'{{"model":"model-{i}",{usage},"cost_usd":{cost}}}')])
    value = metrics.registry.get_sample_value
    assert value("carrel_tokens_total", {"kind": "input", "model": "model-0"}) == 10
    assert value("carrel_tokens_total", {"kind": "output", "model": "model-0"}) == 5
    assert value("carrel_cost_usd_total", {"model": "model-0"}) == 0.25
    assert value("carrel_unpriced_requests_total", {"model": "model-1"}) == 1
    assert value("carrel_tokens_total", {"kind": "input", "model": "other"}) == 1500
    assert value("carrel_tokens_total", {"kind": "input", "model": "model-199"}) is None


def test_event_lag_is_a_sample(metrics, clock):
    one = event("message.user")
    metrics.stored([one])
    clock.now += 0.25
    for _ in range(50):
        metrics.delivered([one])
    metrics.delivered([Delta(session_id="s1", turn_id="t1", kind="text", message_id="m")])
    value = metrics.registry.get_sample_value
    assert value("carrel_event_lag_seconds_count") == 1
    assert value("carrel_event_lag_seconds_sum") == 0.25
    clock.now += 1
    metrics.delivered([event("message.user", seq=7)])  # caught up on, or another session's: not the newest commit
    assert value("carrel_event_lag_seconds_count") == 1


async def test_a_whole_gateway_fills_them(tmp_path: Path):
    metrics = Metrics()
    async with FakeHost() as host:
        gateway = FakeGateway(host, tmp_path, wrap_store=lambda store: MeasuredStore(store, metrics), observer=metrics)
        async with gateway:
            for _ in range(2):
                session = await gateway.create()
                await gateway.run(session.id, "hello")
            states = States(
                gateway.store,
                data=tmp_path,
                links=lambda: len(gateway.hub),
                memory=lambda: {"used": 7},
                run_blocking=asyncio.to_thread,
            )
            page = (await metrics.page(states)).decode()
    samples = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }

    def value(name, **labels):
        return samples[name, tuple(sorted(labels.items()))]

    assert value("carrel_turns_total", status="succeeded", stop_reason="end_turn", error="") == 2
    assert value("carrel_sessions") == 2
    assert value("carrel_sandboxes", state="live") == 2
    assert value("carrel_sandboxes", state="launching") == 0
    assert value("carrel_links") == 2
    assert value("carrel_link_connects_total") == 2
    assert value("carrel_turns_waiting") == 0
    assert value("carrel_sandbox_launches_total") == 2
    assert value("carrel_turn_first_token_seconds_count") == 2
    assert value("carrel_store_transaction_seconds_count", kind="write") > 5
    assert value("carrel_memory_bytes", kind="used") == 7
    assert value("carrel_disk_bytes", kind="free") > 0
    assert value("carrel_database_bytes") > 0
    assert not [name for name, labels in samples if any(session.id in str(label) for label in labels)]


async def test_a_measured_store_is_a_store(tmp_path):
    metrics = Metrics()
    async with AsyncExitStack() as stack:
        store = MeasuredStore(SqliteStore(tmp_path / "carrel.db"), metrics)
        await store.start(stack)
        assert await store.read(lambda tx: tx.sessions.get("no")) is None
        with pytest.raises(KeyError):
            await store.write(lambda tx: {}["no"])
    value = metrics.registry.get_sample_value
    assert value("carrel_store_transaction_seconds_count", {"kind": "read"}) == 1
    assert value("carrel_store_transaction_seconds_count", {"kind": "write"}) == 1
