"""Archives of strangers: what is good is unpacked, and nothing that is not gets anywhere."""

import contextlib
import gzip
import io
import os
import random
import stat
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from carrel import errors
from carrel.workspaces import WorkspaceFiles
from carrel.workspaces.archives import ArchiveLimits, pack, unpack

AGENT = (65534, 65534)
MIB = 2**20
LIMITS = ArchiveLimits(max_bytes=8 * MIB, max_members=100, max_depth=8)
FORMS = ("tar", "tar.gz", "tar.zst", "zip")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").write_text("precious")
    root = tmp_path / "workspace"
    root.mkdir()
    return root


@pytest.fixture
def files(root: Path) -> WorkspaceFiles:
    return WorkspaceFiles(root, owner=AGENT if os.geteuid() == 0 else None)


def member(name: str, content: bytes = b"", **more) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in more.items():
        setattr(info, key, value)
    return info, content


def tar(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def zipped(*members: tuple[str, bytes, int]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content, mode in members:
            info = zipfile.ZipInfo(name)
            info.create_system = 3
            info.external_attr = mode << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, content)
    return out.getvalue()


def wrapped(data: bytes, form: str) -> bytes:
    return {"tar": bytes, "tar.gz": gzip.compress, "tar.zst": zstandard.compress}[form](data)


def put(data: bytes, files: WorkspaceFiles, limits: ArchiveLimits = LIMITS, **options):
    return unpack(io.BytesIO(data), files, limits, **options)


def untouched(tmp_path: Path) -> bool:
    return [path.name for path in (tmp_path / "outside").iterdir()] == ["precious"] and (
        tmp_path / "outside" / "precious"
    ).read_text() == "precious"


@pytest.mark.parametrize("form", ["tar", "tar.gz", "tar.zst"])
def test_a_tar(files, root, form) -> None:
    data = tar(
        member("./", type=tarfile.DIRTYPE),
        member("./d", type=tarfile.DIRTYPE, mode=0o2750, mtime=1_000_000),
        member("d/run", b"#!/bin/sh\n", mode=0o4755, mtime=2_000_000),
        member("d/again", type=tarfile.LNKTYPE, linkname="d/run"),
        member("to-run", type=tarfile.SYMTYPE, linkname="d/run"),
        member("d/up", type=tarfile.SYMTYPE, linkname="../to-run"),
        member("x" * 200 + "/" + "ü" * 100, b"long"),
        member("implied/parents/file", b"y"),
    )
    done = put(wrapped(data, form), files)
    assert (done.members, done.bytes, done.links_left_out) == (8, 15, 0)
    assert (root / "d" / "run").read_text() == "#!/bin/sh\n"
    assert stat.S_IMODE((root / "d" / "run").stat().st_mode) == 0o755
    assert (root / "d" / "run").stat().st_mtime == 2_000_000
    assert stat.S_IMODE((root / "d").stat().st_mode) == 0o750
    assert (root / "d").stat().st_mtime == 1_000_000
    assert (root / "d" / "again").stat().st_ino == (root / "d" / "run").stat().st_ino
    assert os.readlink(root / "d" / "up") == "../to-run"
    assert (root / ("x" * 200) / ("ü" * 100)).read_text() == "long"
    if os.geteuid() == 0:
        assert {(path.lstat().st_uid, path.lstat().st_gid) for path in root.rglob("*")} == {AGENT}


def test_a_zip(files, root) -> None:
    data = zipped(
        ("d/", b"", stat.S_IFDIR | 0o755),
        ("d/run", b"#!", stat.S_IFREG | 0o6755),
        ("link", b"d/run", stat.S_IFLNK | 0o777),
        ("plain", b"x" * 1000, 0),
        ("ümläut", b"u", stat.S_IFREG | 0o600),
    )
    done = put(data, files, path="sub/folder")
    assert (done.members, done.bytes) == (5, 1003)
    base = root / "sub" / "folder"
    assert stat.S_IMODE((base / "d" / "run").stat().st_mode) == 0o755
    assert os.readlink(base / "link") == "d/run"
    assert stat.S_IMODE((base / "plain").stat().st_mode) == 0o600
    assert (base / "ümläut").read_text() == "u"


def test_what_is_there_is_replaced_and_the_rest_stays(files, root) -> None:
    (root / "a").write_text("old")
    (root / "b").write_text("stays")
    (root / "c").symlink_to("b")
    put(tar(member("a", b"new"), member("c", b"a file now")), files)
    assert ((root / "a").read_text(), (root / "b").read_text()) == ("new", "stays")
    assert not (root / "c").is_symlink()


def _evil() -> dict[str, bytes]:
    link, hard, folder = tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE
    return {
        "absolute": tar(member("/etc/x", b"x")),
        "up": tar(member("../outside/x", b"x")),
        "up in the middle": tar(member("a/../../outside/x", b"x")),
        "up at the end": tar(member("a/..", type=folder)),
        "link to absolute": tar(member("l", type=link, linkname="/etc")),
        "link up": tar(member("l", type=link, linkname="../outside")),
        "link up from below": tar(member("a/b/l", type=link, linkname="../../../outside")),
        "link up in the middle": tar(member("l", type=link, linkname="a/../../outside")),
        "through a link": tar(member("l", type=link, linkname="d"), member("d", type=folder), member("l/x", b"x")),
        "through a link to nowhere": tar(member("l", type=link, linkname="d"), member("l/x", b"x")),
        "hard link out": tar(member("h", type=hard, linkname="../outside/precious")),
        "hard link to absolute": tar(member("h", type=hard, linkname="/etc/passwd")),
        "hard link to what it did not bring": tar(member("h", type=hard, linkname="mine")),
        "hard link to a link": tar(member("l", type=link, linkname="mine"), member("h", type=hard, linkname="l")),
        "device": tar(member("dev", type=tarfile.CHRTYPE, devmajor=1, devminor=3)),
        "block device": tar(member("dev", type=tarfile.BLKTYPE)),
        "pipe": tar(member("pipe", type=tarfile.FIFOTYPE)),
        "empty name": tar(member("", b"x")),
        "only dots": tar(member("./.", b"x")),
        "control characters": tar(member("a\nb", b"x")),
        "escape sequence": tar(member("a\x1b[2J", b"x")),
        "long name": tar(member("n" * 256, b"x")),
        "link to nothing": tar(member("l", type=link, linkname="")),
        "zip up": zipped(("../outside/x", b"x", 0)),
        "zip absolute": zipped(("/etc/x", b"x", 0)),
        "zip link": zipped(("l", b"/etc/passwd", stat.S_IFLNK | 0o777)),
        "zip pipe": zipped(("p", b"", stat.S_IFIFO | 0o644)),
        "zip drive": zipped(("C:\\x", b"x", 0)),
        "nothing": b"",
        "text": b"this is no archive at all, only text, and not even much of it",
        "gzip of nothing": gzip.compress(b""),
        "half a gzip": gzip.compress(tar(member("a", random.Random(1).randbytes(50_000))))[:-20_000],
        "half a zip": zipped(("a", b"x" * 5000, 0))[:60],
        "half a member": tar(member("a", b"x" * 5000))[:3000],
        "a damaged header": tar(member("a", b"x"), member("b", b"y"))[:1024] + b"\xff" * 512 + bytes(1024),
    }


@pytest.mark.parametrize("name", _evil())
def test_nothing_that_is_not_good_gets_anywhere(files, root, tmp_path, name) -> None:
    (root / "mine").write_text("mine")
    with pytest.raises((errors.ArchiveInvalid, errors.PathConflict)) as caught:
        put(_evil()[name], files)
    assert caught.value.http_status in (400, 409)
    assert untouched(tmp_path)
    assert (root / "mine").read_text() == "mine"
    assert not list(root.rglob(".carrel-*"))
    assert all(
        path.is_symlink() or stat.S_IFMT(path.stat().st_mode) in (stat.S_IFREG, stat.S_IFDIR)
        for path in root.rglob("*")
    )


def test_links_that_lead_out_can_be_left_out(files, root) -> None:
    data = tar(member("l", type=tarfile.SYMTYPE, linkname="/usr/bin/python3"), member("a", b"x"))
    assert put(data, files, leave_out_links=True).links_left_out == 1
    assert [path.name for path in root.iterdir()] == ["a"]


def test_a_link_that_the_agent_made_is_not_followed(files, root, tmp_path) -> None:
    (root / "d").symlink_to(tmp_path / "outside")
    with pytest.raises(errors.PathConflict):
        put(tar(member("d/x", b"x")), files)
    (root / "f").symlink_to(tmp_path / "outside" / "precious")
    put(tar(member("f", b"new")), files)
    assert (root / "f").read_text() == "new"
    assert untouched(tmp_path)


def _sparse_header(size: int) -> bytes:
    header = bytearray(member("s")[0].tobuf(tarfile.GNU_FORMAT))
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[124:136] = b"00000000000\0"
    header[386:410] = b"00000000000\0" + b"00000000000\0"
    header[483:495] = b"%011o\0" % size
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(1024)


def _bombs() -> dict[str, bytes]:
    zeros = bytes(40 * MIB)
    deep = "/".join("d" * 9)
    wide_name = member("x" * 5)[0]
    wide_name.type = tarfile.GNUTYPE_LONGNAME
    wide_name.size = 2**33
    return {
        "bytes": gzip.compress(tar(member("a", bytes(9 * MIB)))),
        "bytes by zstd": zstandard.compress(tar(member("a", zeros))),
        "bytes in a zip": zipped(("a", zeros, 0)),
        "bytes in many": tar(*(member(str(n), bytes(MIB)) for n in range(9))),
        "members": tar(*(member(str(n)) for n in range(101))),
        "members in a zip": zipped(*((str(n), b"", 0) for n in range(101))),
        "the same member": tar(*(member("a", b"x") for _ in range(101))),
        "depth": tar(member(deep, b"x")),
        "a hole": _sparse_header(2**33 - 1),
        "a long name": gzip.compress(wide_name.tobuf(tarfile.GNU_FORMAT)[:512] + zeros),
    }


@pytest.mark.parametrize("name", _bombs())
def test_bombs_are_bounded(files, root, name) -> None:
    data = _bombs()[name]
    tracemalloc.start()
    try:
        with pytest.raises((errors.ArchiveTooLarge, errors.ArchiveInvalid)):
            put(data, files)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 * MIB
    assert sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) <= LIMITS.max_bytes


