"""The files of a workspace, with an agent at work in it that means no good."""

import contextlib
import errno
import fcntl
import itertools
import os
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from carrel import errors
from carrel.workspaces import WorkspaceFiles, descriptors, files
from carrel.workspaces import paths as spelling_of

AGENT = (65534, 65534)
RACE_SECONDS = 1.0

# Atomically exchanges pairs of paths until it is ended, as fast as it can.
SWAPPER = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
pairs = [path.encode() for path in sys.argv[1:]]
print("ready", flush=True)
while True:
    for a, b in zip(pairs[::2], pairs[1::2]):
        libc.renameat2(-100, a, -100, b, 2)
"""

# Makes files in a directory until it is ended, and the directory too if that is gone.
SCRIBBLER = """
import itertools, os, sys
print("ready", flush=True)
for n in itertools.count():
    try:
        os.makedirs(sys.argv[1], exist_ok=True)
        open(f"{sys.argv[1]}/{n}", "w").close()
    except OSError:
        pass
"""


@contextlib.contextmanager
def agent(script, *arguments):
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert process.stdout.readline() == b"ready\n"
        yield
        assert process.poll() is None, "the agent has to last as long as the race"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def for_a_while():
    until = time.monotonic() + RACE_SECONDS
    for n in itertools.count():
        if time.monotonic() > until:
            return
        yield n


@pytest.fixture(autouse=True)
def no_descriptor_left():
    before = sorted(os.listdir("/proc/self/fd"))
    yield
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def root(tmp_path):
    (tmp_path / "workspace").mkdir()
    return tmp_path / "workspace"


@pytest.fixture
def outside(tmp_path):
    """A folder next to the workspace that has to stay as it is."""
    folder = tmp_path / "outside"
    (folder / "sub").mkdir(parents=True)
    (folder / "secret").write_bytes(b"outside")
    (folder / "sub" / "deep").write_bytes(b"outside")
    yield folder
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    assert found == {"secret", "sub", "sub/deep"}
    assert (folder / "secret").read_bytes() == (folder / "sub" / "deep").read_bytes() == b"outside"


@pytest.fixture
def workspace(root):
    return WorkspaceFiles(root)


@pytest.fixture
def unprivileged():
    """A workspace used by a gateway without privileges, which runs as the agent's own user."""
    base = Path(tempfile.mkdtemp(dir="/tmp"))  # the usual place is closed to other users
    base.chmod(0o777)
    was_root = os.geteuid() == 0
    if was_root:
        os.seteuid(AGENT[0])
    try:
        (base / "workspace").mkdir()
        yield base / "workspace"
    finally:
        if was_root:
            os.seteuid(0)
        subprocess.run(["chmod", "-R", "u+rwx", base], check=False)
        shutil.rmtree(base)


def read(workspace, path):
    with workspace.open_read(path) as file:
        return file.read()


def paths(entries):
    return [entry.path for entry in entries]


def pages(workspace, limit, **options):
    after = None
    while page := paths(workspace.tree(limit=limit, after=after, **options)):
        assert len(page) <= limit
        yield from page
        after = page[-1]


# ---------------------------------------------------------------------------------------------------------------
# Paths


NAMES = st.binary(min_size=1, max_size=255).filter(
    lambda n: b"/" not in n and b"\0" not in n and n not in (b".", b"..")
)
TRICKY_NAMES = st.lists(
    st.sampled_from([b"\\", b"x", b"5C", b"E9", b"\xe9", "é".encode(), b".", b"%", b"\n", b"\xff", b"e9", b"\xed\xb2\x80"]),
    min_size=1,
    max_size=12,
).map(b"".join).filter(lambda name: name not in (b".", b".."))  # fmt: skip
TEXTS = st.text(alphabet="./\\x5CE9%a\0é\udce9\ud800\n", max_size=20) | st.text(max_size=60)


@given(NAMES | TRICKY_NAMES)
def test_every_name_has_a_spelling_that_leads_back(name):
    spelling = spelling_of.spell(name)
    spelling.encode()  # can be sent
    assert spelling_of.parse(spelling) == (name,)


