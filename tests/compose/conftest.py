"""An installation as a self-hoster has it: the real files in a folder of their own, the real script, the real engine."""

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

ROOT = Path(__file__).parents[2]
READY_SECONDS = 120
PORTS = ("API_PORT", "NATIVE_PORT", "SDK_SERVER_PORT", "POSTGRES_PORT", "OBJECTS_PORT", "OBJECTS_CONSOLE_PORT")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Installation:
    """The files of a clone, brought up under a name of their own on ports of their own."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder = folder
        self.project = f"carrel-test-{uuid4().hex[:8]}"
        self.ports = {name: _free_port() for name in PORTS}
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("CARREL_", "COMPOSE_"))},
            "COMPOSE_PROJECT_NAME": self.project,
            "CARREL_MODEL_UPSTREAM": "scripted",
            "CARREL_IMAGE_PREFIX": os.environ.get("CARREL_IMAGE_PREFIX", "carrel"),
            "POSTGRES_IMAGE": "carrel-stand-in-postgres",
            "OBJECTS_IMAGE": "carrel-stand-in-objects",
            **{name: str(port) for name, port in self.ports.items()},
            **environment,
        }
        for file in [*ROOT.glob("docker-compose*.yml"), ROOT / "docker-start.sh", ROOT / ".env.example"]:
            shutil.copy2(file, folder)
        shutil.copytree(ROOT / "deploy/compose", folder / "deploy/compose")
        (folder / "src").symlink_to(ROOT / "src")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports['API_PORT']}"

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False, timeout=400
        )
        assert not check or done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        return done

    def start(self, *options: str) -> str:
        """./docker-start.sh, with what it prints."""
        return self.run("./docker-start.sh", *options).stdout

    def compose(self, *arguments: str, check: bool = True) -> str:
        program = ["docker", "compose"] if self.run("docker", "compose", "version", check=False).returncode == 0 else []
        return self.run(*(program or ["docker-compose"]), *arguments, check=check).stdout

    def exec(self, *command: str, service: str = "app", user: str | None = None) -> str:
        options = ["--user", user] if user is not None else []
        return self.compose("exec", "-T", *options, service, *command)

    def inspect(self, service: str) -> dict[str, Any]:
        name = self.compose("ps", "--all", "--quiet", service).strip()
        found: dict[str, Any] = json.loads(self.run("docker", "inspect", name).stdout)[0]
        return found

    def sandboxes(self) -> list[str]:
        """The names of its sandboxes' containers, in whatever state."""
        return self.run(
            "docker", "ps", "--all", "--filter", f"label=carrel.owner={self.project}", "--format", "{{.Names}}"
        ).stdout.split()

    def api(self, path: str = "/api/v1") -> httpx.Client:
        key = self.exec("cat", "/data/db/admin.key").strip()
        return httpx.Client(base_url=self.url + path, headers={"Authorization": f"Bearer {key}"}, timeout=90)

    def remove(self) -> None:
        print(
            self.compose("--profile", "*", "logs", "--no-color", "--tail", "40", check=False)
        )  # seen where a test fails
        sandboxes = self.sandboxes()
        if sandboxes:
            self.run("docker", "rm", "--force", *sandboxes, check=False)
        self.compose("--profile", "*", "down", "--volumes", "--timeout", "5", check=False)


@pytest.fixture
def install(tmp_path: Path) -> Iterator[Callable[..., Installation]]:
    """`install(VARIABLE=value)` makes an installation that is not started yet; it is removed with the test."""
    made: list[Installation] = []

    def make(**environment: str) -> Installation:
        folder = tmp_path / f"clone{len(made)}"
        folder.mkdir()
        made.append(Installation(folder, **environment))
        return made[-1]

    yield make
    for installation in made:
        installation.remove()


@pytest.fixture
def wait_until() -> Callable[[Callable[[], bool]], None]:
    """Wait for something outside, with a deadline."""

    def wait(holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while not holds():
            assert time.monotonic() < deadline
            time.sleep(0.2)

    return wait
