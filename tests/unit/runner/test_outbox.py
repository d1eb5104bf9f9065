"""Frames are kept until they are stored: in memory, then on disk, then not at all."""

import errno
import os
import random
from pathlib import Path

import pytest

from carrel.errors import DiskFull, SpoolFull
from carrel.runner.outbox import Outbox


def outbox(folder: Path, memory: int = 100, disk: int = 1_000) -> Outbox:
    return Outbox(folder / "spool", memory_bytes=memory, disk_bytes=disk)


def size_on_disk(box: Outbox) -> int:
    assert box._spool_fd is not None
    return os.fstat(box._spool_fd).st_size


def kept(box: Outbox, n: int = 0) -> list[tuple[int, bytes]]:
    return list(box.after(n))


def test_frames_are_kept_in_order_until_acknowledged(tmp_path: Path) -> None:
    box = outbox(tmp_path)
    assert box.next_number == 1
    for text in (b"one", b"two", b"three"):
        box.put(text)
    assert kept(box) == [(1, b"one"), (2, b"two"), (3, b"three")]
    assert kept(box, 1) == [(2, b"two"), (3, b"three")]
    box.ack(2)
    box.ack(1)
    assert (len(box), box.last_acked, box.next_number) == (1, 2, 4)
    assert kept(box) == [(3, b"three")]
    assert box._spool_fd is None


def test_what_memory_does_not_hold_goes_to_disk_and_back(tmp_path: Path) -> None:
    box = outbox(tmp_path)
    frames = [bytes([65 + i]) * 40 for i in range(10)]
    for frame in frames:
        box.put(frame)
    assert size_on_disk(box) == 8 * 40
    assert not any(tmp_path.iterdir()), "what is on disk has no name by which an agent could find it"
    assert kept(box) == list(enumerate(frames, start=1))
    box.ack(5)
    assert kept(box) == list(enumerate(frames, start=1))[5:]
    assert box._memory_size == 0
    box.put(b"after")
    assert kept(box)[-1] == (11, b"after"), "order is kept: what comes later goes behind what is on disk"
    box.ack(11)
    assert box._spool_fd is None
    assert len(box) == 0
    box.put(b"x" * 90)
    assert box._spool_fd is None, "memory is used again"


def test_a_frame_larger_than_memory_is_kept_all_the_same(tmp_path: Path) -> None:
    box = outbox(tmp_path, memory=10, disk=10)
    box.put(b"x" * 5_000)
    assert kept(box) == [(1, b"x" * 5_000)]


def test_no_room_is_said_and_costs_nothing_that_was_kept(tmp_path: Path) -> None:
    box = outbox(tmp_path, memory=10, disk=100)
    box.put(b"m" * 10)
    box.put(b"d" * 60)
    with pytest.raises(SpoolFull):
        box.put(b"d" * 41)
    assert box.next_number == 3, "the number of the refused frame is not used up"
    box.put(b"d" * 40)
    assert [n for n, _ in kept(box)] == [1, 2, 3]
    box.ack(3)
    box.put(b"again")
    assert kept(box) == [(4, b"again")]


def test_what_was_acknowledged_while_it_is_read_does_not_come_back_as_something_else(tmp_path: Path) -> None:
    box = outbox(tmp_path, memory=4)
    for text in (b"mem1", b"old2", b"old3", b"old4"):
        box.put(text)
    reading = box.after(0)
    assert next(reading) == (1, b"mem1")
    assert next(reading) == (2, b"old2")
    box.ack(4)
    for text in (b"mem5", b"new6", b"new7"):
        box.put(text)
    assert list(reading) == []
    assert kept(box) == [(5, b"mem5"), (6, b"new6"), (7, b"new7")]


def test_last_words_find_room(tmp_path: Path) -> None:
    box = outbox(tmp_path, memory=10, disk=10)
    for _ in range(2):
        box.put(b"x" * 10)
    with pytest.raises(SpoolFull):
        box.put(b"no")
    box.put(b"farewell", last_words=True)
    assert kept(box)[-1] == (3, b"farewell")


def test_a_spool_that_is_never_empty_does_not_grow_for_ever(tmp_path: Path) -> None:
    box = outbox(tmp_path, memory=1, disk=1_000)
    box.put(b"x")
    for i in range(2, 200):
        box.put(bytes([i]) * 100)
        if i > 4:
            box.ack(i - 3)
            assert kept(box) == [(n, bytes([n]) * 100) for n in (i - 2, i - 1, i)]
        assert size_on_disk(box) <= 1_500
    reading = box.after(0)
    assert next(reading) == (197, bytes([197]) * 100)
    for i in range(200, 206):
        box.put(bytes([i]) * 100)
    assert list(reading) == [(n, bytes([n]) * 100) for n in (198, 199)], "moving disturbs no reader"


def test_closing_gives_the_room_back(tmp_path: Path) -> None:
    box = outbox(tmp_path, memory=0)
    box.put(b"a")
    box.put(b"b")
    assert box._spool_fd is not None
    box.close()
    box.close()
    assert box._spool_fd is None
    assert not any(tmp_path.iterdir())


def test_what_stands_at_the_place_of_the_spool_is_not_written_through(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"mine")
    (tmp_path / "spool").symlink_to(elsewhere)
    box = outbox(tmp_path, memory=0)
    box.put(b"a")
    box.put(b"b")
    assert elsewhere.read_bytes() == b"mine"
    box.close()


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_no_frame_is_lost_and_none_comes_twice(seed: int, tmp_path: Path) -> None:
    die = random.Random(seed)
    box = outbox(tmp_path, memory=200, disk=2_000)
    model: list[tuple[int, bytes]] = []
    for _ in range(300):
        action = die.random()
        if action < 0.6:
            frame = die.randbytes(die.randrange(1, 120))
            number = box.next_number
            try:
                box.put(frame)
            except SpoolFull:
                assert sum(len(f) for _, f in model) + len(frame) > 2_000, "refused though there was room"
                box.ack(number)
                model = []
                continue
            model.append((number, frame))
        elif action < 0.9 and model:
            n = die.choice(model)[0]
            box.ack(n)
            model = [item for item in model if item[0] > n]
        n = die.randrange(box.next_number)
        assert kept(box, n) == [item for item in model if item[0] > n]
        assert len(box) == len(model)
    box.close()


def test_a_full_disk_is_told_and_last_words_are_kept_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = outbox(tmp_path)
    for frame in (b"a" * 90, b"b" * 90):
        box.put(frame)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(DiskFull):
            box.put(b"c" * 90)
        box.put(b"last", last_words=True)
    box.put(b"d" * 90)
    assert kept(box) == [(1, b"a" * 90), (2, b"b" * 90), (3, b"last"), (4, b"d" * 90)]
    box.ack(3)
    assert kept(box) == [(4, b"d" * 90)]
    box.ack(4)
    assert (len(box), kept(box)) == (0, [])
