"""Wires who may come in, as the settings say."""

from __future__ import annotations

from contextlib import AsyncExitStack

import httpx

from carrel import abc
from carrel.auth import AdminKey, Authenticator, Jwks, JwtOptions, JwtVerifier
from carrel.settings import Settings

__all__ = ["authenticator_of", "jwt_options"]


async def authenticator_of(
    settings: Settings, store: abc.Store, admin_key: AdminKey | None, stack: AsyncExitStack
) -> Authenticator:
    """The authenticator, started. Where `auth` is `none`, only dialects with an `auth` of their own ask it.

    Raises:
        OperatorError: a secret is too weak, or the settings contradict each other.
    """
    options = jwt_options(settings)
    verifier = None
    if options.wanted:
        keys = None
        if options.secret is None:
            client = httpx.AsyncClient(timeout=10, follow_redirects=False)
            stack.push_async_callback(client.aclose)
            keys = Jwks(
                url=options.jwks_url, issuer=options.issuer, client=client, allow_insecure=settings.allow_insecure
            )
            await keys.start(stack)
        verifier = JwtVerifier(options, keys)
    static = settings.static_token.get_secret_value() if settings.static_token is not None else None
    authenticator = Authenticator(store, admin_key=admin_key, static_token=static, jwt_verifier=verifier)
    await authenticator.start(stack)
    return authenticator


def jwt_options(settings: Settings) -> JwtOptions:
    """What the settings say of tokens.

    Raises:
        OperatorError: the secret is too weak, or the settings contradict each other.
    """
    given = settings.jwt
    return JwtOptions(
        secret=given.secret.get_secret_value() if given.secret is not None else None,
        jwks_url=given.jwks_url,
        issuer=given.issuer,
        audience=given.audience,
        leeway_seconds=given.leeway_seconds,
        user_claim=given.user_claim,
        scope_claim=given.scope_claim,
    )
