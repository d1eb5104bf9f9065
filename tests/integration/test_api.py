"""The API's manners: errors, lists, idempotency, streams, files. No agent is started unless a test says so."""

import asyncio
import json

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

pytestmark = pytest.mark.requires("bubblewrap")


@pytest.mark.on_both_engines
async def test_bad_input_gets_a_clear_problem_and_changes_nothing(api):
    session = await api.session()
    for method, path, body, field in [
        ("POST", "/sessions", {"tittle": "x"}, "tittle"),
        ("POST", "/sessions", {"permission_mode": "yes"}, "permission_mode"),
        ("POST", "/sessions", {"max_turns": 0}, "max_turns"),
        ("POST", "/sessions", {"env_vars": {"ANTHROPIC_API_KEY": "x"}}, "env_vars"),
        ("POST", "/sessions", {"env_vars": {"a b": "x"}}, "env_vars"),
        ("POST", "/sessions", {"output_format": {"type": "xml"}}, "output_format"),
        ("POST", "/sessions", {"system_prompt": "a", "append_system_prompt": "b"}, "body"),
        ("POST", "/sessions", {"metadata": {"x": "y" * 70_000}}, "metadata"),
        ("POST", "/sessions", {"workspace": {"type": "named"}}, "workspace"),
        ("POST", "/sessions", {"mcp_servers": {"a": {"type": "stdio"}}}, "mcp_servers"),
        ("POST", "/sessions", {"title": "nul \x00"}, "title"),
        ("POST", f"/sessions/{session}/turns", {}, "body"),
        ("POST", f"/sessions/{session}/turns", {"prompt": "a", "content": [{"type": "text", "text": "b"}]}, "body"),
        ("POST", f"/sessions/{session}/turns", {"prompt": "  "}, "body"),
        ("POST", f"/sessions/{session}/turns", {"prompt": "x", "timeout_seconds": -1}, "timeout_seconds"),
        ("POST", f"/sessions/{session}/turns", {"content": [{"type": "tool_use"}]}, "content"),
        ("GET", "/sessions?limit=0", None, "limit"),
        ("GET", "/sessions?limit=1001", None, "limit"),
        ("GET", f"/sessions/{session}/events?after=-1", None, "after"),
    ]:
        response = await api.http.request(method, path, json=body)
        assert response.status_code == 422, (path, body, response.text)
        assert response.headers["content-type"] == "application/problem+json"
        problem = response.json()
        assert problem["code"] == "validation_failed"
        assert any(field in error["field"] for error in problem["errors"]), (field, problem)
    assert [event["type"] for event in await api.events(session)] == ["session.created"]
    assert len((await api.ask("GET", "/sessions"))["data"]) == 1


async def test_broken_bodies_and_unknown_places_are_problems_too(api):
    for response, status, code in [
        (await api.http.post("/sessions", content=b"{", headers={"content-type": "application/json"}), 422, None),
        (
            await api.http.post("/sessions", content=b"\xff\xfe", headers={"content-type": "application/json"}),
            None,
            None,
        ),
        (await api.http.get("/nowhere"), 404, "route_not_found"),
        (await api.http.put("/sessions"), 405, "method_not_allowed"),
        (await api.http.get("/sessions/no-such-session"), 404, "session_not_found"),
        (await api.http.get("/sessions?cursor=%00%00"), 400, "invalid_cursor"),
        (await api.http.get("/sessions?cursor=bm9uc2Vuc2U"), 400, "invalid_cursor"),
    ]:
        assert response.headers["content-type"] == "application/problem+json", response.text
        assert 400 <= response.status_code < 500
        if status is not None:
            assert response.status_code == status
        if code is not None:
            assert response.json()["code"] == code


async def test_a_body_without_its_content_type_is_told_what_to_send(api):
    response = await api.http.post("/sessions", content=b'{"title": "x"}')
    assert response.status_code == 422
    assert "Content-Type: application/json" in response.json()["detail"]


@pytest.mark.on_both_engines
async def test_lists_are_newest_first_and_their_cursors_walk_them_whole(api):
    made = [await api.session(title=str(i)) for i in range(7)]
    walked, cursor = [], None
    while True:
        params = {"limit": 3} | ({"cursor": cursor} if cursor else {})
        page = await api.ask("GET", "/sessions", params=params)
        walked += [session["id"] for session in page["data"]]
        # One that is made meanwhile does not disturb the walk.
        await api.session()
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert walked == made[::-1]
    assert (await api.ask("GET", "/sessions", params={"status": "running"}))["data"] == []


