"""The promises of a `Store` and of the rows in its transactions."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

from carrel import abc
from carrel.errors import (
    InvalidCursor,
    KeyNotFound,
    SessionNotFound,
    TurnNotFound,
    UserNotFound,
    WorkspaceNotFound,
)
from carrel.model import (
    ApiKey,
    Artifact,
    Birth,
    Budget,
    ChildFiles,
    Failure,
    Interaction,
    InteractionKind,
    InteractionStatus,
    NamedWorkspace,
    OnParentEnd,
    PermissionRule,
    Principal,
    Restoring,
    RewoundPart,
    RuleScope,
    Sandbox,
    SandboxStatus,
    Scope,
    Session,
    SessionStatus,
    Snapshot,
    SnapshotReason,
    StopReason,
    Ticket,
    Turn,
    TurnStatus,
    Usage,
    User,
    WorkspaceMode,
    new_id,
)
from carrel.protocol.environments import Environment, EnvironmentSpec, Secret
from carrel.protocol.events import MessageAssistant, NewEvent, StoredEvent, ToolFinished, TurnCompleted
from carrel.testing.conformance.checks import collect, must, must_equal, must_raise

__all__ = ["CHECKS", "DURABLE_CHECKS", "OpenStore", "new_event", "new_sandbox", "new_session", "new_turn"]

OnCommit = Callable[[list[StoredEvent]], None]
OpenStore = Callable[[OnCommit], AbstractAsyncContextManager[abc.Store]]
"""Opens a started store that tells `on_commit` what was appended. Each check wants an empty one first."""

CHECKS: dict[str, Callable[[OpenStore], Awaitable[None]]] = {}
"""What every store promises."""
DURABLE_CHECKS: dict[str, Callable[[OpenStore], Awaitable[None]]] = {}
"""What a store promises that keeps rows beyond its own life: here the factory opens the same one again."""

NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


def ignore(events: list[StoredEvent]) -> None:
    """An `on_commit` for those who need not hear."""


def new_session(number: int, **changes: Any) -> Session:
    """A session with something in every column."""
    values: dict[str, Any] = {
        "id": new_id(),
        "number": number,
        "owner": "alice",
        "status": SessionStatus.IDLE,
        "stop_reason": StopReason.END_TURN,
        "title": "a title",
        "spec": {"model": "m", "tools": []},
        "metadata": {"ключ": ["𝄞", None, 1.5]},
        "agent_session_id": "a-1",
        "usage": Usage(input_tokens=3),
        "cost_usd": 0.25,
        "error": Failure(code="c", message="m"),
        "created_at": NOW,
        "last_active_at": NOW,
        "ttl_seconds": 60,
        "expires_at": NOW + timedelta(seconds=60),
    }
    return Session(**values | changes)


def new_turn(session: Session, number: int, status: TurnStatus = TurnStatus.QUEUED, **changes: Any) -> Turn:
    """A turn of a session."""
    values: dict[str, Any] = {
        "id": new_id(),
        "session_id": session.id,
        "number": number,
        "status": status,
        "content": [{"type": "text", "text": "hi"}],
        "options": {"timeout_seconds": 1.5},
        "created_at": NOW,
    }
    return Turn(**values | changes)


def new_interaction(session: Session, **changes: Any) -> Interaction:
    """Something of a session that waits for a person."""
    values: dict[str, Any] = {
        "id": new_id(),
        "session_id": session.id,
        "owner": session.owner,
        "turn_id": new_id(),
        "kind": InteractionKind.PERMISSION,
        "tool": "Bash",
        "tool_use_id": "toolu_1",
        "input": {"command": "ls", "nothing": None},
        "input_digest": "0" * 64,
        "reason": "no rule allows it",
        "created_at": NOW,
        "expires_at": NOW,
    }
    return Interaction(**values | changes)


def new_sandbox(session: Session, generation: int, status: SandboxStatus, **changes: Any) -> Sandbox:
    """A sandbox of a session."""
    values: dict[str, Any] = {
        "id": new_id(),
        "session_id": session.id,
        "generation": generation,
        "status": status,
        "runtime": "fake",
        "state": {"pid": 1, "path": "/x"},
        "environment": "dev:3",
        "link_token_hash": "l",
        "agent_token_hash": new_id(),
        "created_at": NOW,
    }
    return Sandbox(**values | changes)


def new_event(text: str, turn_id: str | None = None) -> NewEvent:
    """An event that says `text`."""
    return NewEvent.of(MessageAssistant(message_id="m", block=0, text=text), at=NOW, turn_id=turn_id)


async def add_session(store: abc.Store, **changes: Any) -> Session:
    """Store a session under the next number."""

    def work(tx: abc.Transaction) -> Session:
        session = new_session(tx.sessions.next_number(), **changes)
        tx.sessions.add(session)
        return session

    return await store.write(work)


def texts(events: list[StoredEvent]) -> list[str]:
    """What events made by `new_event` say."""
    return [event.data["text"] for event in events]


_check = collect(CHECKS)
_durable = collect(DURABLE_CHECKS)


@_check
async def what_is_stored_is_read_back(open_store: OpenStore) -> None:
    """Every column of every entity comes back as it went in, times with their zone."""
    async with open_store(ignore) as store:
        session = await add_session(store)
        turn = new_turn(session, 1, error=Failure(code="x", message="y"), structured_output={"a": [1]}, expires_at=NOW)
        sandbox = new_sandbox(session, 1, SandboxStatus.LIVE)

        def work(tx: abc.Transaction) -> None:
            tx.turns.add(turn)
            tx.sandboxes.add(sandbox)

        await store.write(work)
        must_equal(await store.read(lambda tx: tx.sessions.get(session.id)), session, "the session comes back")
        must_equal(await store.read(lambda tx: tx.turns.get(turn.id)), turn, "the turn comes back")
        must_equal(await store.read(lambda tx: tx.sandboxes.get(sandbox.id)), sandbox, "the sandbox comes back")
        elsewhere = NOW.astimezone(timezone(timedelta(hours=9)))
        changed = await store.write(lambda tx: tx.sessions.update(session.id, last_active_at=elsewhere))
        must_equal(changed.last_active_at.isoformat(), NOW.isoformat(), "times come back in UTC")


@_check
async def what_is_not_there_is_said(open_store: OpenStore) -> None:
    """A read of nothing answers None; a change of nothing raises."""
    async with open_store(ignore) as store:
        must(await store.read(lambda tx: tx.sessions.get("no")) is None, "no session is None")
        must(await store.read(lambda tx: tx.turns.get("no")) is None, "no turn is None")
        must(await store.read(lambda tx: tx.sandboxes.get("no")) is None, "no sandbox is None")
        change = store.write(lambda tx: tx.sessions.update("no", title="t"))
        await must_raise(SessionNotFound, change, "a change of no session")
        await must_raise(TurnNotFound, store.write(lambda tx: tx.turns.update("no", num_turns=1)), "of no turn")
        append = store.write(lambda tx: tx.events.append("no", [new_event("x")]))
        await must_raise(SessionNotFound, append, "an event of no session")
        await store.write(lambda tx: tx.sandboxes.update("no", status=SandboxStatus.GONE))


@_check
async def a_failed_transaction_changes_nothing(open_store: OpenStore) -> None:
    """What raised comes out, nothing is stored and nothing published."""
    told: list[StoredEvent] = []
    async with open_store(told.extend) as store:
        session = await add_session(store)

        def work(tx: abc.Transaction) -> None:
            tx.sessions.update(session.id, title="changed")
            tx.events.append(session.id, [new_event("never")])
            raise LookupError("on purpose")

        await must_raise(LookupError, store.write(work), "the error comes out of write")
        must_equal(await store.read(lambda tx: tx.sessions.get(session.id)), session, "nothing changed")
        must_equal(await store.read(lambda tx: tx.events.page(session.id, after=0, limit=9)), [], "nothing appended")
        must_equal(told, [], "nothing published")


@_check
async def a_failure_is_its_own(open_store: OpenStore) -> None:
    """Of transactions at the same time, one that fails takes back its own work alone."""
    told: list[StoredEvent] = []
    async with open_store(told.extend) as store:
        session = await add_session(store)

        def work(tx: abc.Transaction, i: int) -> None:
            tx.events.append(session.id, [new_event(str(i))])
            if i % 3 == 0:
                raise LookupError(str(i))

        writes = [store.write(lambda tx, i=i: work(tx, i)) for i in range(60)]  # type: ignore[misc]
        answers = await asyncio.gather(*writes, return_exceptions=True)
        must_equal([i for i, answer in enumerate(answers) if answer is not None], list(range(0, 60, 3)), "those failed")
        stored = await store.read(lambda tx: tx.events.page(session.id, after=0, limit=100))
        must_equal([event.seq for event in stored], list(range(1, 41)), "numbers have no gaps")
        must_equal(set(texts(stored)), {str(i) for i in range(60) if i % 3}, "the others are stored")
        must_equal([e.seq for e in told], [e.seq for e in stored], "they alone are published, in order")


@_check
async def events_are_numbered_without_gaps(open_store: OpenStore) -> None:
    """From 1, in the order of commits, whoever writes; and the session knows the last."""
    async with open_store(ignore) as store:
        one, two = await add_session(store), await add_session(store)

        async def write(session: Session, i: int) -> None:
            stored = await store.write(lambda tx: tx.events.append(session.id, [new_event(str(i)), new_event("b")]))
            must_equal(stored[1].seq, stored[0].seq + 1, "numbers within a transaction follow each other")

        await asyncio.gather(*(write(session, i) for i in range(50) for session in (one, two)))
        for session in (one, two):
            stored = await store.read(lambda tx, s=session.id: tx.events.page(s, after=0, limit=1000))  # type: ignore[misc]
            must_equal([event.seq for event in stored], list(range(1, 101)), "each session counts for itself")
            now = await store.read(lambda tx, s=session.id: tx.sessions.get(s))  # type: ignore[misc]
            must(now is not None and now.last_seq == 100, "last_seq is the last event's")


@_check
async def events_are_published_after_the_commit(open_store: OpenStore) -> None:
    """Before `write` returns, in the order of commits, in the event loop's thread, and only what can be read."""
    told: list[int] = []
    loops: list[object] = []

    def hear(events: list[StoredEvent]) -> None:
        loops.append(asyncio.get_running_loop())
        told.extend(event.seq for event in events)

    async with open_store(hear) as store:
        session = await add_session(store)
        for i in range(1, 6):
            await store.write(lambda tx: tx.events.append(session.id, [new_event("x")]))
            must_equal(told, list(range(1, i + 1)), "published before write returns")
        writes = [store.write(lambda tx: tx.events.append(session.id, [new_event("y")])) for _ in range(95)]
        await asyncio.gather(*writes)
        must_equal(told, list(range(1, 101)), "published in the order of commits")
        must_equal(set(loops), {asyncio.get_running_loop()}, "published in the event loop")


