"""Every kind of token: what it opens, and everything that keeps it from opening."""

import asyncio
from datetime import timedelta
from typing import Any

import jwt
import pytest
from structlog.testing import capture_logs

from carrel.auth import ALL, Authenticator, JwtOptions, JwtVerifier, make_ticket
from carrel.auth.keys import digest
from carrel.errors import AuthenticationRequired, UnsafeConfiguration
from carrel.model import ADMIN, Principal, SandboxStatus, Scope, utc_now

SECRET = "a-secret-that-is-long-enough-0123456789"
STATIC = "static-0123456789abcdef"
BOTH = frozenset({Scope.READ, Scope.WRITE})
PAST = timedelta(seconds=-1)


async def refused(authenticator: Authenticator, token: str | None, **options: Any) -> str:
    """It is refused with the one message there is; answers why, as the log says it."""
    with capture_logs() as logs, pytest.raises(AuthenticationRequired) as caught:
        await authenticator.authenticate(token, **options)
    assert caught.value.message == AuthenticationRequired().message
    assert (caught.value.context, caught.value.operator_detail) == ({}, None)
    found = [entry for entry in logs if entry["event"] == "auth.refused"]
    assert len(found) == 1
    assert token is None or token == "" or token not in repr(logs)
    return str(found[0]["reason"])


async def test_the_admin_key(authenticator: Any) -> None:
    assert await authenticator.authenticate("carrel_admin_the-key") == ADMIN
    assert await refused(authenticator, "carrel_admin_the-kez") == "unknown"


async def test_the_static_token(world: Any, authenticator: Any) -> None:
    found = await authenticator.authenticate(STATIC)
    assert (found.name, found.user, found.scopes, found.is_admin) == ("static", "static", BOTH, False)
    await world.disable("static")
    assert await refused(authenticator, STATIC) == "disabled user"


async def test_a_short_static_token_is_refused_at_start(world: Any) -> None:
    with pytest.raises(UnsafeConfiguration, match="static_token"):
        await world.authenticator(static_token="x" * 15)
    await world.authenticator(static_token="x" * 16)


async def test_a_key(world: Any, authenticator: Any) -> None:
    key_id, secret = await world.key(lasts=timedelta(hours=1))
    found = await authenticator.authenticate(secret)
    assert (found.name, found.user, found.scopes) == (f"key:{key_id}", "alice", BOTH)
    assert found.expires_at > utc_now()
    _, reading = await world.key(scopes=[Scope.READ])
    assert (await authenticator.authenticate(reading)).scopes == {Scope.READ}


async def test_a_key_with_admin_has_every_scope(world: Any, authenticator: Any) -> None:
    _, secret = await world.key(scopes=[Scope.ADMIN])
    found = await authenticator.authenticate(secret)
    assert found.scopes == frozenset(Scope)
    assert found.is_admin


async def test_keys_that_open_nothing(world: Any, authenticator: Any) -> None:
    _, expired = await world.key(lasts=PAST)
    _, revoked = await world.key(revoked_at=utc_now())
    _, of_bob = await world.key("bob")
    await world.disable("bob")
    _, good = await world.key()
    assert await refused(authenticator, expired) == "expired"
    assert await refused(authenticator, revoked) == "revoked key"
    assert await refused(authenticator, of_bob) == "disabled user"
    for wrong in (good[:-1], good + "x", good.upper(), "carrel_sk_", digest(good)):
        assert await refused(authenticator, wrong) in ("unknown key", "unknown")
    await authenticator.authenticate(good)


@pytest.mark.parametrize("token", [None, "", "é", "\ud800", "a\nb", "a\x00b", "x" * 20_000, "a.b", "..", "a.b.c"])
async def test_what_is_no_token_at_all(authenticator: Any, token: str | None) -> None:
    await refused(authenticator, token)


