"""Sessions that sessions begin: begun once, within limits and rights, stopped and deleted with their parents."""

import asyncio
from typing import Any

import pytest

from carrel import abc
from carrel.budgets import Allowances
from carrel.errors import (
    ChildLimitReached,
    NoPatch,
    PatchConflict,
    SessionNotFound,
    SessionStopped,
    TooDeep,
    WiderThanParent,
)
from carrel.model import (
    ADMIN,
    InteractionKind,
    NetworkPolicy,
    Principal,
    Scope,
    Session,
    SessionStatus,
    Usage,
    new_id,
    utc_now,
)
from carrel.protocol.environments import EnvironmentSpec
from carrel.protocol.link import Ask
from carrel.protocol.spec import CreateChild, CreateTurn, UpdateSession
from carrel.sessions.asking import interaction_of
from carrel.sessions.service import Mark, ServiceOptions
from carrel.sessions.steps import mark_deleted
from carrel.sessions.trees import TreeLimits
from carrel.testing import FakeGateway, FakeHost

ALICE, BOB = Principal.of_user("alice"), Principal.of_user("bob")
OpenGateway = Any
Eventually = Any


async def begin(gateway: FakeGateway, parent: Session | str, prompt: str = "hold", **body: Any) -> Session:
    name = parent if isinstance(parent, str) else parent.id
    return await gateway.children.begin(ALICE, name, CreateChild(prompt=prompt, **body))


def kinds(log: list[Any]) -> list[str]:
    return [event.type for event in log]


async def test_a_child_begins_with_its_prompt_and_its_parent_hears_of_it(gateway: FakeGateway) -> None:
    root = await gateway.create(title="root")
    child = await begin(gateway, root, "hello", context={"module": "auth"}, task_type="test")
    assert (child.parent_id, child.root_id, child.depth, child.owner) == (root.id, root.id, 1, "alice")
    assert child.birth is not None
    first = await gateway.service.turn(ALICE, child.id, child.birth.turn_id)
    result = await gateway.ended(first)
    assert result.status == "succeeded"
    told = [event for event in await gateway.log(root.id) if event.type.startswith("child.")]
    assert [event.type for event in told] == ["child.created", "child.ended"]
    assert told[0].data["child_session_id"] == told[1].data["child_session_id"] == child.id
    assert (told[1].data["turn_id"], told[1].data["status"]) == (first.id, "succeeded")
    assert [each.id for each in await gateway.children.begun(ALICE, root.id)] == [child.id]
    grandchild = await begin(gateway, child, "hello")
    assert (grandchild.parent_id, grandchild.root_id, grandchild.depth) == (child.id, root.id, 2)


async def test_asked_twice_with_one_key_it_is_begun_once(gateway: FakeGateway) -> None:
    root = await gateway.create()
    record = abc.IdempotencyRecord(
        principal="p",
        key="k",
        fingerprint="f",
        boot_id="b",
        object_id=None,
        status=None,
        body=None,
        created_at=utc_now(),
    )
    await gateway.store.write(lambda tx: tx.idempotency.reserve(record))
    child = await gateway.children.begin(ALICE, root.id, CreateChild(prompt="hello"), Mark("p", "k"))
    kept = await gateway.store.write(lambda tx: tx.idempotency.reserve(record))
    assert kept is not None
    assert kept.object_id == child.id


async def test_limits_hold_exactly_under_fifty_spawns_at_once(open_gateway: OpenGateway) -> None:
    gateway = await open_gateway(max_concurrent_turns=1)
    root = await gateway.create()
    made = await asyncio.gather(*(begin(gateway, root) for _ in range(50)), return_exceptions=True)
    children = [each for each in made if isinstance(each, Session)]
    refused = [each for each in made if isinstance(each, ChildLimitReached)]
    assert (len(children), len(refused)) == (10, 40)
    assert len(await gateway.children.begun(ALICE, root.id)) == 10
    await gateway.service.stop(ALICE, children[0].id)
    await begin(gateway, root)
    with pytest.raises(ChildLimitReached):
        await begin(gateway, root)
    with pytest.raises(ChildLimitReached):
        await gateway.service.resume(ALICE, children[0].id)
    await gateway.service.delete(ALICE, children[1].id)
    await gateway.service.resume(ALICE, children[0].id)


