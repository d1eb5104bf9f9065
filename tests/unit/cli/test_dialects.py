"""What the settings say of dialects."""

from typing import Any

import pytest
from starlette.requests import HTTPConnection

from carrel.api.dialects import DialectAuth
from carrel.auth import Authenticator
from carrel.cli.app import run
from carrel.cli.dialects import addresses, dialect_options
from carrel.errors import InvalidSettings, UnsafeConfiguration
from carrel.model import ADMIN, Principal
from carrel.model_gateway import credentials
from carrel.settings import load_settings

NOBODY: Any = Authenticator(None)  # type: ignore[arg-type]
AGENT_HTTP, SDK = "claude-agent-http", "sdk-server"


def test_every_listener_has_an_address() -> None:
    def of(**said: Any) -> dict[str, tuple[str, int]]:
        return addresses(load_settings(overrides=said))

    assert of() == {"api": ("127.0.0.1", 8000)}
    assert of(dialects={AGENT_HTTP: {"port": 8000}}) == {"api": ("127.0.0.1", 8100), AGENT_HTTP: ("127.0.0.1", 8000)}
    assert of(dialects={SDK: {"port": 3000}, AGENT_HTTP: {}}) == {"api": ("127.0.0.1", 8000), SDK: ("127.0.0.1", 3000)}
    both = of(port=0, dialects={SDK: {"port": 0}, AGENT_HTTP: {"port": 0, "host": "127.0.0.2"}})
    assert both == {"api": ("127.0.0.1", 0), SDK: ("127.0.0.1", 0), AGENT_HTTP: ("127.0.0.2", 0)}


@pytest.mark.parametrize(
    "said",
    [
        {"dialects": {SDK: {"port": 1, "auth": "none", "host": "0.0.0.0"}}},
        {"dialects": {SDK: {"port": 1, "auth": "none", "host": "::"}}},
        # /compat of a native listener that others reach.
        {"host": "0.0.0.0", "dialects": {SDK: {"auth": "none"}}},
        {"network": "host", "dialects": {SDK: {"auth": "none"}}},
        {"isolation": "none", "dialects": {SDK: {"auth": "none"}}},
        {"isolation": "container", "dialects": {SDK: {"auth": "none"}}},
    ],
)
def test_no_auth_where_others_could_come_is_refused(said: dict[str, Any]) -> None:
    with pytest.raises(UnsafeConfiguration, match="allow_insecure"):
        load_settings(overrides=said)
    assert load_settings(overrides=said | {"allow_insecure": True})
    kept = {**said, "dialects": {SDK: {**said["dialects"][SDK], "auth": "keys"}}}
    assert load_settings(overrides=kept)


def test_no_auth_on_loopback_is_allowed() -> None:
    assert load_settings(overrides={"dialects": {SDK: {"port": 3000, "auth": "none"}}})


@pytest.mark.parametrize(("mode", "missing"), [("static-token", "static_token"), ("jwt", "jwt.secret")])
def test_a_mode_without_what_it_needs_is_refused(mode: str, missing: str) -> None:
    with pytest.raises(InvalidSettings, match=missing):
        load_settings(overrides={"dialects": {SDK: {"auth": mode}}})


def options(**said: Any) -> Any:
    settings = load_settings(overrides={"dialects": {SDK: {}}, **said})
    return dialect_options(settings, SDK, NOBODY, credentials.NotNeeded(), isolated=True)


@pytest.mark.parametrize(
    ("mode", "opens"),
    [("keys", {"admin", "key"}), ("static-token", {"admin", "static"}), ("jwt", {"admin", "jwt"})],
)
async def test_which_tokens_count_in_which_mode(mode: str, opens: set[str]) -> None:
    asked: list[frozenset[str]] = []

    async def authenticate(token: str | None, *, accept: frozenset[str]) -> Principal:
        asked.append(accept)
        return ADMIN

    auth = DialectAuth(mode, authenticate)  # type: ignore[arg-type]
    headers = [(b"authorization", b"Bearer x")]
    assert await auth.principal_of(HTTPConnection({"type": "http", "method": "GET", "headers": headers})) == ADMIN
    assert asked == [opens]


def test_a_server_without_auth_asks_no_key_of_clients_that_are_here() -> None:
    def mode(said: dict[str, Any], **more: Any) -> str:
        settings = load_settings(overrides={"auth": "none", "dialects": {SDK: said}, **more})
        return dialect_options(settings, SDK, NOBODY, None, isolated=True).auth.mode

    assert mode({"port": 0}) == "none"
    assert mode({"port": 0, "host": "0.0.0.0"}) == "keys"
    assert mode({"auth": "static-token"}, static_token="s" * 16) == "static-token"


def test_what_else_a_dialect_is_told(tmp_path: Any) -> None:
    plain = options(data=tmp_path)
    assert (plain.users_dir, plain.storage_type, plain.authenticated) == (tmp_path / "users", "sqlite", True)
    assert plain.chosen == frozenset()
    chosen = options(
        memory=True,
        users={"base_dir": tmp_path / "x"},
        anthropic_model="opus",
        defaults={"ttl_seconds": 5, "max_turns": 2},
    )
    assert (chosen.storage_type, chosen.users_dir, chosen.default_model) == ("memory", tmp_path / "x", "opus")
    assert chosen.chosen == {"max_turns", "ttl_seconds"}
    assert options(anthropic_model="opus", defaults={"model": "haiku"}).default_model == "haiku"
    assert options(database={"url": "postgresql://x/y"}).storage_type == "postgresql"
    settings = load_settings(overrides={"dialects": {SDK: {}}})
    bare = dialect_options(settings, SDK, NOBODY, credentials.NoCredential(), isolated=False)
    assert (bare.authenticated, bare.allow_bypass) == (False, False)


@pytest.mark.parametrize("text", ["sdk-server", "sdk-server=", "sdk-server=x", "sdk-server=1,auth", "sdk-server=1,a=b"])
def test_an_option_that_is_not_written_so_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--dialect", text]) == 2
    assert "NAME=PORT,auth=MODE" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["no-such=1", "sdk-server=70000", "sdk-server=1,auth=maybe"])
def test_an_option_with_a_wrong_value_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--dialect", text]) == 2
    assert "dialects" in capsys.readouterr().err
