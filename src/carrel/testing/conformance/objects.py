"""The promises of an `ObjectStore`."""

from __future__ import annotations

import asyncio
import hashlib
import random
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager

from carrel import abc
from carrel.errors import ObjectNotFound
from carrel.testing.conformance.checks import collect, must, must_equal, must_raise

__all__ = ["CHECKS", "OpenObjects", "content", "fetch", "pieces"]

OpenObjects = Callable[[], AbstractAsyncContextManager[abc.ObjectStore]]
"""Opens a started store. It may hold objects of earlier checks: each works in a folder of its own."""

CHECKS: dict[str, Callable[[OpenObjects], Awaitable[None]]] = {}
"""What every store of objects promises."""

_check = collect(CHECKS)
_MIB = 2**20


def content(size: int, seed: int = 1) -> bytes:
    """Bytes that no one can compress, the same for the same seed."""
    return random.Random(seed).randbytes(size)


async def pieces(data: bytes, size: int = 100_000) -> AsyncIterator[bytes]:
    """The data in pieces."""
    for at in range(0, len(data), size):
        yield data[at : at + size]


async def fetch(store: abc.ObjectStore, key: str, *, start: int = 0, end: int | None = None) -> bytes:
    """All of a content."""
    return b"".join([piece async for piece in store.get(key, start=start, end=end)])


def _folder() -> str:
    return f"check-{uuid.uuid4()}"


@_check
async def what_is_stored_is_given_back(open_objects: OpenObjects) -> None:
    """Whatever its size is, with its size and its SHA-256."""
    folder = _folder()
    async with open_objects() as store:
        for size in (0, 1, 262_143, 262_144, 262_145, 3 * _MIB, 8 * _MIB - 4_000, 20 * _MIB + 5):
            data = content(size)
            stored = await store.put(f"{folder}/{size}", pieces(data, 2 * _MIB))
            must_equal(await fetch(store, f"{folder}/{size}"), data, f"{size} bytes come back")
            found = await store.stat(f"{folder}/{size}")
            for info in (stored, found):
                must_equal((info.key, info.size), (f"{folder}/{size}", size), "its key and size are told")
                must_equal(info.sha256, hashlib.sha256(data).hexdigest(), "and its checksum")
                must(info.stored_at.tzinfo is not None, "and when it was stored, with a zone")


@_check
async def parts_can_be_read(open_objects: OpenObjects) -> None:
    """Any range; what lies beyond the end is not there."""
    key = f"{_folder()}/a"
    data = content(9 * _MIB + 77)
    ranges = [(0, 10), (5, 6), (262_140, 262_150), (262_144, 524_288), (8 * _MIB, None), (len(data) - 3, len(data) + 9)]
    async with open_objects() as store:
        await store.put(key, pieces(data))
        for start, end in [*ranges, (100, 9 * _MIB), (len(data), None), (len(data) + 5, None), (7, 7), (9, 3)]:
            must_equal(await fetch(store, key, start=start, end=end), data[start:end], f"bytes {start} to {end}")


@_check
async def what_is_not_there_is_told(open_objects: OpenObjects) -> None:
    """By one error; removing it is none."""
    folder = _folder()
    async with open_objects() as store:
        await must_raise(ObjectNotFound, fetch(store, f"{folder}/no"), "no content")
        await must_raise(ObjectNotFound, fetch(store, f"{folder}/no", start=5), "and no part of it")
        await must_raise(ObjectNotFound, store.stat(f"{folder}/no"), "and nothing known of it")
        await store.delete(f"{folder}/no")
        must_equal([info async for info in store.list(folder)], [], "a folder without objects is empty")


@_check
async def a_folder_is_listed(open_objects: OpenObjects) -> None:
    """All that is in it, however deep, and nothing of a folder whose name only begins like it."""
    folder = _folder()
    async with open_objects() as store:
        wanted = {f"{folder}/a/{number}": number for number in range(12)} | {f"{folder}/a/b/c": 5}
        for key, size in wanted.items():
            await store.put(key, pieces(content(size)))
        await store.put(f"{folder}/ab", pieces(b"x"))
        for prefix in (f"{folder}/a", f"{folder}/a/"):
            found = {info.key: info.size async for info in store.list(prefix)}
            must_equal(found, wanted, "keys and sizes are listed")
        everything = [info.key async for info in store.list("")]
        must(set(wanted) <= set(everything), "the empty prefix lists all")