async def test_creating_a_session_asks_no_model_and_starts_no_process(api):
    created = await api.ask("POST", "/sessions", 201, json={"title": "x", "model": "opus-4", "metadata": {"a": [1]}})
    assert created["status"] == "idle"
    assert (created["title"], created["metadata"], created["spec"]) == ("x", {"a": [1]}, {"model": "opus-4"})
    assert (created["turn_count"], created["cost_usd"], created["last_seq"]) == (0, 0.0, 1)
    assert not any(path.is_dir() for path in (api.server.data / "sandboxes").iterdir())
    assert [event["type"] for event in await api.events(created["id"])] == ["session.created"]


@pytest.mark.on_both_engines
async def test_patch_changes_what_is_given_and_says_when_it_applies(api):
    session = await api.session(title="old", model="opus", system_prompt="be brief")
    changed = await api.ask("PATCH", f"/sessions/{session}", json={"title": "new", "model": None, "effort": "low"})
    assert (changed["title"], changed["spec"]) == ("new", {"system_prompt": "be brief", "effort": "low"})
    event = (await api.events(session))[-1]
    assert event["type"] == "session.updated"
    assert event["data"] == {"changed": ["effort", "model", "title"], "at_next_launch": ["effort"]}
    problem = await api.ask("PATCH", f"/sessions/{session}", 422, json={"append_system_prompt": "and kind"})
    assert "not both" in problem["detail"]


@pytest.mark.on_both_engines
async def test_an_idempotency_key_makes_one_of_two(api):
    key = {"Idempotency-Key": "once"}
    first = await api.http.post("/sessions", json={"title": "a"}, headers=key)
    again = await api.http.post("/sessions", json={"title": "a"}, headers=key)
    assert (first.status_code, again.status_code) == (201, 201)
    assert first.json() == again.json()
    other = await api.http.post("/sessions", json={"title": "b"}, headers=key)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_mismatch")
    assert len((await api.ask("GET", "/sessions"))["data"]) == 1
    too_long = await api.http.post("/sessions", json={}, headers={"Idempotency-Key": "k" * 256})
    assert too_long.status_code == 422
    # A request that came to nothing does not use its key up.
    missing = await api.http.post("/sessions/none/turns", json={"prompt": "x"}, headers={"Idempotency-Key": "t"})
    assert missing.status_code == 404
    there = await api.http.post("/sessions", json={"title": "c"}, headers={"Idempotency-Key": "t2"})
    assert there.status_code == 201


@pytest.mark.on_both_engines
@pytest.mark.cli
async def test_a_repeated_turn_runs_once_and_its_stream_is_replayed(api):
    session = await api.session()
    headers = {"Idempotency-Key": "turn", "Accept": "text/event-stream"}
    body = {"prompt": "[[bash: echo x >> once.txt]] [[count: 10 @20]]"}

    async def stream(some: int | None = None):
        seen = []
        async with api.stream("POST", f"/sessions/{session}/turns", json=body, headers=headers) as frames:
            async for frame in frames:
                seen.append(frame)
                if some is not None and len(seen) >= some:
                    break
        return [frame for frame in seen if frame["event"] != "delta"]

    cut = await stream(5)
    replayed = await stream()
    assert replayed[: len(cut)] == cut
    assert replayed[-1]["event"] == "turn.completed"
    assert (await api.http.get(f"/sessions/{session}/files/once.txt")).text == "x\n"
    while_running = {"Idempotency-Key": "slow"}
    slow = asyncio.create_task(
        api.http.post(
            f"/sessions/{session}/turns", json={"prompt": "[[count: 20 @20]]", "wait": True}, headers=while_running
        )
    )
    await api.until("the turn runs", lambda: _running(api, session))
    conflict = await api.http.post(
        f"/sessions/{session}/turns", json={"prompt": "[[count: 20 @20]]", "wait": True}, headers=while_running
    )
    assert (conflict.status_code, conflict.json()["code"]) == (409, "idempotency_in_flight")
    first = await slow
    again = await api.http.post(
        f"/sessions/{session}/turns", json={"prompt": "[[count: 20 @20]]", "wait": True}, headers=while_running
    )
    assert again.json() == first.json()


async def _running(api, session):
    return (await api.ask("GET", f"/sessions/{session}"))["status"] == "running"


