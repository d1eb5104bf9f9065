"""Both clients against a server that says what it is told to."""

import asyncio
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from typing import Any

import pytest

from carrel import errors
from carrel.client import AsyncCarrel, Carrel, Delta, Event, asynchronous, blocking

pytestmark = pytest.mark.slow  # each test has a server of its own

API = "/api/v1"
S1 = f"{API}/sessions/s1"


@dataclass
class Driver:
    """Drives either client in the same way."""

    make: Callable[..., Any]
    wait: Callable[[Any], Any]
    collect: Callable[[Any], list[Any]]


@pytest.fixture(params=["blocking", "asynchronous"])
def driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    clients: list[Any] = []
    with asyncio.Runner() as runner:

        async def collected(iterator: Any) -> list[Any]:
            return [item async for item in iterator]

        async def waited(value: Any) -> Any:
            return await value

        def make(*arguments: Any, **named: Any) -> Any:
            clients.append((Carrel if request.param == "blocking" else AsyncCarrel)(*arguments, **named))
            return clients[-1]

        if request.param == "blocking":
            yield Driver(make, lambda value: value, list)
            for client in clients:
                client.close()
        else:
            yield Driver(make, lambda value: runner.run(waited(value)), lambda value: runner.run(collected(value)))
            for client in clients:
                runner.run(client.aclose())


@pytest.fixture
def carrel(driver: Driver, fake: Any) -> Any:
    return driver.make(fake.url, "the-key")


def test_both_clients_have_the_same_surface() -> None:
    def surface(cls: type) -> dict[str, list[str]]:
        names = {"aclose": "close", "__aenter__": "__enter__", "__aexit__": "__exit__"}
        return {
            names.get(name, name): list(inspect.signature(function).parameters)
            for name, function in inspect.getmembers(cls, inspect.isfunction)
        }

    assert surface(AsyncCarrel) == surface(Carrel)
    parts = [name for name, value in vars(Carrel("http://localhost:1")).items() if not name.startswith("_")]
    assert len(parts) > 10
    for part in [name.removeprefix("Async") for name in vars(asynchronous) if name.startswith("Async")]:
        if part not in ("Carrel", "Generator", "Iterator"):
            assert surface(getattr(asynchronous, f"Async{part}")) == surface(getattr(blocking, part)), part


def test_the_key_is_sent_and_not_shown(carrel: Any, driver: Driver, fake: Any) -> None:
    fake.on("GET", "/health", {"status": "healthy"})
    assert driver.wait(carrel.health()) == {"status": "healthy"}
    assert fake.asked[0].headers["authorization"] == "Bearer the-key"
    assert "the-key" not in repr(vars(carrel))


def test_a_session(carrel: Any, driver: Driver, fake: Any, wire: Any) -> None:
    told = wire.session(of_next_year=1, usage={"input_tokens": 3, "of_next_year": 4})
    fake.on("POST", f"{API}/sessions", told, status=201)
    session = driver.wait(carrel.sessions.create(title="First", tools=[], idempotency_key="k"))
    assert (session.id, session.title, session.usage.input_tokens) == ("s1", "First", 3)
    assert session.model_dump()["of_next_year"] == 1
    assert fake.asked[0].json == {"title": "First", "tools": []}
    assert fake.asked[0].headers["idempotency-key"] == "k"


def test_what_is_none_is_sent_in_a_change(carrel: Any, driver: Driver, fake: Any, wire: Any) -> None:
    fake.on("PATCH", S1, wire.session())
    driver.wait(carrel.sessions.update("s1", model=None))
    assert fake.asked[0].json == {"model": None}


@pytest.mark.parametrize("verb", ["stop", "resume", "fork"])
def test_verbs(carrel: Any, driver: Driver, fake: Any, wire: Any, verb: str) -> None:
    fake.on("POST", f"{S1}/{verb}", wire.session("s2"))
    assert driver.wait(getattr(carrel.sessions, verb)("s1")).id == "s2"


def test_interrupt_names_its_turn(carrel: Any, driver: Driver, fake: Any, wire: Any) -> None:
    fake.on("POST", f"{S1}/interrupt", wire.turn(), status=202)
    assert driver.wait(carrel.sessions.interrupt("s1", turn_id="t1")).id == "t1"
    assert fake.asked[0].json == {"turn_id": "t1"}


