"""Each mode as a self-hoster has it: up, used, stopped, up again, with the same sessions.

The default mode runs with every test; `make soak-compose` runs all of them.
"""

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = [pytest.mark.requires("compose", "images"), pytest.mark.timeout(600)]
slow = pytest.mark.slow_compose


def ask(api: httpx.Client, session: str, prompt: str) -> dict[str, Any]:
    """A turn of a session, done."""
    answered = api.post(f"/sessions/{session}/turns", json={"prompt": prompt, "wait": True})
    answered.raise_for_status()
    turn: dict[str, Any] = answered.json()
    assert turn["status"] == "succeeded", turn
    return turn


def used(installation: Any) -> str:
    """A session that has said something and has written a file."""
    with installation.api() as api:
        session: str = api.post("/sessions", json={"permission_mode": "bypassPermissions"}).json()["id"]
        ask(api, session, "[[bash: echo kept > note.txt; id -u]] [[say: noted]]")
        assert len(installation.sandboxes()) == 1
        return session


def still_there(installation: Any, session: str) -> None:
    """The conversation, its file, and the agent's memory of both."""
    with installation.api() as api:
        assert api.get(f"/sessions/{session}/files/note.txt").text == "kept\n"
        assert [turn["status"] for turn in api.get(f"/sessions/{session}/turns").json()["data"]] == ["succeeded"]
        assert "turn 2" in ask(api, session, "hello again")["text"]


def up_used_stopped_up(installation: Any, *options: str) -> str:
    installation.start(*options)
    session = used(installation)
    _commands_know_what_the_application_knows(installation)
    installation.start("--stop")
    assert installation.sandboxes() == []
    installation.start()  # what was chosen is remembered
    still_there(installation, session)
    return session


def test_default(install: Callable[..., Any]) -> None:
    installation = install(ANTHROPIC_API_KEY="sk-ant-api03-planted-0123456789")
    told = installation.start()
    assert installation.url in told
    assert stat.S_IMODE((installation.folder / ".env").stat().st_mode) == 0o600
    session = used(installation)
    _a_hardened_sandbox(installation)
    _a_door_for_sandboxes_alone(installation)
    _no_secret_where_it_can_be_read(installation)
    # Whatever has become another's is the application's again.
    _as_root(installation, "chown -R 0:0 /data/db /data/claude-users")
    installation.start("--stop")
    assert installation.sandboxes() == []
    installation.start()
    still_there(installation, session)
    assert installation.exec("find", "/data", "!", "-user", "1000").split() in ([], ["/data"])
    installation.start("--down")
    assert installation.compose("ps", "--all", "--quiet").strip() == ""
    installation.start()
    still = installation.api()
    assert still.get(f"/sessions/{session}").status_code == 200
    still.close()


def _as_root(installation: Any, command: str) -> None:
    image = installation.inspect("app")["Config"]["Image"]
    volumes = [f"--volume={installation.project}_{name}:/data/{path}" for name, path in _VOLUMES]
    installation.run("docker", "run", "--rm", "--user=0:0", *volumes, "--entrypoint=sh", image, "-c", command)


def _commands_know_what_the_application_knows(installation: Any) -> None:
    """`docker compose exec app carrel …`, as the guide says it."""
    lines = {line["name"]: line for line in json.loads(installation.exec("carrel", "doctor", "--json"))}
    assert {name: line for name, line in lines.items() if line["level"] != "ok"} == {}
    assert "image" not in lines["Docker engine"]["found"]
    assert "rows of" in installation.exec("carrel", "backup", "/data/db/carrel.tar.gz")
    installation.exec("rm", "/data/db/carrel.tar.gz")


_VOLUMES = (("claude-db", "db"), ("claude-users", "claude-users"))


def _a_hardened_sandbox(installation: Any) -> None:
    [name] = installation.sandboxes()
    found = json.loads(installation.run("docker", "inspect", name).stdout)[0]
    host = found["HostConfig"]
    assert host["CapDrop"] == ["ALL"]
    assert host["ReadonlyRootfs"] is True
    assert host["NetworkMode"] == "none"
    assert host["OomScoreAdj"] > 0
    assert found["Config"]["User"] == "1000:1000"
    sources = [mount["Source"] for mount in found["Mounts"]]
    assert all(f"/{installation.project}_claude-" in source for source in sources)
    assert not any(source.endswith("_data") for source in sources)


