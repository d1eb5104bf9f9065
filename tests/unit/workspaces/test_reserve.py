"""The reserve takes room while there is plenty, and gives it back while there is none."""

import os
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

from carrel.workspaces.reserve import Reserve

MIB = 2**20


async def test_it_is_there_while_the_server_runs(tmp_path: Path) -> None:
    path = tmp_path / "reserve"
    async with AsyncExitStack() as stack:
        await Reserve(path, MIB).start(stack)
        assert path.stat().st_size == MIB
        assert path.stat().st_blocks * 512 >= MIB, "and truly takes the room"
    assert not path.exists()


def test_it_goes_when_the_disk_is_full_and_comes_back_when_there_is_plenty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, reserve = tmp_path / "reserve", Reserve(tmp_path / "reserve", MIB)
    seen = []
    for free_kib in (8000, 600, 400, 800, 1900, 2100):
        disk = SimpleNamespace(f_blocks=10**6, f_frsize=1024, f_bavail=free_kib)
        monkeypatch.setattr(os, "statvfs", lambda _, disk=disk: disk)
        reserve.look()
        seen.append(path.exists())
    assert seen == [True, True, False, False, False, True]


def test_a_small_disk_has_a_small_reserve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_blocks=80, f_frsize=MIB, f_bavail=80))
    assert Reserve(tmp_path / "reserve", 64 * MIB).size_bytes == 10 * MIB


def test_half_a_reserve_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    Reserve(tmp_path / "reserve", MIB).look()
    assert not (tmp_path / "reserve").exists()
