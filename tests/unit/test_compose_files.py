"""The compose files, as they are written. Brought up: tests/compose/test_modes.py."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from carrel import __version__
from carrel.settings import load_settings
from carrel.settings.model import Settings

ROOT = Path(__file__).parents[2]
FILES = sorted(ROOT.glob("docker-compose*.yml"))
VARIABLE = re.compile(r"\$\{([A-Z][A-Z0-9_]*)(?::-((?:[^{}]|\$\{[^{}]*\})*))?\}")
EXAMPLE = dict(
    line.split("=", 1) for line in (ROOT / ".env.example").read_text().splitlines() if line and line[0] != "#"
)
# Read by Compose itself.
COMPOSES_OWN = {"COMPOSE_FILE", "COMPOSE_PROFILES", "COMPOSE_PROJECT_NAME"}


class _Loader(yaml.SafeLoader):
    """YAML with the two tags by which Compose replaces what an earlier file has said."""


_Loader.add_constructor("!reset", lambda loader, node: loader.construct_sequence(node))
_Loader.add_constructor("!override", lambda loader, node: loader.construct_sequence(node))


def services(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.load(file.read_text(), _Loader)["services"]
    return found


BASE = services(ROOT / "docker-compose.yml")
LASTING = {name: service for name, service in BASE.items() if service.get("restart") != "no"}


def used() -> dict[str, set[str]]:
    """Every variable of the compose files, with the defaults that stand there."""
    found: dict[str, set[str]] = {}
    for file in FILES:
        text = "\n".join(line for line in file.read_text().splitlines() if not line.lstrip().startswith("#"))
        for name, default in VARIABLE.findall(text):
            found.setdefault(name, set()).add(default)
    return found


def test_every_variable_is_in_the_example_and_no_other() -> None:
    assert EXAMPLE.keys() - COMPOSES_OWN == used().keys()


def test_the_example_says_the_defaults() -> None:
    for name, defaults in used().items():
        if name == "CARREL_LOG_LEVEL":  # work on Carrel itself has another
            assert EXAMPLE[name] in defaults
            continue
        assert {EXAMPLE[name]} == defaults, name


def test_images_are_of_this_version() -> None:
    assert used()["CARREL_VERSION"] == {__version__}


def test_no_secret_has_a_value() -> None:
    for name, value in EXAMPLE.items():
        if re.search(r"KEY|TOKEN|SECRET|PASSWORD", name):
            assert value == ""


def test_the_applications_variables_are_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A wrong name is an error there: so all of them together are loaded once."""
    environment = dict(BASE["app"]["environment"])
    known = {f"CARREL_{name.upper()}" for name in Settings.model_fields}
    assert environment.pop("CARREL_CONFIG") in str(BASE["app"]["volumes"])
    for name in environment:
        assert not name.startswith("CARREL_") or name.split("__")[0] in known, name
    del environment["PATH"]
    for name, value in environment.items():
        monkeypatch.setenv(name, VARIABLE.sub(lambda found: EXAMPLE[found[1]], value))
    monkeypatch.setenv("CARREL_DATA", str(tmp_path))
    settings = load_settings(config=ROOT / "deploy/compose/config.yaml")
    assert (settings.host, settings.port) == ("0.0.0.0", 8000)


def ports() -> list[tuple[str, str]]:
    return [
        (f"{file.name}-{name}", port)
        for file in FILES
        for name, service in services(file).items()
        for port in service.get("ports", [])
    ]


@pytest.mark.parametrize(("where", "port"), ports())
def test_ports_are_of_loopback_alone(where: str, port: str) -> None:
    assert port.startswith("127.0.0.1:")


@pytest.mark.parametrize("name", LASTING)
def test_services_that_last(name: str) -> None:
    service = LASTING[name]
    assert service["restart"] == "unless-stopped"
    assert service["logging"]["options"].keys() == {"max-size", "max-file"}
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["healthcheck"]["test"]
    assert service["mem_limit"]
    assert "oom_score_adj" in service


@pytest.mark.parametrize("name", BASE)
def test_no_service_is_privileged(name: str) -> None:
    service = BASE[name]
    assert not service.keys() & {"privileged", "pid", "ipc", "devices", "userns_mode", "cgroup_parent"}
    assert service.get("network_mode") in (None, "none")
    sockets = [volume for volume in service.get("volumes", []) if "docker.sock" in str(volume)]
    assert bool(sockets) == (name == "socket-proxy")


def test_what_listens_without_a_key_says_so_and_why() -> None:
    for dialect in ("claude-agent-http", "sdk-server"):
        file = ROOT / f"docker-compose.{dialect}.yml"
        app = services(file)["app"]
        assert app["environment"]["CARREL_ALLOW_INSECURE"] == "true"
        assert any(part.startswith(f"{dialect}=") and part.endswith(",auth=none") for part in app["command"])
        assert "loopback alone" in file.read_text()


