"""The defects of claude-agent-http that ours must not have, each by its number, and what its settings do."""

import asyncio
import json
from contextlib import AsyncExitStack

import httpx
import pytest

from carrel.cli.server import running
from carrel.settings import load_settings

pytestmark = pytest.mark.requires("bubblewrap")

cli = pytest.mark.cli


def text_of(frames):
    return "".join(frame["text"] for frame in frames if frame["type"] == "text_delta")


async def native_turns(old, session):
    async with old.native() as native:
        return (await native.get(f"/sessions/{session}/turns")).json()["data"]


async def until(what, check, seconds=30.0):
    async with asyncio.timeout(seconds):
        while not (found := await check()):
            await asyncio.sleep(0.02)
    return found


@cli
async def test_1_what_is_deleted_stays_deleted_over_a_restart_too(tmp_path):
    settings = {
        "data": tmp_path / "data",
        "port": 0,
        "model_upstream": "scripted",
        "drain_seconds": 0,
        "dialects": {"claude-agent-http": {"port": 0, "auth": "none"}},
    }
    session = None
    for _ in range(2):
        async with AsyncExitStack() as stack:
            server = await stack.enter_async_context(running(load_settings(overrides=settings)))
            url = server.listeners["claude-agent-http"]
            http = await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=60))
            if session is None:
                made = await http.post("/api/v1/sessions", json={"user_id": "alice"})
                session = made.json()["session_id"]
                body = {"session_id": session, "message": "hello"}
                assert (await http.post("/api/v1/chat", json=body)).status_code == 200
                assert (await http.delete(f"/api/v1/sessions/{session}")).status_code == 204
            for _ in range(2):
                answer = await http.post("/api/v1/chat", json=body)
                assert (answer.status_code, answer.json()) == (404, {"detail": "Session not found or expired"})
                assert (await http.post(f"/api/v1/sessions/{session}/resume")).status_code == 404
                assert (await http.get(f"/api/v1/sessions/{session}")).status_code == 404
            assert (await http.get("/api/v1/sessions")).json() == []


@cli
async def test_2_every_tool_call_and_every_block_of_text_is_told(old):
    session = await old.session()
    prompt = "[[say: A]] [[bash: echo 1]] [[say: B]] [[parallel: echo 2 | echo 3]] [[say: C]]"
    answer = await old.chat(session, prompt)
    assert [(call["tool"], call["input"]["command"]) for call in answer["tool_calls"]] == [
        ("Bash", "echo 1"),
        ("Bash", "echo 2"),
        ("Bash", "echo 3"),
    ]
    assert answer["text"].startswith("ABC")
    frames = await old.stream(session, prompt)
    calls = [(f["tool_name"], f["tool_input"]["command"]) for f in frames if f["type"] == "tool_use"]
    assert calls == [("Bash", "echo 1"), ("Bash", "echo 2"), ("Bash", "echo 3")]
    assert text_of(frames) == answer["text"]
    assert [frame["type"] for frame in frames].index("tool_use") == 1
    assert frames[-1]["type"] == "done"


@cli
async def test_3_tokens_arrive_as_they_are_made(old):
    session = await old.session()
    seen, running_at_first = [], None
    async for frame in old.watch("/api/v1/chat/stream", {"session_id": session, "message": "[[count: 40 @40]]"}):
        seen.append(frame)
        if running_at_first is None:
            running_at_first = (await native_turns(old, session))[0]["status"]
    assert running_at_first == "running"
    assert len(seen) > 10
    assert text_of(seen) == " ".join(map(str, range(1, 41))) + " "


@cli
@pytest.mark.parametrize("way", ["wait", "stream"])
async def test_4_a_timeout_interrupts_the_turn_and_the_session_goes_on(old, way):
    session = await old.session()
    await old.chat(session, "wake up")
    if way == "wait":
        told = (await old.chat(session, "[[wait: 60]]", 504, timeout=1))["detail"]
    else:
        frames = await old.stream(session, "[[wait: 60]]", timeout=1)
        assert [frame["type"] for frame in frames] == ["error"]
        told = frames[0]["error"]
    assert told == "Request timed out after 1 seconds"
    last = (await native_turns(old, session))[0]
    assert (last["status"], last["stop_reason"]) == ("failed", "timeout")
    assert "turn 3" in (await old.chat(session, "still there?"))["text"]


