"""The data folder of a server: locked, private, and with sockets that processes of other users can reach."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path

from carrel import __version__
from carrel.errors import DataFolderInUse, OperatorError
from carrel.model import new_id
from carrel.settings import Settings

__all__ = ["DataFolder", "lock_data_folder"]

_LONGEST_SOCKET_PATH = 90


def lock_data_folder(data: Path, stack: AsyncExitStack) -> None:
    """Make the data folder where it is not there, and have it to ourselves until the stack is closed.

    Raises:
        DataFolderInUse: a server runs on it.
    """
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(data / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    stack.callback(os.close, lock)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DataFolderInUse(operator_detail=str(data)) from error


class DataFolder:
    """The data folder: locked, private, with the sockets' folders beside it or, where its path is too long, in /tmp."""

    def __init__(self, settings: Settings, stack: AsyncExitStack) -> None:
        self._data = settings.data
        lock_data_folder(settings.data, stack)
        run = self._data / "run"
        if len(str(run)) + len("/sandbox/gateway.sock") > _LONGEST_SOCKET_PATH:
            run = _short_folder(self._data)
            stack.callback(_remove_if_empty, run)
        self.private = run
        self.sandbox_side = run / "sandbox"
        self.link_socket = run / "link.sock"
        self.containers_link = run / "containers" / "link.sock"
        run.mkdir(mode=0o700, exist_ok=True)
        # Whoever is in a container can come to this one; on the host the folder above is closed to all but us.
        self.containers_link.parent.mkdir(mode=0o755, exist_ok=True)
        self.sandbox_side.mkdir(mode=0o755, exist_ok=True)

    def installation(self) -> str:
        """By which what we make outside of this folder is told from what others make; another one's for a copy."""
        path = self._data / "installation"
        if not path.exists():
            whole = self._data / "installation.new"
            whole.write_text(new_id() + "\n")
            whole.rename(path)
        return path.read_text().strip()

    def announce(self, listeners: Mapping[str, str], stack: AsyncExitStack) -> None:
        """Let the command line find this server."""
        path = self._data / "server.json"
        told = {"url": listeners["api"], "listeners": listeners, "pid": os.getpid(), "version": __version__}
        whole = self._data / "server.json.new"  # whoever finds it finds it whole
        whole.write_text(json.dumps(told))
        whole.rename(path)
        stack.callback(path.unlink, missing_ok=True)


def _short_folder(data: Path) -> Path:
    """A folder of ours with a short name that follows from the data folder's: a restarted server finds its runners."""
    digest = hashlib.sha256(str(data.resolve()).encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir(), f"carrel-{os.geteuid()}-{digest}")
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise OperatorError(f"{folder} is not a private folder of ours; remove it.")
    return folder


def _remove_if_empty(run: Path) -> None:
    with contextlib.suppress(OSError):
        (run / "sandbox").rmdir()
        (run / "containers").rmdir()
        run.rmdir()
