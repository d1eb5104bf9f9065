"""Names of hosts in their one form, and which of them a policy means."""

import pytest
from pydantic import ValidationError

from carrel.hostnames import AddressLiteral, HostPattern, canonical_host
from carrel.model import GATEWAY_ONLY, NetworkPolicy

OPEN = NetworkPolicy(mode="open")


def allow(*names: str) -> NetworkPolicy:
    return NetworkPolicy(mode="allow", allow=names)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("Example.ORG", "example.org"),
        ("example.org.", "example.org"),
        ("münchen.de", "xn--mnchen-3ya.de"),
        ("MÜNCHEN.de", "xn--mnchen-3ya.de"),
        ("XN--MNCHEN-3YA.de", "xn--mnchen-3ya.de"),
        ("例え.jp", "xn--r8jz45g.jp"),
        ("localhost", "localhost"),
        ("a_b.example.org", "a_b.example.org"),
        ("1.example.org", "1.example.org"),
        ("4chan.org", "4chan.org"),
        ("0xcafe.example", "0xcafe.example"),
    ],
)
def test_a_name_has_one_form(written, name):
    assert canonical_host(written) == name


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.1",
        "127.0.0.1.",
        "2130706433",
        "0177.0.0.1",
        "0x7f000001",
        "0x7f.0.0.1",
        "0X7F000001",
        "0x",
        "1.2.3.4.5",
        "example.0x1",
        "example.1",
        "[::1]",
        "::1",
        "fe80::1%eth0",
        "%31%32%37.0.0.1",
        "::ffff:169.254.169.254",
    ],
)
def test_an_address_in_whatever_form_is_no_name(address):
    with pytest.raises(AddressLiteral):
        canonical_host(address)


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        ".",
        "..",
        "example..org",
        ".example.org",
        "example.org..",
        "-a.org",
        "a-.org",
        "a b.org",
        "exa\u200dmple.org",
        "faß.de",  # fass.de in one standard, xn--fa-hia.de in the other
        "a\x00.org",
        "a/b",
        "a@b",
        "a\\b",
        "*.example.org",
        "x" * 64 + ".org",
        ".".join(["abcdefg"] * 40),
        "①②⑦.0.0.1",
        "１２７.0.0.1",
        "example。org",
    ],
)
def test_what_is_no_name_is_refused(wrong):
    with pytest.raises(ValueError, match=r"no name of a host|in two ways"):
        canonical_host(wrong)


@pytest.mark.parametrize(
    ("pattern", "host", "port", "meant"),
    [
        ("example.org", "example.org", 443, True),
        ("example.org", "example.org", 80, True),
        ("example.org", "example.org", 8443, False),
        ("example.org", "example.org", 22, False),
        ("example.org", "www.example.org", 443, False),
        ("example.org", "badexample.org", 443, False),
        ("example.org", "example.org.evil.net", 443, False),
        ("*.example.org", "www.example.org", 443, True),
        ("*.example.org", "a.b.example.org", 443, True),
        ("*.example.org", "example.org", 443, False),
        ("*.example.org", "badexample.org", 443, False),
        ("example.org:8443", "example.org", 8443, True),
        ("example.org:8443", "example.org", 443, False),
        ("*.example.org:22", "git.example.org", 22, True),
    ],
)
def test_a_pattern_means_its_names_and_ports_alone(pattern, host, port, meant):
    assert HostPattern.parse(pattern).matches(host, port) is meant
    assert allow(pattern).permits(host, port) is meant
    assert not GATEWAY_ONLY.permits(host, port)


@pytest.mark.parametrize(
    "wrong",
    ["*", "*.", "*.*.org", "a.*.org", "*example.org", "http://example.org", "example.org/x", "example.org:0",
     "example.org:99999", "example.org:x", "example.org:", "10.0.0.1", "10.0.0.0/8", "2130706433:80", "[::1]:80", ""],
)  # fmt: skip
def test_a_policy_names_hosts_and_nothing_else(wrong):
    with pytest.raises(ValidationError):
        allow(wrong)


def test_a_policy_is_read_as_people_write_it_and_written_so_again():
    for written in ("gateway-only", "open", {"allow": ["example.org", "*.example.net", "example.com:8443"]}):
        policy = NetworkPolicy.model_validate(written)
        assert policy.model_dump(mode="json") == written
        assert NetworkPolicy.model_validate_json(policy.model_dump_json()) == policy
    assert allow("Example.org.", "EXAMPLE.ORG").allow == ("example.org",)
    for wrong in ("host", "closed", {"allow": []}, {"mode": "open", "allow": ["a.org"]}, {"deny": ["a.org"]}):
        with pytest.raises(ValidationError):
            NetworkPolicy.model_validate(wrong)


WIDE = allow("example.org", "*.example.net", "git.example.com:22", "*.example.com:8443")


@pytest.mark.parametrize(
    ("narrow", "wide", "is_within"),
    [
        (GATEWAY_ONLY, GATEWAY_ONLY, True),
        (GATEWAY_ONLY, WIDE, True),
        (OPEN, OPEN, True),
        (OPEN, WIDE, False),
        (OPEN, GATEWAY_ONLY, False),
        (WIDE, OPEN, True),
        (WIDE, WIDE, True),
        (WIDE, GATEWAY_ONLY, False),
        (allow("example.org"), WIDE, True),
        (allow("example.org:443"), WIDE, True),
        (allow("example.org:8080"), WIDE, False),
        (allow("a.example.net", "*.b.example.net"), WIDE, True),
        (allow("*.net"), WIDE, False),
        (allow("example.net"), WIDE, False),
        (allow("*.example.org"), WIDE, False),
        (allow("git.example.com"), WIDE, False),
        (allow("git.example.com:22"), WIDE, True),
        (allow("x.example.com:8443"), WIDE, True),
        (allow("example.org", "evil.org"), WIDE, False),
    ],
)
def test_a_policy_is_within_another_or_not(narrow, wide, is_within):
    assert narrow.within(wide) is is_within
    assert wide.narrowed(narrow).within(wide)
    assert wide.narrowed(narrow).within(narrow)
    if is_within:
        assert wide.narrowed(narrow) == narrow


def test_what_a_wish_does_not_share_with_what_is_given_is_left_out():
    assert WIDE.narrowed(None) == WIDE
    assert WIDE.narrowed(allow("evil.org", "a.example.net")) == allow("a.example.net")
    assert WIDE.narrowed(allow("*.org")) == allow("example.org")
    assert WIDE.narrowed(allow("evil.org")) == GATEWAY_ONLY
    assert allow("example.org").narrowed(allow("example.org:443", "example.org:22")) == allow("example.org:443")
