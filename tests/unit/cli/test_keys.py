"""`carrel keys`, `users` and `token`: straight on a data folder's database, and through a server."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from carrel.cli.app import app, run
from carrel.cli.context import Context
from carrel.cli.durations import seconds_of
from carrel.errors import DataFolderInUse

KEYS = "/api/v1/keys"
NOW = "2026-11-21T09:30:00Z"
KEY = {
    "id": "k1",
    "user_id": "alice",
    "name": "a\x1b[2Jb",
    "prefix": "carrel_sk_abcdefgh",
    "scopes": ["sessions:read"],
    "created_at": NOW,
    "expires_at": None,
    "revoked_at": None,
    "last_used_at": None,
}


@pytest.fixture
def carrel() -> Any:
    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(app, list(arguments), obj=Context())

    return invoke


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CARREL_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def test_without_a_server_the_database_is_used(carrel: Any, folder: Path) -> None:
    made = json.loads(carrel("keys", "create", "--user", "alice", "--json").stdout)
    assert (made["user_id"], made["scopes"], made["expires_at"]) == ("alice", ["sessions:read", "sessions:write"], None)
    assert made["key"].startswith("carrel_sk_")
    for_bob = ["--user", "bob", "--scope", "admin", "--scope", "sessions:read", "--expires", "90d", "--name", "ci"]
    shown = carrel("keys", "create", *for_bob).stdout
    assert "The key, shown once:\n\n    carrel_sk_" in shown
    assert "admin, sessions:read" in shown
    listed = carrel("keys", "list").stdout
    assert made["key"] not in listed
    assert listed.count("carrel_sk_") == 2
    assert [key["user_id"] for key in json.loads(carrel("keys", "list", "--user", "bob", "--json").stdout)] == ["bob"]
    assert carrel("keys", "revoke", made["id"]).stdout == f"{made['id']}  revoked\n"
    assert carrel("keys", "revoke", made["id"]).exit_code == 0
    assert "revoked" in carrel("keys", "list", "--user", "alice").stdout
    assert carrel("users", "disable", "alice").stdout == "alice  disabled\n"
    users = {user["id"]: user["disabled"] for user in json.loads(carrel("users", "list", "--json").stdout)}
    assert users == {"alice": True, "bob": False}
    assert "disabled" in carrel("users", "list").stdout
    assert carrel("users", "enable", "alice").stdout == "alice  enabled\n"
    assert (folder.stat().st_mode & 0o777, (folder / "admin.key").exists()) == (0o700, False)


def test_the_folder_may_be_named_after_the_command(carrel: Any, tmp_path: Path) -> None:
    other = tmp_path / "other"
    carrel("keys", "create", "--user", "alice", "--data", str(other))
    assert "alice" in carrel("--data", str(other), "keys", "list").stdout


def test_the_database_is_the_one_that_the_settings_name(
    carrel: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CARREL_DATABASE__PATH", str(tmp_path / "elsewhere.db"))
    assert carrel("keys", "create", "--user", "alice").exit_code == 0
    assert (tmp_path / "elsewhere.db").exists()
    assert not (folder / "carrel.db").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["keys", "list"], "There is no data folder"),
        (["users", "disable", "alice"], "There is no data folder"),
        (["keys", "create", "--user", "../x"], "letters, digits"),
        (["keys", "create", "--user", "a", "--expires", "soon"], "90d"),
        (["keys", "create", "--user", "a", "--scope", "root"], "sessions:read"),
        (["keys", "create"], "--user"),
        (["token", "create", "--user", "a"], "jwt.secret"),
    ],
)
def test_what_cannot_be_done_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    assert run(arguments) == 2
    assert told in capsys.readouterr().err
    assert not folder.exists()


def test_what_is_not_there_is_told(carrel: Any, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    carrel("keys", "create", "--user", "alice")
    assert run(["keys", "revoke", "none"]) == 1
    assert "no API key with this id" in capsys.readouterr().err
    assert run(["users", "disable", "nobody"]) == 1
    assert "no user with this id" in capsys.readouterr().err


def test_a_database_in_memory_is_the_servers_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CARREL_MEMORY", "true")
    assert run(["keys", "create", "--user", "alice"]) == 2
    assert "start it first" in capsys.readouterr().err


@pytest.fixture
def locked(data: Path) -> Any:
    """The data folder of the fake server, held as a running server holds it."""
    import fcntl

    with (data / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield data


def test_with_a_server_the_server_is_asked(carrel: Any, fake: Any, locked: Path) -> None:
    fake.on("POST", KEYS, KEY | {"key": "carrel_sk_abcdefghijkl"}, status=201)
    made = json.loads(carrel("keys", "create", "--user", "alice", "--expires", "2h", "--json").stdout)
    assert made["key"] == "carrel_sk_abcdefghijkl"
    assert fake.asked[0].json == {"user": "alice", "scopes": None, "name": None, "expires_in_seconds": 7200}
    assert fake.asked[0].headers["authorization"] == "Bearer the-key"
    fake.on("GET", KEYS, {"data": [KEY], "next_cursor": None})
    assert "\x1b" not in carrel("keys", "list").stdout
    fake.on("DELETE", f"{KEYS}/k1", b"", status=204)
    assert carrel("keys", "revoke", "k1").stdout == "k1  revoked\n"
    user = {"id": "alice", "disabled": True, "created_at": NOW, "daily_budget": {"max_usd": 2.5, "max_tokens": 9}}
    fake.on("GET", "/api/v1/users", {"data": [user], "next_cursor": None})
    assert "$2.5, 9 tokens" in carrel("users", "list").stdout
    fake.on("PATCH", "/api/v1/users/alice", user)
    assert carrel("users", "disable", "alice").stdout == "alice  disabled\n"
    assert not (locked / "carrel.db").exists()


def test_an_address_that_is_given_wins(carrel: Any, fake: Any, folder: Path) -> None:
    fake.on("GET", KEYS, {"data": [], "next_cursor": None})
    assert carrel("--url", fake.url, "--key", "mine", "keys", "list").exit_code == 0
    assert fake.asked[0].headers["authorization"] == "Bearer mine"


def test_a_server_that_says_nothing_of_itself(locked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (locked / "server.json").unlink()
    monkeypatch.setattr("carrel.cli.registry._PATIENCE_SECONDS", 0.0)
    assert run(["keys", "list"]) == 2
    assert DataFolderInUse().message


def test_a_token_for_development(carrel: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import jwt

    secret = "a-secret-that-is-long-enough-0123456789"
    monkeypatch.setenv("CARREL_JWT__SECRET", secret)
    monkeypatch.setenv("CARREL_JWT__AUDIENCE", "carrel")
    token = carrel("token", "create", "--user", "alice", "--scope", "sessions:read", "--expires", "2h").stdout.strip()
    claims = jwt.decode(token, secret, algorithms=["HS256"], audience="carrel")
    assert (claims["sub"], claims["scope"], claims["exp"] - claims["iat"]) == ("alice", "sessions:read", 7200)
    told = json.loads(carrel("token", "create", "--user", "alice", "--json").stdout)
    assert jwt.decode(told["token"], secret, algorithms=["HS256"], audience="carrel").get("scope") is None
    assert told["expires_in_seconds"] == 3600


@pytest.mark.parametrize(
    ("text", "seconds"), [("45s", 45), ("30m", 1800), ("12h", 43_200), ("90D", 7_776_000), ("2w", 1_209_600)]
)
def test_durations(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "0d", "-1d", "1", "d", "1y", "1.5h", "99999d", "٣d"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(Exception, match="no duration"):
        seconds_of(text)
