"""The settings of the store of objects: each reaches it, and what everybody knows is refused."""

import base64
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from pydantic import ValidationError

from carrel.cli.objects import objects_of, place_of
from carrel.errors import InvalidSettings, ObjectKeyMissing
from carrel.objects import AzurePlace, DiskPlace, GcsPlace, S3Place
from carrel.settings import Settings
from carrel.testing.conformance.objects import fetch, pieces
from carrel.testing.s3 import S3Server

KEY, OLD = (base64.b64encode(bytes(range(start, start + 32))).decode() for start in (0, 100))


def settings(**objects) -> Settings:
    return Settings(objects=objects)


def test_on_disk(tmp_path: Path) -> None:
    assert place_of(Settings(data=tmp_path)) == DiskPlace(tmp_path / "objects")
    assert place_of(settings(path=tmp_path / "elsewhere")) == DiskPlace(tmp_path / "elsewhere")


def test_in_the_clouds() -> None:
    place = {"bucket": "b", "prefix": "p", "endpoint": "https://objects.example.com"}
    assert place_of(
        settings(kind="s3", region="eu-1", access_key="an-access-key", secret_key="a-secret", **place)
    ) == S3Place(
        bucket="b",
        prefix="p",
        endpoint="https://objects.example.com",
        region="eu-1",
        access_key="an-access-key",
        secret_key="a-secret",
    )
    assert place_of(settings(kind="gcs", secret_key="{}", **place)) == GcsPlace(
        bucket="b", prefix="p", endpoint="https://objects.example.com", service_account_key="{}"
    )
    assert place_of(settings(kind="azure", account="a", secret_key="k", **place)) == AzurePlace(
        container="b", prefix="p", endpoint="https://objects.example.com", account="a", account_key="k"
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "s3"}, "bucket"),
        ({"kind": "azure", "bucket": "b"}, "account"),
        ({"kind": "s3", "bucket": "b", "access_key": "only-one"}, "belong together"),
        ({"kind": "s3", "bucket": "b", "access_key": "minioadmin", "secret_key": "x-y"}, "everybody knows"),
        ({"kind": "s3", "bucket": "b", "access_key": "x-y", "secret_key": "MinioAdmin"}, "everybody knows"),
        ({"endpoint": "objects.example.com"}, "URL"),
        ({"encryption_key": "short-and-secret"}, "32 bytes"),
        ({"old_encryption_keys": "x" * 40 + " short-and-secret"}, "32 bytes"),
        ({"encryption_key": "   "}, "32 bytes"),
        ({"timeout_seconds": 0}, "greater"),
    ],
)
def test_what_is_refused(wrong, message) -> None:
    with pytest.raises(ValidationError, match=message) as caught:
        settings(**wrong)
    assert "secret-" not in str(caught.value).replace("secret_key", "")
    assert "short-and" not in str(caught.value)


def test_old_keys_alone_are_refused() -> None:
    with pytest.raises(InvalidSettings, match="encryption_key"):
        objects_of(settings(old_encryption_keys=OLD))


async def test_encryption_is_turned_on_and_its_key_changed(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:

        async def opened(**more):
            objects = objects_of(settings(path=tmp_path / "o", **more))
            await objects.start(stack)
            return objects

        await (await opened()).put("plain", pieces(b"plain"))
        await (await opened(encryption_key=OLD)).put("old", pieces(b"old"))
        both = f"{OLD} {KEY}"
        new = await opened(encryption_key=KEY, old_encryption_keys=both, accept_unencrypted=True)
        assert [await fetch(new, name) for name in ("plain", "old")] == [b"plain", b"old"]
        strict = await opened(encryption_key=KEY)
        for name in ("plain", "old"):
            with pytest.raises(ObjectKeyMissing):
                await fetch(strict, name)


@pytest.mark.requires("s3")
async def test_a_server_that_speaks_s3(s3_server: S3Server) -> None:
    found = settings(
        kind="s3",
        bucket=s3_server.bucket,
        prefix="carrel",
        endpoint=s3_server.endpoint,
        access_key=s3_server.access_key,
        secret_key=s3_server.secret_key,
        encryption_key=KEY,
        timeout_seconds=5,
    )
    async with AsyncExitStack() as stack:
        objects = objects_of(found)
        await objects.start(stack)
        await objects.put("a/b", pieces(b"content"))
        assert await fetch(objects, "a/b") == b"content"
    assert (s3_server.folder / s3_server.bucket / "carrel" / "a" / "b").read_bytes().startswith(b"CARREL-O")
