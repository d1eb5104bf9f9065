"""Snapshots of many files and of large ones: saved, saved again where nothing or one file has changed, put back."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TypeVar

from benchmarks.figures import Figure, Summary
from benchmarks.harness import Bench
from carrel.objects import DiskPlace, Objects
from carrel.workspaces import Snapshots, Tree, WorkspaceFiles

T = TypeVar("T")

_PIECE = 2**20
_SMALL = b"def add(one, other):\n    return one + other\n" * 40


async def snapshots(bench: Bench) -> list[Figure]:
    """10,000 files of two kilobytes in a hundred folders, then 1 GiB in eight files that cannot be compressed."""
    many = await _measured(bench, "many", "10,000 files", lambda root: _many(root, bench.times(10_000, 500)))
    return many + await _measured(bench, "large", "1 GiB", lambda root: _large(root, bench.times(1024, 16)))


async def _measured(bench: Bench, key: str, what: str, make: Callable[[Path], None]) -> list[Figure]:
    samples: dict[str, list[float]] = {"saved": [], "unchanged": [], "changed": [], "restored": []}
    for number in range(bench.times(3, 1)):
        root = bench.folder("snapshots")
        await asyncio.to_thread(make, root / "files")
        async with AsyncExitStack() as stack:
            objects = Objects(DiskPlace(root / "objects"))
            await objects.start(stack)
            kept = Snapshots(objects, max_bytes=2**32)
            trees = [Tree("workspace", WorkspaceFiles(root / "files"))]
            first = await _timed(samples["saved"], kept.save(f"{number}/1", trees))
            again = await _timed(samples["unchanged"], kept.save(f"{number}/2", trees, since=first.manifest))
            assert not again.changed
            next(iter(sorted((root / "files").rglob("*.bin")))).write_bytes(b"changed")
            since = again.manifest
            changed = await _timed(samples["changed"], kept.save(f"{number}/3", trees, since=since))
            assert changed.changed
            empty = WorkspaceFiles(root / "restored", within=root)
            empty.make()
            await _timed(samples["restored"], kept.restore(changed.manifest, [Tree("workspace", empty)]))
        await asyncio.to_thread(shutil.rmtree, root)
    says = {
        "saved": "saved",
        "unchanged": "saved again, nothing changed",
        "changed": "saved again, one file changed",
        "restored": "put into an empty folder",
    }
    return [
        Figure(key=f"snapshots.{key}_{name}", what=f"{what}, {says[name]}", unit="s", carrel=Summary.of(found))
        for name, found in samples.items()
    ]


async def _timed(samples: list[float], work: Awaitable[T]) -> T:
    begun = time.perf_counter()
    result = await work
    samples.append(time.perf_counter() - begun)
    return result


def _many(root: Path, count: int) -> None:
    for number in range(count):
        path = root / f"{number % 100:02}" / f"{number}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"# %d\n" % number + _SMALL)


def _large(root: Path, pieces: int) -> None:
    root.mkdir()
    for number in range(8):
        with (root / f"{number}.bin").open("wb") as file:
            for _ in range(pieces // 8):
                file.write(os.urandom(_PIECE))


MEASUREMENTS = {"snapshots": snapshots}