@_check
async def a_cancelled_write_leaves_the_store_whole(open_store: OpenStore) -> None:
    """Whoever waits for a write may go away: what was committed is published, and later writes go on."""
    told: list[StoredEvent] = []
    async with open_store(told.extend) as store:
        session = await add_session(store)
        tasks = [
            asyncio.ensure_future(store.write(lambda tx: tx.events.append(session.id, [new_event("x")])))
            for _ in range(20)
        ]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await store.write(lambda tx: tx.events.append(session.id, [new_event("last")]))
        stored = await store.read(lambda tx: tx.events.page(session.id, after=0, limit=100))
        must_equal([e.seq for e in told], [e.seq for e in stored], "what is stored is what was published")
        must_equal(stored[-1].data["text"], "last", "later writes go on")


@_check
async def a_page_of_events_is_bounded(open_store: OpenStore) -> None:
    """By number, by turn and by size, and it holds at least one event."""
    async with open_store(ignore) as store:
        session = await add_session(store)
        events = [new_event("x" * 1000, turn_id=f"t{i % 2}") for i in range(10)]
        await store.write(lambda tx: tx.events.append(session.id, events))

        async def seqs(**options: Any) -> list[int]:
            found = await store.read(lambda tx: tx.events.page(session.id, **options))
            return [event.seq for event in found]

        must_equal(await seqs(after=3, limit=4), [4, 5, 6, 7], "after and limit")
        must_equal(await seqs(after=10, limit=4), [], "nothing after the last")
        must_equal(await seqs(after=2, limit=2, turn_id="t0"), [3, 5], "of one turn")
        must_equal(await seqs(after=0, limit=9, max_bytes=1), [1], "at least one")
        must_equal(await seqs(after=0, limit=9, max_bytes=2500), [1, 2, 3], "no more once the size is passed")
        must_equal(await seqs(after=2**62, limit=9), [], "after a number nobody has")


@_check
async def every_text_comes_back(open_store: OpenStore) -> None:
    """Every plane of Unicode, quotes, braces, control characters, and a text of megabytes."""
    wanted = ["𝄞 € ÿ ا 漢 \u0000 \u2028 \x7f", "\"'{}[]%s;--\\n\\", "é" * 3_000_000, ""]
    async with open_store(ignore) as store:
        session = await add_session(store)
        await store.write(lambda tx: tx.events.append(session.id, [new_event(text) for text in wanted]))
        stored = await store.read(lambda tx: tx.events.page(session.id, after=0, limit=9))
        must(texts(stored) == wanted, "texts come back as they were")
        must_equal(json.loads(stored[0].json())["data"]["text"], wanted[0], "and so does their JSON")
        lines = [json.dumps({"uuid": str(i), "text": text}) for i, text in enumerate(wanted)]
        await store.write(lambda tx: tx.transcripts.append(session.id, subpath="", turn_id=None, lines=lines))
        found = await store.read(lambda tx: tx.transcripts.page(session.id, "", after=0, limit=9))
        must([line for _, line in found] == lines, "lines of a transcript come back exactly")


@_check
async def sessions_are_listed_newest_first(open_store: OpenStore) -> None:
    """A page at a time; sessions that are added meanwhile change no later page."""
    async with open_store(ignore) as store:
        made = [await add_session(store, owner="alice" if i % 2 else "bob") for i in range(20)]
        await store.write(lambda tx: tx.sessions.update(made[3].id, status=SessionStatus.STOPPED))

        async def listed(which: abc.SessionFilter, limit: int) -> list[str]:
            found: list[str] = []
            cursor: str | None = None
            while True:
                page = await store.read(lambda tx, c=cursor: tx.sessions.page(which, cursor=c, limit=limit))  # type: ignore[misc]
                must(len(page.items) <= limit, "a page is bounded")
                found += [session.id for session in page.items]
                cursor = page.next_cursor
                if cursor is None:
                    return found
                await add_session(store, owner="carol")

        newest = [session.id for session in reversed(made)]
        must_equal(await listed(abc.SessionFilter(), 7), newest, "all, newest first")
        of_alice = await listed(abc.SessionFilter(owner="alice"), 3)
        must_equal(of_alice, [s.id for s in reversed(made) if s.owner == "alice"], "of one owner")
        exact = await listed(abc.SessionFilter(owner="bob"), 10)
        must_equal(len(exact), 10, "a last page that is full has no next one")
        stopped = await listed(abc.SessionFilter(status=SessionStatus.STOPPED), 5)
        must_equal(stopped, [made[3].id], "of one status")


@_check
async def a_cursor_of_nobodys_is_refused(open_store: OpenStore) -> None:
    """Whatever a caller sends as a cursor, the answer is InvalidCursor or a page."""
    async with open_store(ignore) as store:
        session = await add_session(store)
        for cursor in (
            "",
            "x",
            "é",
            "bjk5OTk5OTk5OTk5OTk5OTk5OTk5OTk5",
            "====",
            "bi0x",
            "bjFfMA",
            "\x00",
            "a" * 10_000,
        ):
            sessions = store.read(lambda tx, c=cursor: tx.sessions.page(abc.SessionFilter(), cursor=c, limit=5))  # type: ignore[misc]
            await must_raise(InvalidCursor, sessions, f"the cursor {cursor[:20]!r} of sessions")
            turns = store.read(lambda tx, c=cursor: tx.turns.page(session.id, cursor=c, limit=5))  # type: ignore[misc]
            await must_raise(InvalidCursor, turns, f"the cursor {cursor[:20]!r} of turns")


@_check
async def session_numbers_are_never_reused(open_store: OpenStore) -> None:
    """Also after the newest session was deleted."""
    async with open_store(ignore) as store:
        first = await add_session(store)
        await store.write(lambda tx: tx.sessions.remove(first.id))
        numbers = await asyncio.gather(*(store.write(lambda tx: tx.sessions.next_number()) for _ in range(20)))
        must_equal(sorted(numbers), list(range(first.number + 1, first.number + 21)), "each number once")


@_check
async def turns_wait_in_order(open_store: OpenStore) -> None:
    """`queued` in order, `live` the one that runs or waits for a person, numbers from 1."""
    async with open_store(ignore) as store:
        session, other = await add_session(store), await add_session(store)

        def work(tx: abc.Transaction) -> list[Turn]:
            must_equal(tx.turns.next_number(session.id), 1, "turns count from 1")
            made = [new_turn(session, n) for n in (1, 2, 3, 4)]
            for turn in reversed(made):
                tx.turns.add(turn)
            tx.turns.add(new_turn(other, 1))
            return made

        made = await store.write(work)
        must_equal(await store.read(lambda tx: list(tx.turns.queued(session.id))), made, "queued in order")
        must(await store.read(lambda tx: tx.turns.live(session.id)) is None, "a queued turn is not live")
        for status in (TurnStatus.RUNNING, TurnStatus.WAITING):
            live = await store.write(lambda tx, s=status: tx.turns.update(made[0].id, status=s))  # type: ignore[misc]
            must_equal(await store.read(lambda tx: tx.turns.live(session.id)), live, "the live turn")
        await store.write(lambda tx: tx.turns.update(made[0].id, status=TurnStatus.SUCCEEDED))
        must(await store.read(lambda tx: tx.turns.live(session.id)) is None, "an ended turn is not live")
        must_equal(await store.read(lambda tx: len(tx.turns.queued(session.id))), 3, "three are left")
        must_equal(await store.read(lambda tx: tx.turns.next_number(session.id)), 5, "the next number")
        page = await store.read(lambda tx: tx.turns.page(session.id, cursor=None, limit=3))
        rest = await store.read(lambda tx: tx.turns.page(session.id, cursor=page.next_cursor, limit=3))
        must_equal([t.number for t in [*page.items, *rest.items]], [4, 3, 2, 1], "newest first, a page at a time")
        must(rest.next_cursor is None, "the last page says so")


@_check
async def the_current_sandbox_is_the_newest(open_store: OpenStore) -> None:
    """Of those not gone; an agent's token opens nothing once its sandbox is gone."""
    async with open_store(ignore) as store:
        session = await add_session(store)
        gone, old, new = (
            new_sandbox(session, 3, SandboxStatus.GONE),
            new_sandbox(session, 1, SandboxStatus.ENDING),
            new_sandbox(session, 2, SandboxStatus.LIVE),
        )
        must(await store.read(lambda tx: tx.sandboxes.current(session.id)) is None, "at first there is none")
        for sandbox in (gone, new, old):
            await store.write(lambda tx, s=sandbox: tx.sandboxes.add(s))  # type: ignore[misc]
        must_equal(await store.read(lambda tx: tx.sandboxes.current(session.id)), new, "the newest that is not gone")
        ids = await store.read(lambda tx: {sandbox.id for sandbox in tx.sandboxes.not_gone()})
        must_equal(ids, {old.id, new.id}, "those not gone")
        found = await store.read(lambda tx: tx.sandboxes.by_agent_token(new.agent_token_hash))
        must_equal(found, new, "found by its agent's token")
        must(await store.read(lambda tx: tx.sandboxes.by_agent_token(gone.agent_token_hash)) is None, "gone is gone")
        must(await store.read(lambda tx: tx.sandboxes.by_agent_token("")) is None, "no token, no sandbox")


@_check
async def the_mark_of_frames_never_goes_back(open_store: OpenStore) -> None:
    """`advance` answers the mark before, and keeps the higher one."""
    async with open_store(ignore) as store:
        session = await add_session(store)
        sandbox = new_sandbox(session, 1, SandboxStatus.LIVE)
        await store.write(lambda tx: tx.sandboxes.add(sandbox))
        answers = [await store.write(lambda tx, n=n: tx.sandboxes.advance(sandbox.id, n)) for n in (5, 3, 5, 9)]  # type: ignore[misc]
        must_equal(answers, [0, 5, 5, 5], "the mark before")
        now = await store.read(lambda tx: tx.sandboxes.get(sandbox.id))
        must(now is not None and now.acked == 9, "the highest is kept")


