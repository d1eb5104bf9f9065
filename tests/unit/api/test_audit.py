"""The audit log: every change and every refusal, with its outcome, and never a secret or a prompt nobody asked for."""

import asyncio
import csv
import io
import json
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta

import pytest
from fastapi import Request

from carrel import abc
from carrel.api import dependencies
from carrel.api.audit import AuditLog, audited
from carrel.api.limits import Limiter
from carrel.api.origins import Origins
from carrel.model import ADMIN, Principal, new_id, utc_now
from carrel.store import SqliteStore

PROMPT = "the plan nobody may read"


async def records(client, **params):
    answer = await client.get("/api/v1/audit", params=params)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


async def test_changes_are_on_record_with_who_what_where_and_outcome(build):
    called = await build(audit={})
    async with called.client() as client:
        made = await client.post("/api/v1/sessions", json={"title": "x"}, headers={"X-Request-Id": "req-1"})
        session = made.json()["id"]
        await client.patch(f"/api/v1/sessions/{session}", json={"title": "y"})
        turn = (await client.post(f"/api/v1/sessions/{session}/turns", json={"prompt": PROMPT})).json()["id"]
        await client.put(f"/api/v1/sessions/{session}/files/a.txt", content=b"abc")
        await client.get(f"/api/v1/sessions/{session}")
        await client.delete(f"/api/v1/sessions/{session}")
        found = await records(client)
    told = [(r["action"], r["object_type"], r["object_id"], r["outcome"]) for r in reversed(found)]
    assert told == [
        ("session.create", "session", session, 201),
        ("session.update", "session", session, 200),
        ("turn.create", "turn", turn, 202),
        ("file.write", "file", "a.txt", 200),
        ("session.delete", "session", session, 204),
    ]
    assert {(r["principal"], r["user_id"], r["address"]) for r in found} == {(ADMIN.name, ADMIN.user, "192.0.2.7")}
    assert found[-1]["request_id"] == "req-1"
    assert found[2]["details"] == {"session_id": session}
    assert PROMPT not in json.dumps(found)


async def test_refusals_are_on_record_too(build):
    called = await build(audit={}, per_key=Limiter("key", "3/minute"), origins=Origins())
    async with called.client(key="carrel_admin_wrongwrongwrongwrongwrong") as client:
        await client.post("/api/v1/sessions", json={})
        await client.get("/api/v1/sessions")
    async with called.client() as client:
        await client.delete("/api/v1/sessions/nobodys")
        await client.get("/api/v1/sessions/nobodys")  # a look at what is not there changes nothing
        await client.post("/api/v1/sessions", json={"model": 1})
        await client.post("/api/v1/sessions", json={})
        await client.post("/api/v1/sessions", json={}, headers={"Origin": "https://evil.example"})
        await client.post("/api/v1/nothing", json={})
    await called.services.edges.audit.flush()
    found = (await called.gateway.store.read(lambda tx: tx.audit.page(abc.AuditFilter(), cursor=None, limit=100))).items
    assert sorted((r.action, r.principal, r.object_id or "", r.outcome) for r in found) == [
        ("request.unmatched", ADMIN.name, "", 429),
        ("session.create", ADMIN.name, "", 422),
        ("session.create", ADMIN.name, "", 429),
        ("session.create", "anonymous", "", 401),
        ("session.create", "anonymous", "", 403),
        ("session.delete", ADMIN.name, "nobodys", 404),
        ("session.list", "anonymous", "", 401),
    ]
    assert "wrongwrong" not in str(found)


async def test_prompts_are_on_record_where_the_operator_wants_them(build):
    called = await build(audit={"prompts": True})
    async with called.client() as client:
        session = (await client.post("/api/v1/sessions", json={})).json()["id"]
        secret = "sk-ant-api03-abcdefghijklmnop"
        await client.post(f"/api/v1/sessions/{session}/turns", json={"prompt": f"{PROMPT} {secret}"})
        blocks = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
        await client.post(f"/api/v1/sessions/{session}/turns", json={"content": blocks})
        found = await records(client, action="turn.create")
    assert [r["details"]["prompt"] for r in found] == ["one\ntwo", f"{PROMPT} [redacted]"]


