"""The real credential of the model. It is kept here, and goes nowhere but upstream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from carrel import abc
from carrel.errors import MissingCredential

OAUTH_BETA = "oauth-2025-04-20"
"""What Anthropic's API wants beside an OAuth token."""


@dataclass(frozen=True)
class ApiKey(abc.CredentialSource):
    """An API key."""

    key: str = field(repr=False)

    def headers(self) -> Mapping[str, str]:
        """The headers that carry it."""
        return {"x-api-key": self.key}

    def describe(self) -> str:
        """Its name."""
        return "ANTHROPIC_API_KEY"


@dataclass(frozen=True)
class AuthToken(abc.CredentialSource):
    """A bearer token, as gateways and proxies of the API use."""

    token: str = field(repr=False)

    def headers(self) -> Mapping[str, str]:
        """The headers that carry it."""
        return {"authorization": f"Bearer {self.token}"}

    def describe(self) -> str:
        """Its name."""
        return "ANTHROPIC_AUTH_TOKEN"


@dataclass(frozen=True)
class OAuthToken(abc.CredentialSource):
    """A long-lived token of a Claude subscription."""

    token: str = field(repr=False)

    def headers(self) -> Mapping[str, str]:
        """The headers that carry it."""
        return {"authorization": f"Bearer {self.token}", "anthropic-beta": OAUTH_BETA}

    def describe(self) -> str:
        """Its name."""
        return "CLAUDE_CODE_OAUTH_TOKEN"


@dataclass(frozen=True)
class NoCredential(abc.CredentialSource):
    """None is set."""

    def headers(self) -> Mapping[str, str]:
        """Raises MissingCredential."""
        raise MissingCredential

    def describe(self) -> str:
        """Says so."""
        return "none"


@dataclass(frozen=True)
class NotNeeded(abc.CredentialSource):
    """The upstream wants none: the scripted model, or a server of the operator's own."""

    def headers(self) -> Mapping[str, str]:
        """No headers."""
        return {}

    def describe(self) -> str:
        """Says so."""
        return "not needed"


def choose(*, api_key: str | None, auth_token: str | None, oauth_token: str | None) -> abc.CredentialSource:
    """The credential to use, the first that is set: API key, auth token, OAuth token."""
    if api_key:
        return ApiKey(api_key)
    if auth_token:
        return AuthToken(auth_token)
    if oauth_token:
        return OAuthToken(oauth_token)
    return NoCredential()