@_check
async def a_line_of_a_transcript_is_stored_once(open_store: OpenStore) -> None:
    """By its uuid within its file; lines without one are all kept; order is kept."""
    async with open_store(ignore) as store:
        session = await add_session(store)

        def lines(*uuids: str | None) -> list[str]:
            return [json.dumps({"uuid": u, "n": i} if u else {"n": i}) for i, u in enumerate(uuids)]

        async def put(subpath: str, given: list[str]) -> None:
            await store.write(lambda tx: tx.transcripts.append(session.id, subpath=subpath, turn_id="t", lines=given))

        await put("", lines("a", "b", None))
        await put("", lines("b", "c", None, "c"))
        await put("subagents/x", lines("a"))
        await put("", ["not JSON", "[1]", '"text"'])
        found = await store.read(lambda tx: tx.transcripts.page(session.id, "", after=0, limit=100))
        uuids = [value.get("uuid") for _, line in found[:5] if isinstance(value := json.loads(line), dict)]
        must_equal(uuids, ["a", "b", None, "c", None], "each uuid once, in order")
        must_equal([line for _, line in found[5:]], ["not JSON", "[1]", '"text"'], "whatever is a line is kept")
        must_equal([n for n, _ in found], sorted({n for n, _ in found}), "positions rise")
        after = await store.read(lambda tx: tx.transcripts.page(session.id, "", after=found[1][0], limit=2))
        must_equal(after, found[2:4], "a page after a position")
        subpaths = await store.read(lambda tx: list(tx.transcripts.subpaths(session.id)))
        must_equal(subpaths, ["", "subagents/x"], "the files")


@_check
async def what_waits_in_a_pool_is_nobodys_and_taken_once(open_store: OpenStore) -> None:
    """No list and no count has it; of many at once no two get the same; only one that is ready is given."""
    async with open_store(ignore) as store:
        ready, starting = SessionStatus.READY, SessionStatus.STARTING
        waiting = [await add_session(store, reserved="p", owner="", status=ready) for _ in range(3)]
        slow = await add_session(store, reserved="p", owner="", status=starting)
        other = await add_session(store, reserved="q", owner="", status=ready)
        gone = await add_session(store, reserved="p", owner="", status=ready)
        await store.write(lambda tx: tx.sessions.mark_deleting(gone.id))
        taken = await add_session(store)
        found = await store.read(lambda tx: [session.id for session in tx.pools.waiting()])
        must_equal(found, [each.id for each in (*waiting, slow, other)], "all that wait, oldest first")
        page = await store.read(lambda tx: tx.sessions.page(abc.SessionFilter(), cursor=None, limit=10))
        must_equal([session.id for session in page.items], [taken.id], "the list")
        counts = await store.read(lambda tx: (tx.counts.sessions(), tx.counts.sessions(""), tx.counts.busy()))
        must_equal(counts, (1, 0, 0), "sessions, of nobody, at work")
        unsettled = await store.read(lambda tx: set(tx.sessions.unsettled(NOW - timedelta(days=1))))
        must({each.id for each in (*waiting, slow, other)} <= unsettled, "they are looked at after a restart")
        got = await asyncio.gather(*(store.write(lambda tx: tx.pools.take("p")) for _ in range(6)))
        ids = [session.id for session in got if session is not None]
        must(len(ids) == len(set(ids)), "none is given twice")
        # At the very same instant one may be missed; whoever comes later finds it.
        while (more := await store.write(lambda tx: tx.pools.take("p"))) is not None:
            ids.append(more.id)
        must_equal(sorted(ids), sorted(each.id for each in waiting), "those that are ready")
        must(all(session.reserved is None for session in got if session is not None), "out of the pool")
        left = await store.read(lambda tx: [session.id for session in tx.pools.waiting()])
        must_equal(left, [slow.id, other.id], "those that are left")


@_check
async def a_transcript_is_copied_to_a_turns_end(open_store: OpenStore) -> None:
    """With one id put for another, and later turns left out."""
    async with open_store(ignore) as store:
        source, target, whole = [await add_session(store) for _ in range(3)]
        turns = [new_turn(source, n, TurnStatus.SUCCEEDED) for n in (1, 2, 3)]

        def work(tx: abc.Transaction) -> None:
            for turn in turns:
                tx.turns.add(turn)
                line = json.dumps({"uuid": turn.id, "sessionId": "old-id", "n": turn.number})
                tx.transcripts.append(source.id, subpath="", turn_id=turn.id, lines=[line])
            tx.transcripts.append(source.id, subpath="sub", turn_id=turns[2].id, lines=["{}"])
            tx.transcripts.copy(source.id, target.id, up_to_turn=turns[1].id, replace=("old-id", "new-id"))
            tx.transcripts.copy(source.id, whole.id, up_to_turn=None, replace=None)

        await store.write(work)
        copied = await store.read(lambda tx: tx.transcripts.page(target.id, "", after=0, limit=9))
        values = [json.loads(line) for _, line in copied]
        must_equal([(v["n"], v["sessionId"]) for v in values], [(1, "new-id"), (2, "new-id")], "to the turn's end")
        must_equal(await store.read(lambda tx: list(tx.transcripts.subpaths(target.id))), [""], "later files are not")
        must_equal(await store.read(lambda tx: list(tx.transcripts.subpaths(whole.id))), ["", "sub"], "all of it")
        left = await store.read(lambda tx: tx.transcripts.page(source.id, "", after=0, limit=9))
        must_equal(len(left), 3, "the source stays as it was")


@_check
async def usage_is_summed(open_store: OpenStore) -> None:
    """Tokens and cost of a turn; one part of unknown cost makes the sum unknown."""
    async with open_store(ignore) as store:
        session = await add_session(store)

        def record(turn_id: str, cost: float | None) -> abc.UsageRecord:
            usage = Usage(input_tokens=1, output_tokens=2, cache_creation_input_tokens=3, cache_read_input_tokens=4)
            return abc.UsageRecord(
                id=new_id(),
                session_id=session.id,
                user_id="alice",
                turn_id=turn_id,
                model="m",
                usage=usage,
                cost_usd=cost,
                at=NOW,
            )

        for item in (record("known", 0.5), record("known", 0.25), record("unknown", 0.5), record("unknown", None)):
            await store.write(lambda tx, r=item: tx.usage.add(r))  # type: ignore[misc]
        twice = Usage(input_tokens=2, output_tokens=4, cache_creation_input_tokens=6, cache_read_input_tokens=8)
        must_equal(await store.read(lambda tx: tx.usage.of_turn("known")), (twice, 0.75, 2), "the sums")
        must_equal(await store.read(lambda tx: tx.usage.of_turn("unknown")), (twice, None, 2), "unknown cost")
        usage, _, requests = await store.read(lambda tx: tx.usage.of_turn("none"))
        must_equal((usage, requests), (Usage(), 0), "nothing spent")


@_check
async def a_tree_is_known_by_its_sessions(open_store: OpenStore) -> None:
    """Children, all below, all above; what is stopped is not counted, and what deleted ones have spent still is."""
    async with open_store(ignore) as store:
        root = await add_session(store)

        async def add_below(parent: Session, **changes: Any) -> Session:
            child = new_session(
                await store.write(lambda tx: tx.sessions.next_number()),
                parent_id=parent.id,
                root_id=parent.root_id or parent.id,
                depth=parent.depth + 1,
                lineage=(*parent.lineage, parent.id),
                birth=Birth(
                    files=ChildFiles.CLONE, on_parent_end=OnParentEnd.KEEP, context={"a": [1]}, turn_id=new_id()
                ),
                **changes,
            )

            def work(tx: abc.Transaction) -> None:
                tx.sessions.add(child)
                tx.trees.add(child)

            await store.write(work)
            return child

        one, stopped = await add_below(root), await add_below(root, status=SessionStatus.STOPPED)
        deep = await add_below(one)
        await add_session(store)
        must_equal(await store.read(lambda tx: tx.sessions.get(deep.id)), deep, "a child is read back")

        def look(tx: abc.Transaction) -> tuple[Any, ...]:
            return (
                [each.id for each in tx.trees.children(root.id)],
                [each.id for each in tx.trees.below(root.id)],
                [each.id for each in tx.trees.above(deep)],
                tx.trees.live_children(root.id),
                tx.trees.live_below(root.id),
                set(tx.trees.left(root.id)),
            )

        found = await store.read(look)
        must_equal(found[0], [one.id, stopped.id], "children, oldest first")
        must_equal(found[1], [one.id, stopped.id, deep.id], "all below")
        must_equal(found[2], [one.id, root.id], "all above, the nearest first")
        must_equal(found[3:5], (1, 2), "what is stopped does not count")

        def spend(tx: abc.Transaction, session: Session) -> None:
            tx.usage.add(
                abc.UsageRecord(
                    id=new_id(),
                    session_id=session.id,
                    user_id="alice",
                    turn_id=None,
                    model="m",
                    usage=Usage(input_tokens=1),
                    cost_usd=0.5,
                    at=NOW,
                )
            )

        for each in (root, one, deep):
            await store.write(lambda tx, s=each: spend(tx, s))  # type: ignore[misc]

        def spent(session: Session) -> int:
            return int(total.usage.input_tokens) if (total := totals[session.id]) else 0

        async def add_up() -> dict[str, abc.UsageSum]:
            which = [abc.UsageFilter(tree_of=each.id) for each in (root, one, deep)]
            sums = await store.read(lambda tx: [tx.usage.sums(each)[0] for each in which])
            return dict(zip((root.id, one.id, deep.id), sums, strict=True))

        totals = await add_up()
        must_equal([spent(each) for each in (root, one, deep)], [3, 2, 1], "each with what is below it")
        await store.write(lambda tx: tx.sessions.mark_deleting(deep.id))
        must_equal((await store.read(look))[1:3], ([one.id, stopped.id], [one.id, root.id]), "deleted is not below")
        must_equal(await store.read(lambda tx: list(tx.trees.left(one.id))), [deep.id], "but something of it is left")
        await store.write(lambda tx: tx.sessions.remove(deep.id))
        must_equal(await store.read(lambda tx: list(tx.trees.left(one.id))), [], "until it is removed")
        totals = await add_up()
        must_equal([spent(each) for each in (root, one)], [3, 2], "what it has spent is spent")