def _a_door_for_sandboxes_alone(installation: Any) -> None:
    """What the application has of the engine: not its socket, and of its own container the folders alone."""
    asking = ["curl", "--silent", "--unix-socket", "/run/engine/docker.sock", "--write-out", "%{http_code}"]
    own = installation.exec("sh", "-c", f"{' '.join(asking[:4])} http://engine/containers/$(hostname)/json")
    assert json.loads(own).keys() == {"Id", "Name", "Mounts"}
    assert installation.exec(*asking, "--output", "/dev/null", "http://engine/images/json") == "403"
    listed = json.loads(installation.exec(*asking[:4], "http://engine/containers/json?all=1"))
    assert [each["Names"] for each in listed] == [[f"/{name}"] for name in installation.sandboxes()]
    assert installation.exec("sh", "-c", "test -e /var/run/docker.sock || echo none").strip() == "none"


def _no_secret_where_it_can_be_read(installation: Any) -> None:
    key = installation.exec("cat", "/data/db/admin.key").strip()
    told = installation.compose("--profile", "*", "logs", "--no-color")
    for name in installation.sandboxes():
        told += installation.run("docker", "inspect", name).stdout + installation.run("docker", "logs", name).stdout
    assert key not in told
    assert "sk-ant-api03-planted" not in told
    assert installation.exec("stat", "--format=%a", "/data/db/admin.key").strip() == "600"


@slow
def test_postgres_by_its_file(install: Callable[..., Any]) -> None:
    installation = install()
    up_used_stopped_up(installation, "--postgres")
    _is_in_postgres(installation)


@slow
def test_postgres_by_its_profile(install: Callable[..., Any]) -> None:
    installation = install()
    installation.environment["COMPOSE_PROFILES"] = "postgres"
    up_used_stopped_up(installation)
    _is_in_postgres(installation)


def _is_in_postgres(installation: Any) -> None:
    count = installation.exec(
        "psql", "--username=carrel", "--tuples-only", "--command=SELECT count(*) FROM sessions", "carrel",
        service="postgres", user="postgres",
    )  # fmt: skip
    assert int(count) == 1
    assert "carrel.db" not in installation.exec("ls", "/data/db")
    password = installation.exec("cat", "/secrets/password", service="postgres").strip()
    assert len(password) >= 30
    assert password not in installation.compose("logs", "--no-color")
    assert installation.exec("stat", "--format=%a %u", "/secrets/database-url").strip() == "600 1000"


@slow
def test_objects(install: Callable[..., Any], wait_until: Callable[[Callable[[], bool]], None]) -> None:
    """A session's files come back out of the store of objects when they are lost on the disk."""
    installation = install()
    assert "has a console" in installation.start("--objects")
    session = used(installation)
    wait_until(lambda: len(_kept(installation, session)) >= 2)  # the manifest and what it names
    installation.start("--stop")
    _as_root(installation, f"rm -r /data/db/sessions/{session}")
    installation.start()
    still_there(installation, session)
    assert installation.exec("sh", "-c", "ls -d /data/db/objects 2>&1 || true").startswith("ls: cannot access")
    access, secret = installation.exec(
        "sh", "-c", "cd /secrets; cat access-key; echo; cat secret-key", service="objects"
    ).split()
    assert (len(access), len(secret)) == (20, 40)
    told = installation.compose("logs", "--no-color") + "".join(
        json.dumps(installation.inspect(service)) for service in ("app", "objects", "prepare-objects")
    )
    assert secret not in told
    assert access not in told
    port, console = (installation.ports[name] for name in ("OBJECTS_PORT", "OBJECTS_CONSOLE_PORT"))
    assert httpx.get(f"http://127.0.0.1:{port}/carrel").status_code in (400, 403)  # nothing without a key
    assert httpx.get(f"http://127.0.0.1:{console}/").text == "console"


def _kept(installation: Any, session: str) -> list[str]:
    """What the store of objects has of a session."""
    found: str = installation.exec("find", "/data/carrel", "-type", "f", "-path", f"*{session}*", service="objects")
    return found.splitlines()


@slow
def test_objects_and_postgres_by_their_profiles_with_keys_of_ones_own(install: Callable[..., Any]) -> None:
    installation = install(OBJECTS_ACCESS_KEY="minioadmin", OBJECTS_SECRET_KEY="a-secret-of-my-own")
    installation.environment["COMPOSE_PROFILES"] = "objects,postgres"
    assert installation.run("./docker-start.sh", check=False).returncode != 0
    assert "OBJECTS_ACCESS_KEY is a published default" in installation.compose("logs", "--no-color", "prepare-objects")
    installation.environment["OBJECTS_ACCESS_KEY"] = "a-key-of-my-own"
    up_used_stopped_up(installation)
    _is_in_postgres(installation)
    assert installation.exec("cat", "/secrets/access-key", service="objects") == "a-key-of-my-own"
    assert installation.exec("find", "/data/carrel", "-type", "f", service="objects")


