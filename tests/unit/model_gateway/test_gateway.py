"""The road to the model with an upstream of ours: what is reserved, what is settled, and what becomes of the rest."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from carrel import abc
from carrel.budgets import Allowances
from carrel.model import (
    Budget,
    Sandbox,
    SandboxStatus,
    Session,
    SessionStatus,
    Turn,
    TurnStatus,
    new_id,
    utc_now,
)
from carrel.model_gateway.app import ModelGateway
from carrel.model_gateway.credentials import NotNeeded
from carrel.model_gateway.logins import Logins
from carrel.model_gateway.meter import Meter
from carrel.model_gateway.prices import Prices
from carrel.store import SqliteStore

MODEL = "claude-opus-5-5"
ASK = {"model": MODEL, "max_tokens": 8_000, "messages": [{"role": "user", "content": "hi"}]}
USAGE = {"input_tokens": 100, "output_tokens": 50, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
PRICE = (100 * 4 + 50 * 20) / 1e6


def events(*found: dict[str, Any]) -> bytes:
    return b"".join(f"event: {e['type']}\ndata: {json.dumps(e)}\n\n".encode() for e in found)


START = {"type": "message_start", "message": {"model": MODEL, "usage": {**USAGE, "output_tokens": 1}}}
PIECE = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "x" * 300}}
END = {"type": "message_delta", "delta": {}, "usage": {"output_tokens": 50}}
STOP = {"type": "message_stop"}


class Upstream:
    """Answers as `answer` says, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.credentials: list[str | None] = []
        self.answer: Callable[[], Response] = lambda: JSONResponse({"model": MODEL, "usage": USAGE})
        self.hold: asyncio.Event | None = None

    async def handle(self, request: Request) -> Response:
        self.asked.append(await request.json())
        self.credentials.append(request.headers.get("authorization"))
        if self.hold is not None:
            await self.hold.wait()
        return self.answer()

    def stream(self, *parts: dict[str, Any], broken: bool = False) -> None:
        async def body() -> AsyncIterator[bytes]:
            for part in parts:
                yield events(part)
            if broken:
                raise ConnectionError("the upstream is gone")

        self.answer = lambda: StreamingResponse(body(), media_type="text/event-stream")


