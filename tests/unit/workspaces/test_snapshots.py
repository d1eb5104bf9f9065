"""Snapshots: whole, exact, made only when something changed, and restored by as little writing as that takes."""

import asyncio
import errno
import io
import os
import stat
import subprocess
import sys
import tarfile
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from carrel import errors
from carrel.objects import MemoryPlace, Objects
from carrel.workspaces import WorkspaceFiles
from carrel.workspaces.manifests import Manifest
from carrel.workspaces.scanning import HOME_PARTS, Ignored, Tree
from carrel.workspaces.snapshots import Snapshots

NOT_ROOT = (65534, 65534)
MIB = 2**20


class Counting(Objects):
    """Counts what is stored and how much is read."""

    def __init__(self) -> None:
        super().__init__(MemoryPlace())
        self.puts: list[str] = []
        self.read = 0

    async def put(self, key, chunks):
        info = await super().put(key, chunks)
        self.puts.append(key)
        return info

    async def get(self, key, *, start=0, end=None):
        async for piece in super().get(key, start=start, end=end):
            self.read += len(piece)
            yield piece


@pytest.fixture
async def objects() -> AsyncIterator[Counting]:
    async with AsyncExitStack() as stack:
        store = Counting()
        await store.start(stack)
        yield store


@pytest.fixture
def snapshots(objects: Counting) -> Snapshots:
    return Snapshots(objects, max_bytes=64 * MIB)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "workspace"
    root.mkdir()
    return root


def tree(root: Path, name: str = "workspace", **options) -> Tree:
    return Tree(name, WorkspaceFiles(root, owner=NOT_ROOT if os.geteuid() == 0 else None), **options)


def fresh(path: Path) -> Path:
    path.mkdir()
    return path


def picture(root: Path) -> dict[str, tuple]:
    """All that a snapshot is to bring back, seen by other means than ours."""
    found = {}
    for path in sorted(root.rglob("*")):
        at = path.lstat()
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        mtime = at.st_mtime_ns
        mode = 0 if path.is_symlink() else stat.S_IMODE(at.st_mode)
        found[os.fsencode(path.relative_to(root))] = (stat.S_IFMT(at.st_mode), mode, mtime, content)
    return found


def furnish(root: Path) -> None:
    (root / "src").mkdir()
    (root / "src" / "main.py").write_text("print('hello')\n")
    (root / "src" / "run.sh").write_text("#!/bin/sh\n")
    (root / "src" / "run.sh").chmod(0o755)
    (root / "empty").mkdir(mode=0o711)
    (root / "nothing").touch()
    (root / "big").write_bytes(os.urandom(5 * MIB + 17))
    (root / "link").symlink_to("src/main.py")
    (root / "away").symlink_to("/etc/passwd")
    os.link(root / "src" / "main.py", root / "second-name")
    (root / "ümläut ☃").write_text("x")
    Path(os.fsdecode(os.fsencode(root) + b"/caf\xe9")).write_text("latin")
    (root / ("n" * 250)).write_text("long")
    os.utime(root / "nothing", ns=(1, 1_234_567_890_123_456_789))
    os.utime(root / "src" / "run.sh", ns=(0, -5_000_000_001))
    os.utime(root / "link", ns=(7, 7_000_000_007), follow_symlinks=False)
    (root / "closed").mkdir()
    (root / "closed" / "in").write_text("in")
    (root / "closed").chmod(0o500)
    settle(root)


