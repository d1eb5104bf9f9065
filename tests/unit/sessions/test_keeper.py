"""Snapshots over fake sandboxes: taken after turns, put back where files are lost, gone back to, deleted with all else."""

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from carrel.errors import (
    FilesShared,
    SnapshotMissing,
    SnapshotNotFound,
    TurnAtWork,
    TurnNotFinished,
    TurnNotFound,
    TurnRewound,
    Unavailable,
)
from carrel.model import Principal, Restoring, Session, SessionStatus, Snapshot, TurnStatus, WorkspaceMode
from carrel.sessions.history import History
from carrel.testing import FakeGateway, FakeHost, FakeTurn
from carrel.testing.vault import FolderVault
from carrel.workspaces.pruning import KeepRules

ALICE, BOB = Principal.of_user("alice"), Principal.of_user("bob")
SHOP = {"type": "persistent", "name": "shop"}

Kept = tuple[FakeGateway, FolderVault]


@pytest.fixture
async def kept(open_gateway: Any, host: FakeHost, tmp_path: Path) -> Kept:
    """A gateway with a vault, whose agents write what they are told into a file."""
    vault = FolderVault(tmp_path / "vault")
    gateway: FakeGateway = await open_gateway(vault=vault)

    async def write(turn: FakeTurn) -> None:
        path, _, text = turn.prompt.removeprefix("write ").partition("=")
        Path(turn.workspace, path).write_text(text)
        turn.say("written")

    host.scripts["write"] = write
    return gateway, vault


async def snapshots(gateway: FakeGateway, session: Session) -> list[Snapshot]:
    return list((await gateway.snapshots.page(ALICE, session.id, cursor=None, limit=100)).items)


async def write(gateway: FakeGateway, session: Session, path: str, text: str) -> str:
    turn = await gateway.run(session.id, f"write {path}={text}")
    assert turn.status is TurnStatus.SUCCEEDED
    assert await gateway.keeper.settled(session.id, 10)
    return turn.id


async def lose(gateway: FakeGateway, session: Session) -> None:
    """Have its folders be gone, as on another host."""
    assert await gateway.keeper.settled(session.id, 10)
    shutil.rmtree(gateway.folders.workspace(session).parent)


def read(gateway: FakeGateway, session: Session) -> dict[str, str]:
    folder = gateway.folders.workspace(session)
    return {path.name: path.read_text() for path in folder.iterdir()}


async def test_after_each_turn_the_files_are_kept_once(kept: Kept) -> None:
    gateway, vault = kept
    session = await gateway.create()
    first = await write(gateway, session, "a", "1")
    same = (await gateway.run(session.id, "hello")).id
    assert await gateway.keeper.settled(session.id, 10)
    second = await write(gateway, session, "a", "2")
    found = await snapshots(gateway, session)
    assert [(each.turn_id, each.exact) for each in found] == [(second, True), (same, True), (first, True)]
    assert found[1].key == found[2].key != found[0].key
    assert len(vault.keys()) == 2
    log = await gateway.log(session.id)
    ends = {event.turn_id: event.seq for event in log if event.type == "turn.completed"}
    assert {each.turn_id: each.seq for each in found} == ends


async def test_the_next_turn_waits_while_the_files_are_read(kept: Kept) -> None:
    gateway, vault = kept
    session = await gateway.create()
    await write(gateway, session, "a", "1")
    vault.reading.clear()
    one = await gateway.run(session.id, "write a=2")
    two = await gateway.prompt(session.id, "write a=3")
    await gateway.service.settle(session.id)
    assert (await gateway.service.turn(ALICE, session.id, two.id)).status is TurnStatus.QUEUED
    vault.reading.set()
    await gateway.ended(two)
    assert await gateway.keeper.settled(session.id, 10)
    by_turn = {each.turn_id: each for each in await snapshots(gateway, session)}
    assert by_turn[one.id].exact
    assert by_turn[one.id].key != by_turn[two.id].key


