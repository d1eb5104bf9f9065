"""Sessions that sessions begin, on the real CLI."""

import asyncio
from typing import Any

import pytest

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap")]


async def test_a_child_works_beside_its_parent_and_its_work_comes_back(api: Any) -> None:
    root = await api.session(title="root")
    await api.run(root, "[[write: a.txt | one\\n]]")
    body = {"prompt": "[[bash: cat a.txt && echo two >> a.txt && echo new > b.txt]]", "workspace": "clone"}
    clone = (await api.ask("POST", f"/sessions/{root}/children", 201, json=body))["id"]
    body = {"prompt": "[[bash: cat a.txt; touch beside.txt]]", "context": {"a": 1}}
    beside = (await api.ask("POST", f"/sessions/{root}/children", 201, json=body))["id"]
    for child in (clone, beside):
        result = await api.ask("GET", f"/sessions/{child}/result", params={"wait": True, "timeout_seconds": 60})
        assert result["complete"]
        assert result["turn"]["status"] == "succeeded", result
        assert "one" in str(result["turn"]["tool_calls"][0]["result"])
    names = {entry["path"] for entry in (await api.ask("GET", f"/sessions/{root}/files"))["data"]}
    assert names == {"a.txt", "beside.txt"}, "one works in its parent's files, the other does not"
    patch = (await api.http.get(f"/sessions/{clone}/patch")).text
    assert "+two" in patch
    applied = await api.ask("POST", f"/sessions/{clone}/patch/apply")
    assert applied == {"changed": ["a.txt", "b.txt"]}
    assert (await api.http.get(f"/sessions/{root}/files/a.txt")).text == "one\ntwo\n"
    assert (await api.ask("POST", f"/sessions/{clone}/patch/apply", 409))["code"] == "patch_conflict"
    assert (await api.ask("GET", f"/sessions/{beside}/patch", 409))["code"] == "no_patch"
    again = await api.run(root, "[[bash: cat a.txt b.txt]]")
    assert "new" in str(again["tool_calls"][0]["result"]), "the parent's agent can use what came back"

    tree = await api.ask("GET", f"/sessions/{root}/tree")
    assert [branch["session_id"] for branch in tree["children"]] == [clone, beside]
    spent = (await api.ask("GET", "/usage"))["total"]
    assert tree["total_cost_usd"] == pytest.approx(spent["cost_usd"])
    assert tree["total_usage"]["input_tokens"] == spent["input_tokens"]
    page = await api.ask("GET", f"/sessions/{root}/events", params={"tree": True, "limit": 1000})
    assert {event["session_id"] for event in page["data"]} == {root, clone, beside}


async def test_stopping_a_parent_ends_what_is_below_at_once(api: Any) -> None:
    root = await api.session()
    names = [root]
    for parent in (root, root, None):
        body = {"prompt": "[[bash: python3 -c 'import time; time.sleep(600)']]"}
        above = parent or names[1]
        names.append((await api.ask("POST", f"/sessions/{above}/children", 201, json=body))["id"])
    for child in names[1:]:
        await api.until_event(child, "tool.called")
    stream = api.stream("GET", f"/sessions/{names[1]}/result")
    async with stream as frames:
        assert (await anext(frames))["event"] == "progress"
        await api.ask("POST", f"/sessions/{root}/stop")
        async with asyncio.timeout(30):
            last = [frame async for frame in frames][-1]
    assert (last["event"], last["data"]["turn"]["status"]) == ("result", "interrupted")
    assert [(await api.ask("GET", f"/sessions/{name}"))["status"] for name in names] == ["stopped"] * 4
    sandboxes = await api.server.services.store.read(lambda tx: list(tx.sandboxes.not_gone()))
    assert sandboxes == [], "nothing runs any more when the call returns"
    await api.ask("DELETE", f"/sessions/{root}", 204)
    for name in names:
        await api.ask("GET", f"/sessions/{name}", 404)
    assert list((api.server.data / "sessions").iterdir()) == []


async def test_a_paused_child_goes_on(api: Any) -> None:
    root = await api.session()
    body = {"prompt": "[[bash: python3 -c 'import time; time.sleep(600)']]"}
    child = (await api.ask("POST", f"/sessions/{root}/children", 201, json=body))["id"]
    await api.until_event(child, "tool.called")
    assert (await api.ask("POST", f"/sessions/{child}/pause"))["status"] == "stopped"
    await api.ask("POST", f"/sessions/{child}/resume")
    result = await api.ask("GET", f"/sessions/{child}/result", params={"wait": True})
    assert "Go on where you left off" in result["turn"]["text"]


@pytest.mark.on_both_engines
async def test_fifty_at_once_are_as_many_as_may_be(start: Any) -> None:
    api = await start(limits={"max_concurrent_turns": 1})
    busy = await api.session()
    await api.until_event(busy, "turn.started", await api.send(busy, "[[count: 1000000 @5]]"))
    root = await api.session()

    async def begin() -> int:
        return int((await api.http.post(f"/sessions/{root}/children", json={"prompt": "hello"})).status_code)

    codes = await asyncio.gather(*(begin() for _ in range(50)))
    assert sorted(codes) == [201] * 10 + [429] * 40
    assert len((await api.ask("GET", f"/sessions/{root}/children"))["data"]) == 10
    await api.ask("POST", f"/sessions/{root}/stop")
    statuses = [child["status"] for child in (await api.ask("GET", f"/sessions/{root}/children"))["data"]]
    assert statuses == ["stopped"] * 10
    await api.ask("POST", f"/sessions/{root}/resume")
    assert await begin() == 201, "what is stopped does not count"
    await api.ask("DELETE", f"/sessions/{root}", 204)
    await api.ask("POST", f"/sessions/{busy}/interrupt", 202)