@_check
async def a_request_is_reserved_once(open_store: OpenStore) -> None:
    """The first of two with a principal and key is stored; the second is told of it."""
    async with open_store(ignore) as store:
        record = abc.IdempotencyRecord(
            principal="p", key="k", fingerprint="f", boot_id="b", object_id=None, status=None, body=None, created_at=NOW
        )
        later = replace(record, fingerprint="other")
        answers = await asyncio.gather(
            *(store.write(lambda tx, r=r: tx.idempotency.reserve(r)) for r in (record, later, later, later))  # type: ignore[misc]
        )
        must_equal(answers.count(None), 1, "one wins")
        won = record if answers[0] is None else later
        must_equal(answers.count(won), 3, "the others are told of it")
        await store.write(lambda tx: tx.idempotency.update("p", "k", fingerprint="f"))
        other = replace(record, principal="q", created_at=NOW + timedelta(days=1))
        must(await store.write(lambda tx: tx.idempotency.reserve(other)) is None, "another principal's is another")
        await store.write(lambda tx: tx.idempotency.update("p", "k", object_id="o", status=201, body="{}"))
        done = await store.write(lambda tx: tx.idempotency.reserve(later))
        must_equal(done, replace(record, object_id="o", status=201, body="{}"), "its answer is kept")
        await store.write(lambda tx: tx.idempotency.prune(NOW + timedelta(hours=1)))
        must(await store.write(lambda tx: tx.idempotency.reserve(later)) is None, "old ones are forgotten")
        must_equal(await store.write(lambda tx: tx.idempotency.reserve(other)), other, "young ones are not")
        await store.write(lambda tx: tx.idempotency.remove("q", "k"))
        must(await store.write(lambda tx: tx.idempotency.reserve(other)) is None, "removed is forgotten")


@_check
async def a_deleted_session_is_gone(open_store: OpenStore) -> None:
    """Marked: not found, not listed, still to be removed. Removed: every row of it, and of it alone."""
    async with open_store(ignore) as store:
        session, other = await add_session(store), await add_session(store)

        def fill(tx: abc.Transaction, s: Session) -> None:
            tx.turns.add(new_turn(s, 1))
            tx.events.append(s.id, [new_event("x")])
            tx.transcripts.append(s.id, subpath="", turn_id=None, lines=["{}"])
            tx.sandboxes.add(new_sandbox(s, 1, SandboxStatus.LIVE))

        def count(tx: abc.Transaction, s: Session) -> tuple[int, int, int, bool]:
            return (
                len(tx.turns.queued(s.id)),
                len(tx.events.page(s.id, after=0, limit=9)),
                len(tx.transcripts.page(s.id, "", after=0, limit=9)),
                tx.sandboxes.current(s.id) is not None,
            )

        for s in (session, other):
            await store.write(lambda tx, s=s: fill(tx, s))  # type: ignore[misc]
        await store.write(lambda tx: tx.sessions.mark_deleting(session.id))
        must(await store.read(lambda tx: tx.sessions.get(session.id)) is None, "a marked session is not found")
        change = store.write(lambda tx: tx.sessions.update(session.id, title="x"))
        await must_raise(SessionNotFound, change, "a marked session is not changed")
        listed = await store.read(lambda tx: tx.sessions.page(abc.SessionFilter(), cursor=None, limit=9))
        must_equal([s.id for s in listed.items], [other.id], "a marked session is not listed")
        must(await store.read(lambda tx: tx.sessions.deleting(session.id)), "it is still to be removed")
        must(session.id in await store.read(lambda tx: tx.sessions.unsettled(NOW)), "and is found as unsettled")
        must_equal(await store.read(lambda tx: count(tx, session)), (1, 1, 1, True), "its rows are still there")
        await store.write(lambda tx: tx.sessions.remove(session.id))
        must_equal(await store.read(lambda tx: count(tx, session)), (0, 0, 0, False), "then every row is gone")
        must(not await store.read(lambda tx: tx.sessions.deleting(session.id)), "and nothing is left to remove")
        must_equal(await store.read(lambda tx: count(tx, other)), (1, 1, 1, True), "another session's are not")


@_check
async def unsettled_sessions_are_found(open_store: OpenStore) -> None:
    """Those that look alive, have a turn queued or running, or whose time is over; no others."""
    async with open_store(ignore) as store:
        live = [
            await add_session(store, status=status, expires_at=None)
            for status in (SessionStatus.STARTING, SessionStatus.READY, SessionStatus.RUNNING)
        ]
        waiting = [await add_session(store, status=SessionStatus.WAITING, expires_at=None) for _ in range(6)]
        housed, late, reminded, interrupted, for_nobody, without_a_process = waiting
        for session in (housed, late, reminded, without_a_process):
            await store.write(lambda tx, s=session: tx.turns.add(new_turn(s, 1, TurnStatus.WAITING)))  # type: ignore[misc]
        await store.write(lambda tx: tx.sandboxes.add(new_sandbox(housed, 1, SandboxStatus.LIVE)))
        await store.write(lambda tx: tx.interactions.add(new_interaction(late, expires_at=NOW)))
        again = {"expires_at": None, "remind_at": NOW}
        await store.write(lambda tx: tx.interactions.add(new_interaction(reminded, **again)))
        asked = {"interrupt_reason": StopReason.INTERRUPTED}
        await store.write(lambda tx: tx.turns.add(new_turn(interrupted, 1, TurnStatus.WAITING, **asked)))
        live += [housed, late, reminded, interrupted, for_nobody]
        queued, running = [await add_session(store, expires_at=None) for _ in range(2)]
        over = await add_session(store, expires_at=NOW)
        await add_session(store, expires_at=NOW + timedelta(seconds=1))
        for status in (SessionStatus.IDLE, SessionStatus.STOPPED, SessionStatus.FAILED):
            done = await add_session(store, status=status, expires_at=None)
            await store.write(lambda tx, s=done: tx.turns.add(new_turn(s, 1, TurnStatus.FAILED)))  # type: ignore[misc]
        await store.write(lambda tx: tx.turns.add(new_turn(queued, 1)))
        await store.write(lambda tx: tx.turns.add(new_turn(running, 1, TurnStatus.RUNNING)))
        found = await store.read(lambda tx: list(tx.sessions.unsettled(NOW)))
        must_equal(len(found), len(set(found)), "each once")
        must_equal(set(found), {s.id for s in [*live, queued, running, over]}, "those and no others")


# ----------------------------------------------------------------------------------------------------- files that last


def new_workspace(number: int, **changes: Any) -> NamedWorkspace:
    """A persistent workspace."""
    values: dict[str, Any] = {
        "id": new_id(),
        "owner": "alice",
        "name": "shop",
        "number": number,
        "created_at": NOW,
        "last_used_at": NOW,
    }
    return NamedWorkspace(**values | changes)


def new_snapshot(session: Session, number: int, **changes: Any) -> Snapshot:
    """A snapshot of a session's files."""
    values: dict[str, Any] = {
        "id": new_id(),
        "session_id": session.id,
        "number": number,
        "reason": SnapshotReason.TURN,
        "seq": number,
        "key": f"k{number}",
        "size_bytes": 3_000_000_000,
        "stored_bytes": 2,
        "files": 1,
        "created_at": NOW,
    }
    return Snapshot(**values | changes)


@_check
async def a_workspace_has_its_name_alone(open_store: OpenStore) -> None:
    """A user has one of each name, also when it is being deleted; then it is not found, and is still to be removed."""
    async with open_store(ignore) as store:
        shop = new_workspace(1, quota_mb=10**9, size_bytes=2**50)
        other, his = new_workspace(2, name="other"), new_workspace(3, owner="bob")
        added = await store.write(
            lambda tx: [tx.workspaces.add(w) for w in (shop, other, his, new_workspace(4, name="shop"))]
        )
        must_equal(added, [True, True, True, False], "a name is had once by each user")
        must_equal(await store.read(lambda tx: tx.workspaces.get(shop.id)), shop, "it comes back as it was")
        must_equal(await store.read(lambda tx: tx.workspaces.named("bob", "shop")), his, "each user has their own")
        first = await store.read(lambda tx: tx.workspaces.page("alice", cursor=None, limit=1))
        rest = await store.read(lambda tx: tx.workspaces.page("alice", cursor=first.next_cursor, limit=1))
        must_equal([w.id for w in (*first.items, *rest.items)], [other.id, shop.id], "newest first, in pages")
        must(rest.next_cursor is None, "and no more")
        changed = await store.write(lambda tx: tx.workspaces.update(shop.id, mode=WorkspaceMode.SHARE))
        must_equal(changed.mode, WorkspaceMode.SHARE, "a change is answered")
        user = await add_session(store, workspace_id=shop.id)
        sandbox = new_sandbox(user, 1, SandboxStatus.LIVE)
        await store.write(lambda tx: tx.sandboxes.add(sandbox))
        must_equal(await store.read(lambda tx: list(tx.workspaces.sessions(shop.id))), [user.id], "who has it")
        found = await store.read(lambda tx: [s.id for s in tx.sandboxes.in_workspace(shop.id)])
        must_equal(found, [sandbox.id], "who works in it")
        await store.write(lambda tx: tx.sandboxes.update(sandbox.id, status=SandboxStatus.GONE))
        must_equal(await store.read(lambda tx: list(tx.sandboxes.in_workspace(shop.id))), [], "a gone one does not")
        await store.write(lambda tx: tx.workspaces.update(shop.id, deleting=True))
        must(await store.read(lambda tx: tx.workspaces.get(shop.id)) is None, "a deleted one is not found")
        must(await store.read(lambda tx: tx.workspaces.named("alice", "shop")) is None, "nor by its name")
        change = store.write(lambda tx: tx.workspaces.update(shop.id, quota_mb=1))
        await must_raise(WorkspaceNotFound, change, "nor changed")
        must_equal(await store.read(lambda tx: list(tx.workspaces.deleting())), [shop.id], "it is still to be removed")
        must(not await store.write(lambda tx: tx.workspaces.add(new_workspace(5))), "and its name still taken")
        await store.write(lambda tx: tx.workspaces.remove(shop.id))
        must(await store.write(lambda tx: tx.workspaces.add(new_workspace(6))), "until it is removed")