async def test_a_tree_is_only_so_large_and_so_deep(open_gateway: OpenGateway) -> None:
    options = ServiceOptions(trees=TreeLimits(depth=2, children=3, tree=4))
    gateway = await open_gateway(service_options=options, max_concurrent_turns=1)
    root = await gateway.create()
    first, second = await begin(gateway, root), await begin(gateway, root)
    below = await begin(gateway, first)
    with pytest.raises(TooDeep):
        await begin(gateway, below)
    await begin(gateway, second)
    with pytest.raises(ChildLimitReached, match="tree"):
        await begin(gateway, second)
    await begin(gateway, await gateway.create())


async def test_stopping_a_parent_stops_all_below_but_those_that_are_kept(
    gateway: FakeGateway, eventually: Eventually
) -> None:
    root = await gateway.create()
    child, kept = await begin(gateway, root), await begin(gateway, root, on_parent_end="keep")
    below, of_kept = await begin(gateway, child), await begin(gateway, kept)
    everyone = (child, kept, below, of_kept)
    for each in everyone:
        await gateway.until(each.id, SessionStatus.RUNNING)
    await gateway.service.stop(ALICE, root.id)
    assert [(await gateway.session(each.id)).status for each in everyone] == [
        "stopped",
        "running",
        "stopped",
        "running",
    ]
    assert len(gateway.host.alive) == 2
    with pytest.raises(SessionStopped):
        await begin(gateway, root)


async def test_deleting_a_parent_deletes_all_below_with_their_files(gateway: FakeGateway, host: FakeHost) -> None:
    root = await gateway.create()
    await gateway.service.files(root)
    clone = await begin(gateway, root, workspace="clone", on_parent_end="keep")
    below = await begin(gateway, clone)
    for each in (clone, below):
        await gateway.until(each.id, SessionStatus.RUNNING)
    folder = gateway.folders.workspace(clone).parent
    assert folder.is_dir()
    await gateway.service.delete(ALICE, root.id)
    assert not folder.exists()
    assert not host.alive
    for each in (root, clone, below):
        with pytest.raises(SessionNotFound):
            await gateway.session(each.id)
    left = await gateway.store.read(lambda tx: [tx.sessions.deleting(each.id) for each in (root, clone, below)])
    assert left == [False, False, False]


async def test_a_deletion_that_was_cut_short_is_finished(open_gateway: OpenGateway) -> None:
    gateway = await open_gateway()
    root = await gateway.create()
    child = await begin(gateway, root, "hello")
    await gateway.store.write(lambda tx: mark_deleted(tx, root.id))
    again = await open_gateway()
    async with asyncio.timeout(20):
        while await again.store.read(lambda tx: tx.sessions.deleting(root.id) or tx.sessions.deleting(child.id)):
            await asyncio.sleep(0.01)


# -------------------------------------------------------------------------------------------------------------- rights

NARROW: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"permission_mode": "plan"}, {"permission_mode": "default"}, "permission_mode"),
    ({"permission_mode": "acceptEdits"}, {"permission_mode": "bypassPermissions"}, "permission_mode"),
    ({"tools": ["Read"]}, {"tools": ["Read", "Bash"]}, "tools"),
    ({"skills": ["one"]}, {"skills": "all"}, "skills"),
    ({"setting_sources": []}, {"setting_sources": ["project"]}, "setting_sources"),
    ({"max_turns": 3}, {"max_turns": 4}, "max_turns"),
    ({}, {"session_tools": True}, "session_tools"),
    ({"permission_mode": "default"}, {"allowed_tools": ["Bash(rm *)"]}, "allowed_tools"),
    ({"permission_mode": "default"}, {"permissions": {"allow": ["Bash"]}}, "allowed_tools"),
    ({}, {"mcp_servers": {"more": {"type": "http", "url": "https://example.com/mcp"}}}, "mcp_servers"),
    (
        {"permission_mode": "default"},
        {"agents": {"a": {"description": "d", "prompt": "p", "permissionMode": "bypassPermissions"}}},
        "agents",
    ),
    ({"tools": ["Read"]}, {"agents": {"a": {"description": "d", "prompt": "p", "tools": ["Bash"]}}}, "agents"),
    ({}, {"network": {"allow": ["example.com"]}}, "network"),
    ({"network": {"allow": ["example.com"]}}, {"network": {"allow": ["example.com", "example.org"]}}, "network"),
]


