"""A full disk is known by what is said of it, and by how much room there is."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from carrel.runner.disk import Disk


@pytest.mark.parametrize(
    "said",
    [
        "head: error writing 'standard output': No space left on device",
        "ENOSPC: no space left on device, write",
        [{"type": "text", "text": "cp: x: Disk quota exceeded"}],
        "Disk full: this computer's volume holding /tmp is full",
    ],
)
def test_words_that_tell_of_a_full_disk(said: object) -> None:
    assert Disk.blamed(said)
    assert not Disk.blamed("permission denied")


@pytest.mark.parametrize(
    ("free_blocks", "free_files", "files", "full"),
    [(0, 9, 9, True), (15, 9, 9, True), (17, 9, 9, False), (1000, 0, 9, True), (1000, 0, 0, False)],
)
def test_less_room_than_the_reserve_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_blocks: int, free_files: int, files: int, full: bool
) -> None:
    disk = SimpleNamespace(f_blocks=10_000, f_frsize=1 << 20, f_bavail=free_blocks, f_files=files, f_favail=free_files)
    monkeypatch.setattr(os, "statvfs", lambda _: disk)
    assert Disk([str(tmp_path)], reserve_bytes=16 << 20).full is full


def test_a_place_that_is_gone_is_not_full(tmp_path: Path) -> None:
    assert not Disk([str(tmp_path / "gone")], reserve_bytes=0).full