@given(NAMES, NAMES)
def test_no_two_names_share_a_spelling(one, other):
    assert (spelling_of.spell(one) == spelling_of.spell(other)) == (one == other)


@given(TEXTS)
def test_a_path_is_refused_or_has_safe_components(text):
    try:
        names = spelling_of.parse(text)
    except errors.InvalidPath:
        return
    assert "/".join(map(spelling_of.spell, names)) == text
    for name in names:
        assert 0 < len(name) <= 255
        assert name not in (b".", b"..")
        assert b"/" not in name
        assert b"\0" not in name


@given(name=st.text(alphabet="abé%\\x5 .-_~?#:*\"'", min_size=1, max_size=30))
def test_names_that_are_text_are_spelled_as_they_are(name):
    assert spelling_of.spell(name.encode()) == name


BAD_PATHS = [
    "..", ".", "../x", "a/../b", "a/..", "./a", "a/.", "/", "/etc/passwd", "//a", "a//b", "a/", "a\0b", "\0",
    "\udce9", "\ud800", "a" * 256, "a/" + "é" * 128, "/".join(["a" * 200] * 21), "/".join("a" * 129),
    r"caf\xC3\xA9", r"a\x5Cb",
]  # fmt: skip


@pytest.mark.parametrize("path", BAD_PATHS, ids=[ascii(path[:12]) for path in BAD_PATHS])
def test_paths_that_are_none_are_refused_by_every_method(workspace, path):
    for call in (
        workspace.tree,
        workspace.stat,
        workspace.open_read,
        workspace.delete,
        lambda path, **_: workspace.write(path, [b"x"]),
    ):
        with pytest.raises(errors.InvalidPath):
            call(path, **({"limit": 1} if call == workspace.tree else {}))
    assert workspace.tree(limit=10) == []


@pytest.mark.parametrize("path", ["", "a\nb", "a\x7f", "\x85", "\x1b[2J", r"a\xFF", "ok/\t/x"], ids=ascii)
def test_names_that_are_not_to_be_made(workspace, path):
    with pytest.raises(errors.InvalidPath):
        workspace.write(path, [b"x"])
    assert workspace.tree(limit=10) == []


@pytest.mark.parametrize("path", ["a" * 255, "a b", "..a", "...", "-rf", "a\\..\\b", "C:\\x", "~", "caf%C3%A9", "日本"])
def test_odd_but_good_names(workspace, root, path):
    workspace.write(path, [b"x"])
    assert os.listdir(root) == [path]
    assert read(workspace, path) == b"x"


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=40)
@given(
    st.sets(TRICKY_NAMES | st.binary(min_size=1, max_size=40).filter(lambda n: not set(n) & {0, 47} and n.strip(b".")))
)
def test_whatever_an_agent_names_can_be_listed_read_and_deleted(names):
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            Path(os.fsdecode(os.path.join(os.fsencode(folder), name))).write_bytes(name)
        workspace = WorkspaceFiles(Path(folder))
        listed = workspace.tree(limit=1000)
        assert len(listed) == len(names)
        assert {read(workspace, entry.path) for entry in listed} == names
        for entry in listed:
            assert workspace.stat(entry.path) == entry
            workspace.delete(entry.path)
        assert os.listdir(folder) == []


# ---------------------------------------------------------------------------------------------------------------
# tree and stat


def test_tree_tells_what_there_is(workspace, root, outside):
    (root / "dir").mkdir()
    (root / "dir" / "file").write_bytes(b"12345")
    (root / "dir" / "file").chmod(0o640)
    os.utime(root / "dir" / "file", (0, 1_700_000_000))
    (root / "link").symlink_to(outside)
    (root / "dangling").symlink_to("nowhere")
    os.mkfifo(root / "fifo")
    listed = {entry.path: entry for entry in workspace.tree(limit=100)}
    assert {path: entry.type for path, entry in listed.items()} == {
        "dangling": "symlink", "dir": "directory", "dir/file": "file", "fifo": "other", "link": "symlink",
    }  # fmt: skip
    file = listed["dir/file"]
    assert (file.size, file.mode) == (5, 0o640)
    assert file.modified_at == datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)
    assert listed["link"].size == 0
    for path, entry in listed.items():
        assert workspace.stat(path) == entry
    assert workspace.stat("").type == "directory"


