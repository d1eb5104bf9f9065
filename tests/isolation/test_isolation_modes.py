"""What each isolation permits and refuses, and that nothing outlives its sandbox without a wall either."""

import os
import secrets
import shutil
import signal
import tempfile
from pathlib import Path

import pytest

from carrel.cli.server import running
from carrel.errors import IsolationUnavailable, UnsafeConfiguration
from carrel.settings import load_settings

SCRIPTED = {"model_upstream": "scripted"}
STRAGGLERS = """
import os, sys, time
# {marker}
def leave(way):
    if os.fork():
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    code = "import time, signal; [signal.signal(n, signal.SIG_IGN) for n in (1, 2, 15)]; time.sleep(600)  # {marker}"
    environment = dict(os.environ) if way == "marked" else {{}}
    os.execve("/usr/bin/env", ["env", "python3", "-c", code], environment | {{"PATH": os.environ["PATH"]}})
for way in ("marked", "wiped", "marked", "wiped"):
    leave(way)
time.sleep(0.1)
print("left")
"""


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("unsafe", "named"),
    [
        ({"host": "0.0.0.0"}, "0.0.0.0"),
        ({"host": "192.0.2.1"}, "192.0.2.1"),
        ({"host": "::"}, "::"),
        ({"network": "host"}, "network host"),
        ({"isolation": "none"}, "isolation none"),
        ({"isolation": "container"}, "isolation container"),
    ],
)
def test_auth_none_is_refused_where_others_or_agents_could_use_it(tmp_path, unsafe, named):
    with pytest.raises(UnsafeConfiguration, match="auth none") as refused:
        load_settings(overrides={"data": tmp_path, "auth": "none", **unsafe})
    assert named in refused.value.message
    assert load_settings(overrides={"data": tmp_path, "auth": "none", "allow_insecure": True, **unsafe}).auth == "none"
    assert load_settings(overrides={"data": tmp_path, **unsafe}).auth == "key"


async def start(data: Path, **more: object) -> None:
    async with running(load_settings(overrides={"data": data, "port": 0, **SCRIPTED, **more})):
        pass


async def test_a_missing_bubblewrap_is_named_with_its_package(tmp_path, monkeypatch):
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "setpriv").symlink_to("/usr/bin/setpriv")
    monkeypatch.setenv("PATH", str(programs))
    with pytest.raises(IsolationUnavailable, match="apt-get install bubblewrap"):
        await start(tmp_path / "data")


@pytest.mark.requires("root", "bubblewrap")
async def test_a_missing_setpriv_is_named_with_its_package(tmp_path, monkeypatch):
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "bwrap").symlink_to("/usr/bin/bwrap")
    monkeypatch.setenv("PATH", str(programs))
    with pytest.raises(IsolationUnavailable, match="apt-get install util-linux"):
        await start(tmp_path / "data")


async def test_a_bubblewrap_that_does_not_work_here_is_told_with_a_remedy(tmp_path, monkeypatch):
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "setpriv").symlink_to("/usr/bin/setpriv")
    (programs / "bwrap").write_text("#!/bin/sh\necho 'No permissions to create new namespace' >&2\nexit 1\n")
    (programs / "bwrap").chmod(0o755)
    tmp_path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/bin")
    with pytest.raises(IsolationUnavailable, match="user namespaces") as refused:
        await start(tmp_path / "data")
    assert "No permissions" in (refused.value.operator_detail or "") or os.geteuid() == 0


# ----------------------------------------------------------------------------------------------------- isolation none


@pytest.fixture(scope="module")
def unwalled(open_house):
    folder = Path(tempfile.mkdtemp(prefix="carrel-walls-", dir="/tmp"))
    try:
        with open_house(folder, isolation="none", **SCRIPTED) as home:
            yield home
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def session_without_wall(unwalled, until):
    session = unwalled.session(allowed_tools=["Bash(python3:*)"], ask_expires_seconds=0)
    yield session
    assert unwalled.client.delete(f"/sessions/{session}").status_code == 204
    until(lambda: unwalled.sandboxes() == [], name="the sandbox's end")


def test_without_isolation_bypass_is_refused(unwalled):
    refused = unwalled.client.post("/sessions", json={"permission_mode": "bypassPermissions"})
    assert refused.status_code == 403
    assert "bypassPermissions is refused" in refused.json()["detail"]
    assert "not_isolated" in unwalled.stderr.read_text()


@pytest.mark.cli
def test_without_isolation_nothing_goes_unasked(unwalled, session_without_wall):
    session = session_without_wall
    patched = unwalled.client.patch(f"/sessions/{session}", json={"permission_mode": "bypassPermissions"})
    assert patched.status_code == 403
    turn = unwalled.turn(session, "[[bash: touch made]]")
    assert turn["status"] == "succeeded"
    assert turn["tool_calls"][0]["is_error"]
    assert "nobody who can be asked" in turn["tool_calls"][0]["result"]
    assert unwalled.client.get(f"/sessions/{session}/files/made").status_code == 404