@cli
async def test_4_the_time_in_the_queue_and_of_the_start_counts_too(agent_http):
    old = await agent_http(launch_timeout_seconds=60)
    session = await old.session()
    # Not one second passes between the message and its end, although the agent has to be started for it.
    assert (await old.chat(session, "[[wait: 60]]", 504, timeout=1))["detail"].startswith("Request timed out")
    assert (await old.chat(session, "hello"))["text"]


@cli
async def test_5_a_client_that_goes_away_does_not_end_the_turn(old):
    session = await old.session()
    async for frame in old.watch("/api/v1/chat/stream", {"session_id": session, "message": "[[count: 40 @40]] one"}):
        assert frame["type"] == "text_delta"
        break

    async def ended():
        turn = (await native_turns(old, session))[0]
        return turn if turn["status"] not in ("running", "queued") else None

    assert (await until("the turn has ended", ended))["status"] == "succeeded"
    answer = await old.chat(session, "two")
    assert answer["text"] == 'This is turn 2 of our conversation. You said: "two"'
    with pytest.raises(httpx.ReadTimeout):
        await old.http.post(
            "/api/v1/chat", json={"session_id": session, "message": "[[count: 40 @40]] three"}, timeout=0.5
        )
    assert (await until("the turn has ended", ended))["status"] == "succeeded"
    assert text_of(await old.stream(session, "four")) == 'This is turn 4 of our conversation. You said: "four"'


@cli
async def test_6_a_busy_session_is_not_evicted(agent_http):
    old = await agent_http(idle_timeout_seconds=0.3)
    session = await old.session()
    answer = await old.chat(session, "[[bash: python3 -c 'import time; time.sleep(2)'; echo woke]] [[say: done]]")
    assert "woke" in answer["text"]

    async def asleep():
        return (await old.http.get("/health")).json()["in_memory_clients"] == 0

    await until("its process is freed afterwards", asleep)
    assert "turn 2" in (await old.chat(session, "again"))["text"]


@pytest.mark.parametrize(
    ("limits", "users", "passing"),
    [
        ({}, [f"user{i}" for i in range(50)], 20),
        ({}, ["alice"] * 50, 5),
        ({"max_sessions": 3, "max_sessions_per_user": 10}, ["alice"] * 50, 3),
        ({"max_sessions_per_user": 7}, ["alice"] * 25 + ["bob"] * 25, 14),
    ],
)
async def test_7_of_50_creates_at_once_exactly_the_limit_passes(agent_http, limits, users, passing):
    old = await agent_http(limits=limits)
    answers = await asyncio.gather(*(old.http.post("/api/v1/sessions", json={"user_id": user}) for user in users))
    codes = [answer.status_code for answer in answers]
    assert (codes.count(201), codes.count(429)) == (passing, 50 - passing)
    for answer in answers:
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) > 0
            assert "sessions, and no more are allowed" in answer.json()["detail"]
    listed = (await old.http.get("/api/v1/sessions")).json()
    assert len(listed) == passing
    assert (await old.http.delete(f"/api/v1/sessions/{listed[0]}")).status_code == 204
    assert (await old.http.post("/api/v1/sessions", json={"user_id": users[0]})).status_code in (201, 429)


async def test_8_creating_a_session_asks_no_model_and_starts_no_process(old):
    session = await old.session()
    health = (await old.http.get("/health")).json()
    assert (health["active_sessions"], health["in_memory_clients"]) == (1, 0)
    async with old.native() as native:
        events = (await native.get(f"/sessions/{session}/events")).json()["data"]
    assert [event["type"] for event in events] == ["session.created"]


@cli
@pytest.mark.parametrize(
    "said",
    [
        '{"a": "}{", \'b\': [1]} \\ \\n "',
        "äöü € 😀 \u2028 \u200d 中文",
    ],
)
async def test_9_text_comes_intact(old, said):
    session = await old.session()
    assert (await old.chat(session, f"[[say: {said}]]"))["text"] == said
    assert text_of(await old.stream(session, f"[[say: {said}]]")) == said