def test_tree_of_a_part(workspace, root):
    for path in ("a/b/c", "a/d", "ab"):
        workspace.write(path, [])
    assert paths(workspace.tree("a", limit=9)) == ["a/b", "a/b/c", "a/d"]
    assert paths(workspace.tree("a", limit=9, recursive=False)) == ["a/b", "a/d"]
    assert paths(workspace.tree("a", limit=9, after="a/b/c")) == ["a/d"]
    assert paths(workspace.tree(limit=9, recursive=False)) == ["a", "ab"]
    assert workspace.tree(limit=0) == []
    with pytest.raises(errors.PathConflict):
        workspace.tree("ab", limit=9)
    with pytest.raises(errors.FileNotFound):
        workspace.tree("c", limit=9)


PARTS = st.sampled_from(["a", "a-", "a.b", "a b", "b", "á", "a\\", "~", "A"])


@settings(deadline=None, max_examples=60)
@given(
    st.sets(st.lists(PARTS, min_size=1, max_size=4).map("/".join), max_size=25),
    st.integers(1, 7),
    st.text(alphabet="aAb-./~", max_size=6),
)
def test_pages_hold_everything_once_and_in_order(directories, limit, after):
    with tempfile.TemporaryDirectory() as folder:
        for directory in directories:
            Path(folder, directory).mkdir(parents=True, exist_ok=True)
            Path(folder, directory, "file").touch()
        everything = sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*"))
        workspace = WorkspaceFiles(Path(folder))
        assert list(pages(workspace, limit)) == everything
        assert paths(workspace.tree(limit=1000, after=after)) == [path for path in everything if path > after]


@pytest.mark.slow
def test_a_directory_larger_than_a_page_is_listed_whole(workspace, root):
    expected = []
    for n in range(2500):
        (root / f"{n}").touch()
        expected.append(f"{n}")
    for n in range(0, 2500, 5):
        (root / f"d{n}").mkdir()
        (root / f"d{n}" / "x").touch()
        expected += [f"d{n}", f"d{n}/x"]
    assert list(pages(workspace, 7 * 41)) == sorted(expected)


def test_times_beyond_the_calendar():
    for nanoseconds, year in ((10**22, 9999), (-(10**22), 1), (10**28, 9999)):
        assert files._modified_at(SimpleNamespace(st_mtime_ns=nanoseconds)).year == year


def test_what_cannot_be_read_is_listed_without_its_content(unprivileged):
    workspace = WorkspaceFiles(unprivileged)
    for path in ("closed/x", "names-only/x", "open/x"):
        workspace.write(path, [b"x"])
    (unprivileged / "closed").chmod(0)
    (unprivileged / "names-only").chmod(0o444)
    assert paths(workspace.tree(limit=9)) == ["closed", "names-only", "open", "open/x"]
    with pytest.raises(errors.PathConflict):
        workspace.tree("closed", limit=9)
    with pytest.raises(errors.PathConflict):
        workspace.open_read("closed/x")


# ---------------------------------------------------------------------------------------------------------------
# open_read


def test_five_megabytes_there_and_back(workspace):
    content = os.urandom(5 << 20)
    chunks = (content[at : at + 65_521] for at in range(0, len(content), 65_521))
    entry = workspace.write("a/b/large", chunks)
    assert entry.size == len(content)
    with workspace.open_read("a/b/large") as file:
        assert os.fstat(file.fileno()).st_size == len(content)
        assert file.read() == content


@pytest.mark.timeout(10)
def test_only_regular_files_are_read(workspace, root, outside):
    (root / "dir").mkdir()
    os.mkfifo(root / "fifo")
    (root / "link").symlink_to(outside / "secret")
    (root / "inside").write_bytes(b"x")
    (root / "link-inside").symlink_to("inside")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(root / "socket"))
        for path in ("", "dir", "fifo", "link", "link-inside", "socket"):
            with pytest.raises(errors.NotAFile):
                workspace.open_read(path)
    with pytest.raises(errors.FileNotFound):
        workspace.open_read("nothing")
    with pytest.raises(errors.FileNotFound):
        workspace.open_read("no/thing")
    with pytest.raises(errors.PathConflict):
        workspace.open_read("inside/x")