def test_a_list_is_read_to_its_end(carrel: Any, driver: Driver, fake: Any, wire: Any) -> None:
    path = f"{API}/sessions"
    fake.on("GET", path, {"data": [wire.session("a"), wire.session("b")], "next_cursor": "to c"})
    fake.on("GET", path, {"data": [], "next_cursor": "to d"})
    fake.on("GET", path, {"data": [wire.session("d")], "next_cursor": None})
    assert [s.id for s in driver.collect(carrel.sessions.list(status="idle", page_size=2))] == ["a", "b", "d"]
    assert [asked.query for asked in fake.asked] == [
        {"status": "idle", "limit": "2"},
        {"status": "idle", "limit": "2", "cursor": "to c"},
        {"status": "idle", "limit": "2", "cursor": "to d"},
    ]


def test_an_error_is_raised_as_its_class(carrel: Any, driver: Driver, fake: Any) -> None:
    fake.problem("GET", S1, "session_not_found", 404, session_id="s1")
    with pytest.raises(errors.SessionNotFound, match="About session_not_found") as caught:
        driver.wait(carrel.sessions.get("s1"))
    assert caught.value.context == {"session_id": "s1"}


def test_no_server(driver: Driver, unused_port: int) -> None:
    carrel = driver.make(f"http://127.0.0.1:{unused_port}")
    with pytest.raises(errors.ServerUnreachable, match="carrel serve"):
        driver.wait(carrel.health())
    with pytest.raises(errors.ServerUnreachable, match="carrel serve"):
        driver.collect(carrel.events.follow("s1"))
    with pytest.raises(errors.ServerUnreachable, match="carrel serve"):
        driver.collect(carrel.turns.stream("s1", "Hello"))


def test_another_kind_of_server(carrel: Any, driver: Driver, fake: Any) -> None:
    fake.on("GET", S1, b"<html>Welcome</html>")
    with pytest.raises(errors.CarrelError, match="right address"):
        driver.wait(carrel.sessions.get("s1"))


@pytest.mark.parametrize(
    ("path", "sent"),
    [
        ("src/a b.txt", "src/a%20b.txt"),
        ("../x", "%2E%2E/x"),
        ("/etc/passwd", "/etc/passwd"),
        ("ü?#%41.txt", "%C3%BC%3F%23%2541.txt"),
    ],
)
def test_a_path_arrives_as_it_was_given(carrel: Any, driver: Driver, fake: Any, path: str, sent: str) -> None:
    entry = {"path": path, "type": "file", "size": 2, "modified_at": "2026-11-21T09:30:00Z", "mode": 420}
    fake.on("PUT", f"{S1}/files/{sent}", entry)
    fake.on("GET", f"{S1}/files/{sent}", b"\x00\xff")
    fake.on("DELETE", f"{S1}/files/{sent}", b"", status=204)
    assert driver.wait(carrel.files.write("s1", path, "é")).size == 2
    assert fake.asked[0].body == "é".encode()
    assert driver.wait(carrel.files.read("s1", path)) == b"\x00\xff"
    driver.wait(carrel.files.delete("s1", path))


def test_an_export_comes_as_it_is(carrel: Any, driver: Driver, fake: Any) -> None:
    lines = [b'{"kind":"event","t":"\xe2\x80\xa8"}\n', b'{"kind":"turn"}\n']
    fake.stream("GET", f"{S1}/export", *lines)
    assert b"".join(driver.collect(carrel.sessions.export("s1"))) == b"".join(lines)


def test_an_export_that_breaks_off_is_no_export(carrel: Any, driver: Driver, fake: Any) -> None:
    fake.stream("GET", f"{S1}/export", b"{}\n", breaks=True)
    with pytest.raises(errors.ServerUnreachable, match="broke"):
        driver.collect(carrel.sessions.export("s1"))