def _prepare(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    script = (ROOT / "deploy/compose/prepare").read_text()
    script = re.sub(r"(?<![\w}])/(secrets|data|opt)/", rf"{tmp_path}/\1/", script).replace(
        " /data ", f" {tmp_path}/data "
    )
    for name in ("secrets/app", "secrets/postgres", "secrets/objects"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    given = {"CARREL_UID": "1000", "CARREL_GID": "1000", "POSTGRES_USER": "carrel", "POSTGRES_DB": "carrel"}
    given |= {"OBJECTS_PORT": "9000", "OBJECTS_BUCKET": "carrel"}
    return subprocess.run(
        ["/bin/sh", "-c", script, "prepare", *arguments],
        env={"PATH": "/usr/bin:/bin", **given, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )


@pytest.mark.requires("root")
def test_passwords_are_made_once(tmp_path: Path) -> None:
    made = []
    for _ in range(2):
        assert _prepare(tmp_path, "postgres").returncode == 0
        made.append((tmp_path / "secrets/postgres/password").read_text())
    assert made[0] == made[1]
    assert re.fullmatch(r"[A-Za-z0-9]{30,}", made[0])
    address = tmp_path / "secrets/app/database-url"
    assert address.read_text() == f"postgresql://carrel:{made[0]}@postgres:5432/carrel"
    assert (address.stat().st_mode & 0o777, address.stat().st_uid) == (0o600, 1000)
    assert _prepare(tmp_path, "postgres", POSTGRES_PASSWORD="a-password-of-my-own").returncode == 0
    assert address.read_text() == "postgresql://carrel:a-password-of-my-own@postgres:5432/carrel"


@pytest.mark.requires("root")
def test_keys_of_the_store_of_objects_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for _ in range(2):
        assert _prepare(tmp_path, "objects").returncode == 0
        made.append([(tmp_path / "secrets/objects" / name).read_text() for name in ("access-key", "secret-key")])
    assert made[0] == made[1]
    assert [len(key) for key in made[0]] == [20, 40]
    told = (tmp_path / "secrets/app/objects.env").read_text().replace("/secrets/", "/secrets/app/")
    for line in told.splitlines():
        monkeypatch.setenv(*line.split("=", 1))
    monkeypatch.setenv("CARREL_DATA", str(tmp_path))
    objects = load_settings(config=ROOT / "deploy/compose/config.yaml").objects
    assert (objects.kind, objects.endpoint, objects.bucket) == ("s3", "http://objects:9000", "carrel")
    keys = (objects.access_key, objects.secret_key)
    assert [key.get_secret_value() for key in keys if key is not None] == made[0]
    for name in ("objects-access-key", "objects-secret-key"):
        about = (tmp_path / "secrets/app" / name).stat()
        assert (about.st_mode & 0o777, about.st_uid) == (0o600, 1000)
    mine = {"OBJECTS_ACCESS_KEY": "a-key-of-my-own", "OBJECTS_SECRET_KEY": "a-secret-of-my-own"}
    assert _prepare(tmp_path, "objects", **mine).returncode == 0
    assert (tmp_path / "secrets/app/objects-secret-key").read_text() == "a-secret-of-my-own"


@pytest.mark.parametrize(
    ("service", "variables", "words"),
    [
        ("postgres", {"POSTGRES_PASSWORD": "postgres"}, "POSTGRES_PASSWORD is a published default"),
        ("postgres", {"POSTGRES_PASSWORD": "short"}, "at least 16"),
        ("postgres", {"POSTGRES_PASSWORD": "with:colons@and/slashes"}, "letters, digits"),
        ("objects", {"OBJECTS_ACCESS_KEY": "minioadmin"}, "OBJECTS_ACCESS_KEY is a published default"),
        ("objects", {"OBJECTS_SECRET_KEY": "RustFSadmin"}, "OBJECTS_SECRET_KEY is a published default"),
        ("objects", {"OBJECTS_SECRET_KEY": "twelve-bytes"}, "at least 16"),
        ("", {"CARREL_UID": "0"}, "never root"),
        ("", {"CARREL_UID": "me"}, "never root"),
        ("", {"CARREL_GID": "100"}, "1000 or more"),
    ],
)
def test_what_is_unsafe_is_refused(tmp_path: Path, service: str, variables: dict[str, str], words: str) -> None:
    done = _prepare(tmp_path, *([service] if service else []), **variables)
    assert done.returncode == 1
    assert words in done.stderr
    assert list((tmp_path / "secrets").rglob("*.*")) == []


def test_the_start_script_tells_how_it_is_used() -> None:
    helped = subprocess.run([ROOT / "docker-start.sh", "--help"], capture_output=True, text=True, check=True)
    for option in ("--postgres", "--objects", "--bind-mounts", "--build", "--stop", "--down"):
        assert option in helped.stdout
    assert subprocess.run([ROOT / "docker-start.sh", "--no"], capture_output=True, check=False).returncode == 2