async def test_the_log_knows_a_key_by_its_beginning(authenticator: Any) -> None:
    wrong = "carrel_sk_" + "abcdefgh" + "ijklmnopqrstuvwxyz"
    with capture_logs() as logs, pytest.raises(AuthenticationRequired):
        await authenticator.authenticate(wrong)
    assert logs == [
        {"event": "auth.refused", "reason": "unknown key", "token": "carrel_sk_abcdefgh", "log_level": "info"}
    ]


async def test_a_json_web_token(world: Any, authenticator: Any) -> None:
    token = jwt.encode({"sub": "carol", "exp": utc_now() + timedelta(minutes=1)}, SECRET, "HS256")
    found = await authenticator.authenticate(token)
    assert (found.name, found.user, found.scopes) == ("jwt:carol", "carol", BOTH)
    admin = {"sub": "carol", "exp": utc_now() + timedelta(minutes=1), "scope": "openid admin"}
    assert (await authenticator.authenticate(jwt.encode(admin, SECRET, "HS256"))).scopes == frozenset(Scope)

    async def known() -> bool:
        return await world.store.read(lambda tx: tx.users.get("carol")) is not None

    async with asyncio.timeout(10):
        while not await known():
            await asyncio.sleep(0.005)
    await world.disable("carol")
    assert await refused(authenticator, token) == "disabled user"


async def test_without_a_verifier_no_json_web_token_counts(world: Any) -> None:
    authenticator = await world.authenticator(jwt_verifier=None)
    token = jwt.encode({"sub": "carol", "exp": utc_now() + timedelta(minutes=1)}, SECRET, "HS256")
    assert await refused(authenticator, token) == "unknown"


async def test_a_sandbox(world: Any, authenticator: Any) -> None:
    session = await world.session("dave")
    sandbox = await world.sandbox(session, digest("cak-the-token"))
    found = await authenticator.authenticate("cak-the-token")
    assert (found.name, found.user, found.session_id) == (f"sandbox:{sandbox}", "dave", session)
    assert found.scopes == BOTH
    assert await authenticator.still_good(found)
    assert await refused(authenticator, "cak-another") == "unknown sandbox"
    await world.store.write(lambda tx: tx.sandboxes.update(sandbox, status=SandboxStatus.GONE))
    assert await refused(authenticator, "cak-the-token") == "unknown sandbox"
    assert not await authenticator.still_good(found)


async def test_a_sandbox_of_a_disabled_user(world: Any, authenticator: Any) -> None:
    await world.sandbox(await world.session("dave"), digest("cak-the-token"))
    await world.disable("dave")
    assert await refused(authenticator, "cak-the-token") == "disabled user"


async def test_only_the_kinds_that_are_accepted(world: Any, authenticator: Any) -> None:
    _, key = await world.key()
    await world.sandbox(await world.session(), digest("cak-the-token"))
    ticket, browser = make_ticket(ADMIN, "s", reusable=True, lifetime_seconds=60, now=utc_now())
    await world.ticket(ticket)
    tokens = {
        "admin": "carrel_admin_the-key",
        "static": STATIC,
        "key": key,
        "sandbox": "cak-the-token",
        "ticket": browser,
        "jwt": jwt.encode({"sub": "a", "exp": utc_now() + timedelta(minutes=1)}, SECRET, "HS256"),
    }
    assert set(tokens) == ALL
    for kind, token in tokens.items():
        await authenticator.authenticate(token, accept=frozenset({kind}))
        assert await refused(authenticator, token, accept=ALL - {kind}) == f"{kind} not accepted here"


# ------------------------------------------------------------------------------------------------------------ tickets


async def test_a_ticket_opens_once(world: Any, authenticator: Any) -> None:
    alice = Principal.of_user("alice")
    ticket, secret = make_ticket(alice, "s1", reusable=False, lifetime_seconds=30, now=utc_now())
    await world.ticket(ticket)
    assert await refused(authenticator, secret) == "unknown"  # not as a bearer token
    found = await authenticator.redeem(secret)
    assert (found.user, found.session_id, found.scopes) == ("alice", "s1", BOTH)
    with pytest.raises(AuthenticationRequired):
        await authenticator.redeem(secret)