def poke(path: Path, at: int, data: bytes, *, size: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.pwrite(fd, data, at)
    os.ftruncate(fd, size)
    os.close(fd)


def peek(path: Path, at: int, count: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(at)
        return file.read(count)


def settle(root: Path) -> None:
    if os.geteuid() == 0:
        for path in [root, *root.rglob("*")]:
            os.chown(path, *NOT_ROOT, follow_symlinks=False)


async def raw(objects: Objects, key: str) -> bytes:
    return b"".join([piece async for piece in objects.get(key)])


async def unpacked(objects: Objects, key: str) -> bytes:
    """As the zstd program would: frames one after the other."""
    reader = zstandard.ZstdDecompressor().stream_reader(await raw(objects, f"{key}.tar.zst"), read_across_frames=True)
    return reader.read()


async def test_a_tree_comes_back_in_an_empty_place(snapshots, root, tmp_path) -> None:
    furnish(root)
    saved = await snapshots.save("s/1", [tree(root)])
    assert saved.changed
    assert (saved.manifest.left_out, saved.manifest.unsettled) == (0, ())
    other = fresh(tmp_path / "other")
    restored = await snapshots.restore(await snapshots.load("s/1"), [tree(other)])
    assert picture(other) == picture(root)
    assert restored.unlike == ()
    assert (other / "second-name").stat().st_ino == (other / "src" / "main.py").stat().st_ino
    if os.geteuid() == 0:
        assert {(path.lstat().st_uid, path.lstat().st_gid) for path in other.rglob("*")} == {NOT_ROOT}


async def test_a_tree_comes_back_over_what_became_of_it(snapshots, root) -> None:
    furnish(root)
    await snapshots.save("s/1", [tree(root)])
    before = picture(root)
    (root / "src" / "main.py").write_text("print('HELLO')\n")  # the other name of it changes with it
    (root / "closed").chmod(0o700)
    (root / "closed" / "new").mkdir()
    (root / "closed" / "new" / "deep").write_text("x")
    (root / "link").unlink()
    (root / "link").mkdir()
    (root / "link" / "in the way").write_text("x")
    (root / "empty").rmdir()
    (root / "empty").write_text("a file now")
    (root / "nothing").unlink()
    (root / "nothing").symlink_to("/etc/passwd")
    (root / "away").unlink()
    (root / "away").symlink_to("/etc/shadow")
    (root / "src" / "run.sh").chmod(0o600)
    (root / "second-name").unlink()
    (root / "second-name").write_text("print('hello')\n")
    restored = await snapshots.restore(await snapshots.load("s/1"), [tree(root)])
    assert picture(root) == before
    assert restored.unlike == ()
    assert (root / "second-name").stat().st_ino == (root / "src" / "main.py").stat().st_ino


async def test_the_same_files_give_the_same_archive_and_tar_can_read_it(snapshots, objects, root, tmp_path) -> None:
    furnish(root)
    await snapshots.save("s/1", [tree(root)])
    other = fresh(tmp_path / "other")
    await snapshots.restore(await snapshots.load("s/1"), [tree(other)])
    await snapshots.save("s/2", [tree(other)])
    assert await raw(objects, "s/1.tar.zst") == await raw(objects, "s/2.tar.zst")
    (tmp_path / "a.tar").write_bytes(await unpacked(objects, "s/1"))
    (tmp_path / "by-tar").mkdir()
    command = ["tar", "-xpf", tmp_path / "a.tar", "-C", tmp_path / "by-tar"]
    await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True)
    assert picture(tmp_path / "by-tar" / "workspace") == picture(root)


async def test_nothing_is_stored_while_nothing_has_changed(snapshots, objects, root) -> None:
    furnish(root)
    first = await snapshots.save("s/1", [tree(root)])
    count = len(objects.puts)
    os.utime(root / "big", ns=(5, (root / "big").stat().st_mtime_ns))  # another ctime, the same content
    (root / "src" / "tmp").write_text("x")
    (root / "src" / "tmp").unlink()  # the folder's time is no change
    second = await snapshots.save("s/2", [tree(root)], since=first.manifest)
    assert not second.changed
    assert second.manifest.key == "s/1"
    assert len(objects.puts) == count
    assert await snapshots.changes(second.manifest, [tree(root)]) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "src" / "main.py").write_text("print('jello')\n"),
        lambda root: (root / "src" / "main.py").touch(),
        lambda root: (root / "src" / "main.py").chmod(0o600),
        lambda root: (root / "nothing").unlink(),
        lambda root: (root / "new").mkdir(),
        lambda root: ((root / "away").unlink(), (root / "away").symlink_to("/etc/group")),
        lambda root: (root / "empty").chmod(0o700),
    ],
    ids=["content", "time", "mode", "removed", "added", "link", "folder's mode"],
)
async def test_each_change_makes_a_snapshot(snapshots, root, change) -> None:
    furnish(root)
    first = await snapshots.save("s/1", [tree(root)])
    change(root)
    assert (await snapshots.save("s/2", [tree(root)], since=first.manifest)).changed


