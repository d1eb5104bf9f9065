"""The proxy: who may ask, what is understood, where it leads, what is on record."""

import asyncio

import pytest

from carrel.model import SandboxStatus


async def test_plain_http_is_led_to_a_name_that_is_allowed(house):
    answer = await house.get(f"http://good.example:{house.port}/a?b=c", "X-Own: 1")
    assert (answer.status, answer.body) == (200, b"hello")
    assert "Connection: close" in answer.lines
    (received,) = house.received
    assert received == (
        f"GET /a?b=c HTTP/1.1\r\nHost: good.example:{house.port}\r\nx-own: 1\r\nConnection: close\r\n\r\n".encode()
    )
    assert await house.record() == [("good.example", house.port, "allowed", "listed", 1)]
    assert house.told == [("allowed", "listed")]


async def tunnel(house, authority):
    """A tunnel that the proxy has opened, or its answer."""
    reader, writer = await house.dial()
    writer.write(f"CONNECT {authority} HTTP/1.1\r\nproxy-authorization: Bearer {house.token}\r\n\r\n".encode())
    return (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")[0], reader, writer


async def test_a_tunnel_carries_what_it_carries(house):
    line, reader, writer = await tunnel(house, f"GOOD.example.:{house.port}")
    assert line == b"HTTP/1.1 200 Connection established"
    writer.write(b"whatever this may be\r\n\r\n")
    assert await reader.read() == house.answer
    writer.close()
    assert house.received == [b"whatever this may be\r\n\r\n"]
    assert house.asked == ["good.example"]
    assert await house.record() == [("good.example", house.port, "allowed", "listed", 1)]


@pytest.mark.parametrize(
    ("host", "status", "reason"),
    [
        ("evil.example", 403, "not_listed"),
        ("good.example.evil.example", 403, "not_listed"),
        ("notgood.example", 403, "not_listed"),
        ("wild.example", 403, "not_listed"),
        ("127.0.0.1", 403, "address"),
        ("127.1", 403, "address"),
        ("2130706433", 403, "address"),
        ("0177.0.0.1", 403, "address"),
        ("0x7f000001", 403, "address"),
        ("0x7f.1", 403, "address"),
        ("[::1]", 403, "address"),
        ("[::ffff:127.0.0.1]", 403, "address"),
        ("[fe80::1%25eth0]", 403, "address"),
        ("169.254.169.254", 403, "address"),
        ("good%2eexample", 403, "address"),
        ("good..example", 400, "malformed"),
        ("-good.example", 400, "malformed"),
        ("private.example", 403, "private_address"),
        ("nowhere.example", 502, "unresolved"),
    ],
)
async def test_where_it_does_not_lead(house, host, status, reason):
    for request in (
        f"CONNECT {host}:{house.port} HTTP/1.1\r\n\r\n",
        f"GET http://{host}:{house.port}/ HTTP/1.1\r\n\r\n",
    ):
        answer = await house.ask(request)
        assert (answer.status, answer.reason) == (status, reason)
    verdict = "allowed" if status == 502 else "refused"
    assert await house.record() == [(host, house.port, verdict, reason, 2)]
    assert house.received == []
    if reason in ("address", "malformed", "not_listed"):
        assert house.asked == [], "no resolver hears of a name that is not allowed"


async def test_names_wildcards_and_punycode(house):
    for host in ("a.wild.example", "A.B.Wild.Example.", "xn--mnchen-3ya.de", "XN--MNCHEN-3YA.DE."):
        assert (await house.get(f"http://{host}:{house.port}/")).status == 200
    assert house.asked == ["a.wild.example", "a.b.wild.example", "xn--mnchen-3ya.de", "xn--mnchen-3ya.de"]
    raw = "GET http://münchen.de/ HTTP/1.1\r\n\r\n".encode()
    assert (await house.ask(raw)).status == 400


async def test_a_name_without_a_port_means_80_and_443(house):
    """good.example is allowed on its own too, so on these ports; nothing listens there."""
    assert (await house.get("http://good.example/")).reason in ("unreachable", "")
    assert (await house.get("http://wild.a.good.example/")).reason == "not_listed"
    for port in (22, 8080, 1, 65535):
        assert (await house.get(f"http://good.example:{port}/")).reason == "port"


async def test_a_connection_that_fails_is_told_apart_from_a_refusal(make_house):
    house = await make_house()
    port = house.port
    server = await asyncio.start_server(house.serve, "127.0.0.1", 0)
    closed = server.sockets[0].getsockname()[1]
    server.close()
    network = house.sandbox.network.model_copy(update={"allow": (f"good.example:{closed}",)})
    await house.store.write(lambda tx: tx.sandboxes.update(house.sandbox.id, network=network))
    answer = await house.get(f"http://good.example:{closed}/")
    assert (answer.status, answer.reason) == (502, "unreachable")
    assert (await house.get(f"http://good.example:{port}/")).reason == "port"
    assert await house.record() == [
        ("good.example", closed, "allowed", "unreachable", 1),
        ("good.example", port, "refused", "port", 1),
    ]


async def test_a_redirect_is_the_clients_to_follow_and_is_checked_anew(house):
    house.answer = b"HTTP/1.1 302 Found\r\nlocation: http://169.254.169.254/latest/meta-data\r\n\r\n"
    answer = await house.get(f"http://good.example:{house.port}/")
    assert answer.status == 302
    assert (await house.get("http://169.254.169.254/latest/meta-data")).reason == "address"
    assert len(house.received) == 1


async def test_only_the_token_of_a_running_sandbox_opens_it(house):
    request = f"CONNECT good.example:{house.port} HTTP/1.1\r\n\r\n"
    for token in (None, "", "cak-wrong", house.sandbox.id, "own\x00"):
        answer = await house.ask(request, token=token)
        assert answer.status == 407
        assert 'proxy-authenticate: Basic realm="carrel"' in answer.lines
    twice = f"proxy-authorization: Bearer {house.token}\r\n" * 2
    assert (await house.ask(f"CONNECT good.example:{house.port} HTTP/1.1\r\n{twice}\r\n", token=None)).status == 407
    for said in (f"Bearer {house.token}", f"bearer {house.token}"):
        plain = f"GET http://good.example:{house.port}/ HTTP/1.1\r\nproxy-authorization: {said}\r\n\r\n"
        assert (await house.ask(plain, token=None)).status == 200
    await house.store.write(lambda tx: tx.sandboxes.update(house.sandbox.id, status=SandboxStatus.GONE))
    assert (await house.ask(request)).status == 407
    assert house.told == [("allowed", "listed")] * 2


async def test_a_greeting_says_whose_the_connection_is(house):
    reader, writer = await house.dial()
    writer.write(f"OPTIONS * HTTP/1.1\r\nproxy-authorization: Bearer {house.token}\r\n\r\n".encode())
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
    writer.write(f"GET http://good.example:{house.port}/ HTTP/1.1\r\n\r\n".encode())
    assert (await reader.read()).endswith(b"hello")
    writer.close()
    assert (await house.ask("OPTIONS * HTTP/1.1\r\n\r\n", token="wrong")).status == 407


async def test_a_sandbox_without_a_policy_is_led_nowhere(house):
    await house.store.write(lambda tx: tx.sandboxes.update(house.sandbox.id, network=None))
    assert (await house.get(f"http://good.example:{house.port}/")).reason == "not_listed"


# -------------------------------------------------------------------------------------- what can be read in two ways


@pytest.mark.parametrize(
    "request_",
    [
        "GET / HTTP/1.1\r\nHost: good.example\r\n\r\n",
        "GET //good.example/ HTTP/1.1\r\n\r\n",
        "GET https://good.example/ HTTP/1.1\r\n\r\n",
        "GET ftp://good.example/ HTTP/1.1\r\n\r\n",
        "GET http://evil.example@good.example/ HTTP/1.1\r\n\r\n",
        "GET http://good.example\\@evil.example/ HTTP/1.1\r\n\r\n",
        "GET http://good.example#@evil.example/ HTTP/1.1\r\n\r\n",
        "GET http://good.example:80:81/ HTTP/1.1\r\n\r\n",
        "GET http://good.example:/ HTTP/1.1\r\n\r\n",
        "GET http://good.example:0/ HTTP/1.1\r\n\r\n",
        "GET http://good.example:99999/ HTTP/1.1\r\n\r\n",
        "GET http://[::1/ HTTP/1.1\r\n\r\n",
        "GET http://[::1]x:80/ HTTP/1.1\r\n\r\n",
        "GET http:///etc/passwd HTTP/1.1\r\n\r\n",
        "CONNECT good.example HTTP/1.1\r\n\r\n",
        "CONNECT http://good.example:443 HTTP/1.1\r\n\r\n",
        "CONNECT good.example:443/ HTTP/1.1\r\n\r\n",
        "CONNECT :443 HTTP/1.1\r\n\r\n",
        "GET http://good.example/ HTTP/2\r\n\r\n",
        "GET http://good.example/\r\n\r\n",
        "GET  http://good.example/ HTTP/1.1\r\n\r\n",
        "GET http://good.example/ x HTTP/1.1\r\n\r\n",
        "GET http://good.example/ HTTP/1.1\r\nX: a\nHost: evil.example\r\n\r\n",
        "GET http://good.example/ HTTP/1.1\r\nX: a\rb\r\n\r\n",
        "GET http://good.example/ HTTP/1.1\r\nX: a\r\n folded: b\r\n\r\n",
        "GET http://good.example/ HTTP/1.1\r\nX : a\r\n\r\n",
        "GET http://good.example/ HTTP/1.1\r\n: a\r\n\r\n",
        "GET http://good.example/ HTTP/1.1\r\nX: a\x00b\r\n\r\n",
        "GET http://good.example/ HTTP/1.1\r\n" + "X: a\r\n" * 300 + "\r\n",
        "GET http://good.example/ HTTP/1.1\r\nX: " + "a" * 70_000 + "\r\n\r\n",
        "POST http://good.example/ HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "POST http://good.example/ HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        "POST http://good.example/ HTTP/1.1\r\nContent-Length: +1\r\n\r\na",
        "POST http://good.example/ HTTP/1.1\r\nContent-Length: 1, 1\r\n\r\na",
        "POST http://good.example/ HTTP/1.1\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        "POST http://good.example/ HTTP/1.1\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "POST http://good.example/ HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
)
async def test_what_can_be_read_in_two_ways_is_not_read(house, request_):
    answer = await house.ask(request_.replace("http://good.example/", f"http://good.example:{house.port}/"))
    assert answer.status in (400, 407)
    assert answer.status == 400 or "\r\n" not in request_.partition("\r\n")[0]
    assert house.received == []


async def test_the_host_that_is_told_the_server_is_the_one_that_was_checked(house):
    headers = ["Host: evil.example", "Connection: keep-alive, X-Secret", "X-Secret: 1", "Proxy-Connection: keep-alive",
               "Upgrade: websocket", "TE: trailers", "Keep-Alive: 5", "Cookie: a=b"]  # fmt: skip
    assert (await house.get(f"http://good.example:{house.port}/", *headers)).status == 200
    (received,) = house.received
    assert received == (
        f"GET / HTTP/1.1\r\nHost: good.example:{house.port}\r\ncookie: a=b\r\nConnection: close\r\n\r\n".encode()
    )
    assert house.token.encode() not in received


async def test_what_comes_after_a_request_is_not_another_one(house):
    second = f"GET http://good.example:{house.port}/second HTTP/1.1\r\n\r\n"
    for body in ("", "Content-Length: 3\r\n"):
        text = f"POST http://good.example:{house.port}/first HTTP/1.1\r\n{body}\r\n{'abc' if body else ''}{second}"
        assert (await house.ask(text)).status == 200
    assert [received.split(b" ")[1] for received in house.received] == [b"/first", b"/first"]
    assert all(b"second" not in received for received in house.received)


async def test_bodies_are_written_anew(house):
    chunks = "5;x=y\r\nhello\r\n1\r\n!\r\n0\r\nX-Trailer: 1\r\n\r\n"
    answer = await house.get(
        f"http://good.example:{house.port}/", "Transfer-Encoding: chunked", method="POST", body=chunks
    )
    assert answer.status == 200
    assert house.received[0].endswith(b"\r\n\r\n5\r\nhello\r\n1\r\n!\r\n0\r\n\r\n")
    answer = await house.get(
        f"http://good.example:{house.port}/", "Content-Length: 5", "Expect: 100-continue", method="PUT", body="hello"
    )
    assert answer.lines[0] == "HTTP/1.1 100 Continue"
    assert b"HTTP/1.1 200 OK" in answer.body
    assert house.received[1].endswith(b"Content-Length: 5\r\nConnection: close\r\n\r\nhello")


@pytest.mark.parametrize("chunks", ["x\r\n", "-1\r\n", "5\r\nhello!\r\n0\r\n\r\n", "5\nhello\r\n", "fffffffff\r\n", ""])
async def test_a_chunk_that_is_none_ends_the_request(house, chunks):
    reader, writer = await house.dial()
    head = f"POST http://good.example:{house.port}/ HTTP/1.1\r\nproxy-authorization: Bearer {house.token}\r\n"
    writer.write(f"{head}transfer-encoding: chunked\r\n\r\n{chunks}".encode())
    writer.write_eof()
    assert b"400 Bad Request" in await reader.read()
    writer.close()
    assert house.received == []


@pytest.mark.parametrize("answer", [b"", b"hello", b"HTTP/1.1 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: a\nb\r\n\r\n"])
async def test_an_answer_that_is_none_is_not_passed_back(house, answer):
    house.answer = answer
    found = await house.get(f"http://good.example:{house.port}/")
    assert (found.status, found.reason) == (502, "malformed")


async def test_an_early_word_of_the_server_is_passed_back_before_its_answer(house):
    house.answer = b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 200 OK\r\n\r\nhello"
    answer = await house.get(f"http://good.example:{house.port}/")
    assert answer.status == 103
    assert answer.body == b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhello"


# ------------------------------------------------------------------------------------------------------------- bounds


async def test_a_silent_connection_is_ended(make_house):
    house = await make_house(idle_seconds=0.2)
    line, reader, writer = await tunnel(house, f"good.example:{house.port}")
    assert b"200" in line
    assert await asyncio.wait_for(reader.read(), 20) == b""
    writer.close()


async def test_a_connection_carries_so_much_and_no_more(make_house):
    house = await make_house(bytes_each_way=1000)
    house.answer = b"x" * 10_000
    _, reader, writer = await tunnel(house, f"good.example:{house.port}")
    writer.write(b"give\r\n\r\n")
    assert len(await reader.read()) <= 1000
    writer.close()
    answer = await house.get(
        f"http://good.example:{house.port}/", "Content-Length: 2000", method="PUT", body="x" * 2000
    )
    assert (answer.status, answer.reason) == (413, "too_large")
    assert len(house.received) == 1


async def test_a_sandbox_has_so_many_connections_and_no_more(make_house):
    house = await make_house(connections=2)
    kept = [await tunnel(house, f"good.example:{house.port}") for _ in range(2)]
    answer = await house.get(f"http://good.example:{house.port}/")
    assert (answer.status, answer.reason) == (429, "too_many")
    for _, reader, writer in kept:
        writer.write(b"go\r\n\r\n")
        await reader.read()
        writer.close()
    for _ in range(100):
        if (await house.get(f"http://good.example:{house.port}/")).status == 200:
            break
    else:
        raise AssertionError("those that have ended count no more")
    refused = [count for *_, reason, count in await house.record() if reason == "too_many"]
    assert refused


async def test_who_does_not_say_what_it_wants_is_not_waited_for(house, monkeypatch):
    from carrel.egress import proxy

    monkeypatch.setattr(proxy, "_HEAD_SECONDS", 0.2)
    reader, writer = await house.dial()
    writer.write(b"GET http://good")
    assert await asyncio.wait_for(reader.read(), 20) == b""
    writer.close()
    monkeypatch.setattr(proxy, "_MOST_NAMELESS", 0)
    assert (await house.get(f"http://good.example:{house.port}/")).status == 0