def test_much_out_of_little_is_refused(files) -> None:
    roomy = ArchiveLimits(max_bytes=2**40, max_ratio=100)
    with pytest.raises(errors.ArchiveTooLarge, match="100"):
        put(gzip.compress(tar(member("a", bytes(64 * MIB)))), files, roomy)
    with pytest.raises(errors.ArchiveTooLarge, match="100"):
        put(zipped(("a", bytes(64 * MIB), 0)), files, roomy)


def test_a_list_of_members_that_is_too_long_to_read(files) -> None:
    data = bytearray(zipped(("a", b"x", 0)))
    at = data.rfind(b"PK\5\6")
    data[at + 12 : at + 16] = struct.pack("<L", 2**31)
    with pytest.raises(errors.ArchiveTooLarge):
        put(bytes(data), files)


def test_a_zip_needs_a_file(files) -> None:
    class Pipe(io.RawIOBase):
        def __init__(self) -> None:
            self._data = io.BytesIO(zipped(("a", b"x", 0)))

        def readable(self) -> bool:
            return True

        def readinto(self, buffer) -> int:
            return self._data.readinto(buffer)

    with pytest.raises(errors.ArchiveInvalid, match="from a file"):
        unpack(Pipe(), files, LIMITS)


def test_an_encrypted_zip(files) -> None:
    data = bytearray(zipped(("a", b"x", 0)))
    data[6] |= 1
    data[data.rfind(b"PK\1\2") + 8] |= 1
    with pytest.raises(errors.ArchiveInvalid):
        put(bytes(data), files)