async def test_only_admins_read_it(build):
    called = await build(audit={})
    assert called.services.authenticator is not None
    alice = Principal.of_user("alice")

    @called.app.middleware("http")
    async def as_alice(request, call_next):
        request.scope["carrel.principal"] = alice
        return await call_next(request)

    called.app.dependency_overrides[dependencies.principal] = lambda: alice
    async with called.client() as client:
        answer = await client.get("/api/v1/audit")
        assert (answer.status_code, answer.json()["code"]) == (403, "missing_scope")
        answer = await client.get("/metrics")
        assert (answer.status_code, answer.json()["code"]) == (403, "missing_scope")


async def test_it_is_filtered_paged_and_exported(build):
    called = await build(audit={})
    async with called.client() as client:
        sessions = [(await client.post("/api/v1/sessions", json={})).json()["id"] for _ in range(5)]
        await client.put(f"/api/v1/sessions/{sessions[0]}/files/=cmd()", content=b"x")
        await client.delete(f"/api/v1/sessions/{sessions[0]}")
        assert len(await records(client, action="session.create")) == 5
        assert [r["action"] for r in await records(client, object_id=sessions[0])] == [
            "session.delete",
            "session.create",
        ]
        assert len(await records(client, user="admin")) == 7
        assert await records(client, user="alice") == []
        assert len(await records(client, principal=ADMIN.name)) == 7
        tomorrow = (datetime.now(UTC) + timedelta(days=1)).isoformat()
        assert await records(client, since=tomorrow) == []
        assert len(await records(client, until=tomorrow)) == 7
        for wrong in ("2026-01-01T00:00:00", "0.5", "1767225600", "yesterday"):
            assert (await client.get("/api/v1/audit", params={"since": wrong})).status_code == 422, wrong
        assert (await client.get("/api/v1/audit", params={"cursor": "nonsense"})).status_code == 400

        first = (await client.get("/api/v1/audit", params={"limit": 4})).json()
        second = (await client.get("/api/v1/audit", params={"limit": 4, "cursor": first["next_cursor"]})).json()
        assert len(first["data"]) == 4
        assert len(second["data"]) == 3
        assert second["next_cursor"] is None
        everything = first["data"] + second["data"]

        lines = await client.get("/api/v1/audit", headers={"Accept": "application/x-ndjson"})
        assert [json.loads(line) for line in lines.text.splitlines()] == everything
        table = await client.get("/api/v1/audit", headers={"Accept": "text/csv"}, params={"action": "file.write"})
        (row,) = csv.DictReader(io.StringIO(table.text))
        assert (row["action"], row["outcome"]) == ("file.write", "200")
        assert row["object_id"] == "'=cmd()"  # no spreadsheet runs it


async def test_what_comes_another_way_is_put_on_record_by_whoever_takes_it(build):
    called = await build(audit={})

    @called.app.post("/compat/ask")
    async def ask(request: Request) -> dict[str, bool]:
        audited(request, "dialect.ask", outcome=200, object_type="session", object_id="s1", prompt=PROMPT)
        return {"ok": True}

    async with called.client() as client:
        assert (await client.post("/compat/ask")).status_code == 200
        (found,) = await records(client)
    assert (found["action"], found["object_id"], found["outcome"]) == ("dialect.ask", "s1", 200)
    assert found["details"] == {}


@pytest.fixture
async def store(tmp_path):
    async with AsyncExitStack() as stack:
        store = SqliteStore(tmp_path / "carrel.db")
        await store.start(stack)
        yield store


def note(log, action="session.create", outcome=201, **more):
    given = {"principal": None, "object_type": "session", "object_id": None, "address": "192.0.2.7", "request_id": "r"}
    log.record(action, outcome=outcome, **(given | more))


async def stored(store):
    return (await store.read(lambda tx: tx.audit.page(abc.AuditFilter(), cursor=None, limit=1000))).items


