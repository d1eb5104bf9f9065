"""Rate limits: per key, per address, told in headers; nobody escapes by a header, and no guess is free."""

import re
import time

import pytest

from carrel.api.addresses import Proxies
from carrel.api.limits import Limiter
from carrel.errors import InvalidSettings, RateLimited
from carrel.model import Principal


@pytest.mark.parametrize("wrong", ["many", "10", "10/fortnight", "-1/minute", "0/minute", ""])
def test_a_wrong_limit_stops_the_start(wrong):
    with pytest.raises(InvalidSettings, match=r"rate_limits\.per_key"):
        Limiter("key", wrong)


async def test_windows_move(monkeypatch):
    now = 1_000_000.0
    monkeypatch.setattr(time, "time", lambda: now)
    limiter = Limiter("key", "3/minute")
    for passed in (0, 10, 20):
        now = 1_000_000.0 + passed
        assert (await limiter.count("alice")).retry_after_seconds is None
    refused = await limiter.count("alice")
    assert refused.retry_after_seconds == 40
    assert refused.policy == '"key";q=3;w=60'
    assert refused.state == '"key";r=0;t=40'
    assert (await limiter.count("bob")).retry_after_seconds is None
    now = 1_000_000.0 + 60  # the first has left the window, and one place is free
    assert (await limiter.count("alice")).retry_after_seconds is None
    assert (await limiter.count("alice")).retry_after_seconds == 10


async def test_several_windows_hold_at_once(monkeypatch):
    now = 1_000_000.0
    monkeypatch.setattr(time, "time", lambda: now)
    limiter = Limiter("key", "2/second; 3/minute")
    verdicts = []
    for passed in (0, 0, 0, 2, 4):
        now = 1_000_000.0 + passed
        verdicts.append((await limiter.count("alice")).retry_after_seconds)
    assert verdicts == [None, None, 1, None, 56]
    assert (await limiter.count("bob")).policy == '"key-1s";q=2;w=1, "key-60s";q=3;w=60'


async def test_a_caller_that_asks_too_often_is_told_how_long_to_wait(build):
    called = await build(per_key=Limiter("key", "3/minute"))
    async with called.client() as client:
        for left in (2, 1, 0):
            answer = await client.get("/api/v1/sessions")
            assert answer.status_code == 200
            assert answer.headers["RateLimit-Policy"] == '"key";q=3;w=60'
            assert re.fullmatch(rf'"key";r={left};t=\d+', answer.headers["RateLimit"])
        answer = await client.get("/api/v1/sessions")
        assert answer.status_code == 429
        assert answer.json()["code"] == "rate_limited"
        assert 0 < int(answer.headers["Retry-After"]) <= 60
        assert answer.headers["RateLimit"].startswith('"key";r=0;')
        assert (await client.get("/health")).status_code == 200


async def test_whoever_restarts_a_server_is_not_turned_away(build):
    called = await build(per_address=Limiter("address", "1/minute"))
    async with called.client() as client:
        assert (await client.get("/api/v1/sessions")).status_code == 200
        assert (await client.get("/api/v1/sessions")).status_code == 429
        assert (await client.get("/health/live")).status_code == 200


async def test_guesses_at_a_key_count_against_their_address(build):
    called = await build(per_address=Limiter("address", "3/minute"))
    async with called.client(key="wrong") as client:
        answers = [(await client.get("/api/v1/sessions")).status_code for _ in range(5)]
        assert answers == [401, 401, 401, 429, 429]
    async with called.client() as client:
        assert (await client.get("/api/v1/sessions")).status_code == 429  # the right key, from the guesser's address
    async with called.client(address="192.0.2.8") as client:
        assert (await client.get("/api/v1/sessions")).status_code == 200


async def test_a_forwarding_header_of_anybody_s_means_nothing(build):
    called = await build(per_address=Limiter("address", "2/minute"), proxies=Proxies(["10.0.0.5"]))
    statuses = []
    async with called.client() as client:
        for i in range(4):
            headers = {
                "X-Forwarded-For": f"198.51.100.{i}",
                "Forwarded": f"for=198.51.100.{i}",
                "X-Real-IP": f"1.1.1.{i}",
            }
            statuses.append((await client.get("/api/v1/sessions", headers=headers)).status_code)
    assert statuses == [200, 200, 429, 429]
    async with called.client(address="10.0.0.5") as client:
        for i in range(4):  # through the proxy each of them counts for himself, whatever he invents on the left
            headers = {"X-Forwarded-For": f"203.0.113.1, 198.51.100.{i}"}
            assert (await client.get("/api/v1/sessions", headers=headers)).status_code == 200


async def test_a_network_of_version_6_is_one_caller(build):
    called = await build(per_address=Limiter("address", "2/minute"))
    statuses = []
    for i in range(3):
        async with called.client(address=f"2001:db8:0:1::{i}") as client:
            statuses.append((await client.get("/api/v1/sessions")).status_code)
    assert statuses == [200, 200, 429]


async def test_what_comes_over_an_open_connection_is_counted_by_the_message():
    limiter = Limiter("key", "2/minute")
    alice = Principal.of_user("alice")
    await limiter.spend(alice)
    await limiter.spend(alice)
    with pytest.raises(RateLimited) as refused:
        await limiter.spend(alice)
    assert refused.value.retry_after_seconds
    assert refused.value.http_status == 429
    await limiter.spend(Principal.of_user("bob"))