@pytest.mark.requires("root")
def test_devices_are_not_even_opened(workspace, root, monkeypatch):
    os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    opened = []
    real_open = os.open
    monkeypatch.setattr(os, "open", lambda path, *a, **k: (opened.append(path), real_open(path, *a, **k))[1])
    with pytest.raises(errors.NotAFile):
        workspace.open_read("null")
    assert b"null" not in opened


def test_a_lease_does_not_hold_us_up(workspace, root):
    (root / "leased").write_bytes(b"x")
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    try:
        with open(root / "leased", "r+b") as file:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            with pytest.raises(errors.PathConflict):
                workspace.open_read("leased")
    finally:
        signal.signal(signal.SIGIO, before)


def test_no_link_is_followed_by_any_method(workspace, root, outside):
    (root / "door").symlink_to(outside)
    (root / "indoors").mkdir()
    (root / "inner").symlink_to("indoors")
    for call in (
        lambda: workspace.open_read("door/secret"),
        lambda: workspace.open_read("door/sub/deep"),
        lambda: workspace.stat("door/secret"),
        lambda: workspace.tree("door", limit=1),
        lambda: workspace.tree("inner", limit=1),
        lambda: workspace.write("door/new", [b"x"]),
        lambda: workspace.write("door/sub/new", [b"x"]),
        lambda: workspace.write("inner/new", [b"x"]),
        lambda: workspace.write("door", [b"x"]),
        lambda: workspace.delete("door/secret"),
        lambda: workspace.delete("door/sub"),
    ):
        with pytest.raises(errors.PathConflict):
            call()
    assert workspace.stat("door").type == "symlink"
    assert os.listdir(root / "indoors") == []


def test_a_root_that_is_a_link_or_gone(tmp_path, outside):
    (tmp_path / "link").symlink_to(outside)
    with pytest.raises(errors.PathConflict):
        WorkspaceFiles(tmp_path / "link").open_read("secret")
    with pytest.raises(errors.FileNotFound):
        WorkspaceFiles(tmp_path / "gone").write("a", [])
    with pytest.raises(errors.FileNotFound):
        WorkspaceFiles(tmp_path / "gone").tree(limit=1)


@pytest.mark.requires("root")
def test_a_hard_link_to_a_file_of_somebody_else(root, outside, tmp_path):
    os.link(outside / "secret", root / "shadow")
    (root / "own").write_bytes(b"own")
    os.chown(root / "own", *AGENT)
    os.link(root / "own", root / "own-too")
    (root / "ours").write_bytes(b"ours")
    workspace = WorkspaceFiles(root, owner=AGENT)
    with pytest.raises(errors.NotAFile):
        workspace.open_read("shadow")
    assert read(workspace, "own-too") == b"own"
    assert read(workspace, "ours") == b"ours"
    assert workspace.copy_to(tmp_path / "copy") == 1
    assert sorted(os.listdir(tmp_path / "copy")) == ["ours", "own", "own-too"]
    workspace.write("shadow", [b"new"])  # replaces the name, not what it is a name of: the fixture looks


@pytest.mark.slow
@pytest.mark.requires("root")
def test_a_hard_link_swapped_in_while_a_file_is_opened(root, outside):
    workspace = WorkspaceFiles(root, owner=AGENT)
    (root / "door").write_bytes(b"inside")
    os.chown(root / "door", *AGENT)
    os.link(outside / "secret", root / "other")
    seen = {"inside": 0, "refused": 0}
    with agent(SWAPPER, root / "door", root / "other"):
        for _ in for_a_while():
            try:
                assert read(workspace, "door") == b"inside"
                seen["inside"] += 1
            except (errors.NotAFile, errors.PathConflict):
                seen["refused"] += 1
    assert min(seen.values()) > 10, seen


# ---------------------------------------------------------------------------------------------------------------
# write


