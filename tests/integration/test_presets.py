"""The presets' servers, of the sandbox image, used by the real agent."""

from typing import Any

import pytest

pytestmark = [pytest.mark.cli, pytest.mark.requires("docker", "images")]


async def test_files_and_a_database_by_their_presets(start: Any) -> None:
    api = await start(runtime="docker", mcp_servers={"files": {"preset": "filesystem"}})
    session = await api.session(mcp_servers={"shop": {"preset": "sqlite", "path": "shop.db"}})
    result = await api.run(
        session,
        '[[tool: mcp__shop__create_table | {"query": "CREATE TABLE tea (price INT)"}]]'
        '[[tool: mcp__shop__write_query | {"query": "INSERT INTO tea VALUES (42)"}]]'
        '[[tool: mcp__shop__read_query | {"query": "SELECT price FROM tea"}]]'
        '[[tool: mcp__files__write_file | {"path": "note.txt", "content": "of tea"}]]'
        '[[tool: mcp__files__read_text_file | {"path": "/etc/passwd"}]]',
    )
    *_, price, written, outside = (str(call["result"]) for call in result["tool_calls"])
    assert "42" in price
    assert "Successfully wrote" in written
    assert "Access denied" in outside
    names = {entry["path"] for entry in (await api.ask("GET", f"/sessions/{session}/files"))["data"]}
    assert {"shop.db", "note.txt"} <= names
