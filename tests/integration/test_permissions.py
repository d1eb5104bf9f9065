"""Modes and rules on the real Claude Code: our hook decides, and nothing in a workspace widens what it allows."""

import json

import pytest

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap")]

WRITE = "[[write: /workspace/made.txt | made]]"


async def outcome(api, session, prompt):
    """Whether the one tool call went through, and what the agent was told."""
    result = await api.run(session, prompt)
    assert result["status"] == "succeeded", result
    (call,) = result["tool_calls"]
    return not call["is_error"], json.dumps(call["result"])


@pytest.mark.parametrize(
    ("spec", "prompt", "goes_through", "told"),
    [
        ({"permission_mode": "default"}, WRITE, False, "nobody who can be asked"),
        ({"permission_mode": "default"}, "[[bash: ls -la && echo seen]]", True, "seen"),
        ({"permission_mode": "default", "permissions": {"allow": ["Edit(/made.txt)"]}}, WRITE, True, ""),
        ({"permission_mode": "default", "allowed_tools": ["Write"]}, WRITE, True, ""),
        ({"permission_mode": "acceptEdits"}, WRITE, True, ""),
        ({"permission_mode": "acceptEdits"}, "[[bash: python3 -c 1]]", False, "nobody who can be asked"),
        ({"permission_mode": "dontAsk"}, WRITE, False, "dontAsk"),
        ({"permission_mode": "plan"}, WRITE, False, "plan"),
        ({"permissions": {"deny": ["Edit(*.txt)"]}}, WRITE, False, "a deny rule: Edit(*.txt)"),
        ({"permissions": {"ask": ["Bash(rm *)"]}}, "[[bash: true; rm -f x]]", False, "an ask rule: Bash(rm *)"),
        ({"permissions": {"ask": ["Bash(rm *)"]}}, "[[bash: echo fine]]", True, "fine"),
    ],
)
async def test_the_hook_decides(api, spec, prompt, goes_through, told):
    session = await api.session(ask_expires_seconds=0, **spec)
    happened, said = await outcome(api, session, prompt)
    assert happened is goes_through, said
    assert told in said


async def test_settings_in_a_workspace_do_not_widen(api):
    session = await api.session(
        ask_expires_seconds=0, permission_mode="default", setting_sources=["user", "project", "local"]
    )
    settings = {"permissions": {"allow": ["Write", "Bash"], "defaultMode": "bypassPermissions"}}
    await api.ask("PUT", f"/sessions/{session}/files/.claude/settings.json", content=json.dumps(settings))
    happened, said = await outcome(api, session, WRITE)
    assert not happened
    assert "nobody who can be asked" in said


async def test_settings_in_a_workspace_narrow(api):
    session = await api.session(setting_sources=["user", "project", "local"])
    settings = {"permissions": {"deny": ["Write"]}}
    await api.ask("PUT", f"/sessions/{session}/files/.claude/settings.json", content=json.dumps(settings))
    happened, _ = await outcome(api, session, WRITE)
    assert not happened


async def test_the_mode_is_changed_live(api):
    session = await api.session(ask_expires_seconds=0, permission_mode="default")
    happened, _ = await outcome(api, session, WRITE)
    assert not happened
    await api.ask("PATCH", f"/sessions/{session}", json={"permission_mode": "acceptEdits"})
    happened, said = await outcome(api, session, WRITE)
    assert happened, said
    await api.ask("PATCH", f"/sessions/{session}", json={"permission_mode": "dontAsk"})
    happened, _ = await outcome(api, session, "[[bash: touch x]]")
    assert not happened


async def test_a_wrong_rule_is_told(api):
    refused = await api.ask("POST", "/sessions", 422, json={"permissions": {"allow": ["Bash("]}})
    assert "is not a rule" in json.dumps(refused)