@pytest.mark.parametrize(("parent", "wish", "what"), NARROW)
async def test_a_child_cannot_have_what_its_parent_lacks(
    open_gateway: OpenGateway, parent: dict[str, Any], wish: dict[str, Any], what: str
) -> None:
    network = NetworkPolicy.model_validate({"allow": ["example.com", "example.org"]} if "network" in parent else {})
    gateway = await open_gateway(network=network)
    root = await gateway.create(**parent)
    with pytest.raises(WiderThanParent if "network" not in wish or parent else Exception, match=what):
        await begin(gateway, root, options=wish)
    assert await gateway.children.begun(ALICE, root.id) == []
    child = await begin(gateway, root)
    assert {name: child.spec.get(name) for name in parent} == {name: root.spec.get(name) for name in parent}
    with pytest.raises(Exception, match=what):
        await gateway.service.update(ALICE, child.id, UpdateSession(**wish))
    same = await gateway.service.update(ALICE, child.id, UpdateSession(title="of its own"))
    assert same.spec == child.spec


async def test_what_is_forbidden_stays_so(gateway: FakeGateway) -> None:
    rules = {"deny": ["Bash(curl *)"], "ask": ["Write"]}
    root = await gateway.create(disallowed_tools=["WebFetch"], permissions=rules)
    child = await begin(
        gateway, root, options={"disallowed_tools": ["Edit"], "permissions": {"deny": ["Read(/etc/*)"]}}
    )
    assert set(child.spec["disallowed_tools"]) == {"Edit", "WebFetch"}
    assert set(child.spec["permissions"]["deny"]) >= {"Bash(curl *)", "Read(/etc/*)", "WebFetch"}
    assert child.spec["permissions"]["ask"] == ["Write"]


async def test_another_environment_is_one_with_no_more_in_it(gateway: FakeGateway) -> None:
    async def put(name: str, **values: Any) -> None:
        await gateway.environments.put(ADMIN, name, EnvironmentSpec.model_validate(values))

    narrow = {"options": {"permission_mode": "plan", "tools": ["Read"]}, "sandbox": {"resources": {"memory_mb": 512}}}
    await put("one", sandbox={"resources": {"memory_mb": 1024}}, options={"disallowed_tools": ["WebFetch"]})
    await put("narrow", **narrow)
    await put("more-memory", sandbox={"resources": {"memory_mb": 2048}})
    await put("unbounded")
    await put("image", sandbox={"image": "other", "resources": {"memory_mb": 512}})
    await put("variables", sandbox={"variables": {"A": "1"}, "resources": {"memory_mb": 512}})
    await put("mounts", sandbox={"mounts": [{"source": "/a", "target": "/b"}], "resources": {"memory_mb": 512}})
    root = await gateway.create(environment="one")
    child = await begin(gateway, root, environment="narrow")
    assert (child.environment, child.spec["disallowed_tools"]) == ("narrow", ["WebFetch"])
    for name in ("more-memory", "unbounded", "image", "variables", "mounts"):
        with pytest.raises(WiderThanParent):
            await begin(gateway, root, environment=name)
    with pytest.raises(WiderThanParent):
        await begin(gateway, child, environment="one")
    await put("one", options={"permission_mode": "bypassPermissions"})
    assert (await begin(gateway, root)).environment_version == 1, "the version is its parent's"


