"""The defects of sdk-server that ours must not have, each by its number, and what it is asked for."""

import asyncio
from contextlib import AsyncExitStack

import httpx
import pytest

from carrel.cli.server import running
from carrel.settings import load_settings

pytestmark = pytest.mark.requires("bubblewrap")

cli = pytest.mark.cli


def text_of(frames):
    assert all(frame["text"] == frame["content"] for frame in frames if frame["type"] == "text")
    return "".join(frame["text"] for frame in frames if frame["type"] == "text")


async def until(what, check, seconds=30.0):
    async with asyncio.timeout(seconds):
        while not (found := await check()):
            await asyncio.sleep(0.02)
    return found


async def native_sessions(sdk):
    async with sdk.native() as native:
        return (await native.get("/sessions")).json()["data"]


@cli
async def test_1_what_is_deleted_stays_deleted(sdk):
    session = (await sdk.ask("POST", "/session/start", initial_prompt="hello"))["session_id"]
    await sdk.ask("DELETE", f"/session/{session}")
    for _ in range(2):
        gone = await sdk.ask("POST", f"/session/{session}/query", 404, prompt="hello")
        assert gone == {"detail": f"Session {session} not found"}


@cli
async def test_2_3_text_calls_and_thinking_as_they_are_made(sdk):
    session = (await sdk.ask("POST", "/session/start"))["session_id"]
    body = {"prompt": "[[say: A]] [[bash: echo 1]] [[count: 30 @40]]", "stream": True}
    seen, running_at_first = [], None
    async for frame in sdk.watch(f"/session/{session}/query", body):
        seen.append(frame)
        if running_at_first is None:
            running_at_first = (await native_sessions(sdk))[0]["status"]
    assert running_at_first == "running"
    assert text_of(seen).startswith("A" + " ".join(map(str, range(1, 31))))
    assert len(seen) > 10
    [call] = [frame for frame in seen if frame["type"] == "tool_use"]
    assert (call["name"], call["input"]["command"]) == ("Bash", "echo 1")
    assert call["id"].startswith("toolu_")
    assert [frame["type"] for frame in seen][-2:] == ["result", "done"]
    assert (seen[-2]["subtype"], seen[-2]["num_turns"]) == ("success", 2)
    blocking = await sdk.ask("POST", f"/session/{session}/query", prompt="[[say: A]] [[bash: echo 1]] [[say: B]]")
    assert blocking["response"].startswith("AB")


@cli
@pytest.mark.parametrize("stream", [False, True])
async def test_5_a_client_that_goes_away_does_not_end_the_turn(sdk, stream):
    session = (await sdk.ask("POST", "/session/start", initial_prompt="wake up"))["session_id"]
    body = {"prompt": "[[count: 40 @40]] one", "stream": stream}
    if stream:
        async for frame in sdk.watch(f"/session/{session}/query", body):
            assert frame["type"] == "text"
            break
    else:
        with pytest.raises(httpx.ReadTimeout):
            await sdk.http.post(f"/session/{session}/query", json=body, timeout=0.5)
    # The next one waits its turn, and gets nothing but its own answer.
    answer = await sdk.ask("POST", f"/session/{session}/query", prompt="two")
    assert answer["response"] == 'This is turn 3 of our conversation. You said: "two"'
    async with sdk.native() as native:
        turns = (await native.get(f"/sessions/{session}/turns")).json()["data"]
    assert [turn["status"] for turn in turns] == ["succeeded"] * 3


@cli
async def test_5_a_query_nobody_waits_for_is_finished_and_then_removed(sdk):
    body = {"prompt": "[[count: 40 @40]]", "stream": True}
    async for frame in sdk.watch("/query", body):
        assert frame["type"] == "text"
        break
    [session] = await native_sessions(sdk)
    assert session["status"] == "running"
    ended = None
    async with (
        sdk.native() as native,
        native.stream("GET", f"/sessions/{session['id']}/events", headers={"Accept": "text/event-stream"}) as response,
    ):
        async for line in response.aiter_lines():
            if line.startswith("data: ") and '"turn.completed"' in line:
                ended = '"status":"succeeded"' in line
    assert ended

    async def gone():
        return await native_sessions(sdk) == []

    await until("its session is gone", gone)


