"""Secrets: sealed with the operator's key, handed to the environments that declare them, and to nobody else."""

import base64
from pathlib import Path
from typing import Any

import pytest

from carrel.errors import InvalidSettings, SecretInUse, SecretMissing, SecretNotFound, SecretsLocked
from carrel.model import ADMIN, Principal, SessionStatus
from carrel.protocol.environments import EnvironmentSpec
from carrel.sessions.secrets import Keyring, Secrets
from carrel.testing import FakeGateway, FakeHost

OpenGateway = Any
ALICE = Principal.of_user("alice")
VALUE = "npm_only-for-the-build-0123456789"
OLD, NEW = b"o" * 32, b"n" * 32
EXPOSED = EnvironmentSpec.model_validate({"secrets": [{"name": "TOKEN", "expose": "env", "variable": "NPM_TOKEN"}]})


async def test_it_reaches_the_agents_that_declare_it_and_stands_nowhere_else(
    gateway: FakeGateway, host: FakeHost, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    await gateway.secrets.put(ADMIN, "TOKEN", VALUE)
    await gateway.environments.put(ADMIN, "build", EXPOSED)
    inside, outside = await gateway.create(environment="build", env_vars={"MINE": "1"}), await gateway.create()
    await gateway.run(inside.id, "hello")
    await gateway.run(outside.id, "hello")
    one, other = host.alive
    assert one.bind is not None
    assert other.bind is not None
    assert one.bind.spec.env_vars == {"MINE": "1", "NPM_TOKEN": VALUE}
    assert not other.bind.spec.env_vars
    sandbox = await gateway.store.read(lambda tx: tx.sandboxes.current(inside.id))
    assert VALUE not in repr((sandbox, await gateway.log(inside.id), await gateway.session(inside.id)))
    assert VALUE not in repr((await gateway.secrets.all(), one.spec))
    found = [path for path in tmp_path.rglob("*") if path.is_file() and VALUE.encode() in path.read_bytes()]
    assert found == []
    said = capfd.readouterr()
    assert VALUE not in said.out + said.err


async def test_one_that_is_put_again_is_the_new_one(gateway: FakeGateway) -> None:
    await gateway.secrets.put(ADMIN, "TOKEN", "first")
    await gateway.secrets.put(ADMIN, "TOKEN", "second")
    assert [secret.name for secret in await gateway.secrets.all()] == ["TOKEN"]
    assert await gateway.secrets.exposed(EXPOSED) == {"NPM_TOKEN": "second"}


async def test_one_in_use_is_not_deleted(gateway: FakeGateway) -> None:
    await gateway.secrets.put(ADMIN, "TOKEN", VALUE)
    await gateway.environments.put(ADMIN, "build", EXPOSED)
    with pytest.raises(SecretInUse):
        await gateway.secrets.delete("TOKEN")
    await gateway.environments.put(ADMIN, "build", EnvironmentSpec())
    await gateway.secrets.delete("TOKEN")
    with pytest.raises(SecretNotFound):
        await gateway.secrets.delete("TOKEN")


async def test_a_session_whose_secret_is_gone_cannot_start(gateway: FakeGateway, host: FakeHost) -> None:
    await gateway.secrets.put(ADMIN, "TOKEN", VALUE)
    await gateway.environments.put(ADMIN, "build", EXPOSED)
    session = await gateway.create(environment="build")
    await gateway.environments.put(ADMIN, "build", EnvironmentSpec())
    await gateway.secrets.delete("TOKEN")
    result = await gateway.run(session.id, "hello")
    assert result.error is not None
    assert result.error.code == SecretMissing.code
    assert (await gateway.session(session.id)).status is SessionStatus.IDLE
    assert not host.alive
    await gateway.secrets.put(ADMIN, "TOKEN", VALUE)
    assert (await gateway.run(session.id, "again")).status == "succeeded"


async def test_without_a_key_none_is_kept(open_gateway: OpenGateway) -> None:
    gateway = await open_gateway(keys=())
    with pytest.raises(SecretsLocked):
        await gateway.secrets.put(ADMIN, "TOKEN", VALUE)


async def test_keys_can_be_changed(gateway: FakeGateway) -> None:
    old, both, new = (Secrets(gateway.store, Keyring(keys)) for keys in ([OLD], [NEW, OLD], [NEW]))
    await old.put(ADMIN, "TOKEN", VALUE)
    with pytest.raises(SecretMissing):
        await new.exposed(EXPOSED)
    await new.start()
    with pytest.raises(SecretMissing):
        await new.exposed(EXPOSED)
    await both.start()
    assert await new.exposed(EXPOSED) == {"NPM_TOKEN": VALUE}
    with pytest.raises(SecretMissing):
        await old.exposed(EXPOSED)


async def test_a_row_that_was_changed_or_renamed_opens_nothing(gateway: FakeGateway) -> None:
    await gateway.secrets.put(ADMIN, "OTHER", VALUE)
    (secret,) = await gateway.secrets.all()
    await gateway.store.write(lambda tx: tx.secrets.put(secret.model_copy(update={"name": "TOKEN"})))
    with pytest.raises(SecretMissing):
        await gateway.secrets.exposed(EXPOSED)


async def test_a_server_that_needs_one_is_found_at_the_gateway(gateway: FakeGateway, host: FakeHost) -> None:
    server = {"type": "http", "url": "https://shop.example/mcp", "headers": {"X-Key": "${secret:TOKEN}"}}
    plain = {"type": "http", "url": "https://docs.example/mcp"}
    given = {"secrets": [{"name": "TOKEN"}], "options": {"mcp_servers": {"shop": server, "docs": plain}}}
    await gateway.secrets.put(ADMIN, "TOKEN", VALUE)
    await gateway.environments.put(ADMIN, "shop", EnvironmentSpec.model_validate(given))
    inside, outside = await gateway.create(environment="shop"), await gateway.create()
    await gateway.run(inside.id, "hello")
    await gateway.run(outside.id, "hello")
    one, other = host.alive
    assert one.bind is not None
    assert one.bind.spec.mcp_servers == {"shop": {"type": "http", "url": "http://gateway/mcp/shop"}, "docs": plain}
    assert not one.bind.spec.env_vars
    assert (one.spec.mcp, other.spec.mcp) == (True, False)
    assert VALUE not in repr((one.bind, one.spec, await gateway.log(inside.id)))


async def test_status_tells_of_one_that_cannot_be_had(gateway: FakeGateway) -> None:
    await gateway.secrets.put(ADMIN, "TOKEN", VALUE)
    await gateway.environments.put(ADMIN, "build", EXPOSED)
    assert (await gateway.life.status(ADMIN, "build")).problems == []
    await gateway.store.write(lambda tx: tx.secrets.remove("TOKEN"))
    assert [each.code for each in (await gateway.life.status(ADMIN, "build")).problems] == ["secret_missing"]


async def test_exposed_secrets_are_said(gateway: FakeGateway, capfd: pytest.CaptureFixture[str]) -> None:
    await gateway.secrets.put(ADMIN, "TOKEN", VALUE)
    await gateway.environments.put(ADMIN, "build", EXPOSED)
    await gateway.secrets.start()
    said = capfd.readouterr().out
    assert "environment.secrets_exposed" in said
    assert "TOKEN" in said


def test_keys_are_read_in_base64() -> None:
    both = ",".join(base64.b64encode(key).decode() for key in (NEW, OLD))
    assert Keyring.of_text(both).first == Keyring([NEW]).first
    assert Keyring.of_text("").first is None
    assert Keyring.of_text(base64.urlsafe_b64encode(b"\xff" * 32).decode()).first == Keyring([b"\xff" * 32]).first
    for wrong in ("short", "x" * 44, base64.b64encode(b"k" * 16).decode()):
        with pytest.raises(InvalidSettings) as refused:
            Keyring.of_text(wrong)
        assert wrong not in str(refused.value)