async def test_an_orderly_end_loses_nothing(store):
    async with AsyncExitStack() as stack:
        log = AuditLog(store)
        await log.start(stack)
        for i in range(700):
            note(log, object_id=f"s{i}")
    assert len(await stored(store)) == 700


async def test_the_same_refusal_over_and_over_is_one_record_with_its_number(store):
    log = AuditLog(store)
    for _ in range(200):
        note(log, "session.list", 401)
    note(log, "session.list", 401, address="192.0.2.8")
    note(log, "session.create", 201)
    note(log, "session.create", 201)
    await log.flush()
    found = sorted((r.action, r.address, r.details.get("times")) for r in await stored(store) if r.outcome == 401)
    assert found == [("session.list", "192.0.2.7", 200), ("session.list", "192.0.2.8", None)]
    assert len(await stored(store)) == 4


class StoreThatIsAway(abc.Store):
    """Fails to write until it is back."""

    def __init__(self, store):
        self.away = True
        self._store = store

    async def start(self, exit_stack):
        raise AssertionError("it is started already")

    async def read(self, work):
        return await self._store.read(work)

    async def write(self, work):
        if self.away:
            raise OSError("away")
        return await self._store.write(work)


async def test_records_wait_for_a_store_that_is_away(store):
    away = StoreThatIsAway(store)
    async with AsyncExitStack() as stack:
        log = AuditLog(away)
        await log.start(stack)
        note(log)
        with pytest.raises(OSError, match="away"):
            await log.flush()
        away.away = False
        await log.flush()
        assert len(await stored(store)) == 1


async def test_old_records_are_forgotten(store):
    old = abc.AuditRecord(
        id=new_id(),
        at=utc_now() - timedelta(days=31),
        principal="p",
        user_id=None,
        action="a.b",
        object_type=None,
        object_id=None,
        address=None,
        request_id=None,
        outcome=200,
        details={},
    )
    await store.write(lambda tx: tx.audit.add([old]))
    async with AsyncExitStack() as stack:
        log = AuditLog(store, days=30)
        await log.start(stack)
        note(log)
        async with asyncio.timeout(10):
            while [record.action for record in await stored(store)] != ["session.create"]:
                await asyncio.sleep(0.01)


async def test_a_prompt_over_a_websocket_is_on_record_and_counted(build):
    called = await build(audit={}, per_key=Limiter("key", "3/minute"))
    async with called.client() as client:
        session = (await client.post("/api/v1/sessions", json={})).json()["id"]
    sent: list[dict[str, object]] = []
    inbox: asyncio.Queue[dict[str, object]] = asyncio.Queue()
    inbox.put_nowait({"type": "websocket.connect"})
    for text in (
        {"type": "prompt", "prompt": PROMPT},
        {"type": "interrupt", "turn_id": "t9"},
        {"type": "interrupt"},
        {"type": "ping"},
    ):
        inbox.put_nowait({"type": "websocket.receive", "text": json.dumps(text)})
    scope = {
        "type": "websocket",
        "path": f"/api/v1/sessions/{session}/stream",
        "query_string": b"deltas=false",
        "headers": [(b"host", b"localhost"), (b"authorization", f"Bearer {called.key}".encode())],
        "client": ("192.0.2.9", 1),
        "subprotocols": [],
        "extensions": {},
        "scheme": "ws",
        "root_path": "",
    }

    async def send(message):
        sent.append(message)
        if '"pong"' in str(message.get("text")):
            await inbox.put({"type": "websocket.disconnect", "code": 1000})

    async with asyncio.timeout(20):
        await called.app(scope, inbox.get, send)
    assert called.services.edges.audit is not None
    await called.services.edges.audit.flush()
    found = list(reversed(await stored(called.gateway.store)))
    told = [(r.action, r.object_type, r.outcome, r.address, r.details) for r in found[1:]]
    over = {"session_id": session, "over": "websocket"}
    assert told == [
        ("turn.create", "turn", 202, "192.0.2.9", over),
        ("session.interrupt", "session", 409, "192.0.2.9", over),
        ("session.interrupt", "session", 429, "192.0.2.9", over),
    ]
    assert '"rate_limited"' in str(sent)
