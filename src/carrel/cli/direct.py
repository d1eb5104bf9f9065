"""`credentials: direct`: what each sandbox is told of the model's provider."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from carrel.errors import MissingCredential
from carrel.settings import Settings, provider_environment

__all__ = ["check_direct", "direct_environment"]

_CREDENTIALS = {
    "ANTHROPIC_API_KEY": "anthropic_api_key",
    "ANTHROPIC_AUTH_TOKEN": "anthropic_auth_token",
    "CLAUDE_CODE_OAUTH_TOKEN": "claude_code_oauth_token",
}
_PROVIDERS = ("CLAUDE_CODE_USE_BEDROCK", "CLAUDE_CODE_USE_VERTEX")


def direct_environment(settings: Settings) -> dict[str, str] | None:
    """The variables that every agent gets; None where credentials stay with the gateway."""
    if settings.credentials != "direct":
        return None
    found = provider_environment()
    for variable, name in _CREDENTIALS.items():
        secret: Any = getattr(settings, name)
        if secret is not None:
            found[variable] = secret.get_secret_value()
    if not any(name in found for name in _PROVIDERS):
        upstream = settings.model_upstream
        found["ANTHROPIC_BASE_URL"] = upstream if upstream.startswith("http") else settings.anthropic_base_url
    return found


def check_direct(environment: Mapping[str, str]) -> None:
    """Whether an agent could reach a model with these. Raises MissingCredential."""
    if not any(name in environment for name in (*_CREDENTIALS, *_PROVIDERS)):
        raise MissingCredential
