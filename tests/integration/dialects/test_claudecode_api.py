"""What claudecode-api answers, its token and its origins, and the older services' defects that ours must not have."""

import asyncio
import json
import time

import httpx
import pytest

pytestmark = pytest.mark.requires("bubblewrap")

cli = pytest.mark.cli

TOKEN = "a-static-token-of-thirty-bytes"


@pytest.fixture
async def api(serve, stack):
    server = await serve(
        dialects={"claudecode-api": {"port": 0}}, static_token=TOKEN, cors_origins=["https://app.example.com"]
    )
    url, headers = server.listeners["claudecode-api"], {"Authorization": f"Bearer {TOKEN}"}
    http = await stack.enter_async_context(httpx.AsyncClient(base_url=url, headers=headers, timeout=60))
    http.server = server
    return http


async def execute(http, prompt, **more):
    answer = await http.post("/api/execute", json={"env": "dev", "prompt": prompt, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()


async def made(http, env="dev"):
    answer = await http.post("/api/sessions", json={"env": env})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert set(body) == {"id", "sessionId", "session_id", "env"}
    assert body["id"] == body["sessionId"] == body["session_id"]
    assert body["env"] == env
    return body["id"]


# ---------------------------------------------------------------------------------------------------------- the token


@pytest.mark.parametrize("where", ["its own port", "/compat"])
async def test_health_is_open_and_all_else_wants_the_token(api, where):
    base = str(api.base_url) if where == "its own port" else f"{api.server.url}/compat/claudecode-api"
    async with httpx.AsyncClient(base_url=base) as http:
        health = await http.get("/health")
        assert (health.status_code, health.json()) == (200, {"status": "ok"})
        paths = [
            ("GET", "/api/containers/dev"),
            ("POST", "/api/containers/dev/start"),
            ("POST", "/api/containers/dev/stop"),
            ("POST", "/api/execute"),
            ("POST", "/api/sessions"),
            ("GET", "/api/sessions/dev"),
            ("DELETE", "/api/sessions/dev/x"),
        ]
        cases = [
            ({}, 401),
            ({"Authorization": "Bearer wrong"}, 401),
            ({"Authorization": f"Bearer {TOKEN}x"}, 401),
            ({"Authorization": "Bearer"}, 400),
            ({"Authorization": "Basic eDp5"}, 400),
            ({"Authorization": TOKEN}, 400),
            ({"X-Forwarded-User": "admin", "X-API-Token": TOKEN}, 401),
        ]
        for method, path in paths:
            for headers, expected in cases:
                answer = await http.request(method, path, headers=headers, content=b"{")
                assert answer.status_code == expected, (method, path, headers)
                assert answer.headers["content-type"].startswith("text/plain")
                assert answer.headers["www-authenticate"].startswith("Bearer")
                assert TOKEN not in answer.text


async def test_16_the_old_names_of_its_settings(tmp_path, monkeypatch, serve):
    monkeypatch.setenv("API_TOKEN", TOKEN)
    monkeypatch.setenv("ALLOWED_ORIGINS", "https://one.example.com, https://two.example.com")
    server = await serve(dialects={"claudecode-api": {"port": 0}})
    async with httpx.AsyncClient(base_url=server.listeners["claudecode-api"]) as http:
        for origin, allowed in [
            ("https://one.example.com", True),
            ("https://two.example.com", True),
            ("https://evil.example.com", False),
        ]:
            asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            asked["Access-Control-Request-Headers"] = "authorization,content-type"
            preflight = await http.options("/api/execute", headers=asked)
            assert (preflight.headers.get("access-control-allow-origin") == origin) is allowed
        headers = {"Authorization": f"Bearer {TOKEN}", "Origin": "https://one.example.com"}
        answer = await http.get("/api/containers/dev", headers=headers)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://one.example.com"


# ------------------------------------------------------------------------------------------------------- environments


async def test_dev_staging_and_prod_are_there_and_no_other(api):
    for name in ("dev", "staging", "prod"):
        answer = await api.get(f"/api/containers/{name}")
        assert (answer.status_code, answer.json()) == (
            200,
            {"exists": True, "running": True, "name": f"claude-agent-{name}"},
        )
    answer = await api.get("/api/containers/nowhere")
    assert answer.json() == {"exists": False, "running": False, "name": "claude-agent-nowhere"}
    assert (await api.post("/api/containers/nowhere/start")).status_code == 404
    assert (await api.post("/api/sessions", json={"env": "nowhere"})).status_code == 404
    assert (await api.get("/api/sessions/nowhere")).status_code == 404


async def test_those_that_were_written_are_there_instead(serve, stack):
    server = await serve(dialects={"claudecode-api": {"port": 0}}, static_token=TOKEN)
    async with httpx.AsyncClient(base_url=f"{server.url}/api/v1") as native:
        headers = {"Authorization": f"Bearer {server.key}"}
        for name in ("staging", "prod"):
            assert (await native.delete(f"/environments/{name}", headers=headers)).status_code == 204
        names = [each["name"] for each in (await native.get("/environments", headers=headers)).json()["data"]]
    assert names == ["default", "dev"]
    again = await serve(data=server.data.parent / "other", dialects={"claudecode-api": {}}, static_token=TOKEN)
    assert again.url


@cli
async def test_one_that_is_stopped_takes_no_prompts_until_it_is_started(api):
    session = await made(api)
    await execute(api, "hello", sessionId=session)
    running = asyncio.create_task(execute(api, "[[bash: sleep 1; echo done]]", sessionId=session))
    async with httpx.AsyncClient(base_url=f"{api.server.url}/api/v1") as native:
        headers = {"Authorization": f"Bearer {api.server.key}"}

        async def status():
            return (await native.get("/environments/dev/status", headers=headers)).json()

        async with asyncio.timeout(30):
            while (await native.get(f"/sessions/{session}", headers=headers)).json()["status"] != "running":
                await asyncio.sleep(0.02)
        stopped = await api.post("/api/containers/dev/stop")
        assert stopped.json() == {"exists": True, "running": False, "name": "claude-agent-dev"}
        assert (await api.get("/api/containers/dev")).json()["running"] is False
        for more in ({}, {"sessionId": session}):
            refused = await execute(api, "hello", **more)
            assert refused["success"] is False
            assert "stopped" in refused["error"]
        assert (await running)["success"] is True, "what it has taken is answered"
        async with asyncio.timeout(30):
            while (await status())["live_sessions"]:
                await asyncio.sleep(0.05)
        assert (await execute(api, "hello", env="staging"))["success"] is True
        assert (await api.post("/api/containers/dev/start")).json()["running"] is True
        assert "turn 3" in (await execute(api, "hello", sessionId=session))["output"]


# ---------------------------------------------------------------------------------------------------------- execution


@cli
async def test_a_prompt_is_answered_in_text_and_as_the_clis_object(api):
    plain = await execute(api, '[[say: Yes {"a": 1} ]]')
    assert plain == {"success": True, "output": plain["output"]}
    assert '{"a": 1}' in plain["output"]
    told = await execute(api, "[[bash: echo 1]] [[say: done]]", jsonOutput=True)
    assert set(told) == {"success", "output", "json_output"}
    assert isinstance(told["json_output"], str)
    result = json.loads(told["json_output"])
    assert (result["type"], result["subtype"], result["is_error"]) == ("result", "success", False)
    assert result["result"] == told["output"]
    assert result["num_turns"] == 2
    assert {"duration_ms", "total_cost_usd", "usage"} <= set(result)
    # Its session goes on under the id that is told there.
    again = await execute(api, "hello", sessionId=result["session_id"])
    assert "turn 2" in again["output"]


@cli
async def test_what_goes_wrong_is_told_in_the_body(api):
    session = await made(api, "staging")
    for more in ({"env": "nowhere"}, {"sessionId": "00000000-0000-4000-8000-000000000000"}, {"sessionId": session}):
        answer = await execute(api, "hello", **more)
        assert answer["success"] is False
        assert answer["error"]
        assert "output" not in answer
    failed = await execute(api, "[[error: 400 x50]]", jsonOutput=True)
    assert failed["success"] is False
    assert json.loads(failed["json_output"])["is_error"] is True


@cli
async def test_11_two_prompts_at_once_get_their_own_answers(api):
    session = await made(api)
    answers = await asyncio.gather(*(execute(api, f"[[say: answer {n}]]", sessionId=session) for n in range(4)))
    for n, answer in enumerate(answers):
        assert answer["output"].startswith(f"answer {n}")


@cli
async def test_9_text_comes_whole(api):
    text = '{ "quotes" } \\ ü𝄞 }}{{ ' * 20
    answer = await execute(api, f"[[say: {text}]]", jsonOutput=True)
    assert text.strip() in answer["output"]
    assert text.strip() in json.loads(answer["json_output"])["result"]


@cli
async def test_5_a_client_that_goes_away_ends_nothing(api):
    session = await made(api)
    body = {"env": "dev", "prompt": "[[bash: sleep 1; echo one > one.txt]]", "sessionId": session}
    with pytest.raises(httpx.ReadTimeout):
        await api.post("/api/execute", json=body, timeout=0.5)
    answer = await execute(api, "[[bash: cat one.txt]] [[say: next]]", sessionId=session)
    assert answer["output"].startswith("next")


# ----------------------------------------------------------------------------------------------------------- sessions


async def test_sessions_are_listed_newest_first_of_one_environment_and_fifty_at_most(api):
    other = await made(api, "prod")
    ids = [await made(api) for _ in range(52)]
    listed = (await api.get("/api/sessions/dev")).json()
    assert [each["id"] for each in listed] == ids[:1:-1]
    first = listed[0]
    assert set(first) == {"id", "environment", "title", "created_at", "updated_at"}
    assert first["environment"] == "dev"
    assert first["title"] == f"Thread {first['id'][-8:]}"
    assert len({each["title"] for each in listed}) == 50
    for stamp in (first["created_at"], first["updated_at"]):
        assert isinstance(stamp, str)
        assert abs(int(stamp) - time.time()) < 60
    assert [each["id"] for each in (await api.get("/api/sessions/prod")).json()] == [other]


@cli
async def test_1_what_is_deleted_stays_deleted(api):
    session = await made(api)
    await execute(api, "hello", sessionId=session)
    assert (await api.delete(f"/api/sessions/staging/{session}")).status_code == 404
    deleted = await api.delete(f"/api/sessions/dev/{session}")
    assert (deleted.status_code, deleted.content) == (204, b"")
    for _ in range(2):
        assert (await api.delete(f"/api/sessions/dev/{session}")).status_code == 404
        assert (await execute(api, "hello", sessionId=session))["success"] is False
    assert (await api.get("/api/sessions/dev")).json() == []


async def test_8_making_a_session_asks_no_model_and_starts_no_process(api):
    await made(api)
    assert len(api.server.hub) == 0


@pytest.mark.parametrize("auth", ["keys"])
async def test_13_everybody_sees_their_own_and_only_the_trusted_start_and_stop(serve, auth):
    server = await serve(dialects={"claudecode-api": {"auth": auth}})
    async with httpx.AsyncClient(base_url=f"{server.url}/compat/claudecode-api", timeout=60) as http:

        async def holder(user):
            body, headers = {"user": user}, {"Authorization": f"Bearer {server.key}"}
            made = await http.post(f"{server.url}/api/v1/keys", json=body, headers=headers)
            return {"Authorization": f"Bearer {made.json()['key']}"}

        alice, bob = await holder("alice"), await holder("bob")
        session = (await http.post("/api/sessions", json={"env": "dev"}, headers=alice)).json()["id"]
        for other in (bob, {"Authorization": f"Bearer {server.key}"}):
            assert (await http.get("/api/sessions/dev", headers=other)).json() == []
            assert (await http.delete(f"/api/sessions/dev/{session}", headers=other)).status_code == 404
            body = {"env": "dev", "prompt": "x", "sessionId": session}
            assert (await http.post("/api/execute", json=body, headers=other)).json()["success"] is False
        assert (await http.post("/api/containers/dev/stop", headers=alice)).status_code == 403
        assert (await http.get("/api/containers/dev", headers=alice)).json()["running"] is True


@cli
async def test_14_after_a_restart_sessions_go_on(serve, tmp_path):
    from carrel.cli.server import running
    from carrel.settings import load_settings

    settings = {
        "data": tmp_path / "again",
        "port": 0,
        "model_upstream": "scripted",
        "dialects": {"claudecode-api": {"port": 0}},
        "static_token": TOKEN,
        "drain_seconds": 0,
    }
    session = None
    for turn in (1, 2):
        async with running(load_settings(overrides=settings)) as server:
            url, headers = server.listeners["claudecode-api"], {"Authorization": f"Bearer {TOKEN}"}
            async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60) as http:
                session = session or await made(http)
                assert f"turn {turn}" in (await execute(http, "hello", sessionId=session))["output"]
