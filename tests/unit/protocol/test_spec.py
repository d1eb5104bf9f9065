"""What callers may write, and what they are told when it is wrong."""

from typing import Any

import pytest
from pydantic import ValidationError

from carrel.model import PermissionMode
from carrel.protocol.spec import (
    LIVE_FIELDS,
    MAX_METADATA_BYTES,
    CreateSession,
    CreateTurn,
    Query,
    SessionSpec,
    TurnOptions,
    UpdateSession,
)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"system_prompt": "x"},
        {"append_system_prompt": "x"},
        {"tools": []},
        {"permission_mode": "plan", "model": "opus", "fallback_model": "haiku"},
        {
            "mcp_servers": {
                "a": {"command": "x"},
                "b": {"type": "http", "url": "http://x"},
                "c": {"type": "sse", "url": "u"},
            }
        },
        {"agents": {"a": {"description": "d", "prompt": "p", "tools": ["Bash"]}}},
        {"skills": "all"},
        {"skills": ["a"]},
        {"setting_sources": ["user", "project", "local"]},
        {"thinking": {"type": "enabled", "budget_tokens": 5}},
        {"thinking": {"type": "adaptive"}},
        {"output_format": {"type": "json_schema", "schema": {"type": "object"}}},
        {"env_vars": {"MY_VAR": "1", "_x": ""}},
        {"title": "é" * 500, "metadata": {"a": {"b": [1]}}, "ttl_seconds": 1, "workspace": {"type": "ephemeral"}},
    ],
)
def test_a_session_may_be_asked_for_so(body: dict[str, Any]) -> None:
    session = CreateSession.model_validate(body)
    spec = session.spec()
    assert type(spec) is SessionSpec
    given = {name: value for name, value in body.items() if name in SessionSpec.model_fields}
    assert spec.model_dump(mode="json", exclude_none=True) == given


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"system_prompt": "x", "append_system_prompt": "y"}, "not both"),
        ({"unheard_of": 1}, "Extra inputs"),
        ({"permission_mode": "yes"}, "bypassPermissions"),
        ({"model": ""}, "at least 1 character"),
        ({"model": "a\x00b"}, "match pattern"),
        ({"tools": [""]}, "at least 1 character"),
        ({"mcp_servers": {"a": {}}}, "a: a stdio server needs command"),
        ({"mcp_servers": {"a": {"type": "http"}}}, "a: a http server needs url"),
        ({"mcp_servers": {"a": {"type": "ftp", "url": "x"}}}, "stdio, sse or http"),
        ({"agents": {"a": {"prompt": "p"}}}, "a: description: Field required"),
        ({"skills": "some"}, "skills"),
        ({"thinking": {"type": "loud"}}, "adaptive, enabled or disabled"),
        ({"thinking": {"type": "enabled"}}, "budget_tokens"),
        ({"output_format": {"type": "xml"}}, "json_schema"),
        ({"env_vars": {"1A": "x"}}, "match pattern"),
        ({"env_vars": {"A": "x\x00"}}, "match pattern"),
        ({"max_turns": 0}, "greater than or equal to 1"),
        ({"ttl_seconds": 0}, "greater than or equal to 1"),
        ({"metadata": {"a": "x" * MAX_METADATA_BYTES}}, f"larger than {MAX_METADATA_BYTES} bytes"),
        ({"title": "x" * 501}, "at most 500"),
        ({"workspace": {"type": "named"}}, "workspace"),
    ],
)
def test_a_wrong_session_is_refused_in_plain_words(body: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        CreateSession.model_validate(body)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["ANTHROPIC_API_KEY", "anthropic_base_url", "CLAUDE_CONFIG_DIR", "CARREL_SANDBOX", "LD_PRELOAD", "PATH", "HOME",
     "NODE_OPTIONS", "IS_SANDBOX", "HTTPS_PROXY"],
)  # fmt: skip
def test_what_carrel_sets_cannot_be_given(name: str) -> None:
    with pytest.raises(ValidationError, match="set by Carrel"):
        CreateSession(env_vars={name: "x"})


