"""A Docker engine of a test's own, beside the machine's: started in a second, stopped, killed and started again at will."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["DockerEngine"]

_PATIENCE_SECONDS = 30.0
# What of an image is in these is mounted, and the rest, which is little, is copied. The engine itself puts its init
# process into /usr/sbin, which a mount of /usr would hide.
_MOUNTED = ("opt", "usr/bin", "usr/lib", "usr/local", "usr/share")


class DockerEngine:
    """One `dockerd` with its own containerd, data and socket, and no network but `none`. It needs root."""

    def __init__(self) -> None:
        """Make its folder; it does not run before `start`."""
        # Not in TMPDIR, whose name may be too long for a socket; and containers' users come through it.
        self.folder = Path(tempfile.mkdtemp(prefix="carrel-engine-", dir="/tmp"))
        self.folder.chmod(0o755)
        self.host = f"unix://{self.folder}/engine.sock"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        # In a network of its own: an engine without a bridge removes `docker0`, which is the machine's own engine's.
        command = ["unshare", "--net", "dockerd", "--host", self.host]
        command += ["--bridge", "none", "--iptables=false", "--ip-forward=false"]
        for name, place in {"data-root": "data", "exec-root": "exec", "pidfile": "pid"}.items():
            command += [f"--{name}", str(self.folder / place)]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while self._run("version", check=False).returncode != 0:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("dockerd does not answer:\n" + (self.folder / "log").read_text()[-3000:])
            time.sleep(0.05)

    def stop(self) -> None:
        """End it in an orderly way, and every container with it."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(_PATIENCE_SECONDS)
            self._process = None

    def kill(self) -> None:
        """End it as a crash does: its containers go on until it is started again."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(_PATIENCE_SECONDS)
            self._process = None
            # Both leave the number of a process that may be another's by now, and would not start beside it.
            containerd = self.folder / "exec/containerd/containerd.pid"
            _end([int(containerd.read_text())])
            for left in (containerd, self.folder / "pid"):
                left.unlink(missing_ok=True)

    def borrow(self, image: str) -> dict[str, Any]:
        """Have an image of the machine's own engine here, without a copy of its content: settings of a server that uses it."""
        inspect = ["docker", "image", "inspect", image]
        found = json.loads(subprocess.run(inspect, check=True, capture_output=True).stdout)[0]
        layers = found["GraphDriver"]["Data"]
        root = self.folder / "image"
        root.mkdir()
        lower = ":".join(filter(None, (layers["UpperDir"], layers.get("LowerDir"))))
        subprocess.run(["mount", "-t", "overlay", "-o", f"ro,lowerdir={lower}", "overlay", str(root)], check=True)
        left_out = [f"--exclude=./{name}/*" for name in _MOUNTED]
        rest = self.folder / "rest.tar"
        subprocess.run(["tar", "-C", str(root), *left_out, "-cf", str(rest), "."], check=True)
        changes = [f"--change=ENV {variable}" for variable in found["Config"]["Env"]]
        self._run("import", *changes, str(rest), "borrowed:1")
        mounts = [{"source": str(root / name), "target": f"/{name}"} for name in _MOUNTED]
        return {"host": self.host, "image": "borrowed:1", "mounts": mounts}

    def remove(self) -> None:
        """End it, whatever of it runs, and remove all that it has."""
        try:
            if self._process is None:
                self.start()  # what it left behind when it was killed, it knows best how to end
            if names := self._run("ps", "-aq").stdout.split():
                self._run("rm", "-f", *(name.decode() for name in names))
            self.stop()
        finally:
            _end([pid for pid in _pids() if str(self.folder).encode() in _command(pid)])
            mounted = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
            for place in sorted(filter(lambda place: place.startswith(f"{self.folder}/"), mounted), reverse=True):
                subprocess.run(["umount", "--lazy", place], check=False)
            shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[bytes]:
        command = ["docker", "--host", self.host, *arguments]
        done = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True)
        if check and done.returncode != 0:
            raise RuntimeError(f"docker {arguments[0]}: {done.stderr.decode()}")
        return done


def _pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _command(pid: int) -> bytes:
    """The command line of a process; nothing where it has ended, waited for or not."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _end(pids: list[int]) -> None:
    """Kill processes that are not ours to wait for, and see them end."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        while _command(pid) and time.monotonic() < deadline:
            time.sleep(0.01)
