"""Both Python clients against a real server and the real agent: files, archives, snapshots, people."""

import asyncio
import io
import tarfile
from contextlib import AsyncExitStack

import pytest

from carrel import errors
from carrel.client import AsyncCarrel, Carrel

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap")]


class Either:
    """Calls either client in the same way."""

    def __init__(self, blocking, url, key):
        self.blocking = blocking
        self.carrel = (Carrel if blocking else AsyncCarrel)(url, key)

    async def close(self):
        await self.do(self.carrel.close if self.blocking else self.carrel.aclose)

    async def do(self, call, *given, **named):
        if self.blocking:
            return await asyncio.to_thread(call, *given, **named)
        return await call(*given, **named)

    async def all(self, call, *given, **named):
        if self.blocking:
            return await asyncio.to_thread(lambda: list(call(*given, **named)))
        return [item async for item in call(*given, **named)]

    def pieces(self, *pieces):
        """Content in pieces, as either client takes it."""
        if self.blocking:
            return iter(pieces)

        async def each():
            for piece in pieces:
                yield piece

        return each()


@pytest.fixture(params=["blocking", "asynchronous"])
async def either(request, start):
    api = await start()
    async with AsyncExitStack() as stack:
        client = Either(request.param == "blocking", api.server.url, api.server.key)
        stack.push_async_callback(client.close)
        yield client


async def test_files_go_up_are_kept_compared_published_and_go_back(either):
    carrel, do = either.carrel, either.do
    session = (await do(carrel.sessions.create)).id
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        info = tarfile.TarInfo("a")
        info.size = 4
        archive.addfile(info, io.BytesIO(b"one\n"))
    sent = out.getvalue()
    unpacked = await do(carrel.files.unpack, session, either.pieces(sent[:50], sent[50:]), path="src")
    assert (unpacked.members, unpacked.bytes) == (1, 4)
    with pytest.raises(errors.ArchiveInvalid):
        await do(carrel.files.unpack, session, b"none")
    kept = await do(carrel.snapshots.take, session)
    init = "git init -q . && git add -A && git -c user.name=n -c user.email=e@example.com commit -qm m"
    first = await do(carrel.turns.run, session, f"[[bash: {init} && echo two > src/a && echo new > b]]")
    assert first.status == "succeeded"
    found = await do(carrel.files.diff, session, snapshot_id=kept.id)
    changes = {
        change.path: change.kind for change in found.changes if change.type == "file" and ".git" not in change.path
    }
    assert changes == {"src/a": "changed", "b": "added"}
    patch = await do(carrel.files.patch, session)
    assert b"-one\n+two\n" in patch.content
    assert not patch.truncated
    published = await do(carrel.artifacts.publish, session, "b")
    assert await do(carrel.artifacts.read, session, published.id) == b"new\n"
    assert [each.id for each in await either.all(carrel.artifacts.list, session)] == [published.id]
    await do(carrel.artifacts.delete, session, published.id)
    assert await either.all(carrel.artifacts.list, session) == []
    packed = b"".join(await either.all(carrel.files.pack, session, path="src", format="tar"))
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        assert [member.name for member in archive if member.isfile()] == ["src/a"]
    await do(carrel.turns.run, session, "[[bash: echo three > src/a]]")
    while not {first.id} <= {each.turn_id for each in await either.all(carrel.snapshots.list, session)}:
        await asyncio.sleep(0.05)
    await do(carrel.sessions.rewind, session, turn_id=first.id)
    assert await do(carrel.files.read, session, "src/a") == b"two\n"
    await do(carrel.snapshots.restore, session, kept.id)
    assert await do(carrel.files.read, session, "src/a") == b"one\n"
    report = await do(carrel.sessions.network, session)
    assert (report.policy, report.recorded, report.data) == ("gateway-only", True, [])
    shop = await do(carrel.workspaces.create, "shop", quota_mb=5)
    other = await do(carrel.sessions.create, workspace={"type": "persistent", "name": "shop"})
    with pytest.raises(errors.WorkspaceInUse):
        await do(carrel.workspaces.delete, shop.id)
    await do(carrel.sessions.delete, other.id)
    await do(carrel.workspaces.delete, shop.id)


async def test_a_person_is_waited_for_and_answers(either):
    carrel, do = either.carrel, either.do
    session = (await do(carrel.sessions.create, permission_mode="default")).id
    with pytest.raises(TimeoutError):
        await do(carrel.interactions.wait, session, timeout_seconds=0)
    turn = await do(carrel.turns.create, session, "[[bash: echo done > log]]")
    asked = await do(carrel.interactions.wait, session, timeout_seconds=60, poll_seconds=0.05)
    assert (asked.tool, asked.turn_id, asked.status) == ("Bash", turn.id, "pending")
    assert [each.id for each in await either.all(carrel.interactions.list, status="pending")] == [asked.id]
    answered = await do(carrel.interactions.answer, asked.id, "allow")
    assert answered.answer is not None
    assert (await do(carrel.interactions.get, asked.id)).status == "answered"
    with pytest.raises(errors.InteractionResolved):
        await do(carrel.interactions.answer, asked.id, "deny", message="Too late.")
    async with asyncio.timeout(60):
        while (await do(carrel.turns.get, session, turn.id)).status != "succeeded":
            await asyncio.sleep(0.05)
    assert await do(carrel.files.read, session, "log") == b"done\n"
