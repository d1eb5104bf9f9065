"""Archives beside turns: none begins while files are brought in."""

import io
import tarfile
from collections.abc import AsyncIterator

import pytest

from carrel.errors import SessionNotFound, TurnAtWork
from carrel.model import Principal, SessionStatus, TurnStatus, WorkspaceMode
from carrel.testing import FakeGateway

ALICE, BOB = Principal.of_user("alice"), Principal.of_user("bob")


async def archive() -> AsyncIterator[bytes]:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as made:
        info = tarfile.TarInfo("a")
        info.size = 3
        made.addfile(info, io.BytesIO(b"one"))
    yield out.getvalue()


async def test_a_prompt_waits_while_files_are_brought_in(gateway: FakeGateway) -> None:
    session = await gateway.create()
    await gateway.run(session.id, "hello")
    async with gateway.keeper.filling(session):
        turn = await gateway.prompt(session.id, "hello")
        await gateway.service.settle(session.id)
        assert (await gateway.service.turn(ALICE, session.id, turn.id)).status is TurnStatus.QUEUED
        with pytest.raises(TurnAtWork):
            await gateway.archives.unpack(ALICE, session.id, archive())
    assert (await gateway.ended(turn)).status is TurnStatus.SUCCEEDED
    assert (await gateway.archives.unpack(ALICE, session.id, archive())).bytes == 3


async def test_two_are_not_unpacked_at_once_and_none_beside_a_turn_in_the_same_workspace(gateway: FakeGateway) -> None:
    await gateway.workspaces.create(ALICE, "shop", mode=WorkspaceMode.SHARE, quota_mb=None)
    one, other = [await gateway.create(workspace={"type": "persistent", "name": "shop"}) for _ in range(2)]
    async with gateway.keeper.filling(one):
        with pytest.raises(TurnAtWork, match="already"):
            await gateway.archives.unpack(ALICE, one.id, archive())
    held = await gateway.prompt(other.id, "hold")
    await gateway.until(other.id, SessionStatus.RUNNING)
    with pytest.raises(TurnAtWork, match="another session"):
        await gateway.archives.unpack(ALICE, one.id, archive())
    await gateway.service.interrupt(ALICE, other.id)
    await gateway.ended(held)
    await gateway.archives.unpack(ALICE, one.id, archive())
    assert (await gateway.log(one.id))[-1].type == "workspace.unpacked"


async def test_of_somebody_elses_session_nothing_is_told(gateway: FakeGateway) -> None:
    session = await gateway.create()
    with pytest.raises(SessionNotFound):
        await gateway.archives.unpack(BOB, session.id, archive())
    with pytest.raises(SessionNotFound):
        await gateway.archives.pack(BOB, session.id, "tar")
    packed = b"".join([piece async for piece in await gateway.archives.pack(ALICE, session.id, "tar")])
    assert len(packed) % 512 == 0
