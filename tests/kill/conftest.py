"""A server in a process of its own, which a test may kill as often as it likes."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

Json = dict[str, Any]

_SERVE = """
import json, sys
from carrel.cli.server import serve
from carrel.settings import load_settings
serve(load_settings(overrides=json.loads(sys.argv[1])))
"""


class Victim:
    """A server on one data folder, through any number of lives."""

    def __init__(self, data: Path, new_database: Callable[[], str] | None = None) -> None:
        self.data = data
        self._new_database = new_database
        self._rows = self._database()
        self.process: subprocess.Popen[bytes] | None = None
        self.lives = 0
        self._log = data.parent / "server.log"

    def _database(self) -> Json:
        return {} if self._new_database is None else {"database": {"url": self._new_database()}}

    def forget(self) -> None:
        """Remove everything it has stored."""
        for path in sorted(self.data.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        self._rows = self._database()

    def start(self, **settings: Any) -> None:
        given = {"data": str(self.data), "port": 0, "model_upstream": "scripted", "drain_seconds": 0}
        given |= self._rows | settings
        (self.data / "server.json").unlink(missing_ok=True)
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _SERVE, json.dumps(given)], stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        self.lives += 1

    @property
    def dead(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)

    def stop(self) -> int:
        """End it in an orderly way; answers its exit status."""
        if self.process is None:
            return 0
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(40)
        self.process = None
        return status

    def processes(self) -> list[int]:
        """Every process of its sandboxes."""
        return marked(self.data)

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    async def client(self, seconds: float = 30.0) -> httpx.AsyncClient:
        """A client of the present life. Raises ConnectionError when it dies before it answers."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.dead:
                raise ConnectionError("the server is dead")
            try:
                url = json.loads((self.data / "server.json").read_text())["url"]
                key = (self.data / "admin.key").read_text()
            except (OSError, ValueError):
                await asyncio.sleep(0.02)
                continue
            headers = {"Authorization": f"Bearer {key}"}
            try:
                async with httpx.AsyncClient() as first:
                    await first.get(f"{url}/health/live")
            except httpx.HTTPError:
                await asyncio.sleep(0.02)
                continue
            return httpx.AsyncClient(base_url=f"{url}/api/v1", headers=headers, timeout=60)
        raise AssertionError(f"the server did not come up:\n{self.log()[-3000:]}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`@pytest.mark.on_both_engines` runs a test on SQLite and on PostgreSQL."""
    if metafunc.definition.get_closest_marker("on_both_engines") is not None:
        metafunc.parametrize("engine", ["sqlite", "postgres"], indirect=True)


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Callable[[], str] | None:
    """What makes a database; None where rows are in the data folder."""
    if getattr(request, "param", "sqlite") == "sqlite":
        return None
    found: Callable[[], str] = request.getfixturevalue("postgres")
    return found


@pytest.fixture
def victim(tmp_path: Path, engine: Callable[[], str] | None) -> Iterator[Victim]:
    data = tmp_path / "data"
    data.mkdir()
    victim = Victim(data, engine)
    yield victim
    if victim.dead:
        # Whatever runners a killed server left are found and ended by one that starts on the same data.
        victim.process = None
        victim.start()
        asyncio.run(_answers(victim))
    status = victim.stop()
    left = marked(data)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert (status, left) == (0, []), victim.log()[-3000:]


async def _answers(victim: Victim) -> None:
    await (await victim.client()).aclose()


def marked(data: Path) -> list[int]:
    """Every process of a sandbox below this data folder."""
    names = (
        {entry.name.encode() for entry in (data / "sandboxes").iterdir()} if (data / "sandboxes").is_dir() else set()
    )
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            told = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if str(data).encode() in told or any(b"CARREL_SANDBOX=" + name in told for name in names):
            found.append(int(entry.name))
    return found