@pytest.mark.parametrize("form", FORMS)
def test_there_and_back(files, root, tmp_path, form) -> None:
    (root / "src").mkdir()
    (root / "src" / "a.py").write_text("print()\n" * 1000)
    (root / "src" / "run").write_text("#!/bin/sh")
    (root / "src" / "run").chmod(0o755)
    (root / "src" / "link").symlink_to("a.py")
    (root / "ümläut ☃").write_bytes(os.urandom(MIB))
    (root / "empty").mkdir()
    os.utime(root / "src" / "run", (0, 1_500_000_000))
    os.mkfifo(root / "pipe")
    if os.geteuid() == 0:
        for path in root.rglob("*"):
            os.chown(path, *AGENT, follow_symlinks=False)
    data = b"".join(pack(files, form, LIMITS))
    assert data == b"".join(pack(files, form, LIMITS))
    (tmp_path / "other").mkdir()
    put(data, WorkspaceFiles(tmp_path / "other"))
    for path in root.rglob("*"):
        if path.name == "pipe":
            continue
        there = tmp_path / "other" / path.relative_to(root)
        if path.is_symlink():
            assert os.readlink(there) == os.readlink(path)
        elif path.is_file():
            assert there.read_bytes() == path.read_bytes()
            assert there.stat().st_mode == path.stat().st_mode
            assert abs(there.stat().st_mtime - path.stat().st_mtime) <= 2
    assert not (tmp_path / "other" / "pipe").exists()
    assert (tmp_path / "other" / "empty").is_dir()


def test_a_part_is_packed_under_its_own_path(files, root) -> None:
    (root / "a" / "b").mkdir(parents=True)
    (root / "a" / "b" / "c").write_text("c")
    (root / "a" / "d").write_text("d")
    archive = tarfile.open(fileobj=io.BytesIO(b"".join(pack(files, "tar", LIMITS, path="a/b"))))  # noqa: SIM115
    assert archive.getnames() == ["a/b", "a/b/c"]