async def test_a_child_spends_of_its_parents_budget(open_gateway: OpenGateway) -> None:
    gateway = await open_gateway(allowances=Allowances())
    root = await gateway.create(budget={"max_tokens": 1000})
    child = await begin(gateway, root, budget={"max_tokens": 600})
    with pytest.raises(WiderThanParent, match="budget"):
        await begin(gateway, root, budget={"max_tokens": 1001})

    async def spend(session: Session, tokens: int) -> None:
        record = abc.UsageRecord(
            id=new_id(),
            session_id=session.id,
            user_id="alice",
            turn_id=None,
            model="m",
            usage=Usage(output_tokens=tokens),
            cost_usd=tokens / 1000,
            at=utc_now(),
        )
        await gateway.store.write(lambda tx: tx.usage.add(record))

    await spend(child, 500)
    with pytest.raises(WiderThanParent, match="500 tokens"):
        await begin(gateway, root, budget={"max_tokens": 600})
    tree = await gateway.children.tree(ALICE, root.id)
    assert (tree.usage.total, tree.cost_usd) == (500, 0.5)
    await gateway.service.delete(ALICE, child.id)
    with pytest.raises(WiderThanParent, match="500 tokens"):
        await begin(gateway, root, budget={"max_tokens": 600})
    await spend(root, 500)
    other = await begin(gateway, root, "hello")
    assert other.birth is not None
    turn = await gateway.ended(await gateway.service.turn(ALICE, other.id, other.birth.turn_id))
    assert turn.error is not None
    assert turn.error.code == "budget_reached"


async def test_a_childs_first_turn_ends_no_later_than_its_parents(gateway: FakeGateway) -> None:
    root = await gateway.create()
    await gateway.prompt(root.id, "hold", timeout_seconds=30)
    await gateway.until(root.id, SessionStatus.RUNNING)
    child = await begin(gateway, root, timeout_seconds=600)
    assert child.birth is not None
    turn = await gateway.service.turn(ALICE, child.id, child.birth.turn_id)
    assert 0 < turn.options["timeout_seconds"] <= 30


async def test_an_agent_sees_what_is_below_it_and_nothing_else(gateway: FakeGateway) -> None:
    root, stranger = await gateway.create(), await gateway.create()
    child, sibling = await begin(gateway, root), await begin(gateway, root)
    below = await begin(gateway, child)
    agent = Principal(name="sandbox:x", user="alice", scopes=frozenset({Scope.READ, Scope.WRITE}), session_id=child.id)
    assert (await gateway.service.get(agent, below.id)).id == below.id
    for other in (root, sibling, stranger):
        with pytest.raises(SessionNotFound):
            await gateway.service.get(agent, other.id)
        with pytest.raises(SessionNotFound):
            await gateway.children.begin(agent, other.id, CreateChild(prompt="hello"))
    with pytest.raises(SessionNotFound):
        await gateway.children.child(ALICE, child.id, sibling.id)
    with pytest.raises(SessionNotFound):
        await gateway.children.begin(BOB, root.id, CreateChild(prompt="hello"))


# ----------------------------------------------------------------------------------------------- pausing, other words


async def test_a_paused_session_goes_on_where_it_was(gateway: FakeGateway) -> None:
    session = await gateway.create()
    await gateway.prompt(session.id, "hold")
    await gateway.until(session.id, SessionStatus.RUNNING)
    waiting = await gateway.prompt(session.id, "hello")
    assert (await gateway.service.pause(ALICE, session.id)).status is SessionStatus.STOPPED
    assert not gateway.host.alive
    assert (await gateway.service.turn(ALICE, session.id, waiting.id)).status == "queued"
    await gateway.service.resume(ALICE, session.id)
    assert (await gateway.ended(waiting)).status == "succeeded"
    (last,) = (await gateway.service.turns(ALICE, session.id, cursor=None, limit=1)).items
    assert "Go on" in last.content[0]["text"]


async def test_another_instruction_ends_the_turn_and_comes_next(gateway: FakeGateway) -> None:
    session = await gateway.create()
    first = await gateway.prompt(session.id, "hold")
    await gateway.until(session.id, SessionStatus.RUNNING)
    turn, _ = await gateway.service.redirect(ALICE, session.id, CreateTurn(prompt="hello"))
    assert (await gateway.ended(turn)).status == "succeeded"
    assert (await gateway.service.turn(ALICE, session.id, first.id)).status == "interrupted"


