"""What passes between an agent and an MCP server of its environment, and what does not."""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import AsyncExitStack
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from carrel import abc
from carrel.errors import SecretMissing, StoreUnavailable
from carrel.mcp_gateway import McpGateway
from carrel.mcp_gateway import app as mcp_gateway
from carrel.model import Sandbox, SandboxStatus, Session, SessionStatus, new_id, utc_now
from carrel.protocol.environments import Environment, EnvironmentSpec
from carrel.store import SqliteStore

SECRET = "tok_0123456789"
SHOP = {"type": "http", "url": "https://shop.example/mcp?of=us", "headers": {"X-Key": "key ${secret:SHOP}", "X-A": "b"}}
SPEC = EnvironmentSpec.model_validate({"secrets": [{"name": "SHOP"}], "options": {"mcp_servers": {"shop": SHOP}}})
PLAIN = {"type": "http", "url": "https://docs.example/mcp"}


class Upstream(httpx.AsyncBaseTransport):
    """Answers as `answer` says, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[httpx.Request] = []
        self.answer: Callable[[httpx.Request], httpx.Response] = lambda request: httpx.Response(200, json={"ok": 1})
        self.closed = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        self.asked.append(request)
        return self.answer(request)

    def stream(self, pieces: AsyncIterator[bytes], content_type: str = "text/event-stream", **headers: str) -> None:
        upstream = self

        class Body(httpx.AsyncByteStream):
            def __aiter__(self) -> AsyncIterator[bytes]:
                return pieces

            async def aclose(self) -> None:
                upstream.closed += 1

        named = {"content-type": content_type, **headers}
        self.answer = lambda request: httpx.Response(200, headers=named, stream=Body())


class Road:
    """An agent's side of a gateway over a store of its own."""

    def __init__(self, store: abc.Store, stack: AsyncExitStack) -> None:
        self.store = store
        self.upstream = Upstream()
        self.values: dict[str, str] = {"SHOP": SECRET}
        client = httpx.AsyncClient(transport=self.upstream)
        stack.push_async_callback(client.aclose)
        self.gateway = McpGateway(store, self.open, client)
        self.app = Starlette(routes=self.gateway.routes())
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://gateway")
        stack.push_async_callback(self.http.aclose)

    async def open(self, spec: EnvironmentSpec, names: Collection[str]) -> Mapping[str, str]:
        if not set(names) <= set(self.values):
            raise SecretMissing
        return {name: self.values[name] for name in names}

    async def agent(self, environment: str = "shop", version: int = 1) -> dict[str, str]:
        """The headers of the agent of a session in an environment."""
        now, token = utc_now(), new_id()

        def work(tx: abc.Transaction) -> None:
            session = Session(
                id=new_id(),
                number=tx.sessions.next_number(),
                owner="alice",
                status=SessionStatus.RUNNING,
                environment=environment,
                environment_version=version,
                spec={},
                cost_usd=0.0,
                created_at=now,
                last_active_at=now,
            )
            tx.sessions.add(session)
            tx.sandboxes.add(
                Sandbox(
                    id=new_id(),
                    session_id=session.id,
                    generation=1,
                    status=SandboxStatus.LIVE,
                    runtime="fake",
                    link_token_hash="",
                    agent_token_hash=sha256(token.encode()).hexdigest(),
                    created_at=now,
                )
            )

        await self.store.write(work)
        return {"authorization": f"Bearer {token}"}

    async def write(self, spec: EnvironmentSpec, name: str = "shop", version: int = 1) -> None:
        made = Environment(name=name, version=version, spec=spec, created_at=utc_now())
        await self.store.write(lambda tx: tx.environments.add(made))


@pytest.fixture
async def road(tmp_path: Path) -> AsyncIterator[Road]:
    async with AsyncExitStack() as stack:
        store = SqliteStore(tmp_path / "carrel.db")
        await store.start(stack)
        made = Road(store, stack)
        await made.write(SPEC)
        yield made