async def test_of_two_that_come_at_once_one_is_let_in(world: Any, authenticator: Any) -> None:
    ticket, secret = make_ticket(ADMIN, "s1", reusable=False, lifetime_seconds=30, now=utc_now())
    await world.ticket(ticket)
    came = await asyncio.gather(*(authenticator.redeem(secret) for _ in range(8)), return_exceptions=True)
    assert sum(isinstance(one, Principal) for one in came) == 1
    assert sum(isinstance(one, AuthenticationRequired) for one in came) == 7


async def test_tickets_that_open_nothing(world: Any, authenticator: Any) -> None:
    late, late_secret = make_ticket(ADMIN, "s", reusable=False, lifetime_seconds=-1, now=utc_now())
    browser, browser_secret = make_ticket(ADMIN, "s", reusable=True, lifetime_seconds=60, now=utc_now())
    _, key = await world.key()
    for ticket in (late, browser):
        await world.ticket(ticket)
    for wrong in (late_secret, browser_secret, "carrel_st_x", key, "carrel_admin_the-key", STATIC, "", None):
        with pytest.raises(AuthenticationRequired):
            await authenticator.redeem(wrong)


async def test_a_browsers_token_is_good_until_it_ends(world: Any, authenticator: Any) -> None:
    good, secret = make_ticket(ADMIN, "s", reusable=True, lifetime_seconds=60, now=utc_now())
    late, late_secret = make_ticket(ADMIN, "s", reusable=True, lifetime_seconds=-1, now=utc_now())
    await world.ticket(good)
    await world.ticket(late)
    for _ in range(2):
        found = await authenticator.authenticate(secret)
        assert (found.session_id, found.is_admin, found.scopes) == ("s", False, BOTH)
        assert found.expires_at == good.expires_at
    assert await refused(authenticator, late_secret) == "expired"
    assert await refused(authenticator, "carrel_bt_x") == "unknown browser token"


async def test_what_a_revoked_key_has_given_away_opens_nothing(world: Any, authenticator: Any) -> None:
    key_id, secret = await world.key()
    giver = await authenticator.authenticate(secret)
    browser, browser_secret = make_ticket(giver, "s", reusable=True, lifetime_seconds=60, now=utc_now())
    once, once_secret = make_ticket(giver, "s", reusable=False, lifetime_seconds=30, now=utc_now())
    await world.ticket(browser)
    await world.ticket(once)
    inside = await authenticator.authenticate(browser_secret)
    assert await authenticator.still_good(inside)
    await world.store.write(lambda tx: tx.keys.update(key_id, revoked_at=utc_now()))
    assert not await authenticator.still_good(inside)
    assert await refused(authenticator, browser_secret) == "revoked key"
    with pytest.raises(AuthenticationRequired):
        await authenticator.redeem(once_secret)


async def test_who_was_let_in_is_looked_up_again(world: Any, authenticator: Any) -> None:
    assert await authenticator.still_good(ADMIN)
    key_id, secret = await world.key()
    found = await authenticator.authenticate(secret)
    assert await authenticator.still_good(found)
    assert not await authenticator.still_good(found.model_copy(update={"expires_at": utc_now() + PAST}))
    await world.store.write(lambda tx: tx.keys.update(key_id, expires_at=utc_now() + PAST))
    assert not await authenticator.still_good(found)
    assert not await authenticator.still_good(found.model_copy(update={"name": "key:none"}))
    token = jwt.encode({"sub": "erin", "exp": utc_now() + timedelta(minutes=1)}, SECRET, "HS256")
    erin = await authenticator.authenticate(token)
    assert await authenticator.still_good(erin)
    await world.disable("erin")
    assert not await authenticator.still_good(erin)


def test_no_secret_in_a_repr() -> None:
    assert SECRET not in repr(JwtOptions(secret=SECRET))
    assert SECRET not in repr(vars(JwtVerifier(JwtOptions(secret=SECRET))))
