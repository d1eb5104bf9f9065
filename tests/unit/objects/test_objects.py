"""Objects: what is damaged, foreign or encrypted with another key is never taken for what was stored."""

import hashlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from carrel import errors
from carrel.objects import DiskPlace, Keyring, Objects, S3Place
from carrel.objects.sealing import CHUNK, HEADER, LEAST, SEALED, Opener, Sealer, content_size
from carrel.objects.sealing import Keyring as Ring
from carrel.testing.conformance.objects import content, fetch, pieces
from carrel.testing.s3 import S3Server

ONE, OTHER = bytes(range(32)), bytes(32)
SIZE = 2 * CHUNK + 1000


async def opened(stack: AsyncExitStack, place, keys: Keyring | None = None, **options) -> Objects:
    objects = Objects(place, keys, **options)
    await objects.start(stack)
    return objects


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
def place(tmp_path: Path) -> DiskPlace:
    return DiskPlace(tmp_path / "objects")


RINGS = {"plain": None, "encrypted": Keyring([ONE])}


@pytest.mark.parametrize("keys", RINGS.values(), ids=RINGS)
@pytest.mark.parametrize(
    "at", [3, 9, 20, 40, HEADER, HEADER + 5, HEADER + SEALED - 1, HEADER + SEALED, -60, -56, -20, -1]
)
async def test_one_flipped_bit_anywhere(stack, place, keys, at) -> None:
    objects = await opened(stack, place, keys)
    await objects.put("a/b", pieces(content(SIZE)))
    path = place.folder / "a" / "b"
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(errors.ObjectUnreadable):
        await fetch(objects, "a/b")


@pytest.mark.parametrize("keys", RINGS.values(), ids=RINGS)
@pytest.mark.parametrize(
    "left", [0, 1, HEADER, LEAST, HEADER + SEALED, HEADER + 2 * SEALED, HEADER + 2 * SEALED + 56, -1]
)
async def test_an_object_that_is_cut(stack, place, keys, left) -> None:
    objects = await opened(stack, place, keys)
    await objects.put("a", pieces(content(SIZE)))
    data = (place.folder / "a").read_bytes()
    (place.folder / "a").write_bytes(data[:left])
    with pytest.raises(errors.ObjectDamaged):
        await fetch(objects, "a")
    with pytest.raises(errors.ObjectDamaged):
        await objects.stat("a")


@pytest.mark.parametrize("keys", RINGS.values(), ids=RINGS)
async def test_chunks_and_objects_that_were_exchanged(stack, place, keys) -> None:
    objects = await opened(stack, place, keys)
    await objects.put("a", pieces(content(SIZE)))
    await objects.put("b", pieces(content(SIZE, seed=2)))
    one, other = ((place.folder / name).read_bytes() for name in "ab")
    first, second = HEADER, HEADER + SEALED
    for mixed in (
        other,
        one[:first] + one[second : second + SEALED] + one[first:second] + one[second + SEALED :],
        one[:first] + other[first:second] + one[second:],
        one[:-56] + other[-56:],
    ):
        (place.folder / "a").write_bytes(mixed)
        with pytest.raises(errors.ObjectDamaged):
            await fetch(objects, "a")


async def test_a_part_is_checked_without_the_whole(stack, place) -> None:
    objects = await opened(stack, place)
    await objects.put("a", pieces(content(SIZE)))
    data = bytearray((place.folder / "a").read_bytes())
    data[HEADER + SEALED + 5] ^= 1
    (place.folder / "a").write_bytes(bytes(data))
    assert await fetch(objects, "a", start=0, end=CHUNK) == content(SIZE)[:CHUNK]
    with pytest.raises(errors.ObjectDamaged):
        await fetch(objects, "a", start=CHUNK + 100, end=CHUNK + 101)


async def test_keys(stack, place) -> None:
    plain = await opened(stack, place)
    first = await opened(stack, place, Keyring([ONE]))
    turned = await opened(stack, place, Keyring([OTHER, ONE]))
    await plain.put("plain", pieces(b"in the open"))
    await first.put("old", pieces(b"hidden"))
    await turned.put("new", pieces(b"hidden too"))
    assert b"hidden" not in (place.folder / "old").read_bytes()
    assert await fetch(turned, "old") == b"hidden"
    assert await fetch(turned, "new") == b"hidden too"
    with pytest.raises(errors.ObjectKeyMissing, match="old_encryption_keys"):
        await fetch(first, "new")
    with pytest.raises(errors.ObjectKeyMissing):
        await fetch(plain, "old")
    with pytest.raises(errors.ObjectKeyMissing, match="accept_unencrypted"):
        await fetch(first, "plain")
    both = await opened(stack, place, Keyring([ONE], accept_unencrypted=True))
    assert await fetch(both, "plain") == b"in the open"
    assert ONE.hex() not in repr(Keyring([ONE])) + repr(vars(first))
    with pytest.raises(ValueError, match="32"):
        Keyring([b"short"])