async def test_a_lost_folder_comes_back_before_the_agent_starts(kept: Kept) -> None:
    gateway, _ = kept
    session = await gateway.create()
    await write(gateway, session, "a", "1")
    await gateway.service.stop(ALICE, session.id)
    await gateway.service.resume(ALICE, session.id)
    await lose(gateway, session)
    await write(gateway, session, "b", "2")
    assert read(gateway, session) == {"a": "1", "b": "2"}
    told = [event.data for event in await gateway.log(session.id) if event.type == "workspace.restored"]
    newest = (await snapshots(gateway, session))[-1]
    assert [(each["reason"], each["snapshot_id"]) for each in told] == [("lost", newest.id)]
    await lose(gateway, session)
    assert (await gateway.service.files(await gateway.session(session.id))).stat("a").size == 1


async def test_a_turn_goes_on_with_the_files_of_the_last_snapshot(kept: Kept, host: FakeHost) -> None:
    gateway, _ = kept
    session = await gateway.create()
    await write(gateway, session, "a", "1")
    begun = asyncio.Event()

    async def half(turn: FakeTurn) -> None:
        Path(turn.workspace, "half").write_text("lost")
        begun.set()
        await asyncio.Event().wait()

    host.scripts["half"] = half
    turn = await gateway.prompt(session.id, "half", on_sandbox_lost="continue")
    await begun.wait()
    shutil.rmtree(gateway.folders.workspace(session).parent)
    host.scripts["half"] = host.scripts["write"]
    host.alive[0].kill()
    assert (await gateway.ended(turn)).status is TurnStatus.SUCCEEDED
    assert read(gateway, session)["a"] == "1"
    assert "lost" not in read(gateway, session).values()
    restored = [event for event in await gateway.log(session.id) if event.type == "workspace.restored"]
    assert [event.turn_id for event in restored] == [turn.id]


async def test_an_unreadable_snapshot_is_passed_over_and_none_at_all_is_told(kept: Kept) -> None:
    gateway, vault = kept
    session = await gateway.create()
    await write(gateway, session, "a", "1")
    await write(gateway, session, "a", "2")
    await gateway.service.stop(ALICE, session.id)
    session = await gateway.session(session.id)
    newest = (await snapshots(gateway, session))[0]
    vault.broken.add(newest.key)
    await lose(gateway, session)
    await gateway.keeper.ensure(session)
    assert read(gateway, session) == {"a": "1"}
    vault.broken.update(vault.keys())
    await lose(gateway, session)
    await gateway.keeper.ensure(session)
    assert read(gateway, session) == {}
    assert (await gateway.log(session.id))[-1].type == "workspace.lost"


async def test_without_the_object_store_turns_go_on_and_it_catches_up(kept: Kept) -> None:
    gateway, vault = kept
    session = await gateway.create()
    vault.away = True
    for text in "123":
        assert (await gateway.run(session.id, f"write a={text}")).status is TurnStatus.SUCCEEDED
    told = [event for event in await gateway.log(session.id) if event.type == "workspace.snapshot_failed"]
    assert len(told) == 1
    vault.away = False
    while not await gateway.keeper.settled(session.id, 1):
        await asyncio.sleep(0.05)
    assert [each.seq for each in await snapshots(gateway, session)]
    assert len([event for event in await gateway.log(session.id) if event.type == "workspace.snapshot_failed"]) == 1


async def test_lost_files_are_awaited_while_the_object_store_is_away(kept: Kept) -> None:
    gateway, vault = kept
    session = await gateway.create()
    await write(gateway, session, "a", "1")
    await gateway.service.stop(ALICE, session.id)
    await gateway.service.resume(ALICE, session.id)
    await lose(gateway, session)
    vault.away = True
    turn = await gateway.prompt(session.id, "write b=2")
    await gateway.service.settle(session.id)
    assert (await gateway.service.turn(ALICE, session.id, turn.id)).status is TurnStatus.QUEUED
    with pytest.raises(Unavailable):
        await gateway.service.files(await gateway.session(session.id))
    vault.away = False
    assert (await gateway.ended(turn)).status is TurnStatus.SUCCEEDED
    assert read(gateway, session) == {"a": "1", "b": "2"}