def test_write_makes_parents_and_replaces_files(workspace, root):
    assert workspace.write("a/b/c", [b"old"]) == workspace.stat("a/b/c")
    assert stat.S_IMODE((root / "a" / "b").stat().st_mode) == 0o755
    assert workspace.stat("a/b/c").mode == 0o644
    (root / "a/b/c").chmod(0o4750)
    entry = workspace.write("a/b/c", [b"n", b"", b"ew"])
    assert (entry.size, entry.mode, read(workspace, "a/b/c")) == (3, 0o750, b"new")
    assert os.listdir(root / "a" / "b") == ["c"]


def test_modes_do_not_depend_on_our_umask(workspace):
    before = os.umask(0o077)
    try:
        assert workspace.write("a/b", []).mode == 0o644
        assert workspace.stat("a").mode == 0o755
    finally:
        os.umask(before)


def test_what_stands_in_the_way_of_a_write(workspace, root):
    (root / "dir").mkdir()
    (root / "file").write_bytes(b"x")
    os.mkfifo(root / "fifo")
    (root / "dangling").symlink_to("new")
    for path in ("dir", "fifo", "dangling", "file/x", "fifo/x", "dangling/x"):
        with pytest.raises(errors.PathConflict):
            workspace.write(path, [b"x"])
    assert sorted(os.listdir(root)) == ["dangling", "dir", "fifo", "file"]


def test_a_write_is_whole_or_not_at_all(workspace, root):
    workspace.write("file", [b"old"])

    def breaks_off():
        yield b"new"
        assert read(workspace, "file") == b"old"
        raise FileNotFoundError(errno.ENOENT, "the client has gone")

    with pytest.raises(FileNotFoundError):
        workspace.write("file", breaks_off())
    with pytest.raises(errors.FileTooLarge):
        workspace.write("file", [b"123", b"45"], max_bytes=4)
    assert read(workspace, "file") == b"old"
    assert os.listdir(root) == ["file"]
    assert workspace.write("file", [b"12", b"34"], max_bytes=4).size == 4


def test_the_agent_cannot_open_what_is_being_written(workspace, root):
    def chunks():
        (temporary,) = root.iterdir()
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o600
        temporary.unlink()
        temporary.symlink_to("elsewhere")
        yield b"x"

    workspace.write("file", chunks())
    assert not (root / "elsewhere").exists()


@pytest.mark.requires("root")
def test_new_files_and_directories_are_the_owners(root, tmp_path):
    workspace = WorkspaceFiles(root, owner=AGENT)
    workspace.write("a/b/c", [b"x"])
    (root / "link").symlink_to("nowhere")
    os.chown(root, 1234, 1234)
    for path in ("a", "a/b", "a/b/c"):
        assert ((root / path).stat().st_uid, (root / path).stat().st_gid) == AGENT
    workspace.copy_to(tmp_path / "copy")
    for path in ("", "a", "a/b", "a/b/c", "link"):
        assert (tmp_path / "copy" / path).lstat().st_uid == AGENT[0]
    workspace.copy_to(tmp_path / "other", owner=(1234, 1235))
    assert (tmp_path / "other" / "a").stat().st_gid == 1235


def test_the_owner_is_ignored_without_privileges(unprivileged):
    WorkspaceFiles(unprivileged, owner=(0, 0)).write("a/b", [b"x"])
    assert (unprivileged / "a").stat().st_uid == os.geteuid()


# ---------------------------------------------------------------------------------------------------------------
# delete


def test_delete(workspace, root, outside):
    for path in ("dir/a/b", "dir/c", "file"):
        workspace.write(path, [b"x"])
    (root / "dir" / "link").symlink_to(outside)
    (root / "link").symlink_to(outside)
    os.mkfifo(root / "dir" / "fifo")
    for path in ("dir", "file", "link"):
        workspace.delete(path)
        with pytest.raises(errors.FileNotFound):
            workspace.delete(path)
    assert os.listdir(root) == []
    with pytest.raises(errors.InvalidPath):
        workspace.delete("")


def test_read_only_directories_can_be_deleted(unprivileged):
    workspace = WorkspaceFiles(unprivileged)
    workspace.write("pkg/mod/x", [b"x"])
    (unprivileged / "pkg" / "mod").chmod(0o555)
    (unprivileged / "pkg").chmod(0o444)
    workspace.delete("pkg")
    assert os.listdir(unprivileged) == []