def test_every_option_says_when_it_applies() -> None:
    applies = {name: (info.json_schema_extra or {})["x-applies"] for name, info in SessionSpec.model_fields.items()}  # type: ignore[index]
    assert set(applies.values()) == {"live", "launch"}
    assert {"model", "permission_mode"} == LIVE_FIELDS == {name for name, when in applies.items() if when == "live"}
    assert all(info.description for info in SessionSpec.model_fields.values())


def test_null_in_an_update_is_not_the_same_as_nothing() -> None:
    body = UpdateSession.model_validate({"model": None, "title": "x"})
    assert body.model_fields_set == {"model", "title"}
    with pytest.raises(ValidationError):
        UpdateSession.model_validate({"ttl_seconds": 5})


@pytest.mark.parametrize(
    ("body", "blocks"),
    [
        ({"prompt": "hi"}, [{"type": "text", "text": "hi"}]),
        (
            {"content": [{"type": "text", "text": "a"}, {"type": "image", "source": {"type": "base64", "data": "x"}}]},
            [{"type": "text", "text": "a"}, {"type": "image", "source": {"type": "base64", "data": "x"}}],
        ),
    ],
)
def test_a_prompt_becomes_blocks(body: dict[str, Any], blocks: list[dict[str, Any]]) -> None:
    assert CreateTurn.model_validate(body).blocks() == blocks


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "either prompt or content"),
        ({"content": [{"type": "text"}]}, "Field required"),
        ({"content": [{"type": "image"}]}, "Field required"),
        ({"prompt": "a", "content": [{"type": "text", "text": "b"}]}, "either prompt or content"),
        ({"prompt": " \n"}, "blank"),
        ({"prompt": ""}, "at least 1 character"),
        ({"content": []}, "at least 1 item"),
        ({"content": [{"type": "video"}]}, "document"),
        ({"prompt": "x", "timeout_seconds": 0}, "greater than 0"),
        ({"prompt": "x", "timeout_seconds": "inf"}, "less than or equal"),
        ({"prompt": "x", "on_sandbox_lost": "retry"}, "continue"),
        ({"prompt": "x", "max_turns": 0}, "greater than or equal to 1"),
        ({"prompt": "x", "unheard_of": 1}, "Extra inputs"),
    ],
)
def test_a_wrong_turn_is_refused_in_plain_words(body: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        CreateTurn.model_validate(body)
    assert message in str(caught.value)


def test_a_turns_options_are_kept_apart_from_its_prompt() -> None:
    options = CreateTurn(prompt="x", wait=True, timeout_seconds=2, model="m").options()
    assert type(options) is TurnOptions
    assert (options.timeout_seconds, options.model, options.on_disconnect) == (2, "m", "continue")


def test_a_query_is_a_session_and_a_turn() -> None:
    query = Query.model_validate(
        {"prompt": "hi", "wait": True, "permission_mode": "plan", "max_turns": 2, "model": "m", "title": "t"}
    )
    assert query.session().spec().permission_mode is PermissionMode.PLAN
    assert query.session().title == "t"
    turn = query.turn()
    assert (turn.prompt, turn.wait, turn.max_turns) == ("hi", True, 2)
    with pytest.raises(ValidationError):
        Query.model_validate({"permission_mode": "plan"})


@pytest.mark.parametrize("network", ["open", "gateway-only", {"allow": ["a.org", "*.b.org:8443"]}])
def test_a_network_policy_is_stored_as_it_is_written(network):
    spec = SessionSpec.model_validate({"network": network})
    assert spec.model_dump(mode="json", exclude_none=True) == {"network": network}
    assert CreateSession.model_validate({"network": network}).spec() == spec


@pytest.mark.parametrize(
    "network", [{}, [], 0, "host", {"mode": "open"}, {"allow": []}, {"allow": "a.org"}, {"deny": []}]
)
def test_no_other_form_of_a_network_policy_is_taken(network):
    with pytest.raises(ValidationError):
        SessionSpec.model_validate({"network": network})
