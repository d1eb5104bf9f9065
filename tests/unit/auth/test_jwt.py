"""JSON Web Tokens: who signs them is settled by the configuration, and by nothing that a token says."""

import base64
import hashlib
import hmac
import json
import time
from datetime import timedelta
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from carrel.auth import JwtOptions, JwtVerifier, issue
from carrel.errors import InvalidSettings, UnsafeConfiguration
from carrel.model import Scope, utc_now

SECRET = "a-secret-that-is-long-enough-0123456789"
READ, WRITE = Scope.READ, Scope.WRITE


def b64(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def unsigned(claims: dict[str, Any], algorithm: str = "none", signature: bytes = b"") -> str:
    header = {"alg": algorithm, "typ": "JWT"}
    return b".".join([b64(json.dumps(header).encode()), b64(json.dumps(claims).encode()), b64(signature)]).decode()


def claims(**more: Any) -> dict[str, Any]:
    return {"sub": "alice", "exp": int(time.time()) + 60} | more


def signed(key: Any = SECRET, algorithm: str = "HS256", headers: Any = None, **more: Any) -> str:
    given = {name: value for name, value in claims(**more).items() if value is not ...}
    return jwt.encode(given, key, algorithm, headers=headers)


async def refused(verifier: JwtVerifier, token: str) -> str:
    with pytest.raises(jwt.PyJWTError) as caught:
        await verifier.verify(token)
    return type(caught.value).__name__


# --------------------------------------------------------------------------------------------------- a shared secret


async def test_a_good_token() -> None:
    found = await JwtVerifier(JwtOptions(secret=SECRET, leeway_seconds=0)).verify(signed(exp=2_000_000_000))
    assert (found.name, found.user, found.session_id, found.is_admin) == ("jwt:alice", "alice", None, False)
    assert found.scopes == {READ, WRITE}
    assert found.expires_at is not None
    assert found.expires_at.timestamp() == 2_000_000_000


@pytest.mark.parametrize(
    ("claim", "scopes"),
    [
        (..., {READ, WRITE}),
        ("sessions:read", {READ}),
        ("openid sessions:write  sessions:read x", {READ, WRITE}),
        (["sessions:read", "x", 3, None], {READ}),
        ("", set()),
        ([], set()),
        ("openid profile", set()),
        ({"admin": 1}, ...),
        (7, ...),
        (True, ...),
    ],
)
async def test_scopes(claim: Any, scopes: Any) -> None:
    verifier = JwtVerifier(JwtOptions(secret=SECRET, scope_claim="permissions"))
    if scopes is ...:
        assert await refused(verifier, signed(permissions=claim)) == "InvalidTokenError"
        return
    assert (await verifier.verify(signed(permissions=claim))).scopes == scopes


@pytest.mark.parametrize("user", [..., None, 7, "", "a b", "../x", "a\n", "x" * 65, "ä", ["alice"]])
async def test_a_user_that_is_none(user: Any) -> None:
    await refused(JwtVerifier(JwtOptions(secret=SECRET, user_claim="uid")), signed(uid=user))


async def test_the_user_may_stand_in_another_claim() -> None:
    verifier = JwtVerifier(JwtOptions(secret=SECRET, user_claim="preferred_username"))
    assert (await verifier.verify(signed(preferred_username="bob"))).user == "bob"


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        (lambda: signed("another-secret-that-is-long-enough-0123"), "InvalidSignatureError"),
        (lambda: signed(exp=int(time.time()) - 31), "ExpiredSignatureError"),
        (lambda: signed(exp=...), "MissingRequiredClaimError"),
        (lambda: signed(exp="soon"), "DecodeError"),
        (lambda: signed(nbf=int(time.time()) + 60), "ImmatureSignatureError"),
        (lambda: signed(iat=int(time.time()) + 60), "ImmatureSignatureError"),
        (lambda: signed(aud="somebody else's"), "InvalidAudienceError"),
        (lambda: unsigned(claims()), "InvalidAlgorithmError"),
        (lambda: unsigned(claims(), "None"), "InvalidAlgorithmError"),
        (lambda: unsigned(claims(), "nOnE", b"x"), "InvalidAlgorithmError"),
        (lambda: unsigned(claims(), "HS256"), "InvalidSignatureError"),
        (lambda: signed(algorithm="HS512"), "InvalidAlgorithmError"),
        (lambda: signed()[:-2] + "AA", "InvalidSignatureError"),
        (lambda: "a.b.c", "DecodeError"),
        (lambda: unsigned([], "HS256"), "InvalidSignatureError"),  # type: ignore[arg-type]
    ],
)
async def test_tokens_that_are_not_good(token: Any, reason: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)  # of keys that are short for HS512
        made = token()
    assert await refused(JwtVerifier(JwtOptions(secret=SECRET)), made) == reason