@_check
async def snapshots_are_found_by_what_they_are_of(open_store: OpenStore) -> None:
    """By session, by workspace, by turn, newest first; an object that several have is told when the last one goes."""
    async with open_store(ignore) as store:
        session, other = await add_session(store), await add_session(store)
        first = new_snapshot(session, 1, turn_id="t1", workspace_id="w")
        second = new_snapshot(session, 2, turn_id="t1", key="k1", exact=False)
        third = new_snapshot(other, 3, workspace_id="w")
        for snapshot in (first, second, third):
            await store.write(lambda tx, s=snapshot: tx.snapshots.add(s))  # type: ignore[misc]
        must_equal(await store.read(lambda tx: tx.snapshots.get(second.id)), second, "it comes back as it was")
        must_equal(await store.read(lambda tx: tx.snapshots.of_turn("t1")), second, "the newest of a turn")
        must(await store.read(lambda tx: tx.snapshots.of_turn("t2")) is None, "none of another turn")
        page = await store.read(lambda tx: tx.snapshots.page(session.id, cursor=None, limit=1))
        rest = await store.read(lambda tx: tx.snapshots.page(session.id, cursor=page.next_cursor, limit=1))
        must_equal([*page.items, *rest.items], [second, first], "newest first, in pages")
        found = await store.read(lambda tx: list(tx.snapshots.of_files(workspace_id="w")))
        must_equal(found, [third, first], "of every session in a workspace")
        theirs = await store.read(lambda tx: list(tx.snapshots.of_files(owner=session.owner)))
        must_equal([each for each in theirs if each in (first, second, third)], [third, second, first], "of a user")
        must_equal(await store.read(lambda tx: list(tx.snapshots.of_files(owner="nobody"))), [], "of another")
        late = NOW + timedelta(hours=1)
        old = await store.read(lambda tx: list(tx.snapshots.older(late, limit=9)))
        must_equal(old, [first], "what is old, but for the newest of each workspace")
        must_equal(await store.read(lambda tx: list(tx.snapshots.older(first.created_at, limit=9))), [], "none before")
        await store.write(lambda tx: tx.sessions.remove(session.id))
        found = await store.read(lambda tx: list(tx.snapshots.of_files(session_id=session.id)))
        must_equal(found, [second, first], "they outlive their session")
        must_equal(await store.write(lambda tx: list(tx.snapshots.remove([first.id]))), [], "another has its object")
        must_equal(await store.write(lambda tx: list(tx.snapshots.remove([second.id]))), ["k1"], "now none has")
        must_equal(await store.read(lambda tx: list(tx.snapshots.due())), [], "no files are to be kept")
        await store.write(lambda tx: tx.sessions.update(other.id, snapshot_due="t9"))
        must_equal(await store.read(lambda tx: list(tx.snapshots.due())), [other.id], "now there are")


@_check
async def artifacts_go_with_their_session(open_store: OpenStore) -> None:
    """They are listed newest first, and what is to be deleted of objects is remembered once."""
    async with open_store(ignore) as store:
        session = await add_session(store)
        made = [
            Artifact(
                id=new_id(), session_id=session.id, path="a/b", size=2**40, sha256="0" * 64, key="k", created_at=NOW
            )
            for _ in range(2)
        ]
        await store.write(lambda tx: [tx.artifacts.add(a) for a in made])
        must_equal(await store.read(lambda tx: tx.artifacts.get(made[0].id)), made[0], "it comes back as it was")
        page = await store.read(lambda tx: tx.artifacts.page(session.id, cursor=None, limit=1))
        rest = await store.read(lambda tx: tx.artifacts.page(session.id, cursor=page.next_cursor, limit=1))
        must_equal([*page.items, *rest.items], made[::-1], "newest first, in pages")
        await store.write(lambda tx: tx.artifacts.remove(made[0].id))
        await store.write(lambda tx: tx.sessions.remove(session.id))
        must(await store.read(lambda tx: tx.artifacts.get(made[1].id)) is None, "none is left")
        for prefix in ("b", "a", "b"):
            await store.write(lambda tx, p=prefix: tx.doomed.add(p))  # type: ignore[misc]
        must_equal(await store.read(lambda tx: list(tx.doomed.some(9))), ["a", "b"], "each once")
        await store.write(lambda tx: tx.doomed.remove("a"))
        must_equal(await store.read(lambda tx: list(tx.doomed.some(9))), ["b"], "what is deleted is forgotten")


@_check
async def a_session_goes_back_behind_its_turns(open_store: OpenStore) -> None:
    """Its transcript ends with the turn it went back to; where a turn ended is known; what it wants is kept."""
    async with open_store(ignore) as store:
        session = await add_session(store)
        turns = [new_turn(session, number) for number in (1, 2, 3)]

        def fill(tx: abc.Transaction) -> None:
            for turn in turns:
                tx.turns.add(turn)
                line = json.dumps({"uuid": turn.id, "sessionId": "a-1"})
                tx.transcripts.append(session.id, subpath="", turn_id=turn.id, lines=[line])
                ended = TurnCompleted(status=TurnStatus.SUCCEEDED)
                tx.events.append(session.id, [NewEvent.of(ended, at=NOW, turn_id=turn.id), new_event("later", turn.id)])

        await store.write(fill)
        ids = [turn.id for turn in turns]
        ended = await store.read(
            lambda tx: [
                tx.events.completed(session.id, turn_id=ids[1]),
                tx.events.completed(session.id, upto=4),
                tx.events.completed(session.id),
                tx.events.completed(session.id, upto=0),
            ]
        )
        must_equal(ended, [(ids[1], 3), (ids[1], 3), (ids[2], 5), None], "where turns ended")
        await store.write(lambda tx: tx.transcripts.rewind(session.id, to_turn=ids[0], replace=("a-1", "a-2")))
        lines = await store.read(lambda tx: tx.transcripts.page(session.id, "", after=0, limit=9))
        must_equal([json.loads(line) for _, line in lines], [{"uuid": ids[0], "sessionId": "a-2"}], "what is left")
        part = RewoundPart(after_turn=1, upto_turn=3, after_seq=1, upto_seq=7)
        wanted = Restoring(snapshot_id="s", turn_id=ids[0])
        await store.write(lambda tx: tx.sessions.update(session.id, rewound=(part,), restoring=wanted))
        found = await store.read(lambda tx: tx.sessions.get(session.id))
        must(found is not None and (found.rewound, found.restoring) == ((part,), wanted), "what it wants is kept")
        must(session.id in await store.read(lambda tx: list(tx.sessions.unsettled(NOW))), "and is looked after")
        await store.write(lambda tx: tx.sessions.update(session.id, restoring=None))
        found = await store.read(lambda tx: tx.sessions.get(session.id))
        must(found is not None and found.restoring is None, "until it is done")


# ------------------------------------------------------------------------------------------------------ many users


@_check
async def a_user_is_made_once(open_store: OpenStore) -> None:
    """By whoever needs it first, also when several do at once; a disabled one stays so."""
    async with open_store(ignore) as store:
        must(await store.read(lambda tx: tx.users.get("alice")) is None, "no user is None")
        made = await asyncio.gather(*(store.write(lambda tx: tx.users.ensure("alice", NOW)) for _ in range(10)))
        must_equal(set(made), {User(id="alice", created_at=NOW)}, "one and the same user")
        budget = Budget(max_usd=1.5, max_tokens=10)
        changed = await store.write(lambda tx: tx.users.update("alice", disabled=True, budget=budget, max_sessions=3))
        must_equal((changed.disabled, changed.budget, changed.max_sessions), (True, budget, 3), "columns change")
        again = await store.write(lambda tx: tx.users.ensure("alice", NOW + timedelta(days=1)))
        must_equal(again, changed, "a user that is there stays as it is")
        must_equal(await store.write(lambda tx: tx.users.lock("alice")), changed, "a locked user is read too")
        must(await store.write(lambda tx: tx.users.lock("nobody")) is None, "nobody is None")
        change = store.write(lambda tx: tx.users.update("nobody", disabled=True))
        await must_raise(UserNotFound, change, "a change of no user")


@_check
async def users_are_listed_by_name(open_store: OpenStore) -> None:
    """A page at a time, each once; a cursor of nobody's is refused."""
    async with open_store(ignore) as store:
        wanted = [f"user-{i:02}" for i in range(10)]
        for name in reversed(wanted):
            await store.write(lambda tx, n=name: tx.users.ensure(n, NOW))  # type: ignore[misc]
        first = await store.read(lambda tx: tx.users.page(cursor=None, limit=7))
        rest = await store.read(lambda tx: tx.users.page(cursor=first.next_cursor, limit=7))
        must_equal([user.id for user in [*first.items, *rest.items]], wanted, "all, by name")
        must_equal((len(first.items), rest.next_cursor), (7, None), "a page at a time")
        for cursor in ("x", "é", "====", "bjE", "\x00"):
            page = store.read(lambda tx, c=cursor: tx.users.page(cursor=c, limit=5))  # type: ignore[misc]
            await must_raise(InvalidCursor, page, f"the cursor {cursor!r}")


def new_key(user_id: str, **changes: Any) -> ApiKey:
    """A key of a user."""
    values: dict[str, Any] = {
        "id": new_id(),
        "user_id": user_id,
        "name": "laptop",
        "prefix": "carrel_ab",
        "hash": new_id(),
        "scopes": [Scope.READ, Scope.WRITE],
        "created_at": NOW,
        "expires_at": NOW + timedelta(days=90),
    }
    return ApiKey(**values | changes)


@_check
async def a_key_is_found_by_its_hash(open_store: OpenStore) -> None:
    """With its user; revoked and expired ones too, for whoever asks must say which."""
    async with open_store(ignore) as store:
        alice = await store.write(lambda tx: tx.users.ensure("alice", NOW))
        bob = await store.write(lambda tx: tx.users.ensure("bob", NOW))
        keys = [new_key("alice"), new_key("bob", name=None, expires_at=None), new_key("alice")]
        for key in keys:
            await store.write(lambda tx, k=key: tx.keys.add(k))  # type: ignore[misc]
        must_equal(await store.read(lambda tx: tx.keys.by_hash(keys[0].hash)), (keys[0], alice), "key and user")
        must_equal(await store.read(lambda tx: tx.keys.by_hash(keys[1].hash)), (keys[1], bob), "each its own")
        must(await store.read(lambda tx: tx.keys.by_hash("no")) is None, "no such hash is None")
        must_equal(await store.read(lambda tx: tx.keys.get(keys[2].id)), keys[2], "found by its id")
        must(await store.read(lambda tx: tx.keys.get("no")) is None, "no such id is None")
        revoked = await store.write(lambda tx: tx.keys.update(keys[0].id, revoked_at=NOW, last_used_at=NOW))
        found = await store.read(lambda tx: tx.keys.by_hash(keys[0].hash))
        must_equal(found, (revoked, alice), "a revoked key is found, and says so")
        await must_raise(KeyNotFound, store.write(lambda tx: tx.keys.update("no", revoked_at=NOW)), "no such key")

        async def listed(user_id: str | None) -> list[str]:
            names: list[str] = []
            cursor = None
            while True:
                page = await store.read(lambda tx, c=cursor: tx.keys.page(user_id, cursor=c, limit=1))  # type: ignore[misc]
                names += [key.id for key in page.items]
                cursor = page.next_cursor
                if cursor is None:
                    return names

        must_equal(await listed("alice"), sorted([keys[0].id, keys[2].id], reverse=True), "of one user, newest first")
        must_equal(await listed(None), sorted([key.id for key in keys], reverse=True), "of all")