async def test_the_protocols_own_passes_and_the_secret_is_added(road: Road) -> None:
    agent = await road.agent()
    said = {
        "accept": "application/json",
        "mcp-session-id": "s1",
        "mcp-protocol-version": "2025-06-18",
        "last-event-id": "7",
        "x-key": "the agent's own",
        "cookie": "a=b",
        "x-forwarded-for": "1.2.3.4",
    }
    answer = {"mcp-session-id": "s2", "set-cookie": "c=d", "www-authenticate": "Bearer", "x-seen": SECRET}
    road.upstream.answer = lambda request: httpx.Response(202, json={"seen": SECRET}, headers=answer)
    got = await road.http.post("/mcp/shop?to=elsewhere", json={"a": 1}, headers=agent | said)
    (asked,) = road.upstream.asked
    assert str(asked.url) == "https://shop.example/mcp?of=us"
    assert asked.content == b'{"a":1}'
    passed = {name: value for name, value in asked.headers.items() if name in said or name.startswith("x-")}
    assert passed == {
        "accept": "application/json",
        "mcp-session-id": "s1",
        "mcp-protocol-version": "2025-06-18",
        "last-event-id": "7",
        "x-key": f"key {SECRET}",
        "x-a": "b",
    }
    assert "authorization" not in asked.headers, "the agent's token is ours alone"
    assert got.status_code == 202
    assert got.json() == {"seen": "[hidden by Carrel]"}
    assert got.headers["mcp-session-id"] == "s2"
    assert not {"set-cookie", "www-authenticate", "x-seen"} & set(got.headers)


@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_other_methods_of_the_protocol(road: Road, method: str) -> None:
    got = await road.http.request(method, "/mcp/shop", headers=await road.agent())
    assert got.status_code == 200
    assert road.upstream.asked[0].method == method
    assert (await road.http.request("PUT", "/mcp/shop")).status_code == 405


async def test_an_answer_is_passed_on_as_it_comes(road: Road) -> None:
    goes_on = asyncio.Event()

    async def pieces() -> AsyncIterator[bytes]:
        yield b"data: one\n\n"
        await goes_on.wait()
        yield b"data: two tok_01"
        yield b"23456789\n\n"

    road.upstream.stream(pieces())
    agent = await road.agent()
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)
        if message.get("body") == b"data: one\n\n":
            goes_on.set()

    headers = [(name.encode(), value.encode()) for name, value in agent.items()]
    await road.app(_scope("GET", headers), _stays(), send)
    body = b"".join(message.get("body", b"") for message in sent)
    assert body == b"data: one\n\ndata: two [hidden by Carrel]\n\n"
    assert road.upstream.closed == 1


def _scope(method: str, headers: list[tuple[bytes, bytes]]) -> dict[str, Any]:
    return {
        "type": "http", "method": method, "path": "/mcp/shop", "raw_path": b"/mcp/shop", "query_string": b"",
        "root_path": "", "scheme": "http", "http_version": "1.1", "headers": headers, "server": ("gateway", 80),
    }  # fmt: skip


def _stays() -> Callable[[], Any]:
    """The receiving side of an agent that says nothing more, and does not go away."""
    said = iter([{"type": "http.request", "body": b"", "more_body": False}])

    async def receive() -> Any:
        return next(said, None) or await asyncio.Event().wait()

    return receive


async def test_an_agent_that_goes_away_ends_its_stream(road: Road) -> None:
    begun, gone = asyncio.Event(), asyncio.Event()

    async def pieces() -> AsyncIterator[bytes]:
        yield b"data: one\n\n"
        begun.set()
        await asyncio.Event().wait()

    async def receive() -> Any:
        if not gone.is_set():
            gone.set()
            return {"type": "http.request", "body": b"", "more_body": False}
        await begun.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pass

    road.upstream.stream(pieces())
    headers = [(name.encode(), value.encode()) for name, value in (await road.agent()).items()]
    async with asyncio.timeout(10):
        await road.app(_scope("GET", headers), receive, send)
    assert road.upstream.closed == 1
    assert not road.gateway._at_work


