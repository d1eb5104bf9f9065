"""Logins of environments: a Claude subscription that one environment's sessions use, kept outside of their sandboxes.

A login is a configuration folder of Claude Code's own, made by its `auth login`. The gateway reads the access token in it,
as it is written there now; shortly before one ends, Claude Code is run on the folder, which renews it.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import structlog

from carrel.errors import LoginExpired
from carrel.model_gateway.credentials import OAuthToken
from carrel.protocol.environments import ENVIRONMENT_NAME

__all__ = ["Logins", "command"]

log = structlog.get_logger(__name__)

_FILE = ".credentials.json"
_RENEW_BEFORE_SECONDS = 300.0
_RENEW_SECONDS = 60.0
_RENEW_AGAIN_SECONDS = 30.0
_OTHER_CREDENTIALS = (
    "ANTHROPIC_API_KEY",
    "ANTHROPIC_AUTH_TOKEN",
    "ANTHROPIC_BASE_URL",
    "ANTHROPIC_UNIX_SOCKET",
    "CLAUDE_CODE_OAUTH_TOKEN",
    "CLAUDE_CODE_USE_BEDROCK",
    "CLAUDE_CODE_USE_VERTEX",
)


def command(program: Path, folder: Path, *arguments: str) -> list[str]:
    """How Claude Code is run on a login's folder: with the proxies of our environment, and no credential of it."""
    without = [part for name in _OTHER_CREDENTIALS for part in ("-u", name)]
    return ["env", *without, f"CLAUDE_CONFIG_DIR={folder}", f"HOME={folder}", str(program), *arguments]


class Logins:
    """The logins of this installation, by the names of their environments."""

    def __init__(self, folder: Path, program: Path) -> None:
        """Look for them in `folder`. `program`: Claude Code, which renews them."""
        self._folder = folder
        self._program = program
        self._renewing: dict[str, asyncio.Lock] = {}
        self._tried: dict[str, float] = {}

    def names(self) -> list[str]:
        """The environments that have one."""
        if not self._folder.is_dir():
            return []
        return sorted(path.name for path in self._folder.iterdir() if self.has(path.name))

    def folder(self, environment: str) -> Path:
        """Where an environment's login is, or would be."""
        return self._folder / environment

    def has(self, environment: str) -> bool:
        """Whether the environment has one, valid or not."""
        return re.fullmatch(ENVIRONMENT_NAME, environment) is not None and (self._folder / environment / _FILE).exists()

    async def headers(self, environment: str) -> Mapping[str, str] | None:
        """The headers that carry an environment's login; None where it has none.

        Raises:
            LoginExpired: it has ended, and could not be renewed.
        """
        if not self.has(environment):
            return None
        found = self._read(environment)
        if _ends_within(found, _RENEW_BEFORE_SECONDS):
            await self._renew(environment)
            found = self._read(environment)
        token = found.get("accessToken")
        if not isinstance(token, str) or not token or _ends_within(found, 0.0):
            raise LoginExpired(environment)
        return OAuthToken(token).headers()

    def _read(self, environment: str) -> dict[str, Any]:
        try:
            found = json.loads((self._folder / environment / _FILE).read_text())["claudeAiOauth"]
        except (OSError, ValueError, KeyError, TypeError):  # not whole, or of a kind we do not know: it opens nothing
            return {}
        return found if isinstance(found, dict) else {}

    async def _renew(self, environment: str) -> None:
        async with self._renewing.setdefault(environment, asyncio.Lock()):
            if not _ends_within(self._read(environment), _RENEW_BEFORE_SECONDS):
                return  # somebody else has waited for it as well
            now = time.monotonic()
            if now - self._tried.get(environment, -_RENEW_AGAIN_SECONDS) < _RENEW_AGAIN_SECONDS:
                return
            self._tried[environment] = now
            folder = self._folder / environment
            process = await asyncio.create_subprocess_exec(
                *command(self._program, folder, "auth", "status"),
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            try:
                async with asyncio.timeout(_RENEW_SECONDS):
                    await process.wait()
            except TimeoutError:
                log.warning("login.not_renewed", environment=environment, why="Claude Code did not end in time")
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
            renewed = not _ends_within(self._read(environment), _RENEW_BEFORE_SECONDS)
            log.info("login.renewed" if renewed else "login.not_renewed", environment=environment)


def _ends_within(found: Mapping[str, Any], seconds: float) -> bool:
    ends = found.get("expiresAt")
    return isinstance(ends, int | float) and ends / 1000 - seconds <= time.time()