@_check
async def a_ticket_is_taken_once(open_store: OpenStore) -> None:
    """Of many that want it at once, one gets it, and none after its time; a reusable one is good until then."""
    async with open_store(ignore) as store:
        later = NOW + timedelta(seconds=30)
        who = Principal(name="key:1", user="alice", scopes=frozenset({Scope.READ}), session_id="s")
        once, often = (
            Ticket(hash=name, principal=who, reusable=name == "often", expires_at=later) for name in ("once", "often")
        )
        old = Ticket(hash="old", principal=who, reusable=False, expires_at=NOW)
        for ticket in (once, often, old):
            await store.write(lambda tx, t=ticket: tx.tickets.add(t))  # type: ignore[misc]
        taken = await asyncio.gather(*(store.write(lambda tx: tx.tickets.take("once", NOW)) for _ in range(8)))
        must_equal([ticket for ticket in taken if ticket], [once], "one of many takes it")
        for _ in range(2):
            must_equal(await store.write(lambda tx: tx.tickets.take("often", NOW)), often, "a reusable one stays")
        must(await store.write(lambda tx: tx.tickets.take("often", later)) is None, "no longer than its time")
        must(await store.write(lambda tx: tx.tickets.take("old", NOW)) is None, "an old one is no good")
        await store.write(lambda tx: tx.tickets.prune(later + timedelta(seconds=1)))
        must(await store.write(lambda tx: tx.tickets.take("often", NOW)) is None, "old ones are forgotten")


@_check
async def the_audit_log_is_filtered_and_pruned(open_store: OpenStore) -> None:
    """Newest first, a page at a time, by whatever is asked for."""
    async with open_store(ignore) as store:

        def record(i: int) -> abc.AuditRecord:
            return abc.AuditRecord(
                id=new_id(),
                at=NOW + timedelta(minutes=i),
                principal=f"key:{i % 2}",
                user_id="alice" if i % 2 else None,
                action="session.create" if i < 5 else "session.delete",
                object_type="session",
                object_id=f"s{i}",
                address="127.0.0.1",
                request_id=None,
                outcome=201,
                details={"i": i, "nested": [None, "é"]},
            )

        records = [record(i) for i in range(10)]
        await store.write(lambda tx: tx.audit.add(records))
        await store.write(lambda tx: tx.audit.add([]))

        async def found(which: abc.AuditFilter, limit: int = 3) -> list[abc.AuditRecord]:
            items: list[abc.AuditRecord] = []
            cursor = None
            while True:
                page = await store.read(lambda tx, c=cursor: tx.audit.page(which, cursor=c, limit=limit))  # type: ignore[misc]
                must(len(page.items) <= limit, "a page is bounded")
                items += page.items
                cursor = page.next_cursor
                if cursor is None:
                    return items

        newest = records[::-1]
        must_equal(await found(abc.AuditFilter()), newest, "all, newest first, as they were")
        must_equal(await found(abc.AuditFilter(user_id="alice")), newest[::2], "of a user")
        must_equal(await found(abc.AuditFilter(principal="key:0")), newest[1::2], "of a principal")
        must_equal(await found(abc.AuditFilter(action="session.delete")), newest[:5], "of an action")
        must_equal(await found(abc.AuditFilter(object_id="s4")), [records[4]], "of an object")
        since, until = NOW + timedelta(minutes=3), NOW + timedelta(minutes=6)
        must_equal(await found(abc.AuditFilter(since=since, until=until)), records[5:2:-1], "of a time")
        await store.write(lambda tx: tx.audit.prune(since))
        must_equal(await found(abc.AuditFilter()), records[:2:-1], "old ones are forgotten")


@_check
async def what_sandboxes_asked_for_is_counted(open_store: OpenStore) -> None:
    """One row for each kind of request, a bounded number of them; gone with the session."""
    async with open_store(ignore) as store:
        session, other = await add_session(store), await add_session(store)

        def asked(host: str, count: int = 1, minutes: int = 0, **more: Any) -> abc.NetworkRequest:
            at = NOW + timedelta(minutes=minutes)
            values: dict[str, Any] = {
                "session_id": session.id,
                "port": 443,
                "verdict": "refused",
                "reason": "not_listed",
            } | more
            return abc.NetworkRequest(id=new_id(), host=host, count=count, first_at=at, last_at=at, **values)

        async def found(session_id: str = session.id) -> list[tuple[str, int, str, int, datetime, datetime]]:
            items: list[abc.NetworkRequest] = []
            cursor = None
            while True:
                page = await store.read(lambda tx, c=cursor: tx.network.page(session_id, cursor=c, limit=2))  # type: ignore[misc]
                must(len(page.items) <= 2, "a page is bounded")
                items += page.items
                cursor = page.next_cursor
                if cursor is None:
                    return [(i.host, i.port, i.verdict, i.count, i.first_at, i.last_at) for i in items]

        first = [
            asked("a"),
            asked("b", 2),
            asked("b", port=22),
            asked("b", verdict="allowed"),
            asked("x", session_id="no"),
        ]
        await store.write(lambda tx: tx.network.add(first))
        await store.write(lambda tx: tx.network.add([]))
        await store.write(lambda tx: tx.network.add([asked("b", 3, minutes=5)]))
        later = NOW + timedelta(minutes=5)
        all_ = [
            ("b", 443, "allowed", 1, NOW, NOW),
            ("b", 22, "refused", 1, NOW, NOW),
            ("b", 443, "refused", 5, NOW, later),
            ("a", 443, "refused", 1, NOW, NOW),
        ]
        must_equal(await found(), all_, "counted by kind, what came last at the front")
        many = [asked(f"n{i}", 2) for i in range(5)]
        await store.write(lambda tx: tx.network.add(many, most=6))
        rest = [row[:4] for row in (await found())[:3]]
        must_equal(
            rest, [(abc.OTHER_HOSTS, 0, "refused", 6), ("n1", 443, "refused", 2), ("n0", 443, "refused", 2)], "rest"
        )
        await store.write(lambda tx: tx.network.add([asked("y", session_id=other.id)]))
        await store.write(lambda tx: tx.sessions.remove(session.id))
        must_equal(await found(), [], "nothing is left of a session that is gone")
        must_equal(len(await found(other.id)), 1, "another's stays")
        await must_raise(
            InvalidCursor, store.read(lambda tx: tx.network.page(other.id, cursor="?", limit=2)), "no cursor of ours"
        )


@_check
async def what_limits_count_is_counted(open_store: OpenStore) -> None:
    """Sessions of all and of one owner, those at work, and turns that wait."""
    async with open_store(ignore) as store:
        idle = await add_session(store)
        running = await add_session(store, status=SessionStatus.RUNNING)
        await add_session(store, status=SessionStatus.STARTING, owner="bob")
        gone = await add_session(store, status=SessionStatus.RUNNING)
        await store.write(lambda tx: tx.sessions.mark_deleting(gone.id))

        def fill(tx: abc.Transaction) -> None:
            tx.turns.add(new_turn(running, 1, TurnStatus.RUNNING))
            for turn in (new_turn(running, 2), new_turn(idle, 1), new_turn(idle, 2)):
                tx.turns.add(turn)

        await store.write(fill)
        must_equal(await store.read(lambda tx: tx.counts.sessions()), 3, "sessions; deleted ones do not count")
        must_equal(await store.read(lambda tx: tx.counts.sessions("alice")), 2, "of one owner")
        must_equal(await store.read(lambda tx: tx.counts.sessions("nobody")), 0, "of nobody")
        must_equal(await store.read(lambda tx: tx.counts.busy()), 2, "at work, or starting for it")
        must_equal(await store.read(lambda tx: tx.counts.queued_turns()), 3, "turns that wait")


@_check
async def what_waits_for_a_person_is_resolved_once(open_store: OpenStore) -> None:
    """An interaction is found by session, owner and status, and of two ends it comes to the first."""
    async with open_store(ignore) as store:
        session, other = await add_session(store), await add_session(store, owner="bob")
        made = [new_interaction(session), new_interaction(session), new_interaction(other)]

        def add(tx: abc.Transaction) -> None:
            for interaction in made:
                must(tx.interactions.add(interaction), "it is stored")
                must(not tx.interactions.add(interaction), "once")

        def listed(**which: Any) -> Callable[[abc.Transaction], list[Interaction]]:
            wanted = abc.InteractionFilter(**which)
            return lambda tx: list(tx.interactions.page(wanted, cursor=None, limit=9).items)

        await store.write(add)
        must_equal(await store.read(lambda tx: tx.interactions.get(made[0].id)), made[0], "it is found")
        must(await store.read(lambda tx: tx.interactions.get("nobody's")) is None, "another is not")
        must_equal(await store.read(listed()), made, "all, oldest first")
        must_equal(await store.read(listed(owner="bob")), made[2:], "of an owner")
        must_equal(await store.read(listed(session_id=session.id)), made[:2], "of a session")
        must_equal(await store.read(lambda tx: list(tx.interactions.pending(session.id))), made[:2], "both wait")
        end = {"status": InteractionStatus.ANSWERED, "answer": {"decision": "allow"}, "answered_by": "key:1"}
        resolved = await store.write(lambda tx: tx.interactions.resolve(made[0].id, **end, resolved_at=NOW))
        must_equal(resolved, made[0].model_copy(update={**end, "resolved_at": NOW}), "it is answered")
        open_ = lambda tx: [each.id for each in tx.interactions.untaken(session.id)]  # noqa: E731
        must_equal(await store.read(open_), [each.id for each in made[:2]], "neither is acted on")
        taken = await store.write(lambda tx: tx.interactions.update(made[0].id, taken_at=NOW, parked=True))
        must_equal(taken, resolved.model_copy(update={"taken_at": NOW, "parked": True}) if resolved else None, "it is")
        must_equal(await store.read(open_), [made[1].id], "and only the other is not")
        must(await store.write(lambda tx: tx.interactions.update("nobody's", parked=True)) is None, "none to change")
        must_equal(await store.read(listed(tree=session.id)), [taken, made[1]], "of a tree")
        await store.write(lambda tx: tx.interactions.update(made[0].id, taken_at=None, parked=False))
        late = {"status": InteractionStatus.EXPIRED, "resolved_at": NOW}
        must(await store.write(lambda tx: tx.interactions.resolve(made[0].id, **late)) is None, "and stays so")
        must_equal(await store.read(lambda tx: list(tx.interactions.pending(session.id))), made[1:2], "one waits")
        must_equal(await store.read(listed(status=InteractionStatus.ANSWERED)), [resolved], "of a status")
        first = await store.read(lambda tx: tx.interactions.page(abc.InteractionFilter(), cursor=None, limit=2))
        rest = await store.read(
            lambda tx: tx.interactions.page(abc.InteractionFilter(), cursor=first.next_cursor, limit=2)
        )
        must_equal([each.id for each in [*first.items, *rest.items]], [each.id for each in made], "page by page")
        must(rest.next_cursor is None, "the last page says so")
        await store.write(lambda tx: tx.sessions.remove(session.id))
        must_equal(await store.read(listed()), made[2:], "it goes with its session")


