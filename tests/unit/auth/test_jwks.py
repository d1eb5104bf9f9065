"""Published keys from a real server on loopback: fetched, kept, rotated, and never asked for too often."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from structlog.testing import capture_logs

from carrel.auth import Jwks
from carrel.errors import UnsafeConfiguration

RSA_KEY = rsa.generate_private_key(65537, 2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())


def jwk(key: Any, **more: Any) -> dict[str, Any]:
    algorithm: Any = jwt.get_algorithm_by_name("RS256" if hasattr(key, "private_numbers") and _is_rsa(key) else "ES256")
    return {**json.loads(algorithm.to_jwk(key.public_key())), **more}


def _is_rsa(key: Any) -> bool:
    return isinstance(key, rsa.RSAPrivateKey)


class Issuer:
    """An issuer on loopback. What it answers, and how often it was asked, is there to be seen."""

    def __init__(self) -> None:
        self.keys: Any = {"keys": [jwk(RSA_KEY, kid="one", use="sig", alg="RS256")]}
        self.configuration: Any = None
        self.status = 200
        self.asked: list[str] = []
        self.url = ""
        self.hold = asyncio.Event()
        self.hold.set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            path = head.split()[1].decode()
            self.asked.append(path)
            await self.hold.wait()
            value = self.configuration if path.endswith("openid-configuration") else self.keys
            body = value if isinstance(value, bytes) else json.dumps(value).encode()
            extra = b"Location: /keys\r\n" if self.status == 302 else b""
            writer.write(
                b"HTTP/1.1 %d X\r\nContent-Length: %d\r\nConnection: close\r\n%s\r\n" % (self.status, len(body), extra)
            )
            writer.write(body)
            await writer.drain()
        finally:
            writer.close()


@pytest.fixture
async def issuer() -> AsyncIterator[Issuer]:
    made = Issuer()
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    made.configuration = {"issuer": made.url, "jwks_uri": f"{made.url}/found"}
    yield made
    server.close()
    await server.wait_closed()


@asynccontextmanager
async def jwks(url: str | None, issuer: str | None = None, **options: Any) -> AsyncIterator[Jwks]:
    async with httpx.AsyncClient(trust_env=False) as client:
        yield Jwks(url=url, issuer=issuer, client=client, **{"refetch_seconds": 0.0} | options)


async def test_keys_are_fetched_once_and_kept(issuer: Issuer) -> None:
    async with jwks(f"{issuer.url}/keys") as keys:
        found = [await keys.key("one", "RS256") for _ in range(20)]
        assert found[0] is not None
        assert len(set(map(id, found))) == 1
        assert issuer.asked == ["/keys"]


async def test_many_who_come_at_once_ask_once(issuer: Issuer) -> None:
    async with jwks(f"{issuer.url}/keys") as keys:
        issuer.hold.clear()
        waiting = [asyncio.ensure_future(keys.key("one", "RS256")) for _ in range(20)]
        while not issuer.asked:
            await asyncio.sleep(0.005)
        issuer.hold.set()
        assert all(await asyncio.gather(*waiting))
        assert issuer.asked == ["/keys"]


async def test_a_rotated_key_is_found_and_the_old_one_forgotten(issuer: Issuer) -> None:
    async with jwks(f"{issuer.url}/keys") as keys:
        assert await keys.key("one", "RS256")
        issuer.keys = {"keys": [jwk(RSA_KEY, kid="two")]}
        assert await keys.key("two", "RS256")
        assert await keys.key("one", "RS256") is None


async def test_unknown_names_do_not_make_us_ask_again_and_again(issuer: Issuer) -> None:
    async with jwks(f"{issuer.url}/keys", refetch_seconds=3600.0) as keys:
        for number in range(50):
            assert await keys.key(f"made-up-{number}", "RS256") is None
        assert issuer.asked == ["/keys"]
        assert await keys.key("one", "RS256")


@pytest.mark.parametrize("what", ["status", "nonsense", "empty", "redirect", "huge", "gone"])
async def test_a_failure_keeps_the_old_keys(issuer: Issuer, what: str) -> None:
    async with jwks(f"{issuer.url}/keys") as keys:
        assert await keys.key("one", "RS256")
        if what == "status":
            issuer.status = 500
        elif what == "redirect":
            issuer.status = 302
        elif what == "gone":
            keys._url = "http://127.0.0.1:1/keys"
        else:
            issuer.keys = {"nonsense": b"<html>", "empty": {"keys": []}, "huge": b" " * (1024 * 1024 + 1)}[what]
        with capture_logs() as logs:
            assert await keys.key("two", "RS256") is None
        assert [entry["event"] for entry in logs] == ["jwks.not_fetched"]
        assert await keys.key("one", "RS256")


async def test_an_issuer_says_where_its_keys_are(issuer: Issuer) -> None:
    async with jwks(None, issuer.url) as keys:
        assert await keys.key("one", "RS256")
        assert issuer.asked == ["/.well-known/openid-configuration", "/found"]


@pytest.mark.parametrize("wrong", ["issuer", "no address", "plain http elsewhere", "no object"])
async def test_an_issuer_that_is_not_itself(issuer: Issuer, wrong: str) -> None:
    issuer.configuration = {
        "issuer": {"issuer": "https://evil.example", "jwks_uri": f"{issuer.url}/found"},
        "no address": {"issuer": issuer.url},
        "plain http elsewhere": {"issuer": issuer.url, "jwks_uri": "http://id.example/keys"},
        "no object": [],
    }[wrong]
    async with jwks(None, issuer.url) as keys:
        assert await keys.key("one", "RS256") is None
        assert issuer.asked == ["/.well-known/openid-configuration"]


async def test_keys_that_cannot_check_a_signature_of_ours(issuer: Issuer) -> None:
    private: Any = json.loads(jwt.get_algorithm_by_name("RS256").to_jwk(RSA_KEY))  # type: ignore[attr-defined]
    issuer.keys = {
        "keys": [
            {"kty": "oct", "k": "c2VjcmV0", "kid": "secret"},
            jwk(RSA_KEY, kid="for-encryption", use="enc"),
            jwk(RSA_KEY, kid="other", alg="RS512"),
            {**private, "kid": "private"},
            {"kty": "RSA", "kid": "broken", "n": "!", "e": "AQAB"},
            jwk(ec.generate_private_key(ec.SECP384R1()), kid="curve"),
            "nonsense",
            jwk(EC_KEY, kid="good"),
        ]
    }
    async with jwks(f"{issuer.url}/keys") as keys:
        assert await keys.key("good", "ES256")
        for kid in ("secret", "for-encryption", "other", "private", "broken", "curve"):
            for algorithm in ("RS256", "ES256", "HS256"):
                assert await keys.key(kid, algorithm) is None, (kid, algorithm)
        assert await keys.key("good", "RS256") is None


async def test_without_a_name_the_only_key_of_its_kind_counts(issuer: Issuer) -> None:
    issuer.keys = {"keys": [jwk(RSA_KEY), jwk(EC_KEY, kid="e")]}
    async with jwks(f"{issuer.url}/keys") as keys:
        assert await keys.key(None, "RS256")
        assert await keys.key(None, "ES256")
        issuer.keys = {"keys": [jwk(RSA_KEY, kid="1"), jwk(RSA_KEY, kid="2")]}
        await keys.key("2", "RS256")
        assert await keys.key(None, "RS256") is None


@pytest.mark.parametrize(
    "url", ["http://id.example/keys", "ftp://id.example", "keys", "http://[", "file:///etc/passwd"]
)
async def test_an_address_that_others_could_speak_for_is_refused(url: str) -> None:
    with pytest.raises(UnsafeConfiguration, match="https"):
        async with jwks(url):
            pass


async def test_an_operator_may_insist() -> None:
    async with jwks("http://id.internal/keys", allow_insecure=True):
        pass
    async with jwks("https://id.example/keys"):
        pass


async def test_keys_are_there_before_the_first_caller(issuer: Issuer) -> None:
    async with jwks(f"{issuer.url}/keys", refetch_seconds=60.0) as keys, AsyncExitStack() as stack:
        await keys.start(stack)
        async with asyncio.timeout(10):
            while not keys._keys:
                await asyncio.sleep(0.005)
        issuer.status = 500
        assert await keys.key("one", "RS256")