def test_following_goes_on_where_it_broke(carrel: Any, driver: Driver, fake: Any, wire: Any) -> None:
    path = f"{S1}/events"
    second = wire.said(2, "漢😀")
    fake.stream("GET", path, b": still here\n\n", wire.event(1, "turn.queued", ahead=0), second[:-9], breaks=True)
    fake.problem("GET", path, "draining", 503)
    fake.stream("GET", path, wire.event(1, "turn.queued", ahead=0), second[:60], second[60:])
    fake.stream("GET", path, wire.completed(3), wire.event(4, "session.deleted", None))
    frames = driver.collect(carrel.events.follow("s1", deltas=True))
    assert [frame.seq for frame in frames] == [1, 2, 3, 4]
    assert frames[1].data["text"] == "漢😀"
    assert [asked.headers["last-event-id"] for asked in fake.asked] == ["0", "1", "1", "2"]
    assert fake.asked[0].query == {"after": "0", "deltas": "true"}


def test_a_page_of_events(carrel: Any, driver: Driver, fake: Any) -> None:
    event = {"seq": 5, "type": "usage.recorded", "turn_id": None, "at": "2026-11-21T09:30:00Z", "data": {}}
    fake.on("GET", f"{S1}/events", {"data": [event], "next_cursor": "5"})
    assert [e.seq for e in driver.wait(carrel.events.list("s1", after=4, limit=1))] == [5]
    assert fake.asked[0].query == {"after": "4", "limit": "1"}


def test_a_turn_streams(carrel: Any, driver: Driver, fake: Any, wire: Any) -> None:
    path = f"{S1}/turns"
    fake.stream("POST", path, wire.event(5, "turn.queued", ahead=0), wire.delta("Hi"), wire.said(6, "Hi"), breaks=True)
    fake.stream("GET", f"{S1}/events", wire.said(6, "Hi"), wire.completed(7), breaks=True)
    frames = driver.collect(carrel.turns.stream("s1", "Hello", timeout_seconds=9))
    assert [frame.text if isinstance(frame, Delta) else frame.type for frame in frames] == [
        "turn.queued",
        "Hi",
        "message.assistant",
        "turn.completed",
    ]
    assert frames[-1].succeeded
    assert fake.asked[0].json == {"prompt": "Hello", "timeout_seconds": 9}
    assert (fake.asked[1].headers["last-event-id"], fake.asked[1].query["deltas"]) == ("6", "true")


def test_a_prompt_that_got_no_answer_is_sent_again_under_the_same_key(
    carrel: Any, driver: Driver, fake: Any, wire: Any
) -> None:
    path = f"{S1}/turns"
    fake.stream("POST", path, breaks=True)
    fake.problem("POST", path, "idempotency_in_flight", 409, retry_after_seconds=0)
    fake.stream("POST", path, wire.event(5, "turn.queued", ahead=0), wire.completed(6))
    assert len(driver.collect(carrel.turns.stream("s1", "Hello"))) == 2
    assert len({asked.headers["idempotency-key"] for asked in fake.asked}) == 1
    assert len(fake.asked) == 3


def test_what_a_turn_came_to(carrel: Any, driver: Driver, fake: Any, wire: Any) -> None:
    fake.stream(
        "POST",
        f"{S1}/turns",
        wire.event(5, "turn.queued", ahead=0),
        wire.delta("One "),
        wire.said(6, "One "),
        wire.event(7, "tool.called", id="c1", tool="Bash", input={"command": "ls"}),
        wire.event(8, "tool.finished", id="c1", tool="Bash", result="a", is_error=False),
        wire.event(9, "message.assistant", message_id="m2", block=0, text="sub-agent", parent_tool_use_id="c1"),
        wire.said(10, "two", message="m3"),
        wire.completed(11, cost_usd=0.5, stop_reason="end_turn", of_next_year=1, usage={"output_tokens": 3}),
    )
    result = driver.wait(carrel.turns.run("s1", "Hello"))
    assert (result.text, result.status, result.cost_usd) == ("One two", "succeeded", 0.5)
    assert result.usage.output_tokens == 3
    assert [(call.tool, call.result) for call in result.tool_calls] == [("Bash", "a")]
    assert fake.asked[0].query == {"deltas": "false"}