async def test_what_was_due_is_taken_up_after_a_restart(
    kept: Kept, open_gateway: Any, eventually: Callable[..., Awaitable[None]]
) -> None:
    gateway, vault = kept
    session = await gateway.create()
    vault.away = True
    await gateway.run(session.id, "write a=1")
    again = await open_gateway(vault=FolderVault(vault.root))
    assert await again.keeper.settled(session.id, 10)
    assert len(await snapshots(again, session)) == 1


# ------------------------------------------------------------------------------------------------------------ rewind


async def test_conversation_and_files_go_back_together(kept: Kept, host: FakeHost) -> None:
    gateway, _ = kept
    session = await gateway.create()
    first = await write(gateway, session, "a", "1")
    await write(gateway, session, "b", "2")
    before = len(await gateway.log(session.id))
    rewound = await gateway.snapshots.rewind(ALICE, session.id, turn_id=first, seq=None, files=True)
    assert rewound.status is SessionStatus.IDLE
    assert rewound.restoring is None
    assert read(gateway, session) == {"a": "1"}
    log = await gateway.log(session.id)
    assert len(log) > before
    assert [event.data["to_turn_id"] for event in log if event.type == "session.rewound"] == [first]
    assert [
        m.content for m in (await History(gateway.store).messages(ALICE, session.id)).items if m.role == "user"
    ] == [[{"type": "text", "text": "write a=1"}]]
    third = await write(gateway, session, "c", "3")
    assert host.alive[0].turns_remembered == 2
    assert read(gateway, session) == {"a": "1", "c": "3"}
    said = [m.content for m in (await History(gateway.store).messages(ALICE, session.id)).items if m.role == "user"]
    assert [content[0]["text"] for content in said] == ["write a=1", "write c=3"]
    back = next(event.seq for event in log if event.type == "turn.completed")
    again = await gateway.snapshots.rewind(ALICE, session.id, turn_id=None, seq=back + 1, files=True)
    assert again.agent_session_id not in (None, rewound.agent_session_id)
    assert read(gateway, session) == {"a": "1"}
    with pytest.raises(TurnRewound):
        await gateway.snapshots.rewind(ALICE, session.id, turn_id=third, seq=None, files=True)
    with pytest.raises(TurnRewound):
        await gateway.service.fork(ALICE, session.id, third)


async def test_a_folder_lost_after_a_rewind_comes_back_as_it_was_put(kept: Kept) -> None:
    gateway, _ = kept
    session = await gateway.create()
    first = await write(gateway, session, "a", "1")
    await write(gateway, session, "a", "2")
    await gateway.snapshots.rewind(ALICE, session.id, turn_id=first, seq=None, files=True)
    await lose(gateway, session)
    await gateway.keeper.ensure(await gateway.session(session.id))
    assert read(gateway, session) == {"a": "1"}


async def test_nothing_goes_back_while_a_turn_is_at_work(kept: Kept) -> None:
    gateway, _ = kept
    session = await gateway.create()
    first = await write(gateway, session, "a", "1")
    held = await gateway.prompt(session.id, "hold")
    await gateway.until(session.id, SessionStatus.RUNNING)
    for call in (
        gateway.snapshots.rewind(ALICE, session.id, turn_id=first, seq=None, files=True),
        gateway.snapshots.restore(ALICE, session.id, (await snapshots(gateway, session))[0].id),
    ):
        with pytest.raises(TurnAtWork):
            await call
    with pytest.raises(TurnNotFinished):
        await gateway.snapshots.rewind(ALICE, session.id, turn_id=held.id, seq=None, files=True)
    await gateway.service.interrupt(ALICE, session.id)
    await gateway.ended(held)