@pytest.mark.parametrize("form", FORMS)
def test_packing_has_bounds_too(files, root, form) -> None:
    (root / "a").write_bytes(bytes(9 * MIB))
    with pytest.raises(errors.SnapshotTooLarge):
        list(pack(files, form, LIMITS))


@pytest.mark.parametrize("form", FORMS)
def test_memory_is_bounded(files, root, tmp_path, form) -> None:
    limits = ArchiveLimits(max_bytes=64 * MIB)
    (root / "a").write_bytes(os.urandom(40 * MIB))
    if os.geteuid() == 0:
        os.chown(root / "a", *AGENT)
    (tmp_path / "other").mkdir()
    tracemalloc.start()
    try:
        with open(tmp_path / "archive", "wb") as out:
            for piece in pack(files, form, limits):
                out.write(piece)
        with open(tmp_path / "archive", "rb") as source:
            unpack(source, WorkspaceFiles(tmp_path / "other"), limits)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * MIB
    assert (tmp_path / "other" / "a").read_bytes() == (root / "a").read_bytes()


GOOD = [
    tar(member("a/b", b"content" * 100), member("l", type=tarfile.SYMTYPE, linkname="a/b"), member("c", b"c")),
    tar(member("x" * 150, b"pax", mtime=1.5), member("sp", b"x"), form=tarfile.GNU_FORMAT),
    zipped(("a/b", b"content" * 100, stat.S_IFREG | 0o644), ("l", b"a/b", stat.S_IFLNK | 0o777)),
]


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.sampled_from(GOOD),
    changes=st.lists(st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=9)), min_size=1, max_size=6),
    cut=st.integers(0, 10**6),
    form=st.sampled_from(["tar", "tar.gz", "tar.zst"]),
)
def test_whatever_is_damaged_is_told_by_an_error_of_ours(tmp_path_factory, data, changes, cut, form) -> None:
    damaged = bytearray(data)
    for at, piece in changes:
        at %= len(damaged)
        damaged[at : at + len(piece)] = piece
    damaged = damaged[: len(damaged) - (cut % len(damaged) if cut % 3 == 0 else 0)]
    base = tmp_path_factory.mktemp("damaged")
    (base / "w").mkdir()
    sent = bytes(damaged) if damaged.startswith(b"PK") else wrapped(bytes(damaged), form)
    with contextlib.suppress(errors.ArchiveInvalid, errors.ArchiveTooLarge, errors.PathConflict):
        put(sent, WorkspaceFiles(base / "w"))
    assert [path.name for path in base.iterdir()] == ["w"]
    for path in (base / "w").rglob("*"):
        assert stat.S_IFMT(path.lstat().st_mode) in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK)
        assert path.is_symlink() or path.resolve().is_relative_to(base.resolve())


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(
        st.lists(st.sampled_from(["a", "b", "..", ".", "", "/", "c\\d"]), min_size=1, max_size=4), max_size=6
    ),
    kinds=st.lists(st.sampled_from("fdlh"), min_size=6, max_size=6),
    targets=st.lists(
        st.lists(st.sampled_from(["a", "b", "..", ".", "/"]), min_size=1, max_size=4), min_size=6, max_size=6
    ),
)
def test_no_mix_of_links_and_paths_gets_out(tmp_path_factory, names, kinds, targets) -> None:
    types = {"f": tarfile.REGTYPE, "d": tarfile.DIRTYPE, "l": tarfile.SYMTYPE, "h": tarfile.LNKTYPE}
    members = [
        member("/".join(name), b"x" if kind == "f" else b"", type=types[kind], linkname="/".join(target))
        for name, kind, target in zip(names, kinds, targets, strict=False)
    ]
    base = tmp_path_factory.mktemp("mixed")
    (base / "w").mkdir()
    with contextlib.suppress(errors.ArchiveInvalid, errors.PathConflict, errors.NotAFile, errors.InvalidPath):
        put(tar(*members), WorkspaceFiles(base / "w"))
    assert [path.name for path in base.iterdir()] == ["w"]
    for path in (base / "w").rglob("*"):
        if path.is_symlink():
            meant = os.path.normpath(os.path.join(path.parent, os.readlink(path)))
            assert meant == str(base / "w") or meant.startswith(str(base / "w") + "/")


def test_the_deflate_of_a_gzip_is_never_whole_in_memory(files) -> None:
    data = gzip.compress(tar(member("a", bytes(7 * MIB)))) + gzip.compress(b"") + bytes(100)
    assert put(data, files).bytes == 7 * MIB
    with files.open_read("a") as file:
        assert zlib.crc32(file.read()) == zlib.crc32(bytes(7 * MIB))