async def test_a_change_that_hides_its_time_is_found(snapshots, root) -> None:
    (root / "a").write_text("one")
    settle(root)
    first = await snapshots.save("s/1", [tree(root)])
    was = (root / "a").stat()
    (root / "a").write_text("two")
    os.utime(root / "a", ns=(was.st_atime_ns, was.st_mtime_ns))
    saved = await snapshots.save("s/2", [tree(root)], since=first.manifest)
    assert saved.changed
    await snapshots.restore(await snapshots.load("s/1"), [tree(root)])
    assert (root / "a").read_text() == "one"


async def test_only_what_differs_is_read_and_written(snapshots, objects, root) -> None:
    for number in range(8):
        (root / f"f{number}").write_bytes(os.urandom(4 * MIB))
    settle(root)
    saved = await snapshots.save("s/1", [tree(root)])
    inodes = {path.name: path.stat().st_ino for path in root.iterdir()}
    (root / "f5").write_text("lost")
    objects.read = 0
    restored = await snapshots.restore(saved.manifest, [tree(root)])
    assert restored.written == 1
    assert 4 * MIB <= objects.read < 13 * MIB
    assert {path.name for path in root.iterdir() if path.stat().st_ino != inodes[path.name]} == {"f5"}
    objects.read = 0
    assert (await snapshots.restore(restored.manifest, [tree(root)])).written == 0
    assert objects.read == 0


async def test_what_has_changed(snapshots, root) -> None:
    furnish(root)
    saved = await snapshots.save("s/1", [tree(root)])
    (root / "src" / "main.py").touch()  # a time alone is no difference to show
    (root / "src" / "run.sh").write_text("longer now\n")
    (root / "nothing").unlink()
    (root / "new").write_text("four")
    changes = await snapshots.changes(saved.manifest, [tree(root)])
    assert [(each.kind, each.path, each.size_before, each.size_after) for each in changes] == [
        ("added", "workspace/new", None, 4),
        ("removed", "workspace/nothing", 0, None),
        ("changed", "workspace/src/run.sh", 10, 11),
    ]


async def test_one_file_out_of_a_snapshot(snapshots, objects, root) -> None:
    furnish(root)
    (root / "huge").write_bytes(os.urandom(20 * MIB))
    manifest = (await snapshots.save("s/1", [tree(root)])).manifest
    objects.read = 0
    for name in ("big", "src/main.py", "second-name", "nothing", "ümläut ☃"):
        data = b"".join([piece async for piece in snapshots.read(manifest, f"workspace/{name}")])
        assert data == (root / name).read_bytes()
    assert objects.read < 20 * MIB
    with pytest.raises(errors.FileNotFound):
        await anext(snapshots.read(manifest, "workspace/no"))
    with pytest.raises(errors.NotAFile):
        await anext(snapshots.read(manifest, "workspace/src"))