async def test_clocks_may_differ() -> None:
    verifier = JwtVerifier(JwtOptions(secret=SECRET, leeway_seconds=30))
    found = await verifier.verify(signed(exp=int(time.time()) - 20, nbf=int(time.time()) + 20))
    assert found.expires_at is not None
    assert found.expires_at > utc_now()  # a stream of this caller is not ended before its token is refused


async def test_a_token_that_ends_after_the_calendar() -> None:
    assert (await JwtVerifier(JwtOptions(secret=SECRET)).verify(signed(exp=10**30))).expires_at is None


async def test_audience_and_issuer() -> None:
    verifier = JwtVerifier(JwtOptions(secret=SECRET, audience="carrel", issuer="https://id.example"))
    good = {"aud": ["x", "carrel"], "iss": "https://id.example"}
    assert (await verifier.verify(signed(**good))).user == "alice"
    for wrong, reason in [
        ({"aud": "carrel2"}, "InvalidAudienceError"),
        ({"aud": ["x"]}, "InvalidAudienceError"),
        ({"aud": ...}, "MissingRequiredClaimError"),
        ({"iss": "https://id.example/"}, "InvalidIssuerError"),
        ({"iss": ...}, "MissingRequiredClaimError"),
    ]:
        assert await refused(verifier, signed(**good | wrong)) == reason


@pytest.mark.parametrize(
    "secret", ["short", "x" * 31, "x" * 64, "abcabcabcabcabcabcabcabcabcabcabcabc", "", "change-me", "ä" * 20]
)
def test_a_secret_that_could_be_guessed_is_refused(secret: str) -> None:
    with pytest.raises(UnsafeConfiguration, match=r"jwt\.secret") as caught:
        JwtOptions(secret=secret)
    assert not secret or secret not in caught.value.message.replace("jwt.secret", "")


def test_a_public_key_is_no_secret() -> None:
    with pytest.raises(UnsafeConfiguration, match="public key"):
        JwtOptions(secret=public_pem(rsa.generate_private_key(65537, 2048)).decode())


def test_a_secret_and_published_keys_exclude_each_other() -> None:
    with pytest.raises(InvalidSettings, match="exclude"):
        JwtOptions(secret=SECRET, jwks_url="https://id.example/keys")


async def test_a_token_for_development() -> None:
    options = JwtOptions(secret=SECRET, audience="carrel", issuer="me", user_claim="uid", scope_claim="can")
    token = issue(options, "bob", scopes=frozenset({READ}), lifetime=timedelta(hours=2))
    found = await JwtVerifier(options).verify(token)
    assert (found.user, found.scopes) == ("bob", {READ})
    plain = issue(options, "bob", scopes=None, lifetime=timedelta(hours=2))
    assert (await JwtVerifier(options).verify(plain)).scopes == {READ, WRITE}
    with pytest.raises(InvalidSettings, match=r"jwt\.secret"):
        issue(JwtOptions(jwks_url="https://id.example"), "bob", scopes=None, lifetime=timedelta(hours=1))


# ---------------------------------------------------------------------------------------------------- published keys


def public_pem(key: Any) -> bytes:
    return bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )


class Published:
    """Keys without a server around them."""

    def __init__(self, **keys: Any) -> None:
        self._keys = keys

    async def key(self, kid: str | None, algorithm: str) -> jwt.PyJWK | None:
        found = self._keys.get(kid or "")
        return found if found is not None and found.algorithm_name == algorithm else None


RSA_KEY = rsa.generate_private_key(65537, 2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())