async def test_waiting_ends_with_the_last_turn_or_its_own_time(gateway: FakeGateway) -> None:
    session = await gateway.create()
    await gateway.prompt(session.id, "hold")
    await gateway.until(session.id, SessionStatus.RUNNING)
    seen = [each.complete async for each in gateway.children.follow(ALICE, session.id, seconds=0.01)]
    assert seen
    assert not any(seen)
    waiting = asyncio.create_task(last(gateway, session.id))
    await gateway.service.interrupt(ALICE, session.id)
    outcome = await asyncio.wait_for(waiting, 20)
    assert outcome.complete
    assert outcome.turn.status == "interrupted"


async def last(gateway: FakeGateway, session_id: str) -> Any:
    return [each async for each in gateway.children.follow(ALICE, session_id, seconds=None)][-1]


# --------------------------------------------------------------------------------------------------------------- files


async def test_a_child_works_in_its_parents_files(gateway: FakeGateway) -> None:
    root = await gateway.create()
    child = await begin(gateway, root)
    below = await begin(gateway, child)
    (await gateway.service.files(root)).write("a.txt", [b"of the root"])
    for each in (child, below):
        with (await gateway.service.files(each)).open_read("a.txt") as file:
            assert file.read() == b"of the root"
    empty = await begin(gateway, root, workspace="ephemeral")
    assert (await gateway.service.files(empty)).tree("", limit=9) == []
    with pytest.raises(NoPatch):
        await gateway.children.patch(ALICE, child.id)
    await gateway.service.delete(ALICE, below.id)
    assert (await gateway.service.files(root)).stat("a.txt").size == 11, "a child's end leaves its parent's files alone"
    fork = await gateway.service.fork(ALICE, child.id, None)
    (await gateway.service.files(fork)).write("a.txt", [b"of the fork"])
    assert (await gateway.service.files(root)).stat("a.txt").size == 11


async def test_what_a_clone_has_changed_is_brought_back(gateway: FakeGateway) -> None:
    root = await gateway.create()
    files = await gateway.service.files(root)
    for path, content in {"a.txt": b"one\ntwo\n", "gone.txt": b"x\n", "sub/b.bin": bytes(range(256))}.items():
        files.write(path, [content])
    clone = await begin(gateway, root, workspace="clone")
    own = await gateway.service.files(clone)
    own.write("a.txt", [b"one\nTWO\n"])
    own.write("new dir/\u00e9.txt", [b"new\n"])
    own.write("sub/b.bin", [bytes(reversed(range(256)))])
    own.write("run.sh", [b"#!/bin/sh\n"], mode=0o755)
    own.write(".git/config", [b"not to be brought back"])
    own.delete("gone.txt")
    (gateway.folders.workspace(clone) / "link").symlink_to("a.txt")
    assert files.stat("a.txt").size == 8
    with files.open_read("a.txt") as file:
        assert file.read() == b"one\ntwo\n", "the parent's files are as they were"
    patch = await gateway.children.patch(ALICE, clone.id)
    assert b"a/gone.txt" in patch
    assert b".git/config" not in patch
    changed = await gateway.children.apply(ALICE, clone.id)
    assert changed == ["a.txt", "gone.txt", "link", "new dir/\u00e9.txt", "run.sh", "sub/b.bin"]
    place = gateway.folders.workspace(root)
    assert (place / "a.txt").read_bytes() == b"one\nTWO\n"
    assert (place / "sub/b.bin").read_bytes() == bytes(reversed(range(256)))
    assert (place / "run.sh").stat().st_mode & 0o100
    assert (place / "link").is_symlink()
    assert not (place / "gone.txt").exists()
    with pytest.raises(PatchConflict):
        await gateway.children.apply(ALICE, clone.id)


