"""Network policies: what a Bash tool of the real CLI reaches beside the gateway, and what is on record of it.

Every name leads to this machine: `localhost` is what its resolver knows without asking anybody.
"""

import asyncio

import pytest

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap")]

LOOPBACK = {"private_networks": ["127.0.0.0/8"]}


@pytest.fixture
async def site():
    """A server that answers anything: its port, and the requests that came."""
    came = []

    async def serve(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        came.append(head.decode().partition("\r\n")[0])
        body = b"hello\n"
        if b"/away" in head:
            writer.write(b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n")
        else:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1], came
    server.close()


async def said(api, session, command):
    turn = await api.run(session, f"[[bash: {command}]]")
    return turn["tool_calls"][0]["result"]


def curl(url, *options):
    # The list of what is reached directly has `localhost` in it, since that is the sandbox itself.
    return f"curl -sS -m 20 --noproxy nothing {' '.join(options)} {url} 2>&1"


async def record(api, session):
    report = await api.ask("GET", f"/sessions/{session}/network")
    assert report["recorded"]
    return {(each["host"], each["port"], each["verdict"], each["reason"]): each["count"] for each in report["data"]}


async def test_a_bash_tool_reaches_what_is_allowed_and_nothing_else(start, site):
    port, came = site
    api = await start(network={"allow": [f"localhost:{port}", "*.example.org"]}, egress=LOOPBACK)
    session = await api.session()
    assert await said(api, session, curl(f"http://localhost:{port}/a")) == "hello"
    assert await said(api, session, curl(f"http://localhost:{port}/b", "-p")) == "hello"  # by a tunnel
    assert "403" in await said(api, session, curl("https://example.net/"))
    assert "is not among the names" in await said(api, session, curl("http://example.net/"))
    assert "on other ports" in await said(api, session, curl("http://localhost:1/"))
    assert "is an address" in await said(api, session, curl(f"http://127.0.0.1:{port}/"))
    assert "is an address" in await said(api, session, curl("http://169.254.169.254/latest/meta-data"))
    assert "is an address" in await said(api, session, curl(f"http://localhost:{port}/away", "-L"))
    assert came == ["GET /a HTTP/1.1", "GET /b HTTP/1.1", "GET /away HTTP/1.1"]
    assert await record(api, session) == {
        ("localhost", port, "allowed", "listed"): 3,
        ("example.net", 443, "refused", "not_listed"): 1,
        ("example.net", 80, "refused", "not_listed"): 1,
        ("localhost", 1, "refused", "port"): 1,
        ("127.0.0.1", port, "refused", "address"): 1,
        ("127.0.0.1", 1, "refused", "address"): 1,
        ("169.254.169.254", 80, "refused", "address"): 1,
    }
    # Around the proxy there is no way: no name server, no route.
    assert "none" in await said(api, session, "getent hosts localhost.example.org example.net || echo none")
    direct = await said(
        api, session, curl(f"http://127.0.0.1:{port}/direct").replace("--noproxy nothing", "--noproxy '*'")
    )
    assert "Failed to connect" in direct
    assert len(came) == 3
    page = (await api.http.get(f"{api.server.url}/metrics")).text
    assert 'carrel_egress_requests_total{reason="listed",verdict="allowed"} 3.0' in page


async def test_a_session_narrows_what_it_is_given_and_widens_nothing(start, site):
    port, came = site
    api = await start(network={"allow": [f"localhost:{port}", "*.example.org"]}, egress=LOOPBACK)
    for wider in ("open", {"allow": ["example.net"]}, {"allow": ["*.org"]}, {"allow": ["a.example.org:22"]}):
        refused = await api.ask("POST", "/sessions", expected=403, json={"network": wider})
        assert "may narrow" in refused["detail"]
    await api.ask("POST", "/sessions", expected=422, json={"network": {"allow": ["10.0.0.1"]}})
    narrow = await api.session(network={"allow": ["a.example.org"]})
    assert "not among" in await said(api, narrow, curl(f"http://localhost:{port}/"))
    closed = await api.session(network="gateway-only")
    assert await said(api, closed, "env | grep -i -c _proxy= || true") == "0"
    for session, policy in ((narrow, {"allow": ["a.example.org"]}), (closed, "gateway-only")):
        assert (await api.ask("GET", f"/sessions/{session}/network"))["policy"] == policy
        await api.ask("PATCH", f"/sessions/{session}", expected=403, json={"network": "open"})
    # Back to all that is given, from the agent's next start on.
    await api.ask("PATCH", f"/sessions/{narrow}", json={"network": None})
    assert (await api.ask("GET", f"/sessions/{narrow}/network"))["policy"] == {"allow": ["a.example.org"]}
    await api.ask("POST", f"/sessions/{narrow}/stop")
    await api.ask("POST", f"/sessions/{narrow}/resume")
    assert await said(api, narrow, curl(f"http://localhost:{port}/")) == "hello"
    assert len(came) == 1
    whole = await api.ask("GET", f"/sessions/{narrow}/network", params={"limit": 1})
    rest = await api.ask("GET", f"/sessions/{narrow}/network", params={"cursor": whole["next_cursor"]})
    assert [each["verdict"] for each in (*whole["data"], *rest["data"])] == ["allowed", "refused"]
    assert rest["next_cursor"] is None


async def test_with_an_open_network_nothing_is_recorded_and_that_is_said(start, site):
    port, came = site
    api = await start(network="open")
    session = await api.session()
    assert await said(api, session, curl(f"http://127.0.0.1:{port}/")) == "hello"
    report = await api.ask("GET", f"/sessions/{session}/network")
    assert report == {"policy": "open", "recorded": False, "data": [], "next_cursor": None}
    narrow = await api.session(network={"allow": ["example.org"]})
    assert "Failed to connect" in await said(api, narrow, f"curl -sS -m 9 --noproxy '*' http://127.0.0.1:{port}/ 2>&1")
    assert len(came) == 1


@pytest.mark.requires("docker", "images")
async def test_a_container_reaches_what_is_allowed_and_nothing_else(start, site):
    """The runner is inside, so it listens itself; behind it is the same proxy."""
    port, came = site
    api = await start(runtime="docker", network={"allow": [f"localhost:{port}"]}, egress=LOOPBACK)
    session = await api.session()
    assert await said(api, session, curl(f"http://localhost:{port}/a")) == "hello"
    assert await said(api, session, curl(f"http://localhost:{port}/b", "-p")) == "hello"
    assert "403" in await said(api, session, curl("https://example.net/"))
    assert "none" in await said(api, session, "getent hosts example.net || echo none")
    direct = await said(api, session, f"curl -sS -m 9 --noproxy '*' http://127.0.0.1:{port}/ 2>&1")
    assert "Failed to connect" in direct or "Could not connect" in direct
    assert [line.split()[1] for line in came] == ["/a", "/b"]
    assert await record(api, session) == {
        ("localhost", port, "allowed", "listed"): 2,
        ("example.net", 443, "refused", "not_listed"): 1,
    }
    closed = await api.session(network="gateway-only")
    assert "connect" in await said(api, closed, "curl -sS -m 9 -x http://127.0.0.1:3128 http://localhost/ 2>&1")
    assert (await api.ask("GET", f"/sessions/{closed}/network"))["data"] == []
