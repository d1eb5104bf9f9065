"""What the settings say of dialects, as the dialects want to hear it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import structlog

from carrel.api.dialects import DialectAuth, DialectOptions
from carrel.api.dialects.auth import AuthMode
from carrel.api.origins import LOOPBACK_NAMES
from carrel.auth import Authenticator
from carrel.model import ADMIN
from carrel.model_gateway import credentials
from carrel.protocol.environments import EnvironmentSpec
from carrel.sessions.environments import Environments
from carrel.settings import Settings

__all__ = ["OLD_ENVIRONMENTS", "addresses", "dialect_options", "prepare_dialects", "say_dialects"]

OLD_ENVIRONMENTS = ("dev", "staging", "prod")
"""Those of claudecode-api."""

log = structlog.get_logger(__name__)


def addresses(settings: Settings) -> dict[str, tuple[str, int]]:
    """Host and port of every listener: `api`, and each dialect that has one of its own."""
    own: dict[str, tuple[str, int]] = {
        name: (one.host, one.port) for name, one in settings.dialects.items() if one.port is not None
    }
    return {"api": (settings.host, settings.port), **own}


def dialect_options(
    settings: Settings, name: str, authenticator: Authenticator, source: Any, *, isolated: bool
) -> DialectOptions:
    """How a dialect is served.

    Args:
        settings: everything.
        name: which dialect.
        authenticator: knows who holds a token.
        source: the model's credential.
        isolated: whether sandboxes are.
    """
    chosen = settings.dialects[name]  # type: ignore[index]
    local = {chosen.host, settings.host} <= LOOPBACK_NAMES
    # A server that wants no key has no admin's key either, which is the one that clients of a dialect would bring.
    mode: AuthMode = "none" if settings.auth == "none" and chosen.auth == "keys" and local else chosen.auth
    storage = "memory" if settings.memory else "sqlite"
    return DialectOptions(
        auth=DialectAuth(mode, authenticator.authenticate),
        users_dir=settings.users.base_dir or settings.data / "users",
        storage_type=storage if settings.database.url is None else "postgresql",
        authenticated=not isinstance(source, credentials.NoCredential),
        allow_bypass=isolated or settings.allow_bypass_without_isolation,
        default_model=settings.defaults.model or settings.anthropic_model,
        chosen=frozenset(settings.defaults.model_dump(exclude_none=True)),
    )


async def prepare_dialects(settings: Settings, environments: Environments) -> None:
    """Write the environments that clients of claudecode-api ask for, where no environment was ever written."""
    if "claudecode-api" not in settings.dialects:
        return
    page = await environments.page(ADMIN, cursor=None, limit=2)
    if any(each.version > 0 for each in page.items):
        return
    for name in OLD_ENVIRONMENTS:
        await environments.put(ADMIN, name, EnvironmentSpec())


def say_dialects(settings: Settings, listeners: Mapping[str, str]) -> None:
    """Log where dialects are, and which of them let everybody in."""
    for name, chosen in settings.dialects.items():
        url = listeners.get(name)
        log.info("dialect.started", dialect=name, url=url, compat=f"{listeners['api']}/compat/{name}", auth=chosen.auth)
        if chosen.auth == "none":
            log.warning("dialect.no_auth", dialect=name, why="auth is none: whoever reaches it can use it")