@cli
@pytest.mark.blocks_loop("five megabytes pass through client and server in one process")
async def test_9_five_megabytes_and_200_kb_of_stderr(old):
    session = await old.session()
    whole = "é😀x" * 1_000_000
    whole = whole.encode()[:5_000_000].decode(errors="ignore")
    assert (await old.chat(session, "[[repeat: é😀x | 5000000]]"))["text"] == whole
    assert text_of(await old.stream(session, "[[repeat: é😀x | 5000000]]")) == whole
    noisy = "[[bash: python3 -c 'import sys; sys.stderr.write(\"e\" * 200000)'; echo end]] [[say: quiet]]"
    assert (await old.chat(session, noisy))["text"].startswith("quiet")


@cli
async def test_11_of_two_chats_at_once_one_is_refused(old):
    session = await old.session()
    bodies = [{"session_id": session, "message": f"[[count: 30 @30]] {name}"} for name in ("one", "two", "three")]
    answers = await asyncio.gather(*(old.http.post("/api/v1/chat", json=body) for body in bodies))
    assert sorted(answer.status_code for answer in answers) == [200, 429, 429]
    for answer in answers:
        if answer.status_code == 429:
            assert answer.json() == {"detail": "Session is busy processing another request"}
            assert answer.headers["retry-after"] == "1"
    assert len(await native_turns(old, session)) == 1
    stream = asyncio.create_task(old.stream(session, "[[count: 30 @30]]"))

    async def busy():
        return (await native_turns(old, session))[0]["status"] == "running"

    await until("the turn runs", busy)
    assert await old.stream(session, "me too") == [
        {
            "type": "error",
            "text": None,
            "tool_name": None,
            "tool_input": None,
            "error": "Session is busy processing another request",
        }
    ]
    assert (await stream)[-1]["type"] == "done"


@cli
async def test_14_sessions_and_their_conversations_outlive_the_server(tmp_path):
    settings = {
        "data": tmp_path / "data",
        "port": 0,
        "model_upstream": "scripted",
        "drain_seconds": 0,
        "dialects": {"claude-agent-http": {"port": 0, "auth": "none"}},
    }
    session = None
    for turn in (1, 2):
        async with AsyncExitStack() as stack:
            server = await stack.enter_async_context(running(load_settings(overrides=settings)))
            url = server.listeners["claude-agent-http"]
            http = await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=60))
            if session is None:
                session = (await http.post("/api/v1/sessions", json={"user_id": "alice"})).json()["session_id"]
            answer = await http.post("/api/v1/chat", json={"session_id": session, "message": "hi"})
            assert f"turn {turn} " in answer.json()["text"]
            shown = (await http.get(f"/api/v1/sessions/{session}")).json()
            assert shown["message_count"] == turn


@cli
async def test_16_defaults_are_the_old_service_s_and_the_operator_s_win(agent_http):
    old = await agent_http()
    async with old.native() as native:
        made = (await native.get(f"/sessions/{await old.session()}")).json()
    assert made["spec"] == {
        "system_prompt": "You are a helpful AI assistant.",
        "permission_mode": "bypassPermissions",
        "allowed_tools": ["Bash", "Read", "Write", "Edit", "Glob", "Grep", "Skill"],
        "setting_sources": ["user", "project"],
        "max_turns": 50,
        "ask_expires_seconds": 0.0,
    }
    assert made["ttl_seconds"] == 3600
    assert (made["workspace"]["type"], made["workspace"]["subdir"]) == ("user", None)


async def test_16_every_default_of_the_operator_s_has_its_effect(agent_http, tmp_path):
    chosen = {
        "system_prompt": "Be brief.",
        "permission_mode": "plan",
        "allowed_tools": ["Read"],
        "disallowed_tools": ["Bash"],
        "setting_sources": ["local"],
        "model": "haiku",
        "max_turns": 3,
    }
    base = tmp_path / "people"
    old = await agent_http(defaults=chosen | {"ttl_seconds": 77}, users={"base_dir": base})
    session = await old.session(subdir="a/b/")
    async with old.native() as native:
        made = (await native.get(f"/sessions/{session}")).json()
    assert made["spec"] == chosen | {"ask_expires_seconds": 0.0}
    assert made["ttl_seconds"] == 77
    assert (await old.http.get(f"/api/v1/sessions/{session}")).json()["cwd"] == f"{base}/alice/a/b"


