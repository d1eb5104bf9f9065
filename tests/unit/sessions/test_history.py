"""The history page by page is the history, and search finds what was said and nothing else."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from carrel import abc
from carrel.errors import SessionNotFound
from carrel.model import Principal, Scope
from carrel.protocol import events
from carrel.protocol.events import NewEvent
from carrel.sessions.history import History
from carrel.store import SqliteStore
from carrel.testing.conformance.store import add_session, new_event

ALICE = Principal.of_user("alice")


@pytest.fixture
async def store() -> AsyncIterator[abc.Store]:
    async with AsyncExitStack() as stack:
        store = SqliteStore(None)
        await store.start(stack)
        yield store


async def tell(store: abc.Store, session_id: str, turn_id: str, *facts: Any) -> None:
    at = new_event("x").at
    new = [NewEvent.of(fact, at=at, turn_id=turn_id) for fact in facts]
    await store.write(lambda tx: tx.events.append(session_id, new))


def turn_of(n: int) -> list[Any]:
    found: list[Any] = [events.TurnStarted(), events.MessageUser(content=[{"type": "text", "text": f"prompt {n}"}])]
    for step in range(4):
        message = f"m{n}.{step}"
        found += [
            events.MessageAssistant(message_id=message, block=0, text=f"Step {step}"),
            events.ToolCalled(id=f"a{n}.{step}", tool="Bash", input={}, message_id=message, block=1),
            events.ToolFinished(id=f"a{n}.{step}", result="ok"),
            # A second call of the same answer, told after the first one's result.
            events.ToolCalled(id=f"b{n}.{step}", tool="Bash", input={}, message_id=message, block=2),
            events.ToolFinished(id=f"b{n}.{step}", result="ok"),
        ]
    return [*found, events.TurnCompleted(status="succeeded")]  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 100])
async def test_every_page_size_tells_the_same_story(store: abc.Store, limit: int) -> None:
    session = await add_session(store)
    for n in range(3):
        await tell(store, session.id, f"t{n}", *turn_of(n))
    history = History(store)
    whole = (await history.messages(ALICE, session.id, limit=1000)).items
    assert len(whole) == 3 * 9
    assert all(message.complete for message in whole)
    found, after = [], 0
    while True:
        page = await history.messages(ALICE, session.id, after=after, limit=limit)
        found += page.items
        if page.next_after is None:
            break
        assert len(page.items) == limit
        after = page.next_after
    assert found == whole
    of_turn = await history.messages(ALICE, session.id, turn_id="t1")
    assert of_turn.items == [message for message in whole if message.turn_id == "t1"]


async def test_a_page_can_be_filtered_by_what_was_said(store: abc.Store) -> None:
    session = await add_session(store)
    for n in range(3):
        await tell(store, session.id, f"t{n}", *turn_of(n))
    history = History(store)
    page = await history.messages(ALICE, session.id, text="STEP 2", limit=2)
    assert [message.id for message in page.items] == ["m0.2", "m1.2"]
    assert page.next_after is not None
    rest = await history.messages(ALICE, session.id, text="STEP 2", limit=2, after=page.next_after)
    assert ([message.id for message in rest.items], rest.next_after) == (["m2.2"], None)


async def test_somebody_elses_history_is_not_there(store: abc.Store) -> None:
    session = await add_session(store)
    history = History(store)
    with pytest.raises(SessionNotFound):
        await history.messages(Principal.of_user("eve"), session.id)
    bound = Principal(name="t", user="alice", scopes=frozenset({Scope.READ}), session_id="another")
    with pytest.raises(SessionNotFound):
        await history.messages(bound, session.id)


TEXT = 'Ünïcode 100% a_b c\\d "quoted" 😀 line\nbreak \\u0000 nul\x00here'


@pytest.mark.parametrize("where", ["title", "prompt", "answer"])
@pytest.mark.parametrize(
    ("sought", "found"),
    [
        ("ÜNÏCODE", True),
        ("ünïcode", True),
        ("100%", True),
        ("1%0", False),
        ("a_b", True),
        ("axb", False),
        ("c\\d", True),
        ("c\\\\d", False),
        ('"quoted"', True),
        ("😀", True),
        ("line\nbreak", True),
        ("'; --", False),
        # Words of the log itself, and of other members than what was said.
        ("message_id", False),
        ("claude-opus", False),
        ('"type"', False),
    ],
)
async def test_sessions_are_found_by_what_was_said(store: abc.Store, where: str, sought: str, found: bool) -> None:
    title = TEXT.replace("\x00", "") if where == "title" else "another"
    session = await add_session(store, title=title)
    other = await add_session(store, title=None)
    if where == "prompt":
        image = {"type": "image", "source": {"type": "base64", "data": "a1b2"}}
        await tell(store, session.id, "t", events.MessageUser(content=[image, {"type": "text", "text": TEXT}]))
    if where == "answer":
        answer = events.MessageAssistant(message_id="msg_1", block=0, text=TEXT, model="claude-opus-5-5")
        await tell(store, session.id, "t", answer)
    await tell(store, other.id, "t", events.MessageAssistant(message_id="m", block=0, text="else", model="claude-opus"))
    which = abc.SessionFilter(text=sought)
    page = await store.read(lambda tx: tx.sessions.page(which, cursor=None, limit=9))
    assert [s.id for s in page.items] == ([session.id] if found else [])
