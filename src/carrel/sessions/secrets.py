"""Secrets: written by admins, kept sealed, told to nobody but the sessions whose environment declares them."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Collection, Sequence
from hashlib import sha256

import structlog
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from carrel import abc
from carrel.errors import InvalidSettings, SecretInUse, SecretMissing, SecretNotFound, SecretsLocked
from carrel.model import Principal, utc_now
from carrel.protocol.environments import Environment, EnvironmentSpec, Secret

__all__ = ["Keyring", "Secrets"]

log = structlog.get_logger(__name__)

_KEY_BYTES = 32
_NONCE_BYTES = 12
_PAGE = 500


class Keyring:
    """The operator's keys: the first seals, and any of them opens what it has sealed."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        """Take keys of 32 bytes."""
        self._keys = {sha256(b"carrel secrets " + key).hexdigest()[:16]: AESGCM(key) for key in keys}
        self.first = next(iter(self._keys), None)
        """The id of the key that seals; None where there is no key."""

    @classmethod
    def of_text(cls, text: str) -> Keyring:
        """Read keys in base64, with a comma or a space between them.

        Raises:
            InvalidSettings: one of them is no key.
        """
        keys = []
        for part in text.replace(",", " ").split():
            try:
                key = base64.b64decode(part, altchars=b"-_" if set(part) & {"-", "_"} else None, validate=True)
            except (binascii.Error, ValueError):
                key = b""
            if len(key) != _KEY_BYTES:
                raise InvalidSettings("secrets_key: a key is 32 bytes in base64; make one: openssl rand -base64 32")
            keys.append(key)
        return cls(keys)

    def seal(self, name: str, value: str) -> tuple[str, str]:
        """The id of the key, and the value as it may be kept. Raises SecretsLocked where there is no key."""
        if self.first is None:
            raise SecretsLocked
        nonce = os.urandom(_NONCE_BYTES)
        sealed = self._keys[self.first].encrypt(nonce, value.encode(), name.encode())
        return self.first, base64.b64encode(nonce + sealed).decode()

    def open(self, secret: Secret) -> str | None:
        """The value; None where its key is not here, or somebody has changed what was kept."""
        key = self._keys.get(secret.key_id)
        if key is None:
            return None
        data = base64.b64decode(secret.sealed)
        try:
            return key.decrypt(data[:_NONCE_BYTES], data[_NONCE_BYTES:], secret.name.encode()).decode()
        except InvalidTag:
            return None


class Secrets:
    """The secrets of this installation."""

    def __init__(self, store: abc.Store, keyring: Keyring) -> None:
        """Keep them in `store`, sealed with the keys of `keyring`."""
        self._store = store
        self._keyring = keyring

    async def start(self) -> None:
        """Seal anew what was sealed with an older key, and say which environments hand secrets to their agents."""

        def work(tx: abc.Transaction) -> tuple[list[str], list[str], list[Environment]]:
            renewed, lost = [], []
            for secret in tx.secrets.all():
                if secret.key_id == self._keyring.first:
                    continue
                value = self._keyring.open(secret)
                if value is None:
                    lost.append(secret.name)
                    continue
                key_id, sealed = self._keyring.seal(secret.name, value)
                tx.secrets.put(secret.model_copy(update={"key_id": key_id, "sealed": sealed}))
                renewed.append(secret.name)
            return renewed, lost, _newest(tx)

        renewed, lost, environments = await self._store.write(work)
        if renewed:
            log.info("secrets.sealed_anew", names=renewed)
        if lost:
            log.warning("secrets.locked", names=lost, why="their key is not among those of secrets_key")
        for environment in environments:
            self.say(environment)

    def say(self, environment: Environment) -> None:
        """Say which secrets the environment hands to its agents, where there are any."""
        names = [use.name for use in environment.spec.secrets if use.expose == "env"]
        if names:
            why = "expose is env: every agent of the environment, and whoever prompts it, can read them"
            log.warning("environment.secrets_exposed", environment=environment.name, names=names, why=why)

    async def put(self, principal: Principal, name: str, value: str) -> None:
        """Keep a secret; what stood under its name is gone. Raises SecretsLocked where there is no key."""
        key_id, sealed = self._keyring.seal(name, value)

        def work(tx: abc.Transaction) -> None:
            now, known = utc_now(), tx.secrets.get(name)
            tx.secrets.put(
                Secret(
                    name=name,
                    key_id=key_id,
                    sealed=sealed,
                    created_at=now if known is None else known.created_at,
                    updated_at=now,
                    updated_by=principal.user,
                )
            )

        await self._store.write(work)

    async def all(self) -> list[Secret]:
        """Every secret, by name; none with its value."""
        return await self._store.read(lambda tx: list(tx.secrets.all()))

    async def delete(self, name: str) -> None:
        """Forget a secret.

        Raises:
            SecretNotFound: there is none of this name.
            SecretInUse: the newest version of an environment uses it.
        """

        def work(tx: abc.Transaction) -> None:
            using = [e.name for e in _newest(tx) if name in {use.name for use in e.spec.secrets}]
            if using:
                raise SecretInUse(environments=using)
            if not tx.secrets.remove(name):
                raise SecretNotFound

        await self._store.write(work)

    async def exposed(self, spec: EnvironmentSpec) -> dict[str, str]:
        """What agents of the environment are handed: values by the names of variables.

        Raises:
            SecretMissing: one of them cannot be had.
        """
        uses = [use for use in spec.secrets if use.expose == "env"]
        values = await self.opened(spec, [use.name for use in uses])
        return {use.variable_name: values[use.name] for use in uses}

    async def opened(self, spec: EnvironmentSpec, names: Collection[str] | None = None) -> dict[str, str]:
        """The values of secrets that the environment declares, by their names; for whoever stands outside of sandboxes.

        Args:
            spec: the environment.
            names: which of them; None: all.

        Raises:
            SecretMissing: one of them cannot be had.
        """
        wanted = [use.name for use in spec.secrets if names is None or use.name in names]
        if not wanted:
            return {}
        found = await self._store.read(lambda tx: {name: tx.secrets.get(name) for name in wanted})
        values = {}
        for name, secret in found.items():
            value = None if secret is None else self._keyring.open(secret)
            if value is None:
                raise SecretMissing(operator_detail=f"the secret {name} is not set, or its key is not here")
            values[name] = value
        return values


def _newest(tx: abc.Transaction) -> list[Environment]:
    found: list[Environment] = []
    cursor: str | None = None
    while True:
        page = tx.environments.page(cursor=cursor, limit=_PAGE)
        found += page.items
        cursor = page.next_cursor
        if cursor is None:
            return found