async def until(check: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not check():
            await asyncio.sleep(0.001)


class Road:
    """An agent's side of a gateway over a store in memory."""

    def __init__(self, store: abc.Store, upstream: Upstream) -> None:
        self.store = store
        self.upstream = upstream
        self.poked: list[str] = []
        self.logins: Logins | None = None

    async def open(self, stack: AsyncExitStack, *, wait_seconds: float = 5.0, **budgets: Budget) -> None:
        route = Route("/v1/{path:path}", self.upstream.handle, methods=["POST"])
        transport = httpx.ASGITransport(Starlette(routes=[route]), raise_app_exceptions=True)
        client = await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://upstream"))
        self.meter = Meter(
            self.store,
            Prices.shipped(),
            allowances=Allowances(**budgets),
            poke=self.poked.append,
            wait_seconds=wait_seconds,
        )
        gateway = ModelGateway(self.store, self.meter, NotNeeded(), client, self.logins)
        stack.push_async_callback(gateway.close)
        self.gateway = gateway
        self.http = await stack.enter_async_context(
            httpx.AsyncClient(transport=httpx.ASGITransport(gateway.app()), base_url="http://gateway")
        )

    async def session(self, **changes: Any) -> tuple[Session, Turn, dict[str, str]]:
        """A session with a turn at work, and the headers of its agent."""
        now, token = utc_now(), new_id()

        def work(tx: abc.Transaction) -> tuple[Session, Turn]:
            session = Session(
                id=new_id(),
                number=tx.sessions.next_number(),
                owner="alice",
                status=SessionStatus.RUNNING,
                spec={},
                cost_usd=0.0,
                created_at=now,
                last_active_at=now,
                **changes,
            )
            turn = Turn(id=new_id(), session_id=session.id, number=1, status=TurnStatus.RUNNING, created_at=now)
            tx.sessions.add(session)
            tx.turns.add(turn)
            tx.sandboxes.add(
                Sandbox(
                    id=new_id(),
                    session_id=session.id,
                    generation=1,
                    status=SandboxStatus.LIVE,
                    runtime="fake",
                    environment=f"{session.environment}:{session.environment_version}",
                    link_token_hash="x",
                    agent_token_hash=sha256(token.encode()).hexdigest(),
                    created_at=now,
                )
            )
            return session, turn

        session, turn = await self.store.write(work)
        return session, turn, {"x-api-key": token}

    async def ask(self, headers: dict[str, str], **changes: Any) -> httpx.Response:
        return await self.http.post("/v1/messages", json=ASK | changes, headers=headers)

    async def books(self) -> tuple[int, float | None, int, int]:
        """Requests, cost, tokens; and what is still held."""
        await self.gateway.close()

        def work(tx: abc.Transaction) -> tuple[int, float | None, int, int]:
            (total,) = tx.usage.sums(abc.UsageFilter())
            return total.requests, total.cost_usd, total.usage.total, tx.usage.reserved(abc.UsageFilter())[0]

        return await self.store.read(work)


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
async def road(stack: AsyncExitStack) -> Road:
    store = SqliteStore(None)
    await store.start(stack)
    return Road(store, Upstream())


async def test_an_answer_is_charged_what_it_says(road: Road, stack: AsyncExitStack) -> None:
    await road.open(stack)
    _, _, headers = await road.session()
    assert (await road.ask(headers)).status_code == 200
    assert await road.books() == (1, pytest.approx(PRICE), 150, 0)
    assert road.upstream.asked == [ASK]


async def test_an_agent_in_a_warm_pool_asks_for_nobody(road: Road, stack: AsyncExitStack) -> None:
    await road.open(stack)
    _, _, headers = await road.session(reserved="default:1")
    assert (await road.ask(headers)).status_code == 401
    assert road.upstream.asked == []


async def test_a_streamed_answer_too(road: Road, stack: AsyncExitStack) -> None:
    await road.open(stack)
    session, turn, headers = await road.session()
    road.upstream.stream(START, PIECE, END, STOP)
    answer = await road.ask(headers, stream=True)
    assert answer.content == events(START, PIECE, END, STOP)
    assert await road.books() == (1, pytest.approx(PRICE), 150, 0)
    (event,) = await road.store.read(lambda tx: tx.events.page(session.id, after=0, limit=5))
    assert (event.type, event.turn_id, event.data["usage"]["output_tokens"]) == ("usage.recorded", turn.id, 50)


async def test_what_does_not_fit_is_refused_for_good_and_the_turn_is_marked(road: Road, stack: AsyncExitStack) -> None:
    await road.open(stack)
    session, turn, headers = await road.session(budget=Budget(max_tokens=1_000))
    answer = await road.ask(headers)
    assert answer.status_code == 402
    assert answer.headers["x-should-retry"] == "false"
    assert answer.json()["error"]["type"] == "billing_error"
    assert "the session's budget of 1,000 tokens" in answer.json()["error"]["message"]
    assert road.upstream.asked == []
    assert road.poked == [session.id]
    marked = await road.store.read(lambda tx: tx.turns.get(turn.id))
    assert marked is not None
    assert marked.interrupt_reason == "budget_reached"
    assert marked.error is not None
    assert marked.error.message == answer.json()["error"]["message"]
    assert await road.books() == (0, 0.0, 0, 0)


async def test_a_request_is_shortened_to_what_fits(road: Road, stack: AsyncExitStack) -> None:
    await road.open(stack)
    _, _, headers = await road.session(budget=Budget(max_tokens=5_000))
    assert (await road.ask(headers)).status_code == 200
    (asked,) = road.upstream.asked
    assert 1_024 <= asked["max_tokens"] < 5_000
    assert {**asked, "max_tokens": 8_000} == ASK


async def test_counting_tokens_is_free(road: Road, stack: AsyncExitStack) -> None:
    await road.open(stack)
    _, _, headers = await road.session(budget=Budget(max_tokens=0))
    answer = await road.http.post("/v1/messages/count_tokens", json=ASK, headers=headers)
    assert answer.status_code == 200
    assert await road.books() == (0, 0.0, 0, 0)


@pytest.mark.parametrize("status", [400, 429, 500, 529])
async def test_an_error_of_the_upstream_is_not_charged(road: Road, stack: AsyncExitStack, status: int) -> None:
    await road.open(stack)
    _, _, headers = await road.session()
    road.upstream.answer = lambda: JSONResponse({"type": "error"}, status_code=status)
    assert (await road.ask(headers)).status_code == status
    assert await road.books() == (0, 0.0, 0, 0)


async def test_an_error_in_place_of_a_stream_is_not_charged(road: Road, stack: AsyncExitStack) -> None:
    await road.open(stack)
    _, _, headers = await road.session()
    road.upstream.stream({"type": "error", "error": {"type": "overloaded_error"}})
    await road.ask(headers)
    assert await road.books() == (0, 0.0, 0, 0)


@pytest.mark.parametrize("answer", [b"{}", b"not JSON", b'{"usage": null}'])
async def test_an_answer_without_usage_is_charged_what_was_reserved(
    road: Road, stack: AsyncExitStack, answer: bytes
) -> None:
    await road.open(stack)
    _, _, headers = await road.session()
    road.upstream.answer = lambda: Response(answer, media_type="application/json")
    await road.ask(headers)
    requests, cost, tokens, held = await road.books()
    assert (requests, held) == (1, 0)
    assert tokens > 8_000
    assert cost is not None
    assert cost > 8_000 * 20 / 1e6


async def test_a_broken_stream_is_charged_for_what_had_come(road: Road, stack: AsyncExitStack) -> None:
    await road.open(stack)
    _, _, headers = await road.session()
    road.upstream.stream(START, PIECE, PIECE)  # it ends without its end
    await road.ask(headers, stream=True)
    requests, _, tokens, held = await road.books()
    assert (requests, held) == (1, 0)
    assert 100 + 2 * 100 <= tokens < 100 + 2 * 130


async def test_an_upstream_that_cannot_be_reached_costs_nothing(road: Road, stack: AsyncExitStack) -> None:
    await road.open(stack)
    _, _, headers = await road.session()

    def refuse() -> Response:
        raise httpx.ConnectError("refused")

    road.upstream.answer = refuse
    assert (await road.ask(headers)).status_code == 502
    assert await road.books() == (0, 0.0, 0, 0)


async def test_an_upstream_that_breaks_off_is_charged_for(road: Road, stack: AsyncExitStack) -> None:
    await road.open(stack)
    _, _, headers = await road.session()

    def fail() -> Response:
        raise httpx.ReadError("gone")

    road.upstream.answer = fail
    assert (await road.ask(headers)).status_code == 502
    requests, _, tokens, held = await road.books()
    assert (requests, held) == (1, 0)
    assert tokens > 8_000


async def test_what_is_no_request_is_not_passed_on(road: Road, stack: AsyncExitStack) -> None:
    await road.open(stack)
    _, _, headers = await road.session()
    assert (await road.ask(headers, max_tokens=None)).status_code == 400
    assert road.upstream.asked == []


async def test_a_request_waits_for_what_others_hold(road: Road, stack: AsyncExitStack) -> None:
    await road.open(stack, user=Budget(max_tokens=6_000))
    one, two = [(await road.session())[2] for _ in range(2)]
    road.upstream.hold = asyncio.Event()
    first = asyncio.create_task(road.ask(one))
    await until(lambda: road.upstream.asked)
    refused = asyncio.Event()
    wait = road.meter._freed.wait

    async def waiting() -> bool:
        refused.set()
        return await wait()

    road.meter._freed.wait = waiting  # type: ignore[method-assign]
    second = asyncio.create_task(road.ask(two))
    await refused.wait()
    assert len(road.upstream.asked) == 1
    road.upstream.hold.set()
    assert [(await task).status_code for task in (first, second)] == [200, 200]
    assert (await road.books())[0] == 2


async def test_it_does_not_wait_for_ever(road: Road, stack: AsyncExitStack) -> None:
    await road.open(stack, wait_seconds=0.0, user=Budget(max_tokens=6_000))
    one, two = [(await road.session())[2] for _ in range(2)]
    road.upstream.hold = asyncio.Event()
    first = asyncio.create_task(road.ask(one))
    await until(lambda: road.upstream.asked)
    assert (await road.ask(two)).status_code == 402
    road.upstream.hold.set()
    assert (await first).status_code == 200


async def test_many_at_once_never_overspend_together(road: Road, stack: AsyncExitStack) -> None:
    limit = 5 * 1_500
    await road.open(stack, user=Budget(max_tokens=limit))
    headers = [(await road.session())[2] for _ in range(20)]

    # As many tokens as may be: the upstream takes all it is granted.
    def greedy() -> Response:
        most = road.upstream.asked[-1]["max_tokens"]
        return JSONResponse({"model": MODEL, "usage": {"input_tokens": 100, "output_tokens": min(most, 1_300)}})

    road.upstream.answer = greedy
    answers = await asyncio.gather(*(road.ask(each) for each in headers))
    statuses = [answer.status_code for answer in answers]
    requests, _, tokens, held = await road.books()
    assert held == 0
    assert tokens <= limit
    assert statuses.count(200) == requests >= 3
    assert statuses.count(402) == 20 - requests


async def test_what_a_dead_gateway_had_reserved_is_spent(road: Road, stack: AsyncExitStack) -> None:
    await road.open(stack)
    session, turn, headers = await road.session()
    road.upstream.hold = asyncio.Event()
    asking = asyncio.create_task(road.ask(headers))
    await until(lambda: road.upstream.asked)
    held, usd = await road.store.read(lambda tx: tx.usage.reserved(abc.UsageFilter(turn_id=turn.id)))
    assert held > 8_000
    # Another one starts on the same rows, as after kill -9.
    after = Meter(road.store, Prices.shipped())
    assert await after.settle_stale(utc_now()) == 1
    assert await after.settle_stale(utc_now()) == 0
    (total,) = await road.store.read(lambda tx: tx.usage.sums(abc.UsageFilter(turn_id=turn.id)))
    assert (total.requests, total.usage.total, total.cost_usd) == (1, held, pytest.approx(usd))
    told = await road.store.read(lambda tx: tx.sessions.get(session.id))
    assert told is not None
    assert told.usage.total == held
    # What comes after all is not counted a second time.
    road.upstream.hold.set()
    await asking
    assert (await road.books())[0] == 1


async def test_a_reservation_of_our_own_is_not_stale(road: Road, stack: AsyncExitStack) -> None:
    before = utc_now()
    await road.open(stack)
    _, _, headers = await road.session()
    road.upstream.hold = asyncio.Event()
    asking = asyncio.create_task(road.ask(headers))
    await until(lambda: road.upstream.asked)
    assert await road.meter.settle_stale(before) == 0
    road.upstream.hold.set()
    await asking
    assert await road.books() == (1, pytest.approx(PRICE), 150, 0)


async def test_a_later_request_is_bounded_by_what_the_first_had(road: Road, stack: AsyncExitStack) -> None:
    await road.open(stack)
    _, _, headers = await road.session(budget=Budget(max_tokens=50_000))
    long = "x" * 40_000
    assert (await road.ask(headers, system=long)).status_code == 200
    # Of the 50,000 some 49,850 are left: twice forty thousand bytes would not fit beside 8,000 tokens of output.
    assert (await road.ask(headers, system=long)).status_code == 200
    assert road.upstream.asked[1]["max_tokens"] == 8_000


async def test_the_login_of_an_environment_is_its_sessions_alone(
    stack: AsyncExitStack, road: Road, tmp_path: Path
) -> None:
    for name, token, ends in (("dev", "login-of-dev-0123", 2e12), ("old", "login-of-old-0123", 1e12)):
        (tmp_path / "logins" / name).mkdir(parents=True)
        login = {"claudeAiOauth": {"accessToken": token, "expiresAt": ends}}
        (tmp_path / "logins" / name / ".credentials.json").write_text(json.dumps(login))
    road.logins = Logins(tmp_path / "logins", Path("/bin/true"))
    await road.open(stack)
    for environment in ("dev", "default"):
        _, _, agent = await road.session(environment=environment, environment_version=1)
        assert (await road.ask(agent)).status_code == 200
    assert road.upstream.credentials == ["Bearer login-of-dev-0123", None]
    _, _, agent = await road.session(environment="old", environment_version=1)
    refused = await road.ask(agent)
    assert refused.status_code == 401
    assert "carrel env login old" in refused.text
    road.upstream.answer = lambda: JSONResponse({"said": "login-of-dev-0123"}, status_code=400)
    _, _, agent = await road.session(environment="dev", environment_version=1)
    assert "login-of-dev" not in (await road.ask(agent)).text