async def test_8_starting_a_session_asks_no_model(sdk):
    started = await sdk.ask("POST", "/session/start", model="haiku", permission_mode="plan", allowed_tools=["Read"])
    assert started["initial_response"] is None
    [session] = await native_sessions(sdk)
    assert (session["status"], session["turn_count"]) == ("idle", 0)
    assert session["spec"] == {
        "model": "haiku",
        "permission_mode": "plan",
        "allowed_tools": ["Read"],
        "ask_expires_seconds": 0.0,
    }
    assert (await sdk.ask("GET", f"/session/{started['session_id']}"))["model"] == "haiku"


@cli
async def test_9_text_comes_intact(sdk):
    said = '{"a": "}{"} \'\\n\' 😀 \u2028 \x85 中文'
    session = (await sdk.ask("POST", "/session/start"))["session_id"]
    body = {"prompt": f"[[say: {said}]]"}
    assert (await sdk.ask("POST", f"/session/{session}/query", **body))["response"] == said
    assert text_of(await sdk.frames(f"/session/{session}/query", body | {"stream": True})) == said


@cli
async def test_11_of_queries_at_once_each_gets_its_own_answer(sdk):
    session = (await sdk.ask("POST", "/session/start", initial_prompt="wake up"))["session_id"]
    words = ["one", "two", "three"]
    answers = await asyncio.gather(
        *(sdk.ask("POST", f"/session/{session}/query", prompt=f"[[count: 10 @40]] [[say: {word}]]") for word in words)
    )
    counted = " ".join(map(str, range(1, 11))) + " "
    assert [answer["response"] for answer in answers] == [counted + word for word in words]
    one_offs = await asyncio.gather(*(sdk.ask("POST", "/query", prompt=f"[[say: {word}]]") for word in words))
    assert [answer["response"] for answer in one_offs] == words
    assert (await sdk.ask("GET", "/sessions"))["active_sessions"] == [session]
    assert len(await native_sessions(sdk)) == 1


@cli
async def test_14_sessions_and_waiting_queries_outlive_the_server(tmp_path):
    settings = {
        "data": tmp_path / "data",
        "port": 0,
        "model_upstream": "scripted",
        "drain_seconds": 0,
        "dialects": {"sdk-server": {"port": 0, "auth": "none"}},
    }

    async def open_one(stack):
        server = await stack.enter_async_context(running(load_settings(overrides=settings)))
        http = httpx.AsyncClient(base_url=server.listeners["sdk-server"], timeout=60)
        native = httpx.AsyncClient(
            base_url=f"{server.url}/api/v1", headers={"Authorization": f"Bearer {server.key}"}, timeout=60
        )
        return await stack.enter_async_context(http), await stack.enter_async_context(native)

    async with AsyncExitStack() as stack:
        http, native = await open_one(stack)
        started = await http.post("/session/start", json={"initial_prompt": "hello"})
        session = started.json()["session_id"]
        sent = []
        for number, prompt in enumerate(("[[count: 5000 @50]]", "[[say: after the restart]]"), 2):
            sent.append(asyncio.create_task(http.post(f"/session/{session}/query", json={"prompt": prompt})))

            async def there(number=number):
                return len((await native.get(f"/sessions/{session}/turns")).json()["data"]) == number

            await until("it is there", there)
        for task in sent:
            task.cancel()
        await asyncio.gather(*sent, return_exceptions=True)
    async with AsyncExitStack() as stack:
        http, native = await open_one(stack)
        assert (await http.get("/sessions")).json() == {"active_sessions": [session], "count": 1}

        async def ended():
            turns = (await native.get(f"/sessions/{session}/turns")).json()["data"]
            return turns if turns[0]["status"] == "succeeded" else None

        turns = await until("the waiting one has run", ended)
        assert [turn["status"] for turn in turns] == ["succeeded", "interrupted", "succeeded"]
        found = (await native.get(f"/sessions/{session}/turns/{turns[0]['id']}")).json()
        assert found["text"] == "after the restart"
        answer = await http.post(f"/session/{session}/query", json={"prompt": "still there?"})
        assert "turn 4" in answer.json()["response"]


