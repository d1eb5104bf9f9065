"""From where a request comes: forwarding headers count only where a trusted proxy sends them."""

import pytest

from carrel.api.addresses import Proxies
from carrel.errors import InvalidSettings


def scope(peer, *forwarded):
    headers = [(b"x-forwarded-for", value.encode()) for value in forwarded]
    return {"client": (peer, 4711) if peer else None, "headers": headers}


@pytest.mark.parametrize(
    ("trusted", "peer", "forwarded", "expected"),
    [
        ([], "192.0.2.1", [], "192.0.2.1"),
        ([], "192.0.2.1", ["198.51.100.9"], "192.0.2.1"),
        (["10.0.0.5"], "192.0.2.1", ["198.51.100.9"], "192.0.2.1"),
        (["10.0.0.5"], "10.0.0.5", [], "10.0.0.5"),
        (["10.0.0.5"], "10.0.0.5", ["198.51.100.9"], "198.51.100.9"),
        (["10.0.0.5"], "10.0.0.5", ["1.1.1.1, 198.51.100.9"], "198.51.100.9"),
        (["10.0.0.0/8"], "10.0.0.5", ["1.1.1.1, 198.51.100.9, 10.9.9.9"], "198.51.100.9"),
        (["10.0.0.0/8"], "10.0.0.5", ["1.1.1.1, 198.51.100.9", "10.9.9.9"], "198.51.100.9"),
        (["10.0.0.0/8"], "10.0.0.5", ["10.1.1.1, 10.2.2.2"], "10.1.1.1"),
        (["10.0.0.0/8"], "10.0.0.5", ["1.1.1.1, nonsense"], "10.0.0.5"),
        (["10.0.0.0/8"], "10.0.0.5", ["198.51.100.9:5555"], "198.51.100.9"),
        (["::1"], "::1", ["[2001:db8::1]:443"], "2001:db8::1"),
        (["127.0.0.1"], "::ffff:127.0.0.1", ["198.51.100.9"], "198.51.100.9"),
        (["10.0.0.5"], None, ["198.51.100.9"], None),
    ],
)
def test_the_rightmost_untrusted_address_counts(trusted, peer, forwarded, expected):
    assert Proxies(trusted).address(scope(peer, *forwarded)) == expected


def test_a_proxy_that_is_no_address_stops_the_start():
    with pytest.raises(InvalidSettings, match="trusted_proxies: 'everyone'"):
        Proxies(["everyone"])