@pytest.mark.parametrize("adopted", [False, True])
async def test_a_rewind_that_broke_off_is_finished_at_the_next_start(
    kept: Kept, open_gateway: Any, adopted: bool
) -> None:
    gateway, vault = kept
    session = await gateway.create()
    first = await write(gateway, session, "a", "1")
    await write(gateway, session, "a", "2")
    await gateway.service.stop(ALICE, session.id)
    assert await gateway.keeper.settled(session.id, 10)
    snapshot = next(each for each in await snapshots(gateway, session) if each.turn_id == first)
    await gateway.keeper.stage(session, snapshot)
    wanted = Restoring(snapshot_id=snapshot.id, turn_id=first, upto_turn=2)
    await gateway.store.write(lambda tx: tx.sessions.update(session.id, restoring=wanted))
    if adopted:
        gateway.folders.adopt(session)
    again = await open_gateway(vault=FolderVault(vault.root))
    await again.service.settle(session.id)
    now = await again.session(session.id)
    assert (now.restoring, [part.after_turn for part in now.rewound]) == (None, [1])
    assert read(again, session) == {"a": "1"}
    told = [event for event in await again.log(session.id) if event.type == "session.rewound"]
    assert len(told) == 1


async def test_a_rewind_without_files_leaves_them(kept: Kept) -> None:
    gateway, vault = kept
    session = await gateway.create()
    first = await write(gateway, session, "a", "1")
    await write(gateway, session, "a", "2")
    vault.away = True
    with pytest.raises(Unavailable):
        await gateway.snapshots.rewind(ALICE, session.id, turn_id=first, seq=None, files=True)
    assert (await gateway.session(session.id)).restoring is None
    await gateway.snapshots.rewind(ALICE, session.id, turn_id=first, seq=None, files=False)
    assert read(gateway, session) == {"a": "2"}
    with pytest.raises(TurnNotFound):
        await gateway.snapshots.rewind(ALICE, session.id, turn_id=None, seq=1, files=False)


async def test_files_that_others_have_too_stay(kept: Kept) -> None:
    gateway, _ = kept
    await gateway.workspaces.create(ALICE, "shop", mode=WorkspaceMode.SHARE, quota_mb=None)
    for workspace in (SHOP, {"type": "user"}):
        session = await gateway.create(workspace=workspace)
        turn = await write(gateway, session, "a", "1")
        with pytest.raises(FilesShared):
            await gateway.snapshots.rewind(ALICE, session.id, turn_id=turn, seq=None, files=True)
        await gateway.snapshots.rewind(ALICE, session.id, turn_id=turn, seq=None, files=False)
        with pytest.raises(FilesShared):
            await gateway.snapshots.take(ALICE, (await gateway.create(workspace={"type": "user"})).id)


async def test_a_snapshot_is_put_back_by_itself(kept: Kept) -> None:
    gateway, _ = kept
    session = await gateway.create()
    await write(gateway, session, "a", "1")
    asked = await gateway.snapshots.take(ALICE, session.id)
    assert asked.turn_id is None
    await write(gateway, session, "a", "2")
    with pytest.raises(SnapshotNotFound):
        await gateway.snapshots.restore(ALICE, (await gateway.create()).id, asked.id)
    await gateway.snapshots.restore(ALICE, session.id, asked.id)
    assert read(gateway, session) == {"a": "1"}
    assert (await gateway.log(session.id))[-1].data["reason"] == "asked"
    messages = await History(gateway.store).messages(ALICE, session.id)
    assert len([m for m in messages.items if m.role == "user"]) == 2


# ------------------------------------------------------------------------------------------------ forks and deletion


