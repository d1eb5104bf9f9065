"""Snapshots: trees of files as they were at one moment, kept as objects.

A snapshot is two objects: `<key>.tar.zst`, which `tar --zstd -xf` can unpack (`carrel` gives its plain content out), and
`<key>.manifest`, which is written last. It is made only when something has changed, and is whole: none needs another one.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import zstandard

from carrel import abc
from carrel.errors import CarrelError, FileNotFound, NotAFile, ObjectDamaged
from carrel.model import utc_now
from carrel.workspaces.manifests import Change, Entry, Manifest, differences
from carrel.workspaces.restoring import Plan, Restoring
from carrel.workspaces.saving import FRAME_BYTES, Saving
from carrel.workspaces.scanning import Ignored, Scan, Tree, hashed, look
from carrel.workspaces.threads import in_thread, stepwise

__all__ = ["Restored", "Saved", "Snapshots"]

_MANIFEST_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Saved:
    """What came of saving."""

    manifest: Manifest
    """Of the new snapshot, or of the earlier one with what is now known of its files: better to compare with next."""
    changed: bool
    """Whether there is a new snapshot."""


@dataclass(frozen=True)
class Restored:
    """What came of restoring."""

    manifest: Manifest
    """Of the snapshot, with what is now known of its files: to compare with next."""
    removed: int
    written: int
    unlike: tuple[str, ...] = ()
    """What is not as it was saved all the same: an agent was at work."""


class Snapshots:
    """Saves, restores, compares and reads snapshots. Keeps nothing between calls."""

    def __init__(
        self,
        objects: abc.ObjectStore,
        *,
        max_bytes: int,
        max_entries: int = 1_000_000,
        ignored: Sequence[str] = (),
    ) -> None:
        """Keep snapshots in these objects.

        Args:
            objects: a started store.
            max_bytes: of content in one snapshot; holes of sparse files do not count.
            max_entries: in one snapshot.
            ignored: patterns of what is neither saved nor touched (`scanning.Ignored`).
        """
        self._objects = objects
        self._max_bytes = max_bytes
        self._max_entries = max_entries
        self._ignored = Ignored(ignored)

    async def save(self, key: str, trees: Sequence[Tree], *, since: Manifest | None = None) -> Saved:
        """Save the trees under a new key, unless they are what they were in the snapshot `since`.

        It may be called while an agent is at work: each file is then as it was at one moment of the call, or is named in
        the manifest's `unsettled`.

        Raises:
            SnapshotTooLarge: there is more than one snapshot may hold; nothing is kept.
            FileNotFound: a tree is not there.
            PathConflict: the agent moves folders about faster than one can follow; try again.
            ObjectStoreUnavailable: nothing is kept that could be taken for a snapshot.
        """
        if since is not None and _shape(trees) == since.trees:
            seen = await in_thread(lambda: self._seen(trees, since.entries))
            if _same(since.entries, seen.entries):
                return Saved(replace(since, entries=seen.entries), changed=False)
        saving = Saving(trees, self._ignored, max_entries=self._max_entries, max_bytes=self._max_bytes)
        created_at = utc_now()
        archive = stepwise(saving.archive())
        try:
            await self._objects.put(_archive(key), archive)
        finally:
            with contextlib.suppress(RuntimeError):  # whoever was reading it still is; it is closed when that ends
                await archive.aclose()  # type: ignore[attr-defined]
        manifest = Manifest(
            key=key,
            created_at=created_at,
            trees=_shape(trees),
            entries=saving.result.entries,
            frames=tuple(saving.frames),
            frame_bytes=FRAME_BYTES,
            left_out=saving.result.left_out,
            unsettled=tuple(saving.unsettled),
        )
        dumped = await in_thread(manifest.dump)
        try:
            await self._objects.put(_manifest(key), _once(dumped))
        except BaseException:
            with contextlib.suppress(CarrelError):  # the first error says it; an archive alone is no snapshot
                await self._objects.delete(_archive(key))
            raise
        return Saved(manifest, changed=True)

    async def load(self, key: str) -> Manifest:
        """The manifest of a snapshot. Raises ObjectNotFound, ObjectDamaged, ObjectStoreUnavailable."""
        data = bytearray()
        async for piece in self._objects.get(_manifest(key)):
            data += piece
            if len(data) > _MANIFEST_BYTES:
                raise ObjectDamaged(operator_detail="the manifest is too long")
        manifest = await in_thread(lambda: Manifest.load(bytes(data)))
        return replace(manifest, key=key)

    async def restore(self, manifest: Manifest, trees: Sequence[Tree]) -> Restored:
        """Bring the trees to what they were, exactly: what was made since is removed, what is ignored stays.

        No agent should be at work in them. It may be repeated after any error, and has to be.

        Raises:
            FileNotFound: a tree is not there, not even empty.
            ObjectNotFound, ObjectDamaged, ObjectStoreUnavailable: the archive cannot be had.
            PathConflict: an agent is at work, and in the way.
        """
        wanted = {name: entry for name, entry in manifest.entries.items() if name.partition("/")[0] in _shape(trees)}
        seen = await in_thread(lambda: self._seen(trees, wanted))
        plan = Plan.of(wanted, seen)
        if plan.empty:
            return Restored(replace(manifest, entries={**manifest.entries, **seen.entries}), 0, 0)
        restoring = Restoring(trees, plan)
        try:
            await in_thread(restoring.prepare)
            async with contextlib.aclosing(self._frames(manifest, plan.write)) as frames:
                async for index, compressed in frames:
                    await in_thread(partial(_feed, restoring, manifest, index, compressed))
            await in_thread(restoring.finish)
        finally:
            await in_thread(restoring.close)
        after = await in_thread(lambda: look(trees, self._ignored, self._max_entries))
        unlike = tuple(_unlike(wanted, after.entries))
        entries = {
            path: entry.as_seen(after.entries[path])
            if path in after.entries and path not in unlike and entry.type == "file"
            else entry
            for path, entry in manifest.entries.items()
        }
        return Restored(
            replace(manifest, entries=entries),
            len(plan.remove) + len(plan.clear),
            len(plan.write) + len(plan.link),
            unlike,
        )

    async def changes(self, manifest: Manifest, trees: Sequence[Tree]) -> list[Change]:
        """What is otherwise in the trees than it was in the snapshot, sorted by path."""
        names = _shape(trees)
        before = {path: entry for path, entry in manifest.entries.items() if path.partition("/")[0] in names}
        seen = await in_thread(lambda: self._seen(trees, before))
        return list(differences(before, seen.entries))

    async def read(self, manifest: Manifest, path: str) -> AsyncIterator[bytes]:
        """The content of one file of a snapshot, in pieces; `path` begins with the name of its tree.

        Raises:
            FileNotFound: it was not there.
            NotAFile: it was something else.
            ObjectNotFound, ObjectDamaged, ObjectStoreUnavailable: the archive cannot be had.
        """
        entry = manifest.entries.get(path)
        if entry is not None and entry.type == "hardlink":
            entry = manifest.entries.get(entry.target)
        if entry is None:
            raise FileNotFound(path)
        if entry.type != "file":
            raise NotAFile(path)
        position = 0
        async with contextlib.aclosing(self._stored(manifest, entry)) as stored:
            async for at, piece in stored:
                for zeros in _zeros(at - position):
                    yield zeros
                yield piece
                position = at + len(piece)
        for zeros in _zeros(entry.size - position):
            yield zeros

    async def delete(self, key: str) -> None:
        """Remove a snapshot, the manifest first; one that is not there is no error."""
        await self._objects.delete(_manifest(key))
        await self._objects.delete(_archive(key))

    def _seen(self, trees: Sequence[Tree], earlier: Mapping[str, Entry]) -> Scan:
        seen = look(trees, self._ignored, self._max_entries)
        return hashed({tree.name: tree for tree in trees}, seen, earlier, self._max_entries)

    async def _stored(self, manifest: Manifest, entry: Entry) -> AsyncGenerator[tuple[int, bytes], None]:
        """What is stored of a file, with its place in it."""
        async with contextlib.aclosing(self._frames(manifest, [entry])) as frames:
            async for index, compressed in frames:
                data = await in_thread(partial(_unpacked, manifest, compressed))
                begin, at = index * manifest.frame_bytes, entry.at
                for start, length in entry.pieces:
                    low, high = max(at, begin), min(at + length, begin + len(data))
                    if low < high:
                        yield start + low - at, data[low - begin : high - begin]
                    at += length

    async def _frames(self, manifest: Manifest, entries: Sequence[Entry]) -> AsyncGenerator[tuple[int, bytes], None]:
        """The compressed frames in which these entries are, with their numbers; those that adjoin by one request."""
        offsets = [0]
        for size in manifest.frames:
            offsets.append(offsets[-1] + size)
        for first, last in _runs(manifest, entries):
            if last >= len(manifest.frames):
                raise ObjectDamaged(operator_detail="the manifest names more frames than there are")
            pending, index = bytearray(), first
            pieces: Any = self._objects.get(_archive(manifest.key), start=offsets[first], end=offsets[last + 1])
            async with contextlib.aclosing(pieces):
                async for piece in pieces:
                    pending += piece
                    while index <= last and len(pending) >= manifest.frames[index]:
                        yield index, bytes(pending[: manifest.frames[index]])
                        del pending[: manifest.frames[index]]
                        index += 1
            if index <= last:
                raise ObjectDamaged(operator_detail="the archive is shorter than its manifest says")


def _runs(manifest: Manifest, entries: Sequence[Entry]) -> Iterator[tuple[int, int]]:
    run: tuple[int, int] | None = None
    for entry in sorted(entries, key=lambda entry: entry.at):
        if not entry.stored:
            continue
        first, last = entry.at // manifest.frame_bytes, (entry.at + entry.stored - 1) // manifest.frame_bytes
        if run is None:
            run = (first, last)
        elif first <= run[1] + 1:
            run = (run[0], max(run[1], last))
        else:
            yield run
            run = (first, last)
    if run is not None:
        yield run


def _feed(restoring: Restoring, manifest: Manifest, index: int, compressed: bytes) -> None:
    restoring.feed(index * manifest.frame_bytes, _unpacked(manifest, compressed))


def _unpacked(manifest: Manifest, compressed: bytes) -> bytes:
    try:
        if zstandard.frame_content_size(compressed) > manifest.frame_bytes:
            raise ObjectDamaged(operator_detail="a frame of the archive is too long")
        data = zstandard.ZstdDecompressor(max_window_size=2**27).decompress(
            compressed, max_output_size=manifest.frame_bytes, read_across_frames=False
        )
    except zstandard.ZstdError:
        raise ObjectDamaged(operator_detail="a frame of the archive does not unpack") from None
    return data


def _same(before: Mapping[str, Entry], after: Mapping[str, Entry]) -> bool:
    if next(differences(before, after), None) is not None:
        return False
    # A build looks at the times of files, and at no others.
    return all(entry.mtime_ns == after[path].mtime_ns for path, entry in before.items() if entry.type == "file")


def _unlike(wanted: Mapping[str, Entry], found: Mapping[str, Entry]) -> Iterator[str]:
    for path in wanted.keys() | found.keys():
        want, has = wanted.get(path), found.get(path)
        if (
            want is None
            or has is None
            or (want.type, want.size, want.target) != (has.type, has.size, has.target)
            or (want.type == "file" and (want.mode, want.mtime_ns) != (has.mode, has.mtime_ns))
        ):
            yield path


def _shape(trees: Sequence[Tree]) -> dict[str, tuple[str, ...] | None]:
    return {tree.name: tree.parts for tree in trees}


def _archive(key: str) -> str:
    return f"{key}.tar.zst"


def _manifest(key: str) -> str:
    return f"{key}.manifest"


def _zeros(count: int) -> Iterator[bytes]:
    block = bytes(2**18)
    while count > 0:
        yield block[:count]
        count -= len(block)


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data