async def test_what_is_ignored_is_neither_saved_nor_touched(objects, root) -> None:
    snapshots = Snapshots(objects, max_bytes=MIB, ignored=["node_modules", "*.pyc", "build/cache"])
    for path in ("node_modules/a/b", "src/node_modules/c", "src/x.pyc", "src/x.py", "build/cache/d", "build/e"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(path)
    settle(root)
    saved = await snapshots.save("s/1", [tree(root)])
    assert sorted(saved.manifest.entries) == [
        "workspace/build",
        "workspace/build/e",
        "workspace/src",
        "workspace/src/x.py",
    ]
    (root / "src" / "x.pyc").write_text("newer")
    (root / "new" / "node_modules").mkdir(parents=True)
    (root / "new" / "file").touch()
    assert not (await snapshots.save("s/2", [tree(root / "src", "src")])).manifest.left_out
    await snapshots.restore(saved.manifest, [tree(root)])
    assert (root / "src" / "x.pyc").read_text() == "newer"
    assert (root / "node_modules" / "a" / "b").exists()
    assert not (root / "new" / "file").exists()


@pytest.mark.parametrize(
    ("pattern", "path", "ignored"),
    [
        ("a", "b/a", True),
        ("a", "ab", False),
        ("*.py", "x/y.py", True),
        ("a/*.py", "a/x.py", True),
        ("a/*.py", "a/b/x.py", False),
        ("a/b/", "a/b", True),
        ("?.[c]", "x.c", False),
        ("", "x", False),
    ],
)
def test_patterns(pattern: str, path: str, ignored: bool) -> None:
    assert Ignored([pattern])(path) == ignored


async def test_parts_of_a_home(snapshots, root, tmp_path) -> None:
    home = tmp_path / "home"
    for path in (".claude/todos/1.json", ".claude/.credentials.json", ".gitconfig", ".cache/x"):
        (home / path).parent.mkdir(parents=True, exist_ok=True)
        (home / path).write_text(path)
    settle(home)
    (root / "a").write_text("a")
    trees = [tree(root), tree(home, "home", parts=HOME_PARTS)]
    saved = await snapshots.save("s/1", trees)
    files = [path for path, entry in saved.manifest.entries.items() if entry.type == "file"]
    assert files == ["workspace/a", "home/.claude/todos/1.json", "home/.gitconfig"]
    (home / ".claude" / "todos" / "2.json").write_text("later")
    (home / ".gitconfig").unlink()
    (home / ".cache" / "y").write_text("later")
    assert (await snapshots.save("s/2", trees, since=saved.manifest)).changed
    await snapshots.restore(saved.manifest, trees)
    assert sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()) == [
        ".cache/x",
        ".cache/y",
        ".claude/.credentials.json",
        ".claude/todos/1.json",
        ".gitconfig",
    ]


async def test_sparse_files_keep_their_holes(snapshots, objects, root, tmp_path) -> None:
    poke(root / "sparse", 3 * MIB + 11, b"middle", size=2**40)
    poke(root / "hollow", 0, b"", size=2**33)
    settle(root)
    saved = await snapshots.save("s/1", [tree(root)])
    assert saved.manifest.stored < MIB
    other = fresh(tmp_path / "other")
    await snapshots.restore(await snapshots.load("s/1"), [tree(other)])
    assert (other / "sparse").stat().st_size == 2**40
    assert (other / "sparse").stat().st_blocks * 512 < MIB
    assert (other / "hollow").stat().st_blocks == 0
    assert peek(other / "sparse", 3 * MIB + 11, 7) == b"middle\0"
    assert not (await snapshots.save("s/2", [tree(other)], since=saved.manifest)).changed
    poke(other / "sparse", 2**39, b"x", size=2**40)
    assert [each.path for each in await snapshots.changes(saved.manifest, [tree(other)])] == ["workspace/sparse"]
    head = b""
    async for piece in snapshots.read(saved.manifest, "workspace/sparse"):
        head += piece
        if len(head) > 4 * MIB:
            break
    assert head[3 * MIB + 11 : 3 * MIB + 18] == b"middle\0"
    assert not head[: 3 * MIB + 11].strip(b"\0")
    archive = tarfile.open(fileobj=io.BytesIO(await unpacked(objects, "s/1")))  # noqa: SIM115
    assert archive.getmember("workspace/sparse").size == 2**40


async def test_sockets_pipes_and_devices_are_left_out(snapshots, root) -> None:
    os.mkfifo(root / "pipe")
    (root / "file").write_text("x")
    settle(root)
    saved = await snapshots.save("s/1", [tree(root)])
    assert list(saved.manifest.entries) == ["workspace/file"]
    assert saved.manifest.left_out == 1


@pytest.mark.requires("root")
async def test_another_users_file_is_not_read_by_a_hard_link(snapshots, root, tmp_path) -> None:
    (tmp_path / "secret").write_text("root's own")
    os.link(tmp_path / "secret", root / "mine")
    saved = await snapshots.save("s/1", [tree(root)])
    assert "workspace/mine" not in saved.manifest.entries
    assert saved.manifest.left_out == 1