@_check
async def rules_are_found_by_what_they_hold_for(open_store: OpenStore) -> None:
    """A rule that somebody has written holds for one thing, belongs to one user, and goes with that thing."""
    async with open_store(ignore) as store:
        session = await add_session(store)
        targets = [(RuleScope.SESSION, session.id), (RuleScope.WORKSPACE, "w"), (RuleScope.USER, "bob")]
        made = [
            PermissionRule(
                id=new_id(),
                owner="bob" if scope is RuleScope.USER else "alice",
                scope=scope,
                target=target,
                effect="allow",
                rule="Bash(ls *)",
                created_by="key:1",
                created_at=NOW,
            )
            for scope, target in targets
        ]

        def add(tx: abc.Transaction) -> None:
            for rule in made:
                tx.rules.add(rule)

        def listed(**which: Any) -> Callable[[abc.Transaction], list[PermissionRule]]:
            return lambda tx: list(tx.rules.page(abc.RuleFilter(**which), cursor=None, limit=9).items)

        await store.write(add)
        must_equal(await store.read(lambda tx: tx.rules.get(made[0].id)), made[0], "it is found")
        must(await store.read(lambda tx: tx.rules.get("nobody's")) is None, "another is not")
        must_equal(await store.read(lambda tx: list(tx.rules.holding(targets[:2]))), made[:2], "what holds for two")
        must_equal(await store.read(lambda tx: list(tx.rules.holding([]))), [], "for nothing, nothing")
        must_equal(await store.read(listed(owner="alice")), made[:2], "of an owner")
        must_equal(await store.read(listed(scope=RuleScope.USER, target="bob")), made[2:], "for a user")
        first = await store.read(lambda tx: tx.rules.page(abc.RuleFilter(), cursor=None, limit=2))
        rest = await store.read(lambda tx: tx.rules.page(abc.RuleFilter(), cursor=first.next_cursor, limit=2))
        must_equal([*first.items, *rest.items], made, "page by page")
        await store.write(lambda tx: tx.rules.forget(RuleScope.WORKSPACE, "w"))
        await store.write(lambda tx: tx.sessions.remove(session.id))
        must_equal(await store.read(listed()), made[2:], "they go with what they hold for")
        await store.write(lambda tx: tx.rules.remove(made[2].id))
        must_equal(await store.read(listed()), [], "and when they are revoked")


@_check
async def the_first_waiting_turns_are_found(open_store: OpenStore) -> None:
    """One of each session that is free, oldest first, with what its owner has at work."""
    async with open_store(ignore) as store:
        free, ready = await add_session(store), await add_session(store, status=SessionStatus.READY)
        bobs = await add_session(store, owner="bob")
        busy = await add_session(store, status=SessionStatus.RUNNING)
        starting = await add_session(store, status=SessionStatus.STARTING)
        must_equal(list(await store.read(lambda tx: tx.counts.waiting_turns())), [], "nothing waits")

        def at(minutes: int) -> datetime:
            return NOW + timedelta(minutes=minutes)

        first = new_turn(free, 2, created_at=at(3))
        second = new_turn(bobs, 1, created_at=at(1))
        third = new_turn(ready, 1, created_at=at(2))

        def fill(tx: abc.Transaction) -> None:
            tx.turns.add(new_turn(free, 1, TurnStatus.SUCCEEDED, started_at=at(-9)))
            tx.turns.add(new_turn(busy, 1, TurnStatus.RUNNING, started_at=at(-5)))
            for turn in (first, new_turn(free, 3, created_at=at(0)), second, third, new_turn(busy, 2)):
                tx.turns.add(turn)
            tx.turns.add(new_turn(starting, 1))

        await store.write(fill)
        found = await store.read(lambda tx: list(tx.counts.waiting_turns()))
        told = [(w.turn_id, w.session_id, w.owner, w.created_at, w.running, w.last_started_at) for w in found]
        wanted = [
            (second.id, bobs.id, "bob", at(1), 0, None),
            (third.id, ready.id, "alice", at(2), 2, at(-5)),
            (first.id, free.id, "alice", at(3), 2, at(-5)),
        ]
        must_equal(told, wanted, "the first of each free session, oldest first")


@_check
async def usage_is_grouped(open_store: OpenStore) -> None:
    """By user, session, turn, model and day (UTC), alone and together; filtered; outliving its session."""
    async with open_store(ignore) as store:
        session = await add_session(store)

        def record(i: int, **changes: Any) -> abc.UsageRecord:
            values: dict[str, Any] = {
                "id": new_id(),
                "session_id": session.id,
                "user_id": "alice",
                "turn_id": f"t{i % 2}",
                "model": "m",
                "usage": Usage(input_tokens=10**i),
                "cost_usd": 0.25,
                "at": datetime(2026, 1, 1, 23, 59, 59, 999999, tzinfo=UTC) + timedelta(microseconds=i),
            }
            return abc.UsageRecord(**values | changes)

        records = [record(0), record(1), record(2, model="n", cost_usd=None), record(3, user_id="bob", turn_id=None)]
        for item in records:
            await store.write(lambda tx, r=item: tx.usage.add(r))  # type: ignore[misc]

        async def sums(which: abc.UsageFilter, *by: str) -> list[tuple[dict[str, str], int, int, float | None]]:
            rows = await store.read(lambda tx: tx.usage.sums(which, by))
            return [(dict(row.group), row.requests, row.usage.input_tokens, row.cost_usd) for row in rows]

        everything = abc.UsageFilter()
        must_equal(await sums(everything), [({}, 4, 1111, None)], "all in one")
        must_equal(await sums(abc.UsageFilter(user_id="nobody")), [({}, 0, 0, 0.0)], "nothing is nothing")
        by_user = [({"user": "alice"}, 3, 111, None), ({"user": "bob"}, 1, 1000, 0.25)]
        must_equal(await sums(everything, "user"), by_user, "by user")
        by_day = [({"day": "2026-01-01"}, 1, 1, 0.25), ({"day": "2026-01-02"}, 3, 1110, None)]
        must_equal(await sums(everything, "day"), by_day, "by day, of UTC")
        by_both = [
            ({"day": "2026-01-01", "model": "m"}, 1, 1, 0.25),
            ({"day": "2026-01-02", "model": "m"}, 2, 1010, 0.5),
            ({"day": "2026-01-02", "model": "n"}, 1, 100, None),
        ]
        must_equal(await sums(everything, "day", "model"), by_both, "by two")
        must_equal(await sums(abc.UsageFilter(model="m", turn_id="t0")), [({}, 1, 1, 0.25)], "filtered")
        must_equal(await sums(abc.UsageFilter(turn_id="t1"), "turn"), [({"turn": "t1"}, 1, 10, 0.25)], "of a turn")
        window = abc.UsageFilter(since=records[1].at, until=records[3].at)
        must_equal(await sums(window, "session"), [({"session": session.id}, 2, 110, None)], "within a time")
        await store.write(lambda tx: tx.sessions.remove(session.id))
        must_equal(await sums(everything), [({}, 4, 1111, None)], "what was spent stays spent")


@_check
async def reservations_are_summed_and_released(open_store: OpenStore) -> None:
    """Each once, whoever releases it; those of requests that ended without a word are found."""
    async with open_store(ignore) as store:
        session = await add_session(store)

        def reservation(i: int, **changes: Any) -> abc.Reservation:
            values: dict[str, Any] = {
                "id": new_id(),
                "session_id": session.id,
                "user_id": "alice",
                "turn_id": "t",
                "model": "m",
                "tokens": 100,
                "cost_usd": 0.5,
                "at": NOW + timedelta(minutes=i),
            }
            return abc.Reservation(**values | changes)

        mine, other, unpriced = reservation(0), reservation(1, user_id="bob"), reservation(2, cost_usd=None)
        for item in (mine, other, unpriced):
            await store.write(lambda tx, r=item: tx.usage.reserve(r))  # type: ignore[misc]

        async def reserved(**which: Any) -> tuple[int, float]:
            return await store.read(lambda tx: tx.usage.reserved(abc.UsageFilter(**which)))

        must_equal(await reserved(), (300, 1.0), "all")
        must_equal(await reserved(user_id="alice"), (200, 0.5), "of a user")
        must_equal(await reserved(session_id="no"), (0, 0.0), "of nothing")
        stale = await store.read(lambda tx: list(tx.usage.stale(NOW + timedelta(minutes=1))))
        must_equal(stale, [mine], "those made before")
        released = await asyncio.gather(*(store.write(lambda tx: tx.usage.release(mine.id)) for _ in range(5)))
        must_equal([item for item in released if item], [mine], "each is released once")
        must_equal(await reserved(), (200, 0.5), "and is gone then")
        await store.write(lambda tx: tx.sessions.remove(session.id))
        must_equal(await reserved(), (200, 0.5), "a session's outlive it: they are settled all the same")