@cli
async def test_17_no_answer_is_so_fast_that_it_is_missed(sdk):
    session = (await sdk.ask("POST", "/session/start", initial_prompt="wake up"))["session_id"]
    for number in range(15):
        frames = await sdk.frames(f"/session/{session}/query", {"prompt": f"[[say: {number}]]", "stream": True})
        assert [frame["type"] for frame in frames] == ["text", "result", "done"]
        assert text_of(frames) == str(number)


@cli
@pytest.mark.parametrize("stream", [False, True])
async def test_interrupt_ends_the_query_and_tells_what_there_is(sdk, stream):
    session = (await sdk.ask("POST", "/session/start", initial_prompt="wake up"))["session_id"]
    body = {"prompt": "[[say: first]] [[bash: true]] [[count: 5000 @50]]", "stream": stream}
    send = (
        sdk.frames(f"/session/{session}/query", body)
        if stream
        else sdk.ask("POST", f"/session/{session}/query", **body)
    )
    asking = asyncio.create_task(send)

    async def counting():
        async with sdk.native() as native:
            events = (await native.get(f"/sessions/{session}/events", params={"limit": 1000})).json()["data"]
        return any(event["type"] == "tool.finished" for event in events)

    await until("it counts", counting)
    told = await sdk.ask("POST", f"/session/{session}/interrupt")
    assert told == {"status": "interrupted", "session_id": session}
    answer = await asking
    if stream:
        assert (answer[-2]["type"], answer[-2]["subtype"]) == ("result", "error_during_execution")
        assert answer[-1] == {"type": "done"}
    else:
        assert answer["response"].startswith("first")
        assert "5000" not in answer["response"]
    assert await sdk.ask("POST", f"/session/{session}/interrupt") == told
    assert "turn 3" in (await sdk.ask("POST", f"/session/{session}/query", prompt="go on"))["response"]


@cli
async def test_a_query_that_fails_is_told_and_leaves_nothing(sdk):
    prompt = "[[error: 400 x50]]"
    assert (await sdk.ask("POST", "/query", 500, prompt=prompt))["detail"]
    assert (await sdk.ask("POST", "/session/start", 500, initial_prompt=prompt))["detail"]
    frames = await sdk.frames("/query", {"prompt": prompt, "stream": True})
    assert [frame["type"] for frame in frames] == ["error", "done"]
    assert frames[0]["message"]

    async def nothing_left():
        return await native_sessions(sdk) == []

    await until("nothing is left", nothing_left)


@cli
async def test_max_turns_is_kept_and_told(sdk):
    prompt = "[[bash: echo 1]] [[bash: echo 2]] [[bash: echo 3]] [[say: end]]"
    frames = await sdk.frames("/query", {"prompt": prompt, "stream": True, "max_turns": 2})
    assert [frame["type"] for frame in frames][-2:] == ["result", "done"]
    assert frames[-2]["subtype"] == "error_max_turns"
    assert len([frame for frame in frames if frame["type"] == "tool_use"]) == 2


@cli
async def test_the_working_directory_a_query_names_is_not_used(sdk):
    answer = await sdk.ask("POST", "/query", prompt="[[bash: pwd; ls -A | wc -l]]", cwd="/etc")
    assert "/workspace" in answer["response"]
    assert "/etc" not in answer["response"]
