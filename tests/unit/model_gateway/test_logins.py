"""Logins of environments: whose they are, when they are renewed, and what becomes of one that has ended."""

import asyncio
import json
import time
from pathlib import Path

import pytest

from carrel.errors import LoginExpired
from carrel.model_gateway.logins import Logins

HOUR = 3600.0
RENEWING = """#!/bin/sh
echo "$@ key=$ANTHROPIC_API_KEY home=$HOME" >> "$CLAUDE_CONFIG_DIR/asked"
if [ -e "$CLAUDE_CONFIG_DIR/next" ]; then mv "$CLAUDE_CONFIG_DIR/next" "$CLAUDE_CONFIG_DIR/.credentials.json"; fi
"""


def credentials(token: str, seconds: float) -> str:
    return json.dumps({"claudeAiOauth": {"accessToken": token, "expiresAt": int((time.time() + seconds) * 1000)}})


@pytest.fixture
def logins(tmp_path: Path) -> Logins:
    program = tmp_path / "claude"
    program.write_text(RENEWING)
    program.chmod(0o755)
    return Logins(tmp_path / "logins", program)


def put(logins: Logins, name: str, text: str, file: str = ".credentials.json") -> Path:
    path = logins.folder(name) / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


async def test_each_environment_has_its_own(logins: Logins) -> None:
    assert logins.names() == []
    put(logins, "dev", credentials("token-of-dev", HOUR))
    put(logins, "prod", credentials("token-of-prod", HOUR))
    (logins.folder("empty")).mkdir()
    assert logins.names() == ["dev", "prod"]
    assert await logins.headers("staging") is None
    assert await logins.headers("../logins/dev") is None
    assert await logins.headers("") is None
    found = await logins.headers("dev")
    assert found is not None
    assert found["authorization"] == "Bearer token-of-dev"
    assert found["anthropic-beta"].startswith("oauth-")
    assert not (logins.folder("dev") / "asked").exists()


async def test_one_that_is_about_to_end_is_renewed_once(logins: Logins, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "the-servers-own")
    put(logins, "dev", credentials("old", 60))
    put(logins, "dev", credentials("new", HOUR), "next")
    found = await asyncio.gather(*(logins.headers("dev") for _ in range(3)))
    assert [each and each["authorization"] for each in found] == ["Bearer new"] * 3
    asked = (logins.folder("dev") / "asked").read_text()
    assert asked == f"auth status key= home={logins.folder('dev')}\n", "with no credential but its own"


async def test_one_that_cannot_be_renewed_holds_to_its_end_and_then_says_so(logins: Logins) -> None:
    put(logins, "dev", credentials("old", 60))
    for _ in range(2):
        found = await logins.headers("dev")
        assert found is not None
        assert found["authorization"] == "Bearer old"
    assert (logins.folder("dev") / "asked").read_text().count("\n") == 1, "and is not tried anew at each request"
    put(logins, "dev", credentials("old", -1))
    with pytest.raises(LoginExpired, match="carrel env login dev"):
        await logins.headers("dev")


@pytest.mark.parametrize("text", ["", "[]", '{"claudeAiOauth": 1}', '{"claudeAiOauth": {"accessToken": ""}}'])
async def test_what_is_no_login_opens_nothing(logins: Logins, text: str) -> None:
    put(logins, "dev", text)
    with pytest.raises(LoginExpired):
        await logins.headers("dev")