@pytest.mark.on_both_engines
@pytest.mark.cli
async def test_a_viewer_that_comes_back_misses_nothing_and_sees_nothing_twice(api):
    session = await api.session()
    turn = asyncio.create_task(api.run(session, "[[bash: echo 1]] [[count: 60 @60]] [[bash: echo 2]]"))
    seen = []
    while not seen or seen[-1]["event"] != "turn.completed":
        headers = {"Last-Event-ID": seen[-1]["id"]} if seen else {}
        async with api.stream("GET", f"/sessions/{session}/events", headers=headers) as frames:
            taken = 0
            async for frame in frames:
                seen.append(frame)
                taken += 1
                if taken == 2 or frame["event"] == "turn.completed":
                    break
    await turn
    stored = await api.events(session)
    assert [frame["data"] for frame in seen] == stored[: len(seen)]


@pytest.mark.on_both_engines
@pytest.mark.cli
async def test_joining_in_the_middle_of_a_message_gives_the_text_so_far_once(api):
    session = await api.session()
    turn = await api.send(session, "[[count: 60 @40]]")
    await api.until_event(session, "turn.started", turn)

    async def watch(after_deltas: int):
        text, whole = "", None
        async with api.stream("GET", f"/sessions/{session}/events?deltas=true&after=3") as frames:
            async for frame in frames:
                if frame["event"] == "delta":
                    assert frame["data"]["offset"] == len(text), frame
                    text += frame["data"]["text"]
                elif frame["event"] == "message.assistant":
                    whole = frame["data"]["data"]["text"]
                elif frame["event"] == "turn.completed":
                    return text, whole
        raise AssertionError("the stream ended early")

    early = asyncio.create_task(watch(0))
    await asyncio.sleep(0.6)
    late = asyncio.create_task(watch(1))
    expected = " ".join(map(str, range(1, 61))) + " "
    assert await early == (expected, expected)
    assert await late == (expected, expected)


@pytest.mark.on_both_engines
@pytest.mark.cli
async def test_the_websocket_goes_both_ways_and_all_viewers_see_the_same(api):
    session = await api.session()
    address = api.server.url.replace("http", "ws") + f"/api/v1/sessions/{session}/stream"
    headers = {"Authorization": f"Bearer {api.server.key}"}
    async with connect(address, additional_headers=headers) as one, connect(address, additional_headers=headers) as two:
        await one.send('{"type":"ping"}')
        await one.send('{"type":"prompt","prompt":""}')
        await one.send("nonsense")
        await one.send('{"type":"prompt","prompt":"[[count: 200 @50]]"}')

        async def until_completed(socket, interrupt: bool):
            seen = []
            while not seen or seen[-1]["type"] != "turn.completed":
                seen.append(json.loads(await asyncio.wait_for(socket.recv(), 20)))
                if interrupt and seen[-1]["type"] == "delta" and seen[-1]["text"].startswith("9"):
                    await socket.send('{"type":"interrupt"}')
            return seen

        mine, theirs = await asyncio.gather(until_completed(one, True), until_completed(two, False))
    replies = [frame for frame in mine if frame["type"] in ("pong", "problem", "accepted")]
    assert [reply["type"] for reply in replies] == ["pong", "problem", "problem", "accepted"]
    assert mine[-1]["data"]["status"] == "interrupted"

    def seen_by(frames):
        return [frame for frame in frames if frame["type"] not in ("pong", "problem", "accepted", "heartbeat")]

    assert [f for f in seen_by(mine) if "seq" in f] == [f for f in seen_by(theirs) if "seq" in f]
    later = [f["seq"] for f in seen_by(theirs) if "seq" in f]
    async with connect(f"{address}?after={later[3]}", additional_headers=headers) as three:
        assert json.loads(await three.recv())["seq"] == later[4]


async def test_a_websocket_without_key_or_session_is_closed_with_its_code(api):
    session = await api.session()
    address = api.server.url.replace("http", "ws") + "/api/v1/sessions"
    good = {"Authorization": f"Bearer {api.server.key}"}
    for path, headers, code in [
        (session, {}, 4001),
        (session, {"Authorization": "Bearer no"}, 4001),
        ("none", good, 4004),
    ]:
        async with connect(f"{address}/{path}/stream", additional_headers=headers) as socket:
            with pytest.raises(ConnectionClosed) as closed:
                await asyncio.wait_for(socket.recv(), 10)
            assert closed.value.rcvd.code == code