def test_turns(carrel: Any, driver: Driver, fake: Any, wire: Any) -> None:
    fake.on("POST", f"{S1}/turns", wire.turn(), status=202)
    fake.on("GET", f"{S1}/turns", {"data": [wire.turn()], "next_cursor": None})
    fake.on("GET", f"{S1}/turns/t1", wire.turn(text="Hi"))
    fake.on("POST", f"{S1}/turns/t1/cancel", wire.turn(status="cancelled"))
    blocks = [{"type": "text", "text": "Hello"}]
    assert driver.wait(carrel.turns.create("s1", content=blocks)).status == "queued"
    assert fake.asked[0].json == {"content": blocks}
    assert [turn.id for turn in driver.collect(carrel.turns.list("s1"))] == ["t1"]
    assert driver.wait(carrel.turns.get("s1", "t1")).model_dump()["text"] == "Hi"
    assert driver.wait(carrel.turns.cancel("s1", "t1")).status == "cancelled"


def test_a_query(carrel: Any, driver: Driver, fake: Any, wire: Any) -> None:
    told = {"id": "t1", "session_id": "s1", "status": "succeeded", "stop_reason": "end_turn", "text": "42"}
    told |= {"tool_calls": [], "usage": {}, "cost_usd": None, "duration_ms": 5, "num_turns": 1, "of_next_year": 1}
    fake.on("POST", f"{API}/query", told)
    fake.stream("POST", f"{API}/query", wire.event(2, "turn.queued", ahead=0), wire.delta("4"), wire.completed(3))
    assert driver.wait(carrel.query("6 × 7?", model="haiku")).text == "42"
    assert fake.asked[0].json == {"prompt": "6 × 7?", "model": "haiku", "wait": True}
    frames = driver.collect(carrel.query_stream("6 × 7?"))
    assert [type(frame) for frame in frames] == [Event, Delta, Event]


def test_a_query_that_breaks_off_is_not_asked_again(carrel: Any, driver: Driver, fake: Any, wire: Any) -> None:
    fake.stream("POST", f"{API}/query", wire.event(2, "turn.queued", ahead=0), breaks=True)
    with pytest.raises(errors.ServerUnreachable, match="broke"):
        driver.collect(carrel.query_stream("6 × 7?"))
    assert len(fake.asked) == 1


def test_a_proxy_is_not_asked_about_loopback(
    driver: Driver, fake: Any, monkeypatch: pytest.MonkeyPatch, unused_port: int
) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{unused_port}")
    fake.on("GET", "/health", {})
    assert driver.wait(driver.make(fake.url).health()) == {}


def test_an_address_that_is_none(driver: Driver) -> None:
    with pytest.raises(errors.InvalidSettings, match="http://"):
        driver.make("not an address")


def test_usage_and_budgets(carrel: Any, driver: Driver, fake: Any) -> None:
    sums = {"requests": 1, "input_tokens": 2, "cost_usd": None}
    fake.on("GET", f"{API}/usage", {"data": [{"model": "m", **sums}], "total": sums, "next_cursor": None})
    report = driver.wait(carrel.usage.get(["model"], since=date(2026, 11, 21), user="alice"))
    assert (report.data[0].model, report.total.input_tokens, report.total.cost_usd) == ("m", 2, None)
    assert fake.asked[0].query == {"group_by": "model", "since": "2026-11-21", "user": "alice"}
    fake.on("GET", f"{API}/usage/budgets", {"data": [{"kind": "user", "id": "alice", "budget": {"max_tokens": 5}}]})
    (state,) = driver.wait(carrel.usage.budgets(session_id="s1"))
    assert (state.kind, state.budget.max_tokens, state.left_tokens) == ("user", 5, None)


def test_messages_are_read_to_their_end(carrel: Any, driver: Driver, fake: Any) -> None:
    def message(seq: int) -> dict[str, Any]:
        return {"id": f"m{seq}", "seq": seq, "role": "user", "at": "2026-11-21T09:30:00Z", "content": []}

    fake.on("GET", f"{S1}/messages", {"data": [message(2)], "next_cursor": "2"})
    fake.on("GET", f"{S1}/messages", {"data": [message(7)], "next_cursor": None})
    found = driver.collect(carrel.sessions.messages("s1", after=1, q="x"))
    assert [m.seq for m in found] == [2, 7]
    assert [asked.query for asked in fake.asked] == [
        {"after": "1", "q": "x", "thinking": "false"},
        {"after": "1", "q": "x", "thinking": "false", "cursor": "2"},
    ]