def jwk(key: Any, algorithm: str) -> jwt.PyJWK:
    cls: Any = jwt.get_algorithm_by_name(algorithm)
    return jwt.PyJWK(json.loads(cls.to_jwk(key.public_key())), algorithm)


@pytest.fixture
def published() -> JwtVerifier:
    keys: Any = Published(r=jwk(RSA_KEY, "RS256"), e=jwk(EC_KEY, "ES256"))
    return JwtVerifier(JwtOptions(jwks_url="https://id.example/keys", audience="carrel"), keys)


async def test_both_kinds_of_published_keys(published: JwtVerifier) -> None:
    for key, algorithm, kid in ((RSA_KEY, "RS256", "r"), (EC_KEY, "ES256", "e")):
        assert (await published.verify(signed(key, algorithm, {"kid": kid}, aud="carrel"))).user == "alice"


async def test_a_public_key_does_not_pass_for_a_secret(published: JwtVerifier) -> None:
    head = b64(json.dumps({"alg": "HS256", "typ": "JWT", "kid": "r"}).encode())
    body = b64(json.dumps(claims(aud="carrel")).encode())
    numbers = RSA_KEY.public_key().public_numbers().n.to_bytes(256, "big")
    for secret in (public_pem(RSA_KEY), public_pem(RSA_KEY).strip(), numbers, b64(numbers)):
        mac = b64(hmac.new(secret, head + b"." + body, hashlib.sha256).digest())
        assert await refused(published, b".".join([head, body, mac]).decode()) == "InvalidAlgorithmError"


async def test_what_else_published_keys_do_not_let_in(published: JwtVerifier) -> None:
    other = rsa.generate_private_key(65537, 2048)
    for token, reason in [
        (signed(RSA_KEY, "RS256", {"kid": "none"}, aud="carrel"), "InvalidKeyError"),
        (signed(RSA_KEY, "RS256", {"kid": "e"}, aud="carrel"), "InvalidKeyError"),
        (signed(RSA_KEY, "RS512", {"kid": "r"}, aud="carrel"), "InvalidAlgorithmError"),
        (signed(RSA_KEY, "PS256", {"kid": "r"}, aud="carrel"), "InvalidAlgorithmError"),
        (signed(other, "RS256", {"kid": "r"}, aud="carrel"), "InvalidSignatureError"),
        (signed(RSA_KEY, "RS256", {"kid": "r"}, aud="x"), "InvalidAudienceError"),
        (signed(SECRET, aud="carrel"), "InvalidAlgorithmError"),
        (unsigned(claims(aud="carrel")), "InvalidAlgorithmError"),
    ]:
        assert await refused(published, token) == reason
    # A token that brings its own key, or says where one is, is not believed.
    own = json.loads(jwt.get_algorithm_by_name("RS256").to_jwk(other.public_key()))  # type: ignore[attr-defined]
    for header in ({"jwk": own}, {"jku": "http://127.0.0.1:9/keys"}, {"x5u": "http://127.0.0.1:9/keys"}):
        token = signed(other, "RS256", {"kid": "r", **header}, aud="carrel")
        assert await refused(published, token) == "InvalidSignatureError"


@pytest.mark.parametrize("algorithm", [None, [], ["RS256"], {}, 7, "", "rs256"])
@pytest.mark.parametrize("kid", ["r", 7, None, []])
async def test_headers_of_the_wrong_shape(published: JwtVerifier, algorithm: Any, kid: Any) -> None:
    header = b64(json.dumps({"alg": algorithm, "typ": "JWT", "kid": kid}).encode())
    token = b".".join([header, b64(json.dumps(claims()).encode()), b64(b"x" * 256)]).decode()
    for verifier in (published, JwtVerifier(JwtOptions(secret=SECRET))):
        await refused(verifier, token)


async def test_a_published_key_that_is_too_short() -> None:
    weak = rsa.generate_private_key(65537, 1024)
    keys: Any = Published(w=jwk(weak, "RS256"))
    verifier = JwtVerifier(JwtOptions(jwks_url="https://id.example/keys"), keys)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)
        token = signed(weak, "RS256", {"kid": "w"})
    assert await refused(verifier, token) == "InvalidKeyError"