@pytest.mark.cli
def test_stragglers_end_with_a_session_that_has_no_wall(unwalled, session_without_wall, host, until):
    marker = leave_stragglers(unwalled, session_without_wall, host, until)
    assert unwalled.client.post(f"/sessions/{session_without_wall}/stop").status_code == 200
    until(lambda: not host.named(marker), seconds=10, name="the stragglers' end")


@pytest.mark.cli
def test_stragglers_end_although_their_runner_was_killed(unwalled, session_without_wall, host, until):
    """Those too that have left their session and wiped their environment: they fall to the preloaded parent."""
    marker = leave_stragglers(unwalled, session_without_wall, host, until)
    (sandbox,) = unwalled.sandboxes()
    os.kill(unwalled.runner(sandbox), signal.SIGKILL)
    until(lambda: not host.named(marker), seconds=10, name="the stragglers' end")
    until(lambda: unwalled.sandboxes() == [], seconds=10, name="the end of the sandbox")
    assert host.marked(sandbox) == []
    assert unwalled.turn(session_without_wall, "[[say: still here]]")["text"] == "still here"


def test_the_operator_may_insist_on_bypass(open_house, short_folder):
    with open_house(short_folder, isolation="none", allow_bypass_without_isolation=True, **SCRIPTED) as home:
        assert home.client.post("/sessions", json={"permission_mode": "bypassPermissions"}).status_code == 201


@pytest.mark.cli
def test_in_a_container_agents_act_unasked_and_the_start_says_so(open_house, short_folder):
    with open_house(short_folder, isolation="container", **SCRIPTED) as home:
        assert home.bash(home.session(), "touch made && echo done") == "done"
        said = [line for line in home.stderr.read_text().splitlines() if "server.not_isolated" in line]
        assert len(said) == 1
        assert "container" in said[0]
        assert "sessions can see each other" in said[0]


def leave_stragglers(home, session, host, until):
    marker = f"straggler-{secrets.token_hex(6)}"
    home.put(session, "stragglers.py", STRAGGLERS.format(marker=marker).encode())
    assert "left" in home.bash(session, "python3 stragglers.py")
    assert len(until(lambda: len(found := host.named(marker)) >= 4 and found, name="four stragglers")) == 4
    return marker


# ------------------------------------------------------------------------------------------------------- bubblewrap


@pytest.mark.cli
@pytest.mark.requires("bubblewrap")
def test_network_host_reaches_the_host_and_its_api_wants_a_key(open_house, short_folder, listener, host):
    script = f"""
import socket, urllib.request, urllib.error
print(socket.create_connection(("127.0.0.1", {listener.port}), timeout=5).recv(100)[-5:].decode())
try:
    urllib.request.urlopen("URL/api/v1/sessions")
except urllib.error.HTTPError as error:
    print(error.code)
"""
    with open_house(short_folder, network="host", **SCRIPTED) as home:
        session = home.session()
        home.put(session, "reach.py", script.replace("URL", home.url).encode())
        assert home.bash(session, "python3 reach.py").split() == ["hello", "401"]
        assert len(listener.visitors) == 1


@pytest.mark.cli
@pytest.mark.requires("bubblewrap")
def test_variables_of_a_session_reach_its_agent_and_not_its_wall(open_house, short_folder, host):
    """The programs that build the wall run outside of it, and obey variables: these load code of one's choice."""
    variables = {"GREETING": "hello there\n'\"$", "GCONV_PATH": "/workspace", "LOCPATH": "/workspace", "PS4": "$(id)"}
    with open_house(short_folder, **SCRIPTED) as home:
        session = home.session(env_vars=variables)
        home.put(
            session, "show.py", b"import os, json; print(json.dumps({k: os.environ.get(k) for k in %r}))" % [*variables]
        )
        turn = home.turn(session, "[[bash: python3 show.py > shown.json]]")
        assert turn["status"] == "succeeded", turn
        assert home.client.get(f"/sessions/{session}/files/shown.json").json() == variables
        (sandbox,) = home.sandboxes()
        outside = [pid for pid in host.marked(sandbox) if host.link(pid, "ns/pid") == host.link(os.getpid(), "ns/pid")]
        assert len(outside) >= 2  # the runner, and bubblewrap's own process
        for pid in outside:
            assert not any(f"{name}=".encode() in host.read(pid, "environ") for name in variables)
        for name in ("LD_PRELOAD", "PATH", "CARREL_SANDBOX", "ANTHROPIC_BASE_URL", "CLAUDE_CONFIG_DIR"):
            assert home.client.post("/sessions", json={"env_vars": {name: "x"}}).status_code == 422
