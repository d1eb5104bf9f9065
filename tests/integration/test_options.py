"""The options of a session reach its agent, and a change of them when it is said to."""

import json

import pytest

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap")]


async def initialised(api, session) -> dict:
    found = [event["data"] for event in await api.events(session) if event["type"] == "agent.initialised"]
    return found[-1]


async def test_tools_variables_and_prompts_reach_the_agent(api):
    session = await api.session(
        tools=["Bash", "Read"],
        env_vars={"GREETING": "hello there"},
        append_system_prompt="Be brief.",
        model="claude-sonnet-5",
        effort="low",
        thinking={"type": "disabled"},
        fallback_model="claude-haiku-5-5",
        setting_sources=[],
    )
    result = await api.run(session, "[[bash: echo $GREETING]]")
    assert result["tool_calls"][0]["result"] == "hello there"
    known = await initialised(api, session)
    assert sorted(known["tools"]) == ["Bash", "Read"]
    assert known["model"] == "claude-sonnet-5"
    assert known["permission_mode"] == "bypassPermissions"
    assert known["agent_version"]


async def test_a_disallowed_tool_is_not_there(api):
    session = await api.session(disallowed_tools=["WebSearch", "Bash(rm *)"])
    result = await api.run(session, "[[write: a | b]] [[bash: rm a]] [[bash: cat a]]")
    assert "WebSearch" not in (await initialised(api, session))["tools"]
    assert [call["is_error"] for call in result["tool_calls"]] == [False, True, False]


async def test_a_model_applies_at_once_and_tools_at_the_next_wake(start):
    api = await start(idle_timeout_seconds=1.5)
    session = await api.session(model="claude-opus-5-5", tools=["Bash"])
    await api.run(session, "hello")
    await api.ask("PATCH", f"/sessions/{session}", json={"model": "claude-haiku-5-5", "tools": ["Bash", "Glob"]})
    await api.run(session, "hello")
    models = [event["data"]["model"] for event in await api.events(session) if event["type"] == "message.assistant"]
    assert models == ["claude-opus-5-5", "claude-haiku-5-5"]
    assert "Glob" not in (await initialised(api, session))["tools"]
    await api.until_status(session, "idle")
    await api.run(session, "hello")
    assert "Glob" in (await initialised(api, session))["tools"]


async def test_a_session_of_its_own_model_default(start):
    api = await start(anthropic_model="claude-haiku-5-5")
    session = await api.session()
    await api.run(session, "hello")
    assert (await initialised(api, session))["model"] == "claude-haiku-5-5"


async def test_a_sub_agents_words_are_its_own(api):
    agents = {"helper": {"description": "Helps.", "prompt": "You help."}}
    session = await api.session(agents=agents)
    call = json.dumps({"description": "x", "prompt": "[[bash: echo from below]]", "subagent_type": "helper"})
    result = await api.run(session, f"[[tool: Task | {call}]] [[say: above]]")
    assert result["status"] == "succeeded", result
    assert "above" in result["text"]
    events = await api.events(session)
    (task,) = [e["data"]["id"] for e in events if e["type"] == "tool.called" and e["data"]["tool"] in ("Task", "Agent")]
    below = [e["data"] for e in events if e["type"] == "tool.called" and e["data"]["parent_tool_use_id"] == task]
    assert [data["input"]["command"] for data in below] == ["echo from below"]
    assert all(
        e["data"]["parent_tool_use_id"] is None
        for e in events
        if e["type"] == "message.assistant" and e["data"]["text"] in result["text"] and "above" in e["data"]["text"]
    )


async def test_memory_mode_keeps_nothing(start, tmp_path):
    api = await start(memory=True)
    session = await api.session()
    assert "turn 1" in (await api.run(session, "hello"))["text"]
    assert not (tmp_path / "data" / "carrel.db").exists()
