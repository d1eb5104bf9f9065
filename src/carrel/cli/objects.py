"""Which store of objects the settings name."""

from __future__ import annotations

import hashlib

from pydantic import SecretStr

from carrel.errors import InvalidSettings
from carrel.objects import AzurePlace, DiskPlace, GcsPlace, Keyring, Objects, Place, S3Place
from carrel.settings import Settings

__all__ = ["objects_of", "place_of"]


def objects_of(settings: Settings) -> Objects:
    """The store of objects, not started yet."""
    wanted = settings.objects
    keys = [key for each in (wanted.encryption_key, wanted.old_encryption_keys) if each for key in _keys(each)]
    if wanted.encryption_key is None and keys:
        raise InvalidSettings(
            "objects.old_encryption_keys needs objects.encryption_key, which what is new is closed with."
        )
    return Objects(
        place_of(settings),
        Keyring(keys, accept_unencrypted=wanted.accept_unencrypted),
        timeout_seconds=wanted.timeout_seconds,
    )


def _keys(secret: SecretStr) -> list[bytes]:
    """The key that each of the texts is made into."""
    return [hashlib.sha256(b"carrel objects\0" + text.encode()).digest() for text in secret.get_secret_value().split()]


def place_of(settings: Settings) -> Place:
    """Where it keeps them."""
    wanted = settings.objects
    access_key = wanted.access_key.get_secret_value() if wanted.access_key else None
    secret_key = wanted.secret_key.get_secret_value() if wanted.secret_key else None
    bucket = wanted.bucket or ""
    if wanted.kind == "s3":
        return S3Place(
            bucket=bucket,
            prefix=wanted.prefix,
            endpoint=wanted.endpoint,
            region=wanted.region,
            access_key=access_key,
            secret_key=secret_key,
        )
    if wanted.kind == "gcs":
        return GcsPlace(bucket=bucket, prefix=wanted.prefix, endpoint=wanted.endpoint, service_account_key=secret_key)
    if wanted.kind == "azure":
        return AzurePlace(
            container=bucket,
            account=wanted.account or "",
            prefix=wanted.prefix,
            endpoint=wanted.endpoint,
            account_key=secret_key,
        )
    return DiskPlace(wanted.path or settings.data / "objects")
