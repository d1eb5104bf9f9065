"""JSON Web Tokens: somebody the operator trusts vouches for the caller.

Which algorithms count follows from the configuration alone: a shared secret checks HS256, published keys check RS256 and
ES256. What a token says of its own algorithm can only get it refused.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import jwt
from jwt.algorithms import HMACAlgorithm
from jwt.exceptions import InvalidSubjectError

from carrel.auth.jwks import ALGORITHMS, Jwks
from carrel.errors import InvalidSettings, UnsafeConfiguration
from carrel.model import USER_ID, Principal, Scope, utc_now

__all__ = ["JwtOptions", "JwtVerifier", "issue"]

SHORTEST_SECRET_BYTES = 32
DEFAULT_SCOPES = frozenset({Scope.READ, Scope.WRITE})


@dataclass(frozen=True, kw_only=True)
class JwtOptions:
    """What a token must be like.

    Raises:
        UnsafeConfiguration: the secret is one that could be guessed, or is a public key.
        InvalidSettings: there is both a secret and an address of keys.
    """

    secret: str | None = field(default=None, repr=False)
    jwks_url: str | None = None
    issuer: str | None = None
    audience: str | None = None
    leeway_seconds: float = 30.0
    user_claim: str = "sub"
    scope_claim: str = "scope"

    def __post_init__(self) -> None:
        if self.secret is None:
            return
        if self.jwks_url is not None:
            raise InvalidSettings("jwt.secret and jwt.jwks_url exclude each other: choose who signs the tokens.")
        if len(self.secret.encode()) < SHORTEST_SECRET_BYTES:
            raise UnsafeConfiguration(
                f"jwt.secret has fewer than {SHORTEST_SECRET_BYTES} bytes and could be guessed. "
                "Make one with: openssl rand -base64 48"
            )
        if len(set(self.secret)) < 8:
            raise UnsafeConfiguration(
                "jwt.secret is the same few characters again and again and could be guessed. "
                "Make one with: openssl rand -base64 48"
            )
        try:
            HMACAlgorithm(HMACAlgorithm.SHA256).prepare_key(self.secret)
        except jwt.InvalidKeyError as error:
            raise UnsafeConfiguration(
                "jwt.secret is a certificate or a public key, which is no secret. For RS256 and ES256 set jwt.jwks_url "
                "or jwt.issuer instead."
            ) from error

    @property
    def wanted(self) -> bool:
        """Whether tokens are taken at all."""
        return bool(self.secret or self.jwks_url or self.issuer)


class JwtVerifier:
    """Checks tokens, and says who they are of."""

    def __init__(self, options: JwtOptions, keys: Jwks | None = None) -> None:
        """Make it.

        Args:
            options: what a token must be like.
            keys: the published keys; needed unless the options have a secret.
        """
        self._options = options
        self._keys = keys

    async def verify(self, token: str) -> Principal:
        """Whom the token is of.

        Raises:
            jwt.PyJWTError: it is not good; the class says why, the message may repeat parts of it.
        """
        options = self._options
        claims: dict[str, Any]
        common: dict[str, Any] = {
            "audience": options.audience,
            "issuer": options.issuer,
            "leeway": options.leeway_seconds,
            "options": {"require": ["exp"], "enforce_minimum_key_length": True},
        }
        if options.secret is not None:
            claims = jwt.decode(token, options.secret, algorithms=["HS256"], **common)
        else:
            key = await self._key(token)
            claims = jwt.decode(token, key, algorithms=[key.algorithm_name], **common)
        return self._principal(claims)

    async def _key(self, token: str) -> jwt.PyJWK:
        header = jwt.get_unverified_header(token)
        algorithm = header.get("alg")
        if self._keys is None or not isinstance(algorithm, str) or algorithm not in ALGORITHMS:
            raise jwt.InvalidAlgorithmError
        key = await self._keys.key(header.get("kid"), algorithm)
        if key is None:
            raise jwt.InvalidKeyError
        return key

    def _principal(self, claims: dict[str, Any]) -> Principal:
        user = claims.get(self._options.user_claim)
        if not isinstance(user, str) or re.fullmatch(USER_ID, user) is None:
            raise InvalidSubjectError
        return Principal(
            name=f"jwt:{user}",
            user=user,
            scopes=_scopes(claims.get(self._options.scope_claim)),
            expires_at=_moment(int(claims["exp"]), self._options.leeway_seconds),
        )


def _scopes(claim: Any) -> frozenset[Scope]:
    if claim is None:
        return DEFAULT_SCOPES
    words = claim.split() if isinstance(claim, str) else claim
    if not isinstance(words, list):
        raise jwt.InvalidTokenError
    return frozenset(scope for scope in Scope if scope.value in words)


def _moment(seconds: int, leeway_seconds: float) -> datetime | None:
    try:
        return datetime.fromtimestamp(seconds + math.ceil(leeway_seconds), UTC)
    except (OverflowError, ValueError, OSError):  # after the last year a calendar has
        return None


def issue(options: JwtOptions, user: str, *, scopes: frozenset[Scope] | None, lifetime: timedelta) -> str:
    """A token that this server would take, for development.

    Args:
        options: as the server has them.
        user: who it is of.
        scopes: None leaves the claim out, which means read and write.
        lifetime: how long it is good.

    Raises:
        InvalidSettings: there is no secret to sign with.
    """
    if options.secret is None:
        raise InvalidSettings(
            "There is no jwt.secret to sign with. Set one (jwt: {secret: …}, or CARREL_JWT__SECRET) for the server too; "
            "tokens that are checked by jwks_url or issuer are made by whoever has the private key."
        )
    now = utc_now()
    claims: dict[str, Any] = {"iat": now, "exp": now + lifetime, options.user_claim: user}
    if scopes is not None:
        claims[options.scope_claim] = " ".join(sorted(scopes))
    if options.issuer is not None:
        claims["iss"] = options.issuer
    if options.audience is not None:
        claims["aud"] = options.audience
    return jwt.encode(claims, options.secret, algorithm="HS256")
