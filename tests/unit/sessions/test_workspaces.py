"""Persistent workspaces over fake sandboxes: one at a time or together, within a quota, gone by their own call alone."""

import asyncio
from pathlib import Path

import pytest

from carrel.errors import ValidationFailed, WorkspaceExists, WorkspaceInUse, WorkspaceNotFound, WorkspaceOverQuota
from carrel.model import Principal, SessionStatus, TurnStatus, WorkspaceMode
from carrel.testing import FakeGateway, FakeHost

ALICE, BOB = Principal.of_user("alice"), Principal.of_user("bob")
SHOP = {"type": "persistent", "name": "shop"}


async def make(gateway: FakeGateway, mode: WorkspaceMode = WorkspaceMode.LOCK, quota_mb: int | None = None) -> str:
    return (await gateway.workspaces.create(ALICE, "shop", mode=mode, quota_mb=quota_mb)).id


async def test_sessions_that_name_it_have_the_same_files(gateway: FakeGateway) -> None:
    first, second = [await gateway.create(workspace=SHOP) for _ in range(2)]
    listed = (await gateway.workspaces.page(ALICE, cursor=None, limit=9)).items
    assert [workspace.name for workspace in listed] == ["shop"]
    gateway.folders.files(first).write("note", [b"kept"])
    await gateway.service.delete(ALICE, first.id)
    with gateway.folders.files(second).open_read("note") as note:
        assert note.read() == b"kept"
    assert first.uid_number == second.uid_number
    apart = await gateway.create(workspace={"type": "persistent", "name": "other"})
    assert gateway.folders.workspace(apart) != gateway.folders.workspace(second)


async def test_a_name_is_its_users_own(gateway: FakeGateway) -> None:
    hers = await make(gateway)
    with pytest.raises(WorkspaceExists):
        await make(gateway)
    his = await gateway.workspaces.create(BOB, "shop", mode=WorkspaceMode.SHARE, quota_mb=5)
    assert his.id != hers
    for call in (
        gateway.workspaces.get(BOB, hers),
        gateway.workspaces.update(BOB, hers, quota_mb=1),
        gateway.workspaces.delete(BOB, hers),
    ):
        with pytest.raises(WorkspaceNotFound):
            await call


async def test_it_is_deleted_when_no_session_has_it(gateway: FakeGateway, tmp_path: Path) -> None:
    session = await gateway.create(workspace=SHOP)
    await gateway.run(session.id, "hello")
    workspace = session.workspace_id or ""
    with pytest.raises(WorkspaceInUse) as refused:
        await gateway.workspaces.delete(ALICE, workspace)
    assert refused.value.context["sessions"] == [session.id]
    await gateway.service.delete(ALICE, session.id)
    assert (tmp_path / "workspaces" / workspace / "files").is_dir()
    await gateway.workspaces.delete(ALICE, workspace)
    assert not (tmp_path / "workspaces" / workspace).exists()
    assert await gateway.store.read(lambda tx: list(tx.doomed.some(9))) == [
        f"sessions/{session.id}/",
        f"workspaces/{workspace}/",
    ]
    assert (await gateway.create(workspace=SHOP)).workspace_id != workspace


async def test_a_deletion_that_broke_off_is_finished(gateway: FakeGateway, tmp_path: Path) -> None:
    session = await gateway.create(workspace=SHOP)
    gateway.folders.files(session).write("note", [b"x"])
    workspace = session.workspace_id or ""
    await gateway.service.delete(ALICE, session.id)
    await gateway.store.write(lambda tx: tx.workspaces.update(workspace, deleting=True))
    with pytest.raises(WorkspaceInUse):
        await gateway.create(workspace=SHOP)
    await gateway.workspaces.finish_deletions()
    assert not (tmp_path / "workspaces" / workspace).exists()
    await gateway.create(workspace=SHOP)


async def test_one_works_in_it_at_a_time(gateway: FakeGateway, host: FakeHost) -> None:
    first, second = [await gateway.create(workspace=SHOP) for _ in range(2)]
    held = await gateway.prompt(first.id, "hold")
    await gateway.until(first.id, SessionStatus.RUNNING)
    waiting = await gateway.prompt(second.id, "hello")
    await gateway.service.settle(second.id)
    assert (await gateway.service.turn(ALICE, second.id, waiting.id)).status is TurnStatus.QUEUED
    assert len(host.alive) == 1
    await gateway.service.interrupt(ALICE, first.id)
    assert (await gateway.ended(held)).status is TurnStatus.INTERRUPTED
    # It rests now, and makes room although its idle timeout is far.
    assert (await gateway.ended(waiting)).status is TurnStatus.SUCCEEDED
    await gateway.until(first.id, SessionStatus.IDLE)
    assert (await gateway.run(first.id, "again")).status is TurnStatus.SUCCEEDED


async def test_several_share_it_where_they_may(gateway: FakeGateway, host: FakeHost) -> None:
    workspace = await make(gateway, WorkspaceMode.SHARE)
    sessions = [await gateway.create(workspace=SHOP) for _ in range(2)]
    turns = [await gateway.prompt(session.id, "hold") for session in sessions]
    await asyncio.gather(*(gateway.until(session.id, SessionStatus.RUNNING) for session in sessions))
    assert len(host.alive) == 2
    with pytest.raises(WorkspaceInUse):
        await gateway.workspaces.update(ALICE, workspace, mode=WorkspaceMode.LOCK)
    for session, turn in zip(sessions, turns, strict=True):
        await gateway.service.interrupt(ALICE, session.id)
        await gateway.ended(turn)


async def test_a_full_one_takes_no_prompt_until_there_is_room(gateway: FakeGateway) -> None:
    workspace = await make(gateway, quota_mb=1)
    session = await gateway.create(workspace=SHOP)
    files = gateway.folders.files(session)
    assert await gateway.workspaces.room(session) == 2**20
    files.write("big", [b"x" * (2**20 + 1)])
    assert await gateway.workspaces.room(session) == 0
    with pytest.raises(WorkspaceOverQuota):
        await gateway.prompt(session.id, "hello")
    await gateway.workspaces.update(ALICE, workspace, quota_mb=2)
    assert (await gateway.run(session.id, "hello")).status is TurnStatus.SUCCEEDED
    await gateway.workspaces.update(ALICE, workspace, quota_mb=1)
    files.delete("big")
    await gateway.workspaces.measure(session)
    assert (await gateway.run(session.id, "hello")).status is TurnStatus.SUCCEEDED


async def test_a_name_belongs_to_one_type(gateway: FakeGateway) -> None:
    for wrong in (
        {"type": "persistent"},
        {"type": "ephemeral", "name": "shop"},
        {"type": "persistent", "name": "../x"},
    ):
        with pytest.raises((ValueError, ValidationFailed)):
            await gateway.create(workspace=wrong)
