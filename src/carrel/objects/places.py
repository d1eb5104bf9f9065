"""Where objects can be kept, and what opens each of these places."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import obstore.store

__all__ = ["AzurePlace", "DiskPlace", "GcsPlace", "MemoryPlace", "Place", "S3Place"]

_CONNECT_SECONDS = 5


class Place(ABC):
    """One place. Its `repr` holds no secret."""

    @abstractmethod
    def open(self, timeout_seconds: float) -> obstore.store.ObjectStore:
        """A store of obstore's; nothing is asked of the place yet. Raises ValueError and obstore's errors."""

    @property
    def secrets(self) -> tuple[str, ...]:
        """What must not be told with an error."""
        return ()

    def missing(self) -> bool:
        """Whether the whole place is gone, where that looks as if one object were."""
        return False


@dataclass(frozen=True)
class MemoryPlace(Place):
    """Within this process; for tests."""

    def open(self, timeout_seconds: float) -> obstore.store.ObjectStore:
        """An empty one."""
        from obstore.store import MemoryStore

        return MemoryStore()


@dataclass(frozen=True)
class DiskPlace(Place):
    """A folder, which is made if it is not there; private to us."""

    folder: Path

    def open(self, timeout_seconds: float) -> obstore.store.ObjectStore:
        """The folder."""
        from obstore.store import LocalStore

        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return LocalStore(self.folder, automatic_cleanup=True)

    def missing(self) -> bool:
        """Whether the folder is gone: a disk that is not mounted."""
        return not self.folder.is_dir()


@dataclass(frozen=True, kw_only=True)
class S3Place(Place):
    """A bucket of Amazon S3, or of what speaks like it. Without keys, those of the machine's role are used."""

    bucket: str
    prefix: str | None = None
    endpoint: str | None = None
    region: str | None = None
    access_key: str | None = field(default=None, repr=False)
    secret_key: str | None = field(default=None, repr=False)

    def open(self, timeout_seconds: float) -> obstore.store.ObjectStore:
        """The bucket."""
        from obstore.store import S3Store

        config: dict[str, Any] = {"region": self.region or "us-east-1"}
        if self.endpoint is not None:
            config["endpoint"] = self.endpoint
        if self.access_key is not None:
            config |= {"access_key_id": self.access_key, "secret_access_key": self.secret_key}
        return S3Store(
            self.bucket,
            prefix=self.prefix,
            config=config,  # type: ignore[arg-type]
            **_patience(timeout_seconds, self.endpoint),
        )

    @property
    def secrets(self) -> tuple[str, ...]:
        """The keys."""
        return tuple(secret for secret in (self.access_key, self.secret_key) if secret)


@dataclass(frozen=True, kw_only=True)
class GcsPlace(Place):
    """A bucket of Google Cloud Storage. Without a service account, the machine's own is used."""

    bucket: str
    prefix: str | None = None
    endpoint: str | None = None
    service_account_key: str | None = field(default=None, repr=False)
    """The JSON of a service account's key."""

    def open(self, timeout_seconds: float) -> obstore.store.ObjectStore:
        """The bucket."""
        from obstore.store import GCSStore

        config: dict[str, Any] = {}
        if self.endpoint is not None:
            config["base_url"] = self.endpoint
        if self.service_account_key is not None:
            config["service_account_key"] = self.service_account_key
        return GCSStore(
            self.bucket,
            prefix=self.prefix,
            config=config,  # type: ignore[arg-type]
            **_patience(timeout_seconds, self.endpoint),
        )

    @property
    def secrets(self) -> tuple[str, ...]:
        """The key."""
        return (self.service_account_key,) if self.service_account_key else ()


@dataclass(frozen=True, kw_only=True)
class AzurePlace(Place):
    """A container of Azure Blob Storage. Without a key, the machine's managed identity is used."""

    container: str
    account: str
    prefix: str | None = None
    endpoint: str | None = None
    account_key: str | None = field(default=None, repr=False)

    def open(self, timeout_seconds: float) -> obstore.store.ObjectStore:
        """The container."""
        from obstore.store import AzureStore

        config: dict[str, Any] = {"account_name": self.account}
        if self.endpoint is not None:
            config["endpoint"] = self.endpoint
        if self.account_key is not None:
            config["account_key"] = self.account_key
        return AzureStore(
            self.container,
            prefix=self.prefix,
            config=config,  # type: ignore[arg-type]
            **_patience(timeout_seconds, self.endpoint),
        )

    @property
    def secrets(self) -> tuple[str, ...]:
        """The key."""
        return (self.account_key,) if self.account_key else ()


def _patience(timeout_seconds: float, endpoint: str | None) -> dict[str, Any]:
    """How long one request may take, and how long it is repeated."""
    return {
        "client_options": {
            "connect_timeout": timedelta(seconds=min(_CONNECT_SECONDS, timeout_seconds)),
            "timeout": timedelta(seconds=timeout_seconds),
            "allow_http": endpoint is not None and endpoint.startswith("http://"),
        },
        "retry_config": {
            "max_retries": 3,
            "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=2), "base": 2},
            "retry_timeout": timedelta(seconds=timeout_seconds),
        },
    }