async def test_what_does_not_fit_changes_nothing(gateway: FakeGateway) -> None:
    root = await gateway.create()
    files = await gateway.service.files(root)
    files.write("a.txt", [b"one\n"])
    files.write("b.txt", [b"one\n"])
    clone = await begin(gateway, root, workspace="clone")
    own = await gateway.service.files(clone)
    own.write("a.txt", [b"two\n"])
    own.write("b.txt", [b"two\n"])
    files.write("b.txt", [b"meanwhile\n"])
    with pytest.raises(PatchConflict, match=r"'b\.txt'"):
        await gateway.children.apply(ALICE, clone.id)
    with files.open_read("a.txt") as file:
        assert file.read() == b"one\n"


async def test_a_patch_leads_nowhere_else(gateway: FakeGateway, tmp_path: Any) -> None:
    root = await gateway.create()
    files = await gateway.service.files(root)
    files.write("dir/a.txt", [b"one\n"])
    clone = await begin(gateway, root, workspace="clone")
    (await gateway.service.files(clone)).write("dir/a.txt", [b"two\n"])
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a.txt").write_bytes(b"one\n")
    files.delete("dir")
    (gateway.folders.workspace(root) / "dir").symlink_to(outside)
    with pytest.raises(PatchConflict):
        await gateway.children.apply(ALICE, clone.id)
    assert (outside / "a.txt").read_bytes() == b"one\n"


# ---------------------------------------------------------------------------------------------------------- one stream


async def test_a_tree_is_one_stream_that_goes_on_from_any_of_its_cursors(gateway: FakeGateway) -> None:
    root = await gateway.create()
    first = await begin(gateway, root, "hello")
    seen: list[Any] = []

    async def watch(after: str | None, until: int) -> list[Any]:
        found: list[Any] = []
        stream = gateway.trees.follow(ALICE, root.id, after=after, heartbeat_seconds=5)
        try:
            async for batch in stream:
                found += batch
                if len([e for e in found if e.event.type == "turn.completed"]) >= until:
                    return found
        finally:
            await stream.aclose()  # type: ignore[attr-defined]
        return found

    seen = await asyncio.wait_for(watch(None, 1), 20)
    second = await begin(gateway, first, "hello")
    middle = seen[len(seen) // 2].cursor
    again = await asyncio.wait_for(watch(middle, 2), 20)
    both = {(e.event.session_id, e.event.seq) for e in (*seen, *again)}
    for session in (root, first, second):
        numbers = sorted(seq for name, seq in both if name == session.id)
        assert numbers == list(range(1, len(numbers) + 1)), "nothing is missing"
    known = {(e.event.session_id, e.event.seq) for e in seen[: len(seen) // 2 + 1]}
    assert not known & {(e.event.session_id, e.event.seq) for e in again}, "and nothing comes twice"
    pages: list[Any] = []
    after = None
    while page := await gateway.trees.page(ALICE, root.id, after=after, limit=5):
        pages += page
        after = page[-1].cursor
    everything = [len(await gateway.log(each.id)) for each in (root, first, second)]
    assert len(pages) == sum(everything)


async def test_what_a_child_asks_is_shown_at_the_root_and_on_the_child(gateway: FakeGateway) -> None:
    root = await gateway.create()
    child, sibling = await begin(gateway, root), await begin(gateway, root)
    frame = Ask(
        n=1,
        interaction_id=new_id(),
        turn_id=new_id(),
        at=utc_now(),
        about=InteractionKind.PERMISSION,
        tool="Bash",
        input={"command": "ls"},
        reason="no rule allows it",
    )
    asked = interaction_of(child, frame)
    await gateway.store.write(lambda tx: tx.interactions.add(asked))
    shown = {
        session.id: [each.id for each in (await asked_of(gateway, session)).items] for session in (root, child, sibling)
    }
    assert shown == {root.id: [asked.id], child.id: [asked.id], sibling.id: []}
    assert asked.root_session_id == root.id


async def asked_of(gateway: FakeGateway, session: Session) -> Any:
    return await gateway.interactions.page(ALICE, session_id=session.id, cursor=None, limit=9)