@slow
def test_bind_mounts(install: Callable[..., Any]) -> None:
    installation = install()
    users = installation.folder / "data/claude-users"
    up_used_stopped_up(installation, "--bind-mounts")
    assert (installation.folder / "data/db/carrel.db").is_file()
    assert users.stat().st_uid == 1000
    assert list(installation.folder.glob("data/db/sessions/*/workspace/note.txt"))


@slow
def test_bind_mounts_elsewhere_for_another_user(install: Callable[..., Any], tmp_path: Path) -> None:
    data = tmp_path / "elsewhere"
    installation = install(HOST_DB_DIR=str(data / "db"), HOST_USER_DATA_DIR=str(data / "users"), UID="4321", GID="4322")
    up_used_stopped_up(installation, "--bind-mounts")
    assert ((data / "db/carrel.db").stat().st_uid, (data / "users").stat().st_gid) == (4321, 4322)


@slow
def test_memory(install: Callable[..., Any]) -> None:
    """What is in memory alone does not outlive a stop, and says so beforehand."""
    installation = install(CARREL_MEMORY="true")
    installation.start()
    session = used(installation)
    installation.start("--stop")
    assert installation.sandboxes() == []
    installation.start()
    with installation.api() as api:
        assert api.get(f"/sessions/{session}").status_code == 404
        assert api.get("/sessions").json()["data"] == []


@slow
def test_claude_agent_http(install: Callable[..., Any]) -> None:
    installation = install()
    installation.environment["COMPOSE_FILE"] = "docker-compose.yml:docker-compose.claude-agent-http.yml"
    installation.start()
    with httpx.Client(base_url=installation.url, timeout=90) as old:
        assert old.get("/health").json()["status"] == "healthy"
        session = old.post("/api/v1/sessions", json={"user_id": "somebody"}).json()["session_id"]
        chatted = old.post("/api/v1/chat", json={"session_id": session, "message": "hello"})
        assert "turn 1" in chatted.json()["text"], chatted.text
    native = f"http://127.0.0.1:{installation.ports['NATIVE_PORT']}/api/v1/sessions"
    assert httpx.get(native).status_code == 401
    installation.start("--stop")
    installation.start()
    with httpx.Client(base_url=installation.url, timeout=90) as old:
        chatted = old.post("/api/v1/chat", json={"session_id": session, "message": "hello again"})
        assert "turn 2" in chatted.json()["text"], chatted.text


@slow
def test_sdk_server(install: Callable[..., Any]) -> None:
    installation = install()
    installation.environment["COMPOSE_FILE"] = "docker-compose.yml:docker-compose.sdk-server.yml"
    installation.start()
    with httpx.Client(base_url=f"http://127.0.0.1:{installation.ports['SDK_SERVER_PORT']}", timeout=90) as old:
        session = old.post("/session/start", json={}).json()["session_id"]
        assert "turn 1" in old.post(f"/session/{session}/query", json={"prompt": "hello"}).json()["response"]
        installation.start("--stop")
        installation.start()
        assert "turn 2" in old.post(f"/session/{session}/query", json={"prompt": "hello"}).json()["response"]
    assert httpx.get(f"{installation.url}/api/v1/sessions").status_code == 401


@slow
def test_development(install: Callable[..., Any], wait_until: Callable[[Callable[[], bool]], None]) -> None:
    """A change of the source is served without anything being built."""
    installation = install()
    (installation.folder / "src").unlink()
    installation.run("cp", "-r", str(Path(__file__).parents[2] / "src"), "src")
    installation.environment["COMPOSE_FILE"] = "docker-compose.yml:docker-compose.dev.yml"
    installation.start()
    session = used(installation)
    changed = installation.folder / "src/carrel/api/routes/health.py"
    changed.write_text(changed.read_text().replace('"alive": True', '"alive": True, "changed": True'))

    def serves_the_change() -> bool:
        try:
            return bool(httpx.get(f"{installation.url}/health/live").json().get("changed"))
        except httpx.HTTPError:  # it is just starting again
            return False

    wait_until(serves_the_change)
    still_there(installation, session)
