"""What a name may lead to: public addresses alone, whatever they are dressed in."""

import socket
from contextlib import closing
from ipaddress import ip_address

import pytest

from carrel.egress import Judge

PUBLIC = ["8.8.8.8", "93.184.215.14", "1.1.1.1", "2606:4700::1111", "2a00:1450:4001::1", "::ffff:8.8.8.8",
          "64:ff9b::808:808"]  # fmt: skip
NOT_PUBLIC = {
    "this host": ["0.0.0.0", "0.1.2.3", "::"],
    "loopback": ["127.0.0.1", "127.255.255.254", "::1"],
    "private": ["10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "fc00::1", "fd12:3456::1", "fec0::1"],
    "link-local": ["169.254.1.1", "fe80::1", "febf::1"],
    "metadata": ["169.254.169.254", "169.254.170.2", "100.100.100.200", "168.63.129.16", "192.0.0.192", "fd00:ec2::254"],
    "carrier-grade": ["100.64.0.1", "100.127.255.255"],
    "multicast": ["224.0.0.1", "239.255.255.255", "ff02::1", "ff0e::1"],
    "reserved": ["240.0.0.1", "255.255.255.255", "192.0.2.1", "198.51.100.1", "203.0.113.1", "198.18.0.1", "2001:db8::1",
                 "3fff::1", "5f00::1", "4000::1", "100::1"],
    "IPv4-mapped": ["::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::ffff:0.0.0.0"],
    "IPv4-compatible": ["::127.0.0.1", "::10.0.0.1", "::8.8.8.8"],
    "6to4": ["2002:7f00:1::", "2002:a00:1::1", "2002:a9fe:a9fe::"],
    "NAT64": ["64:ff9b::7f00:1", "64:ff9b::a00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::7f00:1", "64:ff9b:1::808:808"],
    "Teredo": ["2001:0:7f00:1::", "2001:0:808:808:0:0:f5ff:fffe"],
    "ISATAP": ["2a00::5efe:10.0.0.1", "2a00::200:5efe:127.0.0.1"],
}  # fmt: skip
METADATA = [*NOT_PUBLIC["metadata"], "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::"]


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_permitted(address):
    assert Judge().permits(ip_address(address))


@pytest.mark.parametrize(("kind", "address"), [(kind, each) for kind, every in NOT_PUBLIC.items() for each in every])
def test_no_other_address_is(kind, address):
    assert not Judge().permits(ip_address(address))


def test_the_operator_may_add_private_networks_and_those_alone():
    judge = Judge(["10.20.0.0/16", "fd12::/16", "127.0.0.0/8"])
    for address in ("10.20.3.4", "::ffff:10.20.3.4", "fd12::1", "127.0.0.1", *PUBLIC):
        assert judge.permits(ip_address(address)), address
    for address in ("10.21.0.1", "192.168.1.1", "fd13::1", "::1"):
        assert not judge.permits(ip_address(address)), address


@pytest.mark.parametrize("address", METADATA)
def test_where_a_cloud_tells_a_machine_its_credentials_is_never_permitted(address):
    assert not Judge(["0.0.0.0/0", "::/0"]).permits(ip_address(address))


def test_this_machines_own_public_address_is_not_permitted(monkeypatch):
    """Its services may trust what comes from itself."""
    own = "93.184.215.14"
    assert Judge().permits(ip_address(own))
    bound = socket.socket.bind

    class Own(socket.socket):
        def bind(self, address):
            bound(self, ("127.0.0.1", 0) if address[0] == own else address)

    monkeypatch.setattr(socket, "socket", Own)
    assert not Judge().permits(ip_address(own))
    assert Judge().permits(ip_address("8.8.8.8"))
    with closing(Own(socket.AF_INET, socket.SOCK_DGRAM)):
        pass
