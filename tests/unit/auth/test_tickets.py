"""Tickets as they are made: never more, and never longer, than who gives them."""

from datetime import timedelta

import pytest

from carrel.auth import make_ticket
from carrel.auth.tickets import issuer_of
from carrel.errors import MissingScope
from carrel.model import ADMIN, Principal, Scope, utc_now

NOW = utc_now()
READER = Principal.of_user("alice", frozenset({Scope.READ}))


def test_a_ticket_is_bound_to_its_session_and_is_no_admin() -> None:
    ticket, secret = make_ticket(ADMIN, "s1", reusable=False, lifetime_seconds=30, now=NOW)
    assert secret.startswith("carrel_st_")
    assert secret not in repr(ticket)
    assert (ticket.principal.session_id, ticket.principal.is_admin) == ("s1", False)
    assert Scope.ADMIN not in ticket.principal.scopes
    assert ticket.expires_at == NOW + timedelta(seconds=30)
    assert ticket.principal.expires_at is None


def test_it_may_do_no_more_than_its_giver() -> None:
    assert make_ticket(READER, "s", reusable=True, lifetime_seconds=9, now=NOW)[0].principal.scopes == {Scope.READ}
    with pytest.raises(MissingScope, match="sessions:write"):
        make_ticket(READER, "s", reusable=True, lifetime_seconds=9, now=NOW, scopes=[Scope.WRITE])
    with pytest.raises(MissingScope, match="admin"):
        make_ticket(ADMIN, "s", reusable=True, lifetime_seconds=9, now=NOW, scopes=[Scope.ADMIN])
    less, _ = make_ticket(ADMIN, "s", reusable=True, lifetime_seconds=9, now=NOW, scopes=[Scope.READ])
    assert less.principal.scopes == {Scope.READ}


def test_it_does_not_outlive_its_giver() -> None:
    soon = NOW + timedelta(seconds=5)
    short = READER.model_copy(update={"expires_at": soon})
    for reusable in (True, False):
        ticket, _ = make_ticket(short, "s", reusable=reusable, lifetime_seconds=30, now=NOW)
        assert (ticket.expires_at, ticket.principal.expires_at) == (soon, soon)


def test_its_name_tells_who_gave_it_also_where_that_was_a_ticket() -> None:
    first, _ = make_ticket(READER, "s1", reusable=True, lifetime_seconds=9, now=NOW)
    assert first.principal.name == "ticket:s1:user:alice"
    assert issuer_of(first.principal.name) == "user:alice"
    assert issuer_of("user:alice") is None
    second, _ = make_ticket(first.principal, "s1", reusable=False, lifetime_seconds=9, now=NOW)
    assert second.principal.name == first.principal.name