async def test_two_of_the_same_content_have_nothing_in_common(stack, place) -> None:
    objects = await opened(stack, place, Keyring([ONE]))
    for name in "ab":
        await objects.put(name, pieces(bytes(1000)))
    one, other = ((place.folder / name).read_bytes()[HEADER:] for name in "ab")
    assert one != other
    assert len(set(zip(one, other, strict=True)) & {(n, n) for n in range(256)}) < 50


def test_sizes() -> None:
    for size in (0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK):
        sealer = Sealer(Ring(), "k")
        data = sealer.header + sealer.add(bytes(size)) + sealer.end()
        assert content_size(len(data)) == size
        opener = Opener(Ring(), "k", data[:HEADER], len(data))
        assert opener.trailer(data[-56:]) == hashlib.sha256(bytes(size)).hexdigest()
    for stored in (0, LEAST - 1, LEAST + 1, LEAST + 16, LEAST + SEALED + 16):
        with pytest.raises(errors.ObjectDamaged):
            content_size(stored)


async def test_a_folder_that_is_gone_is_no_object_that_is_gone(stack, place) -> None:
    objects = await opened(stack, place)
    await objects.put("a/b", pieces(b"x"))
    place.folder.rename(place.folder.with_name("unmounted"))
    with pytest.raises(errors.ObjectStoreUnavailable):
        await fetch(objects, "a/b")
    place.folder.with_name("unmounted").rename(place.folder)
    assert await fetch(objects, "a/b") == b"x"


async def test_the_folder_is_ours_alone(stack, place) -> None:
    await opened(stack, place)
    assert place.folder.stat().st_mode & 0o777 == 0o700


async def test_what_is_no_object_of_ours_is_not_listed(stack, place) -> None:
    objects = await opened(stack, place)
    await objects.put("a", pieces(b"x"))
    (place.folder / "README").write_text("hello")
    (place.folder / "not a key").write_bytes(bytes(1000))
    assert [info.key async for info in objects.list("")] == ["a"]


async def test_a_folder_that_cannot_be_made(stack, tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(errors.InvalidSettings):
        await opened(stack, DiskPlace(tmp_path / "file" / "objects"))


@pytest.mark.requires("s3")
async def test_a_server_that_goes_and_comes_again(stack, s3_server: S3Server) -> None:
    place = S3Place(
        bucket=s3_server.bucket,
        endpoint=s3_server.endpoint,
        access_key=s3_server.access_key,
        secret_key=s3_server.secret_key,
    )
    objects = await opened(stack, place, timeout_seconds=2)
    await objects.put("a", pieces(content(SIZE)))
    s3_server.stop()
    for attempt in (objects.put("b", pieces(b"x")), fetch(objects, "a"), objects.stat("a"), objects.delete("a")):
        with pytest.raises(errors.ObjectStoreUnavailable):
            await attempt
    with pytest.raises(errors.ObjectStoreUnavailable):
        assert [info async for info in objects.list("")]
    s3_server.start()
    assert await fetch(objects, "a") == content(SIZE)


@pytest.mark.requires("s3")
async def test_wrong_keys_and_a_missing_bucket_are_told_without_secrets(stack, s3_server: S3Server) -> None:
    keys = {"access_key": "someone-elses-key", "secret_key": "someone-elses-secret"}
    wrong = S3Place(bucket=s3_server.bucket, endpoint=s3_server.endpoint, **keys)
    objects = await opened(stack, wrong, timeout_seconds=2)
    with pytest.raises(errors.ObjectStoreUnavailable) as caught:
        await fetch(objects, "a")
    assert "someone-elses" not in str(caught.value) + repr(wrong)
    assert caught.value.operator_detail
    assert "127.0.0.1" not in caught.value.message
    missing = S3Place(
        bucket="no-such-bucket",
        endpoint=s3_server.endpoint,
        access_key=s3_server.access_key,
        secret_key=s3_server.secret_key,
    )
    objects = await opened(stack, missing, timeout_seconds=2)
    with pytest.raises(errors.ObjectStoreUnavailable):
        await objects.put("a", pieces(b"x"))