@pytest.mark.slow
def test_delete_comes_to_an_end_while_an_agent_writes(workspace, root):
    with agent(SCRIBBLER, root / "busy"):
        ends = []
        for _ in for_a_while():
            started = time.monotonic()
            with contextlib.suppress(errors.PathConflict, errors.FileNotFound):
                workspace.delete("busy")
            ends.append(time.monotonic() - started)
    assert max(ends) < 30
    with contextlib.suppress(errors.FileNotFound):
        workspace.delete("busy")
    assert os.listdir(root) == []


@pytest.mark.timeout(20)
def test_a_directory_that_never_gets_empty(workspace, monkeypatch):
    def never_empty(name, *, dir_fd):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))

    workspace.write("a/b/c", [])
    monkeypatch.setattr(os, "rmdir", never_empty)
    with pytest.raises(errors.PathConflict):
        workspace.delete("a")


# ---------------------------------------------------------------------------------------------------------------
# copy_to


def test_copy(workspace, root, outside, tmp_path):
    workspace.write("bin/tool", [b"#!"])
    (root / "bin" / "tool").chmod(0o6755)
    os.utime(root / "bin" / "tool", ns=(5, 1_600_000_000_123_456_789))
    (root / "locked").mkdir()
    (root / "locked" / "x").write_bytes(b"x")
    (root / "locked").chmod(0o2550)
    os.utime(root / "bin", ns=(5, 77_000_000_000))
    (root / "link").symlink_to(outside)
    (root / "up").symlink_to("../../etc")
    os.mkfifo(root / "fifo")
    target = tmp_path / "copy"
    assert workspace.copy_to(target) == 1
    assert [e for e in workspace.tree(limit=99) if e.path not in ("fifo", "locked", "bin/tool")] == [
        e for e in WorkspaceFiles(target).tree(limit=99) if e.path not in ("locked", "bin/tool")
    ]
    assert os.readlink(target / "link") == str(outside)
    assert os.readlink(target / "up") == "../../etc"
    tool = (target / "bin" / "tool").stat()
    assert (stat.S_IMODE(tool.st_mode), tool.st_mtime_ns) == (0o755, 1_600_000_000_123_456_789)
    assert stat.S_IMODE((target / "locked").stat().st_mode) == 0o550
    assert (target / "locked" / "x").read_bytes() == b"x"
    assert (target / "bin").stat().st_mtime_ns == 77_000_000_000
    with pytest.raises(errors.PathConflict):
        workspace.copy_to(target)


def test_copy_counts_what_cannot_be_read(unprivileged):
    workspace = WorkspaceFiles(unprivileged)
    for path in ("closed/x", "names-only/x", "ok/x", "secret"):
        workspace.write(path, [b"x"])
    (unprivileged / "closed").chmod(0)
    (unprivileged / "names-only").chmod(0o444)
    (unprivileged / "secret").chmod(0)
    target = unprivileged.parent / "copy"
    assert workspace.copy_to(target) == 3
    assert paths(WorkspaceFiles(target).tree(limit=9)) == ["names-only", "ok", "ok/x"]


def test_holes_stay_holes(workspace, root, tmp_path):
    with open(root / "sparse", "wb") as file:
        file.seek(1 << 30)
        file.write(b"middle")
        file.truncate(1 << 40)
    workspace.copy_to(tmp_path / "copy", max_bytes=1 << 20)
    found = (tmp_path / "copy" / "sparse").stat()
    assert found.st_size == 1 << 40
    assert found.st_blocks < 1000
    with open(tmp_path / "copy" / "sparse", "rb") as file:
        file.seek(1 << 30)
        assert file.read(7) == b"middle\0"


def test_copy_over_its_limit_leaves_nothing(workspace, tmp_path):
    workspace.write("a/b", [b"x" * 60])
    workspace.write("c", [b"x" * 60])
    with pytest.raises(errors.FileTooLarge):
        workspace.copy_to(tmp_path / "copy", max_bytes=119)
    assert not (tmp_path / "copy").exists()
    assert workspace.copy_to(tmp_path / "copy", max_bytes=120) == 0


