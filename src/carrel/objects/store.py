"""Objects by obstore: the one implementation, over every place."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Iterator
from contextlib import AsyncExitStack, contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

from carrel import abc
from carrel.errors import InvalidSettings, ObjectDamaged, ObjectNotFound, ObjectStoreUnavailable
from carrel.model import utc_now
from carrel.objects.places import Place
from carrel.objects.sealing import CHUNK, HEADER, LEAST, SEALED, TRAILER, Keyring, Opener, Sealer, content_size

if TYPE_CHECKING:
    import obstore.store

__all__ = ["Objects"]

T = TypeVar("T")

_KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")
_PART = 8 * 2**20
_PARTS_AT_ONCE = 2
_WINDOW_CHUNKS = 32
_GRACE = 3.0
"""A request that fails is repeated for as long as one may take, so it has an end after twice that, and some."""


class Objects(abc.ObjectStore):
    """Keeps objects in one place, each in the form that `sealing.py` describes.

    An object of up to 8 MiB is one request, a larger one is uploaded in parts of that size, two at a time. It is read in
    requests of 8 MiB: each can be repeated, and none takes long.
    """

    def __init__(self, place: Place, keys: Keyring | None = None, *, timeout_seconds: float = 60.0) -> None:
        """Keep objects at this place.

        Args:
            place: where.
            keys: what they are encrypted with; without any they are not.
            timeout_seconds: how long one request may take, and how long one that fails is repeated.
        """
        self._place = place
        self._keys = keys or Keyring()
        self._timeout_seconds = timeout_seconds
        self._store: obstore.store.ObjectStore

    async def start(self, exit_stack: AsyncExitStack) -> None:
        """Open the place. Raises InvalidSettings where it is told what cannot be."""
        from obstore.exceptions import BaseError

        try:
            self._store = await asyncio.to_thread(self._place.open, self._timeout_seconds)
        except (BaseError, ValueError) as error:
            raise InvalidSettings(f"objects: {self._told(error)}") from None
        except OSError as error:
            raise InvalidSettings(f"objects: the folder cannot be made: {error.strerror}") from None

    async def put(self, key: str, chunks: AsyncIterable[bytes]) -> abc.ObjectInfo:
        """Store an object."""
        import obstore

        _check(key)
        sealer = Sealer(self._keys, key)
        parts = _Parts(sealer, chunks)
        first = await parts.next()
        # obstore tells of an error in what it is given in words of its own; ours is kept by the parts.
        whole: Any = first if parts.ended else parts.all(first)
        try:
            with self._translated(key):
                if parts.ended:
                    await self._bounded(obstore.put_async(self._store, key, whole, use_multipart=False))
                else:
                    await obstore.put_async(
                        self._store, key, whole, use_multipart=True, chunk_size=_PART, max_concurrency=_PARTS_AT_ONCE
                    )
        except Exception:
            if parts.error is not None:
                raise parts.error from None
            raise
        return abc.ObjectInfo(key=key, size=sealer.size, sha256=sealer.sha256, stored_at=utc_now())

    async def get(self, key: str, *, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """The content of an object."""
        opener, stored, head, _ = await self._open(key, _WINDOW_CHUNKS if start < _WINDOW_CHUNKS * CHUNK else 0)
        end = opener.size if end is None else min(end, opener.size)
        whole = hashlib.sha256() if start <= 0 and end == opener.size else None
        first, last = max(start, 0) // CHUNK, -(-end // CHUNK)
        for window in range(first, last, _WINDOW_CHUNKS):
            count = min(_WINDOW_CHUNKS, last - window)
            at = HEADER + window * SEALED
            sealed = await self._range(key, at, min(at + count * SEALED, stored - TRAILER), head)
            skip, until = max(start - window * CHUNK, 0), end - window * CHUNK
            data = await asyncio.to_thread(_content, opener, window, sealed)
            piece = data[skip:until]
            if whole is not None:
                await asyncio.to_thread(whole.update, piece)
                if window + count >= last:
                    trailer = await self._range(key, stored - TRAILER, stored, head)
                    if opener.trailer(trailer) != whole.hexdigest():
                        raise ObjectDamaged(operator_detail="the checksum of the whole does not hold")
            if piece:
                yield piece
        if whole is not None and not opener.size:
            opener.trailer(await self._range(key, stored - TRAILER, stored, head))

    async def stat(self, key: str) -> abc.ObjectInfo:
        """What is known of an object."""
        opener, stored, head, stored_at = await self._open(key, 0)
        sha256 = opener.trailer(await self._range(key, stored - TRAILER, stored, head))
        return abc.ObjectInfo(key=key, size=opener.size, sha256=sha256, stored_at=stored_at)

    async def list(self, prefix: str) -> AsyncIterator[abc.ObjectInfo]:
        """Every object in a folder."""
        import obstore

        if prefix:
            _check(prefix.removesuffix("/"))
        with self._translated(prefix):
            stream = obstore.list(self._store, prefix.removesuffix("/") or None, chunk_size=500).__aiter__()
        while True:
            try:
                with self._translated(prefix):
                    metas = await self._bounded(stream.__anext__())
            except StopAsyncIteration:
                return
            except ObjectNotFound:  # a folder that went away while it was listed
                return
            for meta in metas:
                if _KEY.fullmatch(meta["path"]) and meta["size"] >= LEAST:  # else it is none of ours
                    yield abc.ObjectInfo(
                        key=meta["path"], size=content_size(meta["size"]), stored_at=meta["last_modified"]
                    )

    async def delete(self, key: str) -> None:
        """Remove an object."""
        import obstore

        _check(key)
        try:
            with self._translated(key):
                await self._bounded(obstore.delete_async(self._store, key))
        except ObjectNotFound:  # the contract: no error
            return

    async def _open(self, key: str, chunks: int) -> tuple[Opener, int, bytes, datetime]:
        """The opener, how many bytes are stored, the first of them (so many chunks at least), and since when."""
        import obstore

        _check(key)
        with self._translated(key):
            meta = await self._bounded(obstore.head_async(self._store, key))
            stored = int(meta["size"])
            most = min(stored, HEADER + chunks * SEALED + TRAILER)
            if most < stored:
                head = bytes(await self._bounded(obstore.get_range_async(self._store, key, start=0, end=most)))
            else:  # of a range that is the whole some servers say that it is none
                head = await self._whole(key)
        if stored < LEAST or len(head) < HEADER:
            raise ObjectDamaged(operator_detail=f"only {stored} bytes are stored")
        return Opener(self._keys, key, head[:HEADER], stored), stored, head, meta["last_modified"]

    async def _whole(self, key: str) -> bytes:
        import obstore

        found = await self._bounded(obstore.get_async(self._store, key))
        return bytes(await self._bounded(found.bytes_async()))

    async def _range(self, key: str, start: int, end: int, head: bytes) -> bytes:
        import obstore

        if end <= len(head):
            return head[start:end]
        with self._translated(key):
            data = bytes(await self._bounded(obstore.get_range_async(self._store, key, start=start, end=end)))
        if len(data) != end - start:
            raise ObjectDamaged(operator_detail=f"of {end - start} bytes {len(data)} came")
        return data

    async def _bounded(self, request: Awaitable[T]) -> T:
        async with asyncio.timeout(2 * self._timeout_seconds + _GRACE):
            return await request

    @contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        """Turns what obstore says into our own errors, secrets taken out."""
        from obstore.exceptions import BaseError

        try:
            yield
        except FileNotFoundError as error:
            # A bucket or a folder that is gone is no object that is gone: nobody may conclude that it was deleted.
            if "NoSuchBucket" in str(error) or "ContainerNotFound" in str(error) or self._place.missing():
                raise ObjectStoreUnavailable(operator_detail=self._told(error)) from None
            raise ObjectNotFound(operator_detail=key) from None
        except TimeoutError:
            raise ObjectStoreUnavailable(operator_detail="no answer in time") from None
        except (BaseError, OSError) as error:
            raise ObjectStoreUnavailable(operator_detail=self._told(error)) from None

    def _told(self, error: Exception) -> str:
        text = " ".join(str(error).split())
        for secret in self._place.secrets:
            text = text.replace(secret, "***")
        return f"{type(error).__name__}: {text[:500]}"


class _Parts:
    """What is sealed of an object, in parts that are worth a request."""

    def __init__(self, sealer: Sealer, chunks: AsyncIterable[bytes]) -> None:
        self._sealer = sealer
        self._chunks = aiter(chunks)
        self.ended = False
        self.error: BaseException | None = None

    async def next(self) -> bytes:
        """The next part; `ended` tells whether it is the last."""
        part = bytearray() if self._sealer.size else bytearray(self._sealer.header)
        while len(part) < _PART:
            try:
                data = await anext(self._chunks)
            except StopAsyncIteration:
                self.ended = True
                part += await asyncio.to_thread(self._sealer.end)
                break
            part += await asyncio.to_thread(self._sealer.add, data)
        return bytes(part)

    async def all(self, first: bytes) -> AsyncIterator[bytes]:
        """Every part."""
        yield first
        while not self.ended:
            try:
                part = await self.next()
            except BaseException as error:
                self.error = error
                raise
            yield part


def _content(opener: Opener, first: int, sealed: bytes) -> bytes:
    view = (sealed[at : at + SEALED] for at in range(0, len(sealed), SEALED))
    return b"".join(opener.chunks(first, view))


def _check(key: str) -> None:
    if not _KEY.fullmatch(key) or len(key) > 512:
        raise ValueError(f"{key!r} is no key of an object")
