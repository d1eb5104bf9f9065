"""Secrets are taken out of what comes back, wherever its pieces end."""

import json

import pytest

from carrel.mcp_gateway.hiding import HIDDEN, Hider

SECRET = "tok_0123456789"


@pytest.mark.parametrize("size", [1, 2, 5, 13, 14, 15, 100])
def test_in_pieces_of_any_size(size: int) -> None:
    text = f"a {SECRET} b {SECRET[:9]} c {SECRET}{SECRET} tok_ d {SECRET[:-1]}".encode()
    hider = Hider([SECRET])
    shown = b"".join(hider.feed(text[at : at + size]) for at in range(0, len(text), size)) + hider.rest()
    assert shown == text.replace(SECRET.encode(), HIDDEN)


def test_only_what_may_become_a_secret_waits() -> None:
    hider = Hider([SECRET])
    assert hider.feed(b"event: message\n") == b"event: message\n"
    assert hider.feed(b"data: tok_01") == b"data: "
    assert hider.feed(b"x") == b"tok_01x"
    assert hider.rest() == b""


def test_as_it_is_written_in_json() -> None:
    secret = 'pass"wörd\\123'
    hider = Hider([secret])
    for ascii in (True, False):
        shown = hider.feed(json.dumps({"a": secret}, ensure_ascii=ascii).encode()) + hider.rest()
        assert json.loads(shown) == {"a": HIDDEN.decode()}
    assert hider.whole(f"key={secret}") == f"key={HIDDEN.decode()}"


def test_what_is_short_stands_in_too_many_texts() -> None:
    assert Hider(["a"]).feed(b"banana") == b"banana"
