"""Archives: whatever is in a folder comes back as it was; what is damaged or hostile is refused before a byte is written."""

import gzip
import hashlib
import io
import json
import os
import socket
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from carrel.cli.app import run
from carrel.cli.archive import ArchiveWriter, extract, verify
from carrel.errors import BackupInvalid, TargetNotEmpty


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder with everything an agent can leave in one."""
    root = tmp_path / "tree"
    (root / "deep" / "er").mkdir(parents=True)
    (root / "empty").mkdir()
    (root / "deep" / "er" / "text").write_text("é\n")
    (root / "nothing").write_bytes(b"")
    (root / "large").write_bytes(os.urandom(100_000) * 20)
    (root / "program").write_text("#!/bin/sh\n")
    (root / "program").chmod(0o755)
    Path(os.fsdecode(bytes(root) + b"/odd \xe9\n name")).write_text("odd")
    (root / ("n" * 200)).mkdir()
    (root / ("n" * 200) / ("m" * 200)).write_text("long")
    (root / "inside").symlink_to("deep/er/text")
    (root / "outside").symlink_to("/etc/passwd")
    (root / "folder-outside").symlink_to("/etc")
    (root / "dangling").symlink_to("x" * 300)
    os.mkfifo(root / "fifo")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(os.path.relpath(root / "socket"))
    os.utime(root / "program", (1_000_000_000, 1_000_000_000))
    return root


def write(path: Path, tree: Path) -> ArchiveWriter:
    with ArchiveWriter.create(path, {"fact": 1}) as archive:
        assert archive.add_tree("tree", tree)
        assert not archive.add_tree("absent", tree / "absent")
        assert not archive.add_path("absent", tree / "absent")
    return archive


def read(path: Path, target: Path) -> None:
    with path.open("rb") as file:
        manifest = verify(file)
        target.mkdir()
        extract(file, manifest, lambda name: target / name)


def listed(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for folder, folders, files in os.walk(root):
        for name in [*folders, *files]:
            path = Path(folder, name)
            mode = path.lstat().st_mode
            content = path.read_bytes() if stat.S_ISREG(mode) else os.readlink(path) if stat.S_ISLNK(mode) else None
            found[str(path.relative_to(root))] = (
                stat.S_IFMT(mode),
                None if stat.S_ISLNK(mode) else mode & 0o777,
                content,
            )
    return found


def test_a_tree_comes_back_as_it_was(tree: Path, tmp_path: Path) -> None:
    archive = write(tmp_path / "a.tar.gz", tree)
    assert sorted(archive.skipped) == ["tree/fifo", "tree/socket"]
    read(tmp_path / "a.tar.gz", tmp_path / "back")
    wanted = {name: value for name, value in listed(tree).items() if name not in ("fifo", "socket")}
    assert listed(tmp_path / "back" / "tree") == wanted
    assert (tmp_path / "back" / "tree" / "program").stat().st_mtime == 1_000_000_000
    assert os.readlink(tmp_path / "back" / "tree" / "outside") == "/etc/passwd"


def test_nobody_else_can_read_it_and_nothing_is_overwritten(tree: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    write(path, tree)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_bytes()
    with pytest.raises(TargetNotEmpty):
        write(path, tree)
    assert path.read_bytes() == before


def test_an_archive_that_could_not_be_finished_leaves_nothing(tree: Path, tmp_path: Path) -> None:
    folder = tmp_path / "backups"
    folder.mkdir()

    def fail() -> None:
        with ArchiveWriter.create(folder / "a.tar.gz", {}) as archive:
            archive.add_tree("tree", tree)
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    assert list(folder.iterdir()) == []


def test_every_cut_and_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_text("content " * 50)
    write(tmp_path / "a.tar.gz", tmp_path / "tree")
    whole = (tmp_path / "a.tar.gz").read_bytes()
    verify(io.BytesIO(whole))
    for length in range(0, len(whole), 7):
        with pytest.raises(BackupInvalid):
            verify(io.BytesIO(whole[:length]))
    # From the end of gzip's header on: a time of making is no content.
    for place in range(10, len(whole), 3):
        changed = bytearray(whole)
        changed[place] ^= 0x55
        with pytest.raises(BackupInvalid):
            verify(io.BytesIO(bytes(changed)))


def archive_of(members: list[tuple[tarfile.TarInfo, bytes]], *, honest: bool = True) -> bytes:
    """An archive with these members, and a manifest that tells of them."""
    manifest: dict[str, Any] = {"format": 1, "facts": {"engine": "sqlite", "revision": "0002"}}
    manifest |= {"files": {}, "links": {}, "folders": []}
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb") as zipped, tarfile.open(fileobj=zipped, mode="w") as tar:
        for entry, content in members:
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
            if entry.issym():
                manifest["links"][entry.name] = entry.linkname
            elif entry.isdir():
                manifest["folders"].append(entry.name)
            else:
                digest = hashlib.sha256(content).hexdigest()
                manifest["files"][entry.name] = {"sha256": digest, "size": len(content)}
        if honest:
            data = json.dumps(manifest).encode()
            last = tarfile.TarInfo("manifest.json")
            last.size = len(data)
            tar.addfile(last, io.BytesIO(data))
    return packed.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, link
    return entry


SESSIONS = (member("sessions", tarfile.DIRTYPE), b"")
HOSTILE: dict[str, Callable[[], bytes]] = {
    "leads out by dots": lambda: archive_of([(member("../evil"), b"x")]),
    "leads out from within": lambda: archive_of([SESSIONS, (member("sessions/../../evil"), b"x")]),
    "absolute": lambda: archive_of([(member("/evil"), b"x")]),
    "a dot": lambda: archive_of([SESSIONS, (member("sessions/./evil"), b"x")]),
    "beneath a link": lambda: archive_of(
        [SESSIONS, (member("sessions/a", tarfile.SYMTYPE, ".."), b""), (member("sessions/a/evil"), b"x")]
    ),
    "a link that a folder replaces": lambda: archive_of(
        [SESSIONS, (member("sessions/a", tarfile.SYMTYPE, ".."), b""), (member("sessions/a", tarfile.DIRTYPE), b"")]
    ),
    "twice": lambda: archive_of([(member("admin.key"), b"x"), (member("admin.key"), b"y")]),
    "in no folder": lambda: archive_of([(member("sessions/evil"), b"x")]),
    "a hard link": lambda: archive_of(
        [(member("admin.key"), b"x"), (member("b", tarfile.LNKTYPE, "/etc/passwd"), b"")]
    ),
    "a device": lambda: archive_of([SESSIONS, (member("sessions/null", tarfile.CHRTYPE), b"")]),
    "a pipe": lambda: archive_of([SESSIONS, (member("sessions/pipe", tarfile.FIFOTYPE), b"")]),
    "no manifest": lambda: archive_of([(member("admin.key"), b"x")], honest=False),
    "not a backup": lambda: b"hello",
    "nothing": lambda: b"",
    "another gzip": lambda: gzip.compress(b"hello"),
}


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_archive_is_refused_and_nothing_written(make: Callable[[], bytes], tmp_path: Path) -> None:
    path = tmp_path / "evil.tar.gz"
    path.write_bytes(make())
    before = sorted(tmp_path.iterdir())
    with path.open("rb") as file, pytest.raises(BackupInvalid):
        verify(file)
    assert run(["restore", str(path), "--data", str(tmp_path / "data")]) == 2
    assert run(["backup", "--verify", str(path)]) == 2
    assert sorted(tmp_path.iterdir()) == before


def test_a_member_without_a_place_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    for member_ in (member("server.json"), member("run", tarfile.DIRTYPE), member("rows.unknown.jsonl")):
        path = tmp_path / "odd.tar.gz"
        path.write_bytes(archive_of([(member_, b"")]))
        assert run(["restore", str(path), "--data", str(tmp_path / "data")]) == 2
        assert sorted(tmp_path.iterdir()) == [path]


def test_a_backup_of_a_newer_release_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new.tar.gz"
    data = archive_of([(member("admin.key"), b"x")])
    unzipped = gzip.decompress(data).replace(b'"revision": "0002"', b'"revision": "9999"')
    path.write_bytes(gzip.compress(unzipped))
    assert run(["restore", str(path), "--data", str(tmp_path / "data")]) == 2
    assert "newer release" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == [path]
