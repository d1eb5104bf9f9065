"""Network `{allow: [...]}`: names through the egress proxy, and no other way out, as root and as an ordinary user."""

import json
import os

import pytest

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap")]

ORDINARY_USER = 64_321
PROBE = """
import errno, json, os, socket, subprocess
found = {}

def status(sent, path=None, port=3128):
    connection = socket.socket(socket.AF_UNIX if path else socket.AF_INET)
    connection.settimeout(20)
    connection.connect(path or ("127.0.0.1", port))
    connection.sendall(sent)
    data = connection.recv(4096)
    connection.close()
    return data.split()[1].decode() if data else "closed"

def connect(host):
    return b"CONNECT " + host.encode() + b" HTTP/1.1\\r\\n\\r\\n"

def error(call):
    try:
        call()
    except OSError as wrong:
        return errno.errorcode.get(wrong.errno, str(wrong)) if wrong.errno and wrong.errno > 0 else type(wrong).__name__
    return "none"

found["interfaces"] = [name for _, name in socket.if_nameindex()]
found["listening"] = [line.split()[1].split(":")[1] for line in open("/proc/net/tcp").readlines()[1:] if line.split()[3] == "0A"]
found["allowed"] = status(connect("localhost:PORT"))
found["refused"] = {each: status(connect(each)) for each in HOSTS}
found["direct"] = {
    "tcp": error(lambda: socket.create_connection(("127.0.0.1", PORT), timeout=5)),
    "routed": error(lambda: socket.create_connection(("192.0.2.1", 443), timeout=5)),
    "names": error(lambda: socket.getaddrinfo("example.org", 443)),
    "datagrams": error(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.53", 53))),
    "six": error(lambda: socket.create_connection(("2001:db8::1", 443), timeout=5)),
}
socket_path = "/run/carrel/egress.sock"
token = os.environ["ANTHROPIC_API_KEY"]
found["sockets"] = sorted(os.listdir("/run/carrel"))
said = lambda token: b"CONNECT evil.example:443 HTTP/1.1\\r\\nproxy-authorization: Bearer " + token + b"\\r\\n\\r\\n"
found["without a token"] = status(connect("localhost:PORT"), socket_path)
found["wrong token"] = status(said(b"cak-wrong"), socket_path)
found["own token"] = status(said(token.encode()), socket_path)
found["link"] = status(b"GET http://gateway/link HTTP/1.1\\r\\nupgrade: websocket\\r\\n\\r\\n")
found["descriptors"] = sorted({os.readlink(f"/proc/{pid}/fd/{fd}").partition(":")[0]
    for pid in os.listdir("/proc") if pid.isdigit() and os.access(f"/proc/{pid}/fd", os.R_OK)
    for fd in os.listdir(f"/proc/{pid}/fd") if os.path.islink(f"/proc/{pid}/fd/{fd}")})
found["environment"] = {name: os.environ.get(name) for name in ("HTTP_PROXY", "https_proxy", "no_proxy")}
print(json.dumps(found))
"""
REFUSED = [
    "evil.example:443",
    "localhost:1",
    "localhost.evil.example:443",
    "127.0.0.1:PORT",
    "2130706433:PORT",
    "0x7f000001:PORT",
    "[::1]:PORT",
    "[::ffff:127.0.0.1]:PORT",
    "169.254.169.254:80",
    "metadata.google.internal:80",
    "c2VjcmV0.tunnel.evil.example:53",
    "gateway:80",
]


@pytest.mark.parametrize("who", ["root", "ordinary user"])
def test_names_that_are_allowed_are_the_only_way_out(who, open_house, short_folder, listener, require):
    if who == "root":
        require("root")
    uid = ORDINARY_USER if who != "root" and os.geteuid() == 0 else None
    network = {"allow": [f"localhost:{listener.port}"]}
    hosts = [each.replace("PORT", str(listener.port)) for each in REFUSED]
    script = PROBE.replace("HOSTS", repr(hosts)).replace("PORT", str(listener.port))
    settings = {"model_upstream": "scripted", "network": network, "egress": {"private_networks": ["127.0.0.1"]}}
    with open_house(short_folder, uid=uid, **settings) as home:
        session = home.session()
        home.put(session, "probe.py", script.encode())
        found = json.loads(home.bash(session, "python3 probe.py"))
        report = home.client.get(f"/sessions/{session}/network").json()
    assert found["interfaces"] == ["lo"]
    assert found["listening"] == [f"{3128:04X}"]
    assert found["allowed"] == "200"
    assert found["refused"] == dict.fromkeys(hosts, "403")
    direct = {"tcp": "ECONNREFUSED", "routed": "ENETUNREACH", "names": "gaierror", "datagrams": "ENETUNREACH"}
    assert found["direct"] == direct | {"six": "ENETUNREACH"}
    assert found["sockets"] == ["egress.sock", "gateway.sock"]
    assert (found["without a token"], found["wrong token"], found["own token"]) == ("407", "407", "403")
    assert found["link"] == "403"
    assert not [path for path in found["descriptors"] if path.endswith(("/wall", "/go"))], "no pipe of the wall is left"
    proxy = "http://127.0.0.1:3128"
    own = "localhost,127.0.0.1,::1,gateway"
    assert found["environment"] == {"HTTP_PROXY": proxy, "https_proxy": proxy, "no_proxy": own}
    assert len(listener.visitors) == 1
    recorded = {(each["host"], each["port"]) for each in report["data"] if each["verdict"] == "refused"}
    assert len(recorded) == len(hosts)
    assert ("evil.example", 443) in recorded


def test_a_policy_that_allows_nothing_opens_nothing_by_the_proxys_socket(open_house, short_folder, listener):
    script = f"""
import os, socket
connection = socket.socket(socket.AF_UNIX)
connection.connect("/run/carrel/egress.sock")
token = os.environ["ANTHROPIC_API_KEY"]
connection.sendall(f"CONNECT localhost:{listener.port} HTTP/1.1\\r\\nproxy-authorization: Bearer {{token}}\\r\\n\\r\\n".encode())
print(connection.recv(100).split()[1].decode())
"""
    with open_house(short_folder, model_upstream="scripted", egress={"private_networks": ["127.0.0.1"]}) as home:
        session = home.session()
        home.put(session, "ask.py", script.encode())
        assert home.bash(session, "python3 ask.py; env | grep -ci _proxy=").split() == ["403", "0"]
        report = home.client.get(f"/sessions/{session}/network").json()
    assert report["policy"] == "gateway-only"
    assert [(each["reason"], each["count"]) for each in report["data"]] == [("not_listed", 1)]
    assert listener.visitors == []
