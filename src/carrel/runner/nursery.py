"""The preloaded parent of local runners.

Importing the Agent SDK costs most of a second and tens of megabytes; a process forked from one that has done so starts
in milliseconds and shares the memory. So one parent imports everything, stays single-threaded with no event loop, and
forks a runner for each bootstrap it reads from its socket. It ends when the gateway has gone and its last runner too.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import json
import os
import selectors
import signal
import socket
import sys
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
    connection = socket.socket(fileno=fd)
    children: set[int] = set()
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    selector = selectors.DefaultSelector()
    selector.register(connection, selectors.EVENT_READ)
    selector.register(wake_read, selectors.EVENT_READ)
    pending = b""
    open_ = True
    while open_ or children:
        for key, _ in selector.select():
            if key.fileobj is not connection:
                with contextlib.suppress(BlockingIOError):
                    os.read(wake_read, 4096)
                children -= _reap()
                continue
            data = connection.recv(1 << 20)
            if not data:
                selector.unregister(connection)
                open_ = False
                break
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                children |= _serve(connection, line, close=(wake_read, wake_write, selector.fileno()))


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
        os.environ.update({"CARREL_SANDBOX": bootstrap.sandbox_id, "PATH": "/usr/local/bin:/usr/bin:/bin"})
        os.environ["CLAUDE_AGENT_SDK_SKIP_VERSION_CHECK"] = "1"
        # Nothing outside root may look into a process that holds the link token.
        _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
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


def _redirect(log_path: str) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    out = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(null, 0)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.close(null)
    os.close(out)


def enter_mounts(root: str, mounts: list[Mount]) -> None:
    """Move this process into a mount namespace of its own in which `mounts` stand under `root`.

    An unprivileged agent cannot walk through a private folder of root's to its own workspace; from here it need not.
    """
    _check(_libc.unshare(_CLONE_NEWNS), "unshare")
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount("carrel", root, b"tmpfs", 0, b"mode=755,size=1m")
    for mount in mounts:
        if os.path.isdir(mount.source):
            os.makedirs(mount.target, mode=0o755, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(mount.target), mode=0o755, exist_ok=True)
            os.close(os.open(mount.target, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
        _mount(mount.source, mount.target, None, _MS_BIND)


def _mount(source: str | None, target: str, kind: bytes | None, flags: int, data: bytes | None = None) -> None:
    result = _libc.mount(source.encode() if source else None, target.encode(), kind, flags, data)
    _check(result, f"mount {target}")


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
