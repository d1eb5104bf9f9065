"""The preloaded parent of local runners.

Importing the Agent SDK costs most of a second and tens of megabytes; a process forked from one that has done so starts
in milliseconds and shares the memory. So one parent imports everything, stays single-threaded with no event loop, and
forks a runner for each bootstrap it reads from its socket. It ends when the gateway has gone and its last runner too.

It also sweeps up behind its runners: a runner that was killed could end nothing, and what it leaves falls to us.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import io
import json
import os
import selectors
import signal
import socket
import stat
import sys
from pathlib import Path
from typing import NoReturn

from carrel.protocol.bootstrap import Bootstrap, Mount

_PR_SET_DUMPABLE = 4
_PR_SET_CHILD_SUBREAPER = 36
_CLONE_NEWNS = 0x20000
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 0x40000

_libc = ctypes.CDLL(None, use_errno=True)


def main(fd: int) -> None:
    """Serve the socket `fd`: one JSON bootstrap a line in, `{"sandbox_id", "pid"}` or `{"sandbox_id", "error"}` out."""
    import carrel.runner.main  # noqa: F401  (what every runner needs, imported once)

    gc.collect()
    gc.freeze()
    # Every runner's secrets pass through this memory, and its children inherit that nobody may look into it.
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    connection = socket.socket(fileno=fd)
    runners: set[int] = set()
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    selector = selectors.DefaultSelector()
    selector.register(connection, selectors.EVENT_READ)
    selector.register(wake_read, selectors.EVENT_READ)
    pending = b""
    open_ = True
    while open_ or runners or _end_orphans(runners):
        for key, _ in selector.select():
            if key.fileobj is not connection:
                with contextlib.suppress(BlockingIOError):
                    os.read(wake_read, 4096)
                runners -= _reap()
                _end_orphans(runners)
                continue
            data = connection.recv(1 << 20)
            if not data:
                selector.unregister(connection)
                open_ = False
                break
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                runners |= _serve(connection, line, close=(wake_read, wake_write, selector.fileno()))


def _reap() -> set[int]:
    gone: set[int] = set()
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return gone
        if pid == 0:
            return gone
        gone.add(pid)


def _end_orphans(runners: set[int]) -> bool:
    """End what has fallen to us: processes whose runner is gone. Whether there were any.

    Found by descent, so it does not help them to have left their session and wiped their environment. What they leave
    in turn falls to us when they have ended, of which we are told.
    """
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        orphans = {int(pid) for pid in file.read().split()} - runners
    for pid in orphans:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    return bool(orphans)


def _serve(connection: socket.socket, line: bytes, close: tuple[int, ...]) -> set[int]:
    bootstrap = Bootstrap.model_validate_json(line)
    answer: dict[str, object] = {"sandbox_id": bootstrap.sandbox_id}
    started: set[int] = set()
    try:
        # The lock is taken before the fork and shared with the child: there is no moment in which a runner exists
        # and its lock is free.
        lock = os.open(bootstrap.lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        pid = os.fork()
        if pid == 0:
            _become_runner(bootstrap, lock, connection, close)
        os.close(lock)
        started.add(pid)
        answer["pid"] = pid
    except OSError as error:
        answer["error"] = str(error)
    connection.sendall(json.dumps(answer).encode() + b"\n")
    return started


def _become_runner(bootstrap: Bootstrap, lock: int, connection: socket.socket, close: tuple[int, ...]) -> NoReturn:
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.setsid()
        connection.close()
        for fd in close:
            os.close(fd)
        _redirect(bootstrap.log_path)
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        os.environ.clear()
        mark = {"CARREL_SANDBOX": bootstrap.sandbox_id}
        _show_environment(mark)
        os.environ.update(mark, PATH="/usr/local/bin:/usr/bin:/bin", CLAUDE_AGENT_SDK_SKIP_VERSION_CHECK="1")
        if bootstrap.subreaper:
            _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        if bootstrap.mount_root is not None:
            enter_mounts(bootstrap.mount_root, bootstrap.mounts)
        os.chdir(bootstrap.workspace)
        from carrel.runner.main import run

        run(bootstrap)
        status = 0
    except BaseException as error:
        import traceback

        traceback.print_exception(error)
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _show_environment(shown: dict[str, str]) -> None:
    """Have /proc show this environment: it shows what stood in memory at the last exec, which was the parent's."""
    text = b"".join(f"{name}={value}\0".encode() for name, value in shown.items())
    with open("/proc/self/stat", "rb") as file:
        # Counted from behind the command's name, which may hold anything: the 48th and 49th field after it.
        fields = file.read().rpartition(b")")[2].split()
    start, end = int(fields[47]), int(fields[48])
    if end - start < len(text):
        raise OSError("the parent's environment leaves no room for a runner's")
    ctypes.memset(start, 0, end - start)
    ctypes.memmove(start, text, len(text))


def _redirect(log_path: str) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    out = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(null, 0)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.close(null)
    os.close(out)
    sys.stdout = sys.stderr = _Log()


class _Log(io.TextIOBase):
    """Writes to the log, and does without where there is no room: a runner must not end of a line it cannot write."""

    def write(self, text: str) -> int:
        """Write at once, as far as there is room."""
        with contextlib.suppress(OSError):
            os.write(1, text.encode("utf-8", "backslashreplace"))
        return len(text)


def enter_mounts(root: str, mounts: list[Mount]) -> None:
    """Move this process into a mount namespace of its own in which `mounts` stand under `root`.

    An unprivileged agent cannot walk through a private folder of root's to its own workspace; from here it need not.
    """
    _check(_libc.unshare(_CLONE_NEWNS), "unshare")
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount("carrel", root, b"tmpfs", 0, b"mode=755,size=1m")
    for mount in mounts:
        source = _open_source(mount)
        try:
            if stat.S_ISDIR(os.fstat(source).st_mode):
                os.makedirs(mount.target, mode=0o755, exist_ok=True)
            else:
                os.makedirs(os.path.dirname(mount.target), mode=0o755, exist_ok=True)
                os.close(os.open(mount.target, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
            # What was opened is mounted, whatever stands at its path by now.
            _mount(f"/proc/self/fd/{source}", mount.target, None, _MS_BIND)
        finally:
            os.close(source)


def _open_source(mount: Mount) -> int:
    if mount.within is None:
        return os.open(mount.source, os.O_PATH | os.O_CLOEXEC)
    fd = os.open(mount.within, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    for name in Path(mount.source).relative_to(mount.within).parts:
        child = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
        os.close(fd)
        fd = child
    return fd


def _mount(source: str | None, target: str, kind: bytes | None, flags: int, data: bytes | None = None) -> None:
    result = _libc.mount(source.encode() if source else None, target.encode(), kind, flags, data)
    _check(result, f"mount {target}")


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