async def test_files_over_http(api):
    session = await api.session()
    base = f"/sessions/{session}/files"
    body = bytes(range(256)) * 10_000
    put = await api.http.put(f"{base}/deep/er/data.bin", content=body)
    assert put.json()["size"] == len(body)
    got = await api.http.get(f"{base}/deep/er/data.bin")
    assert (got.content, got.headers["content-length"]) == (body, str(len(body)))
    assert got.headers["content-disposition"] == "attachment"
    tree = (await api.ask("GET", base))["data"]
    assert [(entry["path"], entry["type"]) for entry in tree] == [
        ("deep", "directory"),
        ("deep/er", "directory"),
        ("deep/er/data.bin", "file"),
    ]
    page = await api.ask("GET", base, params={"limit": 2})
    rest = await api.ask("GET", base, params={"limit": 2, "cursor": page["next_cursor"]})
    assert [entry["path"] for entry in rest["data"]] == ["deep/er/data.bin"]
    assert (await api.http.delete(f"{base}/deep")).status_code == 204
    assert (await api.http.get(f"{base}/deep/er/data.bin")).status_code == 404
    for path in ["%2e%2e/carrel.db", "..%2f..%2fadmin.key", "%2fetc/passwd", "a//b", "a%00b", "a/%2e/b", "/etc/passwd"]:
        for method in ("GET", "PUT", "DELETE"):
            refused = await api.http.request(method, f"{base}/{path}", content=b"x" if method == "PUT" else None)
            assert refused.status_code in (400, 404), (method, path, refused.status_code)
    (api.server.data / "sessions" / session / "workspace" / "link").symlink_to("/etc/passwd")
    assert (await api.http.get(f"{base}/link")).status_code == 409
    assert (await api.http.put(f"{base}/link", content=b"x")).status_code == 409


async def test_a_file_that_is_too_large_is_refused_and_leaves_nothing(start):
    api = await start(max_file_bytes=100_000)
    session = await api.session()

    async def endless():
        for _ in range(50):
            yield b"x" * 10_000

    refused = await api.http.put(f"/sessions/{session}/files/big", content=endless())
    assert (refused.status_code, refused.json()["code"]) == (413, "file_too_large")
    assert (await api.ask("GET", f"/sessions/{session}/files"))["data"] == []


@pytest.mark.on_both_engines
@pytest.mark.cli
async def test_export_is_whole(api):
    session = await api.session()
    await api.run(session, "hello")
    text = (await api.http.get(f"/sessions/{session}/export")).text
    lines = [json.loads(line) for line in text.splitlines()]
    kinds = [line["kind"] for line in lines]
    assert kinds[0] == "session"
    assert {"session", "turn", "event", "transcript"} == set(kinds)
    assert [line["event"] for line in lines if line["kind"] == "event"] == await api.events(session)
    assert "hello" in "".join(line["line"] for line in lines if line["kind"] == "transcript")


@pytest.mark.cli
async def test_on_disconnect_a_turn_goes_on_or_is_interrupted_as_asked(api):
    session = await api.session()
    for choice, expected in [("continue", "succeeded"), ("interrupt", "interrupted")]:
        body = {"prompt": "[[count: 40 @40]]", "on_disconnect": choice}
        async with api.stream("POST", f"/sessions/{session}/turns", json=body) as frames:
            async for frame in frames:
                if frame["event"] == "delta":
                    turn = frame["data"]["turn_id"]
                    break
        ended = await api.until_event(session, "turn.completed", turn)
        assert ended["data"]["status"] == expected
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(api.run(session, "[[count: 1000 @40]]", on_disconnect="interrupt"), 1.5)
    last = (await api.ask("GET", f"/sessions/{session}/turns"))["data"][0]
    ended = await api.until_event(session, "turn.completed", last["id"])
    assert ended["data"]["status"] == "interrupted"


async def test_the_openapi_document_is_complete(api):
    root = api.server.url
    document = (await api.http.get(f"{root}/openapi.json")).json()
    assert (await api.http.get(f"{root}/docs")).status_code == 200
    for path, item in document["paths"].items():
        for method, operation in item.items():
            where = f"{method} {path}"
            assert operation.get("summary"), where
            assert operation.get("description") or operation["tags"] == ["health"], where
            told = operation["responses"]
            assert any(code.startswith("2") for code in told), where
            if not path.startswith("/api/"):
                continue
            assert "401" in told, where
            assert operation["security"] == [{"key": []}], where
            for code, response in told.items():
                if code == "204":
                    continue
                contents = response.get("content", {})
                assert contents, (where, code)
                for kind, content in contents.items():
                    if kind == "application/octet-stream" or content.get("schema", {}).get("format") == "binary":
                        continue
                    assert "example" in content or "examples" in content or code == "422", (where, code, kind)


async def test_the_models_of_the_upstream_are_listed(api):
    models = await api.ask("GET", "/models")
    assert models["data"]
    assert all("id" in model for model in models["data"])
    assert models["next_cursor"] is None