async def test_a_fork_has_the_files_of_its_turn(kept: Kept) -> None:
    gateway, vault = kept
    session = await gateway.create()
    first = await write(gateway, session, "a", "1")
    await write(gateway, session, "a", "2")
    fork = await gateway.service.fork(ALICE, session.id, first)
    assert read(gateway, fork) == {"a": "1"}
    assert read(gateway, await gateway.service.fork(ALICE, session.id, None)) == {"a": "2"}
    assert await gateway.keeper.settled(fork.id, 10)
    assert [each.reason for each in await snapshots(gateway, fork)] == ["fork"]
    await gateway.service.delete(ALICE, session.id)
    shutil.rmtree(gateway.folders.workspace(fork).parent)
    await gateway.keeper.ensure(fork)
    assert read(gateway, fork) == {"a": "1"}
    assert vault.keys()


async def test_a_fork_of_files_that_were_not_kept_is_refused(kept: Kept) -> None:
    gateway, vault = kept
    vault.away = True
    session = await gateway.create()
    first = await gateway.run(session.id, "hello")
    await gateway.run(session.id, "again")
    with pytest.raises(SnapshotMissing):
        await gateway.service.fork(ALICE, session.id, first.id)
    assert (await gateway.service.fork(ALICE, session.id, None)).forked_from == session.id


async def test_a_deleted_session_leaves_no_object_also_when_the_store_was_away(
    kept: Kept, eventually: Callable[..., Awaitable[None]]
) -> None:
    gateway, vault = kept
    session = await gateway.create()
    await write(gateway, session, "a", "1")
    vault.away = True
    await gateway.service.delete(ALICE, session.id)
    assert vault.keys()
    vault.away = False
    gateway.keeper.doomed()
    await eventually(lambda: not vault.keys())
    while await gateway.store.read(lambda tx: list(tx.doomed.some(9))):
        await asyncio.sleep(0.01)
    assert await gateway.store.read(lambda tx: list(tx.snapshots.of_files(session_id=session.id))) == []


async def test_the_newest_snapshot_of_a_persistent_workspace_outlives_its_sessions(
    kept: Kept, eventually: Callable[..., Awaitable[None]]
) -> None:
    gateway, vault = kept
    first = await gateway.create(workspace=SHOP)
    await write(gateway, first, "a", "1")
    await write(gateway, first, "a", "2")
    await gateway.service.delete(ALICE, first.id)
    await eventually(lambda: len(vault.keys()) == 1)
    second = await gateway.create(workspace=SHOP)
    shutil.rmtree(gateway.folders.workspace(second).parent)
    await write(gateway, second, "b", "3")
    assert read(gateway, second) == {"a": "2", "b": "3"}
    await gateway.service.delete(ALICE, second.id)
    await gateway.workspaces.delete(ALICE, second.workspace_id or "")
    gateway.keeper.doomed()
    await eventually(lambda: not vault.keys())


async def test_a_turn_that_fills_a_workspace_says_so(kept: Kept) -> None:
    gateway, _ = kept
    await gateway.workspaces.create(ALICE, "shop", mode=WorkspaceMode.LOCK, quota_mb=1)
    session = await gateway.create(workspace=SHOP)
    turn = await write(gateway, session, "a", "x" * (2**20 + 1))
    told = [event for event in await gateway.log(session.id) if event.type == "workspace.quota_exceeded"]
    assert [(event.turn_id, event.data["quota_mb"]) for event in told] == [(turn, 1)]


async def test_old_snapshots_of_sessions_at_rest_go_too(
    kept: Kept, open_gateway: Any, eventually: Callable[..., Awaitable[None]]
) -> None:
    gateway, vault = kept
    session = await gateway.create()
    await write(gateway, session, "a", "1")
    await write(gateway, session, "a", "2")
    assert len(vault.keys()) == 2
    again = await open_gateway(vault=FolderVault(vault.root), keep=KeepRules(max_age=timedelta(microseconds=1)))
    await eventually(lambda: len(vault.keys()) == 1)
    (left,) = await snapshots(again, session)
    assert [left.key] == vault.keys()