async def test_16_a_time_to_live_of_0_is_never(agent_http):
    old = await agent_http(defaults={"ttl_seconds": 0})
    session = await old.session()
    async with old.native() as native:
        own = (await native.post("/sessions", json={})).json()["id"]
        for one in (session, own):
            assert (await native.get(f"/sessions/{one}")).json()["ttl_seconds"] is None
    stored = await old.server.services.store.read(lambda tx: [tx.sessions.get(one) for one in (session, own)])
    assert [one.expires_at for one in stored] == [None, None]


async def test_16_memory_is_told_as_storage(agent_http):
    old = await agent_http(memory=True)
    assert (await old.http.get("/health")).json()["storage_type"] == "memory"


@cli
async def test_16_time_to_live_deletes_what_is_unused(agent_http):
    old = await agent_http(defaults={"ttl_seconds": 1})
    session = await old.session()

    async def gone():
        async with old.native() as native:
            await native.get("/sessions")
        return (await old.http.post(f"/api/v1/sessions/{session}/resume")).status_code == 404

    await old.chat(session, "hello")
    await until("it is gone", gone)


@cli
async def test_17_no_answer_is_so_fast_that_it_is_missed(old):
    session = await old.session()
    for number in range(15):
        frames = await old.stream(session, f"[[say: {number}]]")
        assert text_of(frames) == str(number)
        assert [frame["type"] for frame in frames] == ["text_delta", "done"]


@cli
async def test_18_no_secret_is_told(agent_http, capfd, tmp_path):
    token, key = "static-token-of-the-test", "sk-ant-api03-planted"
    old = await agent_http(auth="static-token", key=token, static_token=token, anthropic_api_key=key)
    session = await old.session()
    answer = await old.chat(session, "[[bash: env; cat /proc/self/cmdline]] [[say: x]]")
    frames = await old.stream(session, "[[bash: env]] [[say: x]]")
    told = json.dumps([answer, frames]) + "".join(capfd.readouterr())
    for path in ("/health", "/openapi.json", "/", "/docs"):
        told += (await old.http.get(path)).text
    for file in tmp_path.rglob("*"):
        if file.is_file() and not file.is_symlink() and file.name != "admin.key":
            told += file.read_bytes().decode(errors="replace")
    assert token not in told
    assert key not in told
    assert old.server.key
    assert old.server.key not in told


@cli
async def test_a_turn_that_fails_is_told_and_the_session_goes_on(old):
    session = await old.session()
    failed = await old.chat(session, "[[error: 400 x50]]", 500)
    assert failed["detail"]
    frames = await old.stream(session, "[[error: 400 x50]]")
    assert (frames[-1]["type"], bool(frames[-1]["error"])) == ("error", True)
    assert (await old.chat(session, "hello"))["text"]


@cli
async def test_a_stopped_session_is_closed_until_it_is_resumed(old):
    session = await old.session()
    async with old.native() as native:
        await native.post(f"/sessions/{session}/stop")
    assert (await old.http.get(f"/api/v1/sessions/{session}")).json()["status"] == "closed"
    assert "resume" in (await old.chat(session, "hello", 409))["detail"]
    resumed = (await old.http.post(f"/api/v1/sessions/{session}/resume")).json()
    assert (resumed["session_id"], resumed["status"]) == (session, "active")
    assert (await old.chat(session, "hello"))["text"]


@cli
async def test_a_session_that_is_deleted_under_a_stream_ends_it(old):
    session = await old.session()
    await old.chat(session, "wake up")
    seen = []
    async for frame in old.watch("/api/v1/chat/stream", {"session_id": session, "message": "[[count: 500 @50]]"}):
        if not seen:
            assert (await old.http.delete(f"/api/v1/sessions/{session}")).status_code == 204
        seen.append(frame)
    assert (seen[-1]["type"], seen[-1]["error"]) == ("error", "There is no session with this id.")


@cli
async def test_an_answer_that_breaks_off_and_is_made_anew_is_whole_in_the_end(old):
    session = await old.session()
    frames = await old.stream(session, "[[drop]] [[say: And this is the end of it.]]")
    whole = (await old.chat(session, "[[drop]] [[say: And this is the end of it.]]"))["text"]
    assert whole.endswith("And this is the end of it.")
    # What broke off stays where it was; the answer follows whole.
    assert text_of(frames).endswith(whole)
    assert text_of(frames).count("And this is the end of it.") == 1
    assert frames[-1]["type"] == "done"
