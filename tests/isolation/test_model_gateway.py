"""The gateway keeps the model's key, whatever the upstream does, and a token ends with its sandbox."""

import json
import shutil
import tempfile
from pathlib import Path

import httpx
import pytest

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap")]

KEY = "sk-ant-the-real-key-of-the-model-0123456789"
MESSAGE = {"model": "claude-opus-4-5", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}


class UpstreamThatRepeats:
    """Says what it was told: in a header, in an error and in an answer. Redirects what asks for it."""

    def __init__(self) -> None:
        self.paths: list[str] = []

    async def __call__(self, scope, receive, send):
        while (await receive()).get("more_body"):
            pass
        told = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.paths.append(scope["path"])
        status = {b"then=fail": 400, b"then=redirect": 307}.get(scope["query_string"], 200)
        headers = [(b"content-type", b"application/json"), (b"x-you-said", told.get("x-api-key", "").encode())]
        headers += [(b"location", b"http://127.0.0.1:9/v1/messages"), (b"set-cookie", b"a=b")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps({"type": "error", "told": told}).encode()})


@pytest.fixture(scope="module")
def served_home(open_house, serve_app):
    folder = Path(tempfile.mkdtemp(prefix="carrel-walls-", dir="/tmp"))
    upstream = UpstreamThatRepeats()
    try:
        with serve_app(upstream) as url:
            environment = {"ANTHROPIC_API_KEY": KEY}  # given by the environment, as to most servers
            with open_house(folder, model_upstream=url, environment=environment) as home:
                yield home, upstream
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def sandboxed(served_home, until):
    """A server with such an upstream, the gateway's socket, and the tokens of a live sandbox."""
    home, upstream = served_home
    session = home.session()
    # The upstream's answer is nonsense to the agent; what counts is that it lives.
    turn = home.client.post(f"/sessions/{session}/turns", json={"prompt": "hi", "timeout_seconds": 300})
    assert turn.status_code == 202
    note = until(lambda: next((note for note in home.note() if note["session"] == session), None), name="a sandbox")
    transport = httpx.HTTPTransport(uds=str(home.data / "run/sandbox/gateway.sock"))
    with httpx.Client(base_url="http://gateway", transport=transport, timeout=20) as client:
        client.headers["authorization"] = f"Bearer {note['agent']}"
        yield home, session, upstream, client, note
    assert home.client.delete(f"/sessions/{session}").status_code == 204
    until(lambda: home.sandboxes() == [], name="the sandbox's end")


def test_an_upstream_that_repeats_the_key_does_not_tell_the_agent(sandboxed):
    home, _session, _upstream, client, _note = sandboxed
    for path in ("/v1/messages", "/v1/messages?then=fail", "/v1/messages/count_tokens"):
        answer = client.post(path, json=MESSAGE)
        assert answer.status_code in (200, 400)
        assert "[hidden by Carrel]" in answer.text  # it was repeated, hence it had arrived
        assert KEY not in answer.text
        assert KEY not in str(answer.headers)
        assert "set-cookie" not in answer.headers
    assert KEY not in home.stderr.read_text()


def test_a_redirect_is_not_followed(sandboxed):
    _home, _session, _upstream, client, _note = sandboxed
    answer = client.post("/v1/messages?then=redirect", json=MESSAGE)
    assert answer.status_code == 307
    assert KEY not in str(answer.headers)


def test_a_token_ends_with_its_sandbox(sandboxed, until):
    home, session, upstream, client, _note = sandboxed
    assert client.get("/v1/models").status_code == 200
    assert home.client.post(f"/sessions/{session}/stop").status_code == 200
    until(lambda: home.sandboxes() == [], name="the sandbox's end")
    # Its row is closed after its folder is gone; there is no other delay.
    until(lambda: client.get("/v1/models").status_code == 401, seconds=1, name="the token's end")
    asked = len(upstream.paths)
    assert client.post("/v1/messages", json=MESSAGE).status_code == 401
    assert len(upstream.paths) == asked


def test_a_link_token_or_the_admins_key_opens_nothing_here(sandboxed):
    home, _session, _upstream, client, note = sandboxed
    for wrong in (note["link"], home.key, KEY, "é", note["agent"][:-1], note["agent"] + "x", note["agent"].upper()):
        assert client.get("/v1/models", headers={"x-api-key": wrong.encode()}).status_code == 401, wrong
    assert client.get("/v1/models", headers={"x-api-key": note["agent"]}).status_code == 200


def test_a_key_in_the_servers_environment_goes_no_further(sandboxed, host, until):
    home, _, _, _, _note = sandboxed
    (sandbox,) = home.sandboxes()
    until(lambda: len(host.marked(sandbox)) > 2, name="the agent")
    assert KEY.encode() in host.read(home.process.pid, "environ")
    assert [pid for pid in host.marked(sandbox) if KEY.encode() in host.read(pid, "environ")] == []
    parent = int(host.read(home.runner(sandbox), "stat").rpartition(b")")[2].split()[1])
    assert KEY.encode() not in host.read(parent, "environ")