async def test_no_more_than_may_be_saved(objects, root) -> None:
    for number in range(5):
        (root / str(number)).write_bytes(bytes(MIB))
    settle(root)
    with pytest.raises(errors.SnapshotTooLarge, match="bytes"):
        await Snapshots(objects, max_bytes=4 * MIB).save("s/1", [tree(root)])
    with pytest.raises(errors.SnapshotTooLarge, match="entries"):
        await Snapshots(objects, max_bytes=64 * MIB, max_entries=4).save("s/1", [tree(root)])
    assert [info async for info in objects.list("")] == []


async def test_a_tree_that_is_not_there(snapshots, tmp_path) -> None:
    with pytest.raises(errors.FileNotFound):
        await snapshots.save("s/1", [tree(tmp_path / "no")])
    with pytest.raises(errors.ObjectNotFound):
        await snapshots.load("s/1")


async def test_deleted_is_deleted(snapshots, objects, root) -> None:
    furnish(root)
    await snapshots.save("s/1", [tree(root)])
    await snapshots.delete("s/1")
    assert [info async for info in objects.list("")] == []
    await snapshots.delete("s/1")


async def test_an_archive_without_its_manifest_is_removed(objects, root) -> None:
    class Failing(Counting):
        async def put(self, key, chunks):
            if key.endswith(".manifest"):
                raise errors.ObjectStoreUnavailable
            return await super().put(key, chunks)

    furnish(root)
    async with AsyncExitStack() as stack:
        failing = Failing()
        await failing.start(stack)
        with pytest.raises(errors.ObjectStoreUnavailable):
            await Snapshots(failing, max_bytes=64 * MIB).save("s/1", [tree(root)])
        assert [info async for info in failing.list("")] == []


async def test_a_damaged_archive_restores_no_file_wrongly(snapshots, objects, root, tmp_path) -> None:
    furnish(root)
    manifest = (await snapshots.save("s/1", [tree(root)])).manifest
    (root / "src" / "main.py").write_text("print('other')\n")
    await snapshots.save("s/2", [tree(root)])
    mixed = replace(manifest, key="s/2", frames=(await snapshots.load("s/2")).frames)
    with pytest.raises(errors.ObjectDamaged):
        await snapshots.restore(mixed, [tree(fresh(tmp_path / "other"))])
    assert not (tmp_path / "other" / "src" / "main.py").exists()
    assert list((tmp_path / "other").rglob(".carrel-*")) == []
    for data in (b"", b"no manifest", zstandard.compress(b"{}\n"), zstandard.compress(b'{"version": 1}\n')):
        with pytest.raises(errors.ObjectDamaged):
            Manifest.load(data)


WRITER = """
import os, sys
folder = sys.argv[1]
print("ready", flush=True)
n = 0
while True:
    n += 1
    data = (b"%010d" % n) * 3000
    with open(folder + "/small", "r+b") as file:
        file.write(data)
    with open(folder + "/large", "r+b") as file:
        file.write(data * 50)
    os.rename(folder + "/d1", folder + "/d2")
    os.rename(folder + "/d2", folder + "/d1")
"""


def of_one_moment(data: bytes) -> bool:
    """In the middle of a write a file begins as it will be and ends as it was."""
    numbers = [int(data[at : at + 10]) for at in range(0, len(data), 10)]
    return numbers == sorted(numbers, reverse=True) and numbers[0] - numbers[-1] <= 1