# ---------------------------------------------------------------------------------------------------------------
# An agent that does not stand still


@pytest.fixture
def door(root, outside):
    """`door` is by turns a directory and a link to the outside."""
    (root / "door" / "sub").mkdir(parents=True)
    (root / "door" / "secret").write_bytes(b"inside")
    (root / "door" / "sub" / "deep").write_bytes(b"inside")
    (root / "other").symlink_to(outside)
    with agent(SWAPPER, root / "door", root / "other"):
        yield


def tried(seen, call):
    try:
        result = call()
    except (errors.PathConflict, errors.FileNotFound, errors.NotAFile):
        seen["refused"] = seen.get("refused", 0) + 1
        return None
    seen["done"] = seen.get("done", 0) + 1
    return result


@pytest.mark.slow
def test_reading_through_a_swapped_directory(workspace, door):
    seen = {}
    for _ in for_a_while():
        for path in ("door/secret", "door/sub/deep"):
            assert tried(seen, lambda path=path: read(workspace, path)) in (None, b"inside")
    assert min(seen["done"], seen["refused"]) > 10, seen


@pytest.mark.slow
def test_writing_through_a_swapped_directory(workspace, door):
    seen = {}
    for _ in for_a_while():
        for path in ("door/new", "door/sub/new", "door/made/new"):
            tried(seen, lambda path=path: workspace.write(path, [b"x"]))
    assert min(seen["done"], seen["refused"]) > 10, seen


@pytest.mark.slow
def test_reading_a_swapped_file(workspace, root, outside):
    (root / "file").write_bytes(b"inside")
    (root / "link").symlink_to(outside / "secret")
    os.mkfifo(root / "fifo")
    seen = {}
    with agent(SWAPPER, root / "file", root / "link", root / "file", root / "fifo"):
        for _ in for_a_while():
            assert tried(seen, lambda: read(workspace, "file")) in (None, b"inside")
    assert min(seen["done"], seen["refused"]) > 10, seen


@pytest.mark.slow
def test_listing_swapped_directories(workspace, root, outside):
    (root / "door").mkdir()
    (root / "other").symlink_to(outside)
    lengths = set()
    with agent(SWAPPER, root / "door", root / "other"):
        for _ in for_a_while():
            listed = paths(workspace.tree(limit=100))
            lengths.add(len(listed))
            assert set(listed) <= {"door", "other"}
    assert lengths


@pytest.mark.slow
def test_deleting_what_is_being_swapped(workspace, root, outside):
    seen = {}
    box = root / "box"
    with agent(SWAPPER, box / "door", box / "other", box / "door/sub", box / "door/link"):
        for n in for_a_while():
            if not box.exists():
                (root / f"{n}" / "door" / "sub").mkdir(parents=True)
                (root / f"{n}" / "door" / "link").symlink_to(outside)
                (root / f"{n}" / "other").symlink_to(outside)
                (root / f"{n}").rename(box)
            tried(seen, lambda: workspace.delete("box"))
    assert seen["done"] > 10, seen


@pytest.mark.slow
def test_copying_what_is_being_swapped(workspace, door, root, tmp_path):
    kinds = set()
    for _ in for_a_while():
        workspace.copy_to(tmp_path / "copy")
        for name in ("door", "other"):
            copied = tmp_path / "copy" / name
            kinds.add(copied.is_symlink())
            if copied.is_dir() and not copied.is_symlink():
                assert {path.read_bytes() for path in copied.rglob("*") if path.is_file()} <= {b"inside"}
        shutil.rmtree(tmp_path / "copy")
    assert kinds == {True, False}


