"""A store, and a proxy over it whose names are all on this machine."""

import asyncio
import base64
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from carrel import abc
from carrel.egress import Dialler, EgressLimits, EgressProxy, Judge, Ledger
from carrel.model import NetworkPolicy, Sandbox, SandboxStatus, Session, new_id, utc_now
from carrel.sessions.hub import token_hash
from carrel.store import SqliteStore
from carrel.testing.conformance.store import new_session

ALLOWED = ("good.example", "*.wild.example", "gone.example", "private.example", "nowhere.example", "xn--mnchen-3ya.de")


@pytest.fixture
async def open_store(tmp_path: Path) -> AsyncIterator[abc.Store]:
    async with AsyncExitStack() as stack:
        store = SqliteStore(tmp_path / "carrel.db", on_commit=lambda events: None)
        await store.start(stack)
        yield store


@pytest.fixture
def make_ledger() -> Callable[..., Ledger]:
    def make(store: Any, told: list[Any]) -> Ledger:
        return Ledger(store, lambda verdict, reason: told.append((verdict, reason)))

    return make


class Loopback(Judge):
    """Takes 127.0.0.1 alone for a public address."""

    def permits(self, address: Any) -> bool:
        return address == ip_address("127.0.0.1")


class Answer:
    """What the proxy has answered."""

    def __init__(self, data: bytes) -> None:
        head, _, self.body = data.partition(b"\r\n\r\n")
        self.lines = head.decode("latin-1").split("\r\n")
        self.status = int(self.lines[0].split(" ")[1]) if data else 0

    @property
    def reason(self) -> str:
        found = [line.partition(": ")[2] for line in self.lines if line.startswith("x-carrel-reason")]
        return found[0] if found else ""


class House:
    """A proxy, a server that every allowed name leads to, and one sandbox."""

    def __init__(self, store: abc.Store, folder: Path) -> None:
        self.store = store
        self.path = folder / "egress.sock"
        self.asked: list[str] = []
        self.received: list[bytes] = []
        self.answer = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"
        self.told: list[tuple[str, str]] = []
        self.port = 0
        self.token = "cak-" + "t" * 40
        self.session: Session
        self.sandbox: Sandbox
        self.ledger: Ledger

    async def resolve(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        if host == "nowhere.example":
            raise OSError("no such name")
        return ["10.0.0.1", "169.254.169.254"] if host == "private.example" else ["127.0.0.1"]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request, kept as it came; its body as far as Content-Length says, or to the last chunk."""
        try:
            self.received.append(await self.read(reader))
        except asyncio.IncompleteReadError:
            writer.close()
            return
        writer.write(self.answer)
        await writer.drain()
        writer.close()

    async def read(self, reader: asyncio.StreamReader) -> bytes:
        data = await reader.readuntil(b"\r\n\r\n")
        for line in data.lower().split(b"\r\n"):
            if line.startswith(b"content-length: "):
                data += await reader.readexactly(int(line[16:]))
            if line == b"transfer-encoding: chunked":
                data += await reader.readuntil(b"0\r\n\r\n")
        return data

    async def start(self, stack: AsyncExitStack, **limits: Any) -> None:
        server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        stack.callback(server.close)
        self.port = server.sockets[0].getsockname()[1]
        self.session = new_session(1)
        allow = [f"{name}:{self.port}" for name in ALLOWED] + ["good.example"]
        self.sandbox = Sandbox(
            id=new_id(), session_id=self.session.id, generation=1, status=SandboxStatus.LIVE, runtime="fake",
            link_token_hash="l", agent_token_hash=token_hash(self.token), created_at=utc_now(),
            network=NetworkPolicy(mode="allow", allow=tuple(allow)),
        )  # fmt: skip

        def work(tx: abc.Transaction) -> None:
            tx.sessions.add(self.session)
            tx.sandboxes.add(self.sandbox)

        await self.store.write(work)
        self.ledger = Ledger(self.store, lambda verdict, reason: self.told.append((verdict, reason)))
        proxy = EgressProxy(
            self.store, Dialler(Loopback(), self.resolve), self.ledger, EgressLimits(**limits) if limits else None
        )
        await proxy.start(self.path, stack)

    async def dial(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_unix_connection(self.path)

    async def ask(self, request: bytes | str, *, token: str | None = "own") -> Answer:
        """What comes back for these bytes; after the request line stands the sandbox's token."""
        data = request.encode("latin-1") if isinstance(request, str) else request
        if token is not None:
            line, _, rest = data.partition(b"\r\n")
            credential = base64.b64encode(f"x:{self.token if token == 'own' else token}".encode())
            data = line + b"\r\nProxy-Authorization: Basic " + credential + b"\r\n" + rest
        reader, writer = await self.dial()
        try:
            writer.write(data)
            return Answer(await asyncio.wait_for(reader.read(), 20))
        except ConnectionResetError:
            return Answer(b"")
        finally:
            writer.close()

    async def get(self, target: str, *headers: str, method: str = "GET", body: str = "") -> Answer:
        return await self.ask("\r\n".join([f"{method} {target} HTTP/1.1", *headers, "", body]))

    async def record(self) -> list[tuple[str, int, str, str, int]]:
        await self.ledger.flush()
        page = await self.store.read(lambda tx: tx.network.page(self.session.id, cursor=None, limit=1000))
        return [(each.host, each.port, each.verdict, each.reason, each.count) for each in reversed(page.items)]


@pytest.fixture
async def make_house(open_store: abc.Store, tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    async with AsyncExitStack() as stack:

        async def make(**limits: Any) -> House:
            house = House(open_store, tmp_path)
            await house.start(stack, **limits)
            return house

        yield make


@pytest.fixture
async def house(make_house: Callable[..., Any]) -> House:
    made: House = await make_house()
    return made