@_check
async def deleted_is_deleted(open_objects: OpenObjects) -> None:
    """And nothing beside it."""
    folder = _folder()
    async with open_objects() as store:
        for name in ("a", "b"):
            await store.put(f"{folder}/{name}", pieces(b"content"))
        await store.delete(f"{folder}/a")
        await store.delete(f"{folder}/a")
        await must_raise(ObjectNotFound, store.stat(f"{folder}/a"), "what was deleted is gone")
        must_equal([info.key async for info in store.list(folder)], [f"{folder}/b"], "the other one is not")


@_check
async def an_object_is_replaced_whole(open_objects: OpenObjects) -> None:
    """By a shorter one too, and at once."""
    key = f"{_folder()}/a"
    async with open_objects() as store:
        for size in (9 * _MIB, 10, 0):
            await store.put(key, pieces(content(size, seed=size), _MIB))
            must_equal(await fetch(store, key), content(size, seed=size), "the new content is given")


class _OnPurposeError(Exception):
    pass


@_check
async def a_put_that_fails_changes_nothing(open_objects: OpenObjects) -> None:
    """What its content raises is passed on, after few bytes or many; the object stays what it was."""
    folder = _folder()

    async def failing(count: int) -> AsyncIterator[bytes]:
        for _ in range(count):
            yield content(_MIB)
        raise _OnPurposeError

    async with open_objects() as store:
        await store.put(f"{folder}/there", pieces(b"before"))
        for count in (0, 1, 20):
            for name in ("there", "new"):
                await must_raise(
                    _OnPurposeError, store.put(f"{folder}/{name}", failing(count)), "its error is passed on"
                )
        must_equal(await fetch(store, f"{folder}/there"), b"before", "the old content stays")
        must_equal([info.key async for info in store.list(folder)], [f"{folder}/there"], "no part is left to see")


@_check
async def nobody_sees_a_part(open_objects: OpenObjects) -> None:
    """While an object is being stored there is the old one, or none."""
    folder = _folder()
    seen: list[object] = []

    async with open_objects() as store:

        async def slowly() -> AsyncIterator[bytes]:
            for number in range(20):
                yield content(_MIB)
                if number in (0, 19):
                    seen.append([info.key async for info in store.list(folder)])
                    seen.append(await fetch(store, f"{folder}/old"))

        await store.put(f"{folder}/old", pieces(b"before"))
        await store.put(f"{folder}/old", slowly())
        must_equal(seen, [[f"{folder}/old"], b"before"] * 2, "the old content is given until the new one is whole")
        seen.clear()
        await store.put(f"{folder}/a/new", slowly_of(store, f"{folder}/a", seen))
        must_equal(seen, [[]], "a new one does not show before it is whole")


async def slowly_of(store: abc.ObjectStore, folder: str, seen: list[object]) -> AsyncIterator[bytes]:
    """Content that looks at its folder before its end."""
    for _ in range(20):
        yield content(_MIB)
    seen.append([info.key async for info in store.list(folder)])


@_check
async def several_at_once(open_objects: OpenObjects) -> None:
    """They do not come into each other's way."""
    folder = _folder()
    async with open_objects() as store:

        async def one(number: int) -> None:
            key, data = f"{folder}/{number % 3}/{number}", content(number * 500_000, seed=number)
            await store.put(key, pieces(data))
            must_equal(await fetch(store, key), data, "each has its own content")
            await store.delete(key)

        async with asyncio.TaskGroup() as group:
            for number in range(8):
                group.create_task(one(number), name=f"object {number}")
        must_equal([info async for info in store.list(folder)], [], "nothing is left")


@_check
async def a_key_that_is_none_is_refused(open_objects: OpenObjects) -> None:
    """Before anything is asked of the store."""
    async with open_objects() as store:
        for key in ("", "/a", "a/", "a//b", "../a", "a/../b", "a/.b", "a b", "ä", "a\0", "a\n", "x" * 600):
            await must_raise(ValueError, store.put(key, pieces(b"x")), f"{key!r} is no key")
            await must_raise(ValueError, fetch(store, key), f"{key!r} is no key")
            await must_raise(ValueError, store.stat(key), f"{key!r} is no key")
            await must_raise(ValueError, store.delete(key), f"{key!r} is no key")