def test_a_directory_moved_away_while_we_are_in_it(root):
    (root / "a" / "b" / "c").mkdir(parents=True)
    (root / "elsewhere").mkdir()
    fd = os.open(root, os.O_RDONLY)
    try:
        with descriptors.Cursor(fd) as cursor:
            cursor.enter(b"a")
            cursor.enter(b"b")
            (root / "a" / "b").rename(root / "elsewhere" / "b")
            cursor.leave()
            assert os.fstat(cursor.fd).st_ino == (root / "a").stat().st_ino
            cursor.leave()
            assert os.fstat(cursor.fd).st_ino == root.stat().st_ino
            cursor.enter(b"a")
            (root / "a" / "b").mkdir()
            cursor.enter(b"b")
            (root / "a" / "b").rmdir()
            cursor.leave()
            assert os.fstat(cursor.fd).st_ino == (root / "a").stat().st_ino
            (root / "a" / "b").mkdir()
            cursor.enter(b"b")
            (root / "a" / "b").rename(root / "elsewhere" / "b2")
            (root / "a").rename(root / "elsewhere" / "a")
            with pytest.raises(OSError, match=os.strerror(errno.ENOENT)):
                cursor.leave()
    finally:
        os.close(fd)


# ---------------------------------------------------------------------------------------------------------------
# Deep trees, few descriptors


@pytest.fixture
def deep(root):
    """3000 directories in each other, which no path can name, and only a few descriptors left to us."""
    fd = os.open(root, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("d", dir_fd=fd)
        child = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = child
    os.close(os.open("bottom", os.O_WRONLY | os.O_CREAT, dir_fd=fd))
    os.close(fd)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 16, limits[1]))
    yield root
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    WorkspaceFiles(root.parent).delete(root.name)


def depth_of(folder):
    fd, depth = os.open(folder, os.O_RDONLY), 0
    while True:
        try:
            child = os.open("d", os.O_RDONLY, dir_fd=fd)
        except FileNotFoundError:
            bottom = os.listdir(fd)
            os.close(fd)
            return depth, bottom
        os.close(fd)
        fd, depth = child, depth + 1


def test_a_tree_deeper_than_any_path(workspace, deep, tmp_path):
    assert len(workspace.tree(limit=10_000)) == spelling_of.MAX_PATH_DEPTH
    assert workspace.stat("/".join(["d"] * spelling_of.MAX_PATH_DEPTH)).type == "directory"
    workspace.copy_to(tmp_path / "copy")
    assert depth_of(tmp_path / "copy") == (3000, ["bottom"])
    WorkspaceFiles(tmp_path).delete("copy")
    workspace.delete("d")
    assert os.listdir(deep) == []


def test_what_is_listed_can_be_named(workspace, root):
    fd = os.open(root, os.O_RDONLY)
    for _ in range(25):
        os.mkdir("\\" * 200, dir_fd=fd)
        child = os.open("\\" * 200, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = child
        os.close(os.open(b"\xff", os.O_WRONLY | os.O_CREAT, dir_fd=fd))
    os.close(fd)
    listed = workspace.tree(limit=1000)
    assert len(listed) == 40
    for entry in listed:
        assert workspace.stat(entry.path) == entry


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO], ids=errno.errorcode.get)
def test_trouble_of_our_own_is_no_shorter_answer(workspace, root, tmp_path, monkeypatch, number):
    workspace.write("a/b", [b"x"])
    real_open = os.open

    def open_with_trouble(path, *arguments, **options):
        if path == b"a":
            raise OSError(number, os.strerror(number))
        return real_open(path, *arguments, **options)

    monkeypatch.setattr(os, "open", open_with_trouble)
    for call in (lambda: workspace.tree(limit=9), lambda: workspace.copy_to(tmp_path / "copy")):
        with pytest.raises(OSError, match=os.strerror(number)):
            call()
    assert not (tmp_path / "copy").exists()


def test_a_directory_that_opens_but_cannot_be_listed(workspace, monkeypatch):
    workspace.write("a/x", [])
    workspace.write("b", [])
    real_scandir = os.scandir
    calls = []

    def second_is_denied(fd):
        calls.append(fd)
        if len(calls) == 2:
            raise PermissionError(errno.EACCES, "denied")
        return real_scandir(fd)

    monkeypatch.setattr(os, "scandir", second_is_denied)
    assert paths(workspace.tree(limit=9)) == ["a", "b"]


def test_threads_may_share_it(workspace):
    failures = []

    def work(n):
        try:
            for i in range(30):
                workspace.write(f"shared/{n}/{i}", [b"%d" % i])
                assert read(workspace, f"shared/{n}/{i}") == b"%d" % i
                workspace.tree(limit=50)
                workspace.delete(f"shared/{n}")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