async def test_whoever_has_no_token_or_another_environment_reaches_nothing(road: Road) -> None:
    await road.write(EnvironmentSpec(), name="plain")
    options = {"mcp_servers": {"shop": PLAIN}}
    await road.write(EnvironmentSpec.model_validate({"options": options}), version=2)
    assert (await road.http.post("/mcp/shop")).status_code == 401
    assert (await road.http.post("/mcp/shop", headers={"authorization": "Bearer x"})).status_code == 401
    assert (await road.http.post("/mcp/docs", headers=await road.agent())).status_code == 404
    for where in (("plain", 1), ("default", 0), ("shop", 2), ("shop", 3)):
        assert (await road.http.post("/mcp/shop", headers=await road.agent(*where))).status_code == 404
    assert road.upstream.asked == []


async def test_bounds(road: Road, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcp_gateway, "_MOST_BODY_BYTES", 10)
    monkeypatch.setattr(mcp_gateway, "_MOST_ANSWER_BYTES", 10)
    monkeypatch.setattr(mcp_gateway, "_MOST_AT_ONCE", 1)
    agent = await road.agent()
    assert (await road.http.post("/mcp/shop", headers=agent, content=b"x" * 11)).status_code == 413

    async def long() -> AsyncIterator[bytes]:
        yield b"x" * 10
        yield b"x"

    road.upstream.stream(long(), "application/json")
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(name.encode(), value.encode()) for name, value in agent.items()]
    await road.app(_scope("GET", headers), _stays(), send)
    assert sent[-1]["more_body"], "it is cut, and not ended as if it were whole"
    assert len(b"".join(message.get("body", b"") for message in sent)) == 10
    arrived, held = asyncio.Event(), asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        arrived.set()
        await held.wait()
        yield b"{}"

    road.upstream.stream(slow())
    first = asyncio.create_task(road.http.post("/mcp/shop", headers=agent))
    await arrived.wait()
    assert (await road.http.post("/mcp/shop", headers=agent)).status_code == 429
    held.set()
    assert (await first).status_code == 200


async def test_what_is_wrong_is_told_without_the_secret(
    road: Road, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = await road.agent()

    async def code() -> str | None:
        problem = await road.gateway.problem(SPEC, "shop")
        got = await road.http.post("/mcp/shop", headers=agent)
        assert (got.status_code == 502) is (problem is not None)
        if problem is not None:
            assert got.json()["error"]["message"] == problem.message
            assert SECRET not in got.text
        return problem.code if problem is not None else None

    def fail(error: Exception) -> Callable[[httpx.Request], httpx.Response]:
        def answer(request: httpx.Request) -> httpx.Response:
            raise error

        return answer

    assert await code() is None
    for answer, expected in (
        (lambda request: httpx.Response(401, headers={"www-authenticate": "Bearer"}), "mcp_server_refused"),
        (lambda request: httpx.Response(307, headers={"location": "https://away.example/"}), "mcp_server_unreachable"),
        (fail(httpx.ConnectError("unresolved")), "mcp_server_unreachable"),
        (fail(httpx.ConnectError("private_address")), "mcp_server_forbidden"),
        (fail(httpx.ReadTimeout("late")), "mcp_server_unreachable"),
    ):
        road.upstream.answer = answer
        assert await code() == expected
    road.values["SHOP"] = "no\nheader-0123456789"
    road.upstream.answer = fail(httpx.LocalProtocolError("Illegal header value"))
    assert await code() == "mcp_server_refused"
    del road.values["SHOP"]
    assert await code() == "secret_missing"
    assert SECRET not in "".join(capfd.readouterr())


async def test_a_store_that_is_away(road: Road, monkeypatch: pytest.MonkeyPatch) -> None:
    async def away(work: Any) -> Any:
        raise StoreUnavailable

    agent = await road.agent()
    monkeypatch.setattr(road.store, "read", away)
    assert (await road.http.post("/mcp/shop", headers=agent)).status_code == 503