async def test_saving_while_an_agent_writes(snapshots, root, tmp_path) -> None:
    (root / "small").write_bytes(b"0" * 30_000)
    (root / "large").write_bytes(b"0" * 1_500_000)
    (root / "d1" / "e").mkdir(parents=True)
    (root / "d1" / "e" / "f").write_text("f")
    (root / "quiet").write_text("quiet")
    settle(root)
    writer = await asyncio.create_subprocess_exec(sys.executable, "-c", WRITER, str(root), stdout=subprocess.PIPE)
    try:
        assert writer.stdout is not None
        await writer.stdout.readline()
        for number in range(5):
            try:
                saved = await snapshots.save(f"s/{number}", [tree(root)])
            except errors.PathConflict:
                continue
            other = fresh(tmp_path / f"other-{number}")
            await snapshots.restore(saved.manifest, [tree(other)])
            assert (other / "quiet").read_text() == "quiet"
            assert (other / "small").stat().st_size == 30_000
            small = (other / "small").read_bytes()
            if "workspace/small" not in saved.manifest.unsettled:
                assert of_one_moment(small)
            if "workspace/large" not in saved.manifest.unsettled:
                large = (other / "large").read_bytes()
                assert of_one_moment(large)
    finally:
        writer.kill()
        await writer.communicate()


async def test_a_link_in_the_place_of_a_folder_leads_a_restore_nowhere(snapshots, root, tmp_path) -> None:
    furnish(root)
    manifest = (await snapshots.save("s/1", [tree(root)])).manifest
    outside = tmp_path / "outside"
    outside.mkdir()
    (root / "src").rename(root / "was")
    (root / "src").symlink_to(outside)
    before = picture(outside)
    await snapshots.restore(manifest, [tree(root)])
    assert picture(outside) == before
    assert not (root / "src").is_symlink()
    assert (root / "src" / "main.py").exists()


async def test_cancelling_leaves_nothing_open(snapshots, objects, root) -> None:
    for number in range(40):
        (root / str(number)).write_bytes(os.urandom(MIB))
    settle(root)
    descriptors = len(os.listdir("/proc/self/fd"))
    saving = asyncio.ensure_future(snapshots.save("s/1", [tree(root)]))
    await asyncio.sleep(0.02)
    saving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await saving
    deadline = asyncio.get_running_loop().time() + 20
    while len(os.listdir("/proc/self/fd")) > descriptors:
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.01)
    assert not any(key.endswith(".manifest") for key in objects.puts)


async def test_memory_is_bounded(snapshots, root, tmp_path) -> None:
    class Nowhere(Counting):
        """Takes everything and keeps nothing."""

        async def put(self, key, chunks):
            async for _ in chunks:
                pass

    (root / "large").write_bytes(os.urandom(60 * MIB))
    settle(root)
    engine = Snapshots(Nowhere(), max_bytes=64 * MIB)
    tracemalloc.start()
    try:
        await engine.save("s/1", [tree(root)])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 32 * MIB


NAMES = st.binary(min_size=1, max_size=12).filter(lambda name: not set(name) & {0, 47} and name not in (b".", b".."))
CONTENT = st.one_of(st.binary(max_size=50), st.just("folder"), st.tuples(st.just("link"), NAMES))
TREES = st.dictionaries(st.tuples(NAMES) | st.tuples(NAMES, NAMES), CONTENT, max_size=12)


def build(root: Path, spec) -> None:
    for names, content in spec.items():
        path = os.path.join(os.fsencode(root), *names)
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            if content == "folder":
                os.mkdir(path)
            elif isinstance(content, tuple):
                os.symlink(content[1], path)
            else:
                with open(path, "xb") as file:
                    file.write(content)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTDIR):
                raise
    settle(root)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(one=TREES, other=TREES)
def test_any_tree_comes_back_over_any_other(tmp_path_factory, one, other) -> None:
    first, second = tmp_path_factory.mktemp("one") / "w", tmp_path_factory.mktemp("other") / "w"
    first.mkdir()
    second.mkdir()
    build(first, one)
    build(second, other)

    async def run() -> None:
        async with AsyncExitStack() as stack:
            objects = Objects(MemoryPlace())
            await objects.start(stack)
            snapshots = Snapshots(objects, max_bytes=MIB)
            saved = await snapshots.save("s/1", [tree(first)])
            loaded = await snapshots.load("s/1")
            assert loaded.entries == saved.manifest.entries
            await snapshots.restore(loaded, [tree(second)])
            assert await snapshots.changes(loaded, [tree(second)]) == []
            assert not (await snapshots.save("s/2", [tree(second)], since=loaded)).changed

    asyncio.run(run())
    assert picture(second) == picture(first)
