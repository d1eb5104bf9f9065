"""Custom tools as an environment declares them: what fits, and what is refused in plain words."""

from typing import Any

import pytest
from pydantic import ValidationError

from carrel.protocol.environments import EnvironmentSpec

TOOL = {
    "name": "price",
    "description": "What an article costs.",
    "input_schema": {"type": "object"},
    "url": "https://shop.example/price",
}


def spec(*tools: dict[str, Any], **more: Any) -> EnvironmentSpec:
    return EnvironmentSpec.model_validate({"custom_tools": [*tools], **more})


def test_agents_reach_them_by_the_gateway() -> None:
    assert spec(TOOL).behind_gateway == ["custom"]
    assert spec().behind_gateway == []


def test_who_is_no_admin_is_not_shown_where_they_are() -> None:
    shown = spec(TOOL).without_inner_facts()
    assert "shop.example" not in shown.model_dump_json()
    assert shown.custom_tools[0].name == "price"


@pytest.mark.parametrize(
    ("tools", "more", "words"),
    [
        ([TOOL, TOOL], {}, "custom_tools: each name is taken once"),
        ([TOOL], {"options": {"mcp_servers": {"custom": {"command": "x"}}}}, "the name is that of the custom tools"),
        ([TOOL | {"signed_with": "KEY"}], {}, "custom_tools: the secret KEY is not among secrets"),
        ([TOOL | {"url": "http://shop.example/price"}], {}, "url"),
        ([TOOL | {"url": "http://localhost.example/price"}], {}, "url"),
        ([TOOL | {"url": "file:///etc/passwd"}], {}, "url"),
        ([TOOL | {"url": "https://shop.example:port/price"}], {}, "it is no address such as"),
        ([TOOL | {"url": "https://"}], {}, "it is no address such as"),
        ([TOOL | {"input_schema": {"type": "array"}}], {}, "its type must be object"),
        ([TOOL | {"timeout_seconds": 601}], {}, "timeout_seconds"),
        ([TOOL | {"name": "a b"}], {}, "name"),
    ],
)
def test_what_is_wrong_is_told(tools: list[dict[str, Any]], more: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        spec(*tools, **more)
    assert words in str(caught.value)


def test_a_secret_that_signs_is_used() -> None:
    assert spec(TOOL | {"signed_with": "KEY"}, secrets=[{"name": "KEY"}]).custom_tools[0].signed_with == "KEY"