@_check
async def a_lock_lets_one_at_a_time_through(open_store: OpenStore) -> None:
    """What is counted under a lock is not overrun, however many count at once."""
    async with open_store(ignore) as store:

        def create(tx: abc.Transaction, by_user: bool) -> bool:
            if by_user:
                tx.users.lock("alice")
            else:
                tx.lock("sessions")
            if tx.counts.sessions() >= 5:
                return False
            tx.sessions.add(new_session(tx.sessions.next_number()))
            return True

        await store.write(lambda tx: tx.users.ensure("alice", NOW))
        for by_user in (False, True):
            made = await asyncio.gather(*(store.write(lambda tx, u=by_user: create(tx, u)) for _ in range(25)))  # type: ignore[misc]
            must_equal(made.count(True), 5, "exactly the limit passes")
            for session in (
                await store.read(lambda tx: tx.sessions.page(abc.SessionFilter(), cursor=None, limit=9))
            ).items:
                await store.write(lambda tx, s=session.id: tx.sessions.remove(s))  # type: ignore[misc]


@_check
async def a_session_that_is_read_to_be_changed_is_held(open_store: OpenStore) -> None:
    """Of transactions that read a session and then change it, none overwrites what another did."""
    async with open_store(ignore) as store:
        session = await add_session(store, metadata={"n": 0})

        def work(tx: abc.Transaction) -> None:
            now = tx.sessions.get(session.id)
            must(now is not None, "the session is there")
            assert now is not None
            tx.sessions.update(session.id, metadata={"n": now.metadata["n"] + 1})

        await asyncio.gather(*(store.write(work) for _ in range(40)))
        now = await store.read(lambda tx: tx.sessions.get(session.id))
        must(now is not None and now.metadata == {"n": 40}, "every change counts")


@_check
async def frames_that_come_twice_at_once_are_stored_once(open_store: OpenStore) -> None:
    """A runner's old connection and its new one may bring the same frames at the same time."""
    async with open_store(ignore) as store:
        session = await add_session(store)
        sandbox = new_sandbox(session, 1, SandboxStatus.LIVE)
        await store.write(lambda tx: tx.sandboxes.add(sandbox))

        def work(tx: abc.Transaction) -> None:
            if tx.sandboxes.advance(sandbox.id, 7) < 7:
                tx.events.append(session.id, [new_event("once")])

        await asyncio.gather(*(store.write(work) for _ in range(20)))
        stored = await store.read(lambda tx: tx.events.page(session.id, after=0, limit=9))
        must_equal(texts(stored), ["once"], "the first of them counts")


@_check
async def sessions_are_found_by_text(open_store: OpenStore) -> None:
    """In the title, or in what was said, in any case of letters; signs of a pattern mean themselves."""
    async with open_store(ignore) as store:
        titled = await add_session(store, title="Budget 100% of_it")
        spoken = await add_session(store, title=None, owner="bob")
        other = await add_session(store, title="something else")
        said = 'He said: "The QUICK brown\nfox" — naïve ☃ \u0000 end'
        await store.write(lambda tx: tx.events.append(spoken.id, [new_event(said)]))
        tool = ToolFinished(id="t", result="quicksilver")
        await store.write(lambda tx: tx.events.append(other.id, [NewEvent.of(tool, at=NOW, turn_id=None)]))

        async def found(text: str, owner: str | None = None) -> list[str]:
            which = abc.SessionFilter(text=text, owner=owner)
            page = await store.read(lambda tx: tx.sessions.page(which, cursor=None, limit=9))
            return [session.id for session in page.items]

        must_equal(await found("budget"), [titled.id], "in a title")
        must_equal(await found("quick"), [spoken.id], "in what was said, and not in what tools put out")
        must_equal(await found('"the quick brown\nFOX"'), [spoken.id], "quotes and line feeds too")
        must_equal(await found("☃ \u0000 end"), [spoken.id], "whatever character")
        must_equal(await found("quick", owner="alice"), [], "of one owner")
        must_equal(await found("100%"), [titled.id], "a per cent sign is one")
        must_equal(await found("of_it"), [titled.id], "an underscore is one")
        must_equal((await found("1%0"), await found("b_dget"), await found("\\")), ([], [], []), "and no pattern")


# -------------------------------------------------------------------------------------------------------- environments


def new_environment(name: str, version: int, **spec: Any) -> Environment:
    """A version of an environment."""
    return Environment(
        name=name, version=version, spec=EnvironmentSpec.model_validate(spec), created_at=NOW, created_by="root"
    )


@_check
async def an_environment_has_its_versions(open_store: OpenStore) -> None:
    """None is ever changed; the newest is what its name stands for."""
    async with open_store(ignore) as store:
        one = new_environment("dev", 1, description="один \U0001d11e", options={"tools": [], "model": "m"})
        two = new_environment("dev", 2, sandbox={"network": {"allow": ["example.org"]}}, warm_pool=2)
        other = new_environment("a.b", 1)
        same = new_environment("dev", 2, description="another")
        added = await store.write(lambda tx: [tx.environments.add(each) for each in (one, two, other, same)])
        must_equal(added, [True, True, True, False], "a version is written once")
        must_equal(await store.read(lambda tx: tx.environments.get("dev", 1)), one, "it comes back as it was")
        must_equal(await store.read(lambda tx: tx.environments.get("dev")), two, "by its name, the newest")
        must(await store.read(lambda tx: tx.environments.get("dev", 3)) is None, "no such version")
        must(await store.read(lambda tx: tx.environments.get("nothing")) is None, "no such environment")
        must_equal(await store.read(lambda tx: list(tx.environments.versions("dev"))), [two, one], "newest first")
        first = await store.read(lambda tx: tx.environments.page(cursor=None, limit=1))
        rest = await store.read(lambda tx: tx.environments.page(cursor=first.next_cursor, limit=1))
        must_equal([*first.items, *rest.items], [other, two], "the newest of each, by name, in pages")
        must(rest.next_cursor is None, "and no more")
        inside = await add_session(store, environment="dev", environment_version=1)
        his = await add_session(store, environment="dev", environment_version=2, owner="bob")
        await add_session(store)
        must_equal(await store.read(lambda tx: tx.sessions.get(inside.id)), inside, "a session keeps its version")
        must_equal(await store.read(lambda tx: tx.environments.sessions("dev")), 2, "who is in it")
        must_equal(await store.read(lambda tx: tx.environments.sessions("dev", "bob")), 1, "of one owner")
        await store.write(lambda tx: tx.sessions.mark_deleting(his.id))
        must_equal(await store.read(lambda tx: tx.environments.sessions("dev")), 1, "a deleted one is not")
        await store.write(lambda tx: tx.environments.remove("dev"))
        must(await store.read(lambda tx: tx.environments.get("dev", 1)) is None, "it goes with all of its versions")
        must_equal(await store.read(lambda tx: tx.environments.get("a.b")), other, "and no other goes")


@_check
async def a_secret_is_kept_as_it_was_sealed(open_store: OpenStore) -> None:
    """One of each name; what is put again stands in its place."""
    async with open_store(ignore) as store:
        secret = Secret(name="TOKEN", key_id="k1", sealed="c2VhbGVk" * 2000, created_at=NOW, updated_at=NOW)
        again = secret.model_copy(update={"sealed": "eA==", "key_id": "k2", "updated_by": "root"})
        other = secret.model_copy(update={"name": "OTHER"})
        await store.write(lambda tx: [tx.secrets.put(each) for each in (secret, other)])
        must_equal(await store.read(lambda tx: tx.secrets.get("TOKEN")), secret, "it comes back as it was")
        await store.write(lambda tx: tx.secrets.put(again))
        must_equal(await store.read(lambda tx: list(tx.secrets.all())), [other, again], "by name, each once")
        must(await store.write(lambda tx: tx.secrets.remove("TOKEN")), "it is removed")
        must(not await store.write(lambda tx: tx.secrets.remove("TOKEN")), "and is not there any more")
        must(await store.read(lambda tx: tx.secrets.get("TOKEN")) is None, "nor found")


@_check
async def whatever_is_asked_is_answered(open_store: OpenStore) -> None:
    """Odd texts and large numbers are kept as they are, and what they do not name is not found."""
    async with open_store(ignore) as store:
        for odd in ("\x00", "a\x00\x10b", "\x10" * 3, "x" * 5000, "'; DROP TABLE sessions; --", "𝄞"):
            must(await store.read(lambda tx, o=odd: tx.sessions.get(o)) is None, "no such session")  # type: ignore[misc]
            must(await store.read(lambda tx, o=odd: tx.turns.get(o)) is None, "no such turn")  # type: ignore[misc]
            must(await store.read(lambda tx, o=odd: tx.keys.by_hash(o)) is None, "no such key")  # type: ignore[misc]
            session = await add_session(store, title=odd, metadata={odd: odd}, ttl_seconds=10**9)
            must_equal(await store.read(lambda tx, s=session.id: tx.sessions.get(s)), session, "kept as it is")  # type: ignore[misc]
            lines = [odd, json.dumps({"uuid": odd})]

            def append(tx: abc.Transaction, session_id: str = session.id, lines: list[str] = lines) -> None:
                tx.transcripts.append(session_id, subpath="", turn_id=None, lines=lines)

            await store.write(append)
            found = await store.read(lambda tx, s=session.id: tx.transcripts.page(s, "", after=0, limit=9))  # type: ignore[misc]
            must_equal([line for _, line in found], lines, "lines too")


@_durable
async def rows_outlive_the_store(open_store: OpenStore) -> None:
    """What was written is there when the store is opened again, and numbers go on."""
    async with open_store(ignore) as store:
        session = await add_session(store)
        await store.write(lambda tx: tx.events.append(session.id, [new_event("before")]))
    async with open_store(ignore) as store:
        again = await store.read(lambda tx: tx.sessions.get(session.id))
        must_equal(again, session.model_copy(update={"last_seq": 1}), "the session is there")
        stored = await store.write(lambda tx: tx.events.append(session.id, [new_event("after")]))
        must_equal(stored[0].seq, 2, "numbers go on")
        number = await store.write(lambda tx: tx.sessions.next_number())
        must_equal(number, session.number + 1, "session numbers go on")


@_durable
async def a_read_changes_nothing(open_store: OpenStore) -> None:
    """A reader sees whole commits while others write, and holds no writer up."""
    async with open_store(ignore) as store:
        session = await add_session(store)

        def both(tx: abc.Transaction, i: int) -> None:
            tx.sessions.update(session.id, title=str(i), metadata={"i": str(i)})

        def torn(tx: abc.Transaction) -> bool:
            now = tx.sessions.get(session.id)
            return now is not None and now.title != "a title" and now.metadata != {"i": now.title}

        writes = [store.write(lambda tx, i=i: both(tx, i)) for i in range(100)]  # type: ignore[misc]
        reads = [store.read(torn) for _ in range(100)]
        answers = await asyncio.gather(*writes, *reads)
        must(not any(answers[100:]), "no half of a transaction is seen")
