"""The real tree keeps the import rule, and a tree with one breach fails with the sentence it broke."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "scripts" / "check_import_rules.py"

_spec = importlib.util.spec_from_file_location("check_import_rules", SCRIPT)
assert _spec is not None
assert _spec.loader is not None
rules = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = rules  # dataclasses look their module up there
_spec.loader.exec_module(rules)


@pytest.fixture
def breaches(tmp_path):
    """Checks a tree of one file (its path within the package, its source) and answers the breaches as text."""

    def check(file: str, source: str) -> list[str]:
        package = tmp_path / "carrel"
        path = package / file
        path.parent.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").touch()
        path.write_text(source, encoding="utf-8")
        return [str(breach) for breach in rules.check(package)]

    return check


def test_the_real_tree_keeps_the_rule():
    assert [str(breach) for breach in rules.check(REPOSITORY / "src" / "carrel")] == []


ALLOWED = [
    ("model.py", "import enum\nfrom pydantic import BaseModel\nfrom carrel.errors import CarrelError\n"),
    ("protocol/frames.py", "from carrel import errors, model\nfrom carrel.protocol.events import Event\n"),
    ("abc.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from carrel.store import Store\n"),
    ("store/sql.py", "import sqlalchemy\nfrom ..abc import EventBus\nfrom .tables import events\n"),
    ("sessions/service.py", "from carrel import killpoints\nfrom carrel.workspaces import open_workspace\n"),
    ("runner/agent.py", "import claude_agent_sdk\nfrom claude_agent_sdk.types import Message\n"),
    ("runner/nursery.py", "import importlib, os\nimportlib.import_module('claude_agent_sdk')\nos.environ.clear()\n"),
    ("api/app.py", "from carrel import __version__\nfrom carrel.sessions import service\n"),
    ("cli/serve.py", "from carrel import api, settings\nfrom carrel.runtimes.local import LocalRuntime\n"),
    ("settings/sources.py", "import os\nos.environ.get('X')\n"),
    ("testing/fakes.py", "from carrel.store import memory\n"),
    ("__main__.py", "from carrel.cli import main\n"),
    ("store/urls.py", "environ = {}\nenviron['os']\nself.environ\n"),
]


@pytest.mark.parametrize(("file", "source"), ALLOWED, ids=[file for file, _ in ALLOWED])
def test_what_is_allowed(breaches, file, source):
    assert breaches(file, source) == []


PARTS = "never one another"
FORBIDDEN = [
    ("pure model", "model.py", "import sqlalchemy\n", 1, "imports sqlalchemy", "do no I/O"),
    ("pure errors", "errors.py", "from carrel.protocol import events\n", 1, "imports carrel.protocol", "do no I/O"),
    ("protocol looks right", "protocol/x.py", "from carrel import abc\n", 1, "imports carrel.abc", "protocol imports"),
    ("protocol does I/O", "protocol/x.py", "import httpx\n", 1, "imports httpx", "pydantic and the standard"),
    ("abc at run time", "abc.py", "from carrel.store import Store\n", 1, "imports carrel.store", "TYPE_CHECKING"),
    (
        "abc names api",
        "abc.py",
        "import typing\nif typing.TYPE_CHECKING:\n    from carrel.api import app\n",
        3,
        "imports carrel.api",
        "TYPE_CHECKING",
    ),
    (
        "the other branch of TYPE_CHECKING",
        "abc.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    pass\nelse:\n    import carrel.store.sql\n",
        5,
        "imports carrel.store",
        "TYPE_CHECKING",
    ),
    ("siblings", "store/sql.py", "import carrel.buses.memory\n", 1, "imports carrel.buses", PARTS),
    ("siblings, relative", "store/deep/sql.py", "from ...buses import x\n", 1, "imports carrel.buses", PARTS),
    ("siblings, from the root", "store/sql.py", "from .. import buses\n", 1, "imports carrel.buses", PARTS),
    ("inside a function", "auth/keys.py", "def f():\n    from carrel.store import s\n", 2, "carrel.store", PARTS),
    (
        "for typing, but not in abc",
        "sessions/owner.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from carrel.runtimes import local\n",
        3,
        "imports carrel.runtimes",
        PARTS,
    ),
    ("by name", "tools/x.py", "import importlib\nimportlib.import_module('carrel.api')\n", 2, "carrel.api", PARTS),
    ("one way only", "workspaces/x.py", "import carrel.sessions\n", 1, "imports carrel.sessions", PARTS),
    ("kill points", "killpoints.py", "import carrel.model\n", 1, "imports carrel.model", "standard library alone"),
    (
        "kill points in the sandbox",
        "runner/link.py",
        "from carrel import killpoints\n",
        1,
        "killpoints",
        "in the sandbox",
    ),
    ("budgets", "budgets.py", "from carrel import store\n", 1, "imports carrel.store", "budgets imports"),
    ("runner", "runner/link.py", "from carrel import abc\n", 1, "imports carrel.abc", "lives in the sandbox"),
    ("client", "client/http.py", "from carrel.api import app\n", 1, "imports carrel.api", "lives with its user"),
    ("api wires", "api/app.py", "from carrel import settings\n", 1, "imports carrel.settings", "to their left"),
    ("api looks right", "api/app.py", "from carrel.cli import main\n", 1, "imports carrel.cli", "to their left"),
    ("production tests", "cli/demo.py", "import carrel.testing\n", 1, "imports carrel.testing", "cli wires"),
    ("testing", "testing/x.py", "import carrel.cli\n", 1, "imports carrel.cli", "all but api, cli and settings"),
    ("settings", "settings/model.py", "import carrel.store\n", 1, "imports carrel.store", "settings holds values"),
    ("package root", "__init__.py", "from carrel.client import C\n", 1, "imports carrel.client", "every process pays"),
    ("a second door", "runner/link.py", "import claude_agent_sdk\n", 1, "claude_agent_sdk", "runner/agent.py alone"),
    ("preloading by import", "runner/nursery.py", "import claude_agent_sdk\n", 1, "claude_agent_sdk", "agent.py alone"),
    (
        "os.environ",
        "api/app.py",
        "import os\nos.environ['A']\n",
        2,
        "reads os.environ",
        "only settings/sources.py reads",
    ),
    (
        "os.getenv renamed",
        "cli/x.py",
        "import os as o\no.getenv('A')\n",
        2,
        "reads os.getenv",
        "only settings/sources.py",
    ),
    ("from os", "store/x.py", "from os import environ\n", 1, "reads os.environ", "only settings/sources.py reads"),
    ("envvar", "cli/x.py", "import typer\ntyper.Option(envvar='A')\n", 2, "envvar=", "only settings/sources.py reads"),
    ("no place", "helpers.py", "import enum\n", 1, "helpers has no place", "every package is named"),
]


@pytest.mark.parametrize(
    ("file", "source", "line", "what", "sentence"),
    [case[1:] for case in FORBIDDEN],
    ids=[case[0] for case in FORBIDDEN],
)
def test_one_breach_is_told_with_its_place_and_its_sentence(breaches, file, source, line, what, sentence):
    (breach,) = breaches(file, source)

    assert breach.startswith(f"carrel/{file}:{line}: ")
    assert what in breach
    assert sentence in breach


def test_every_part_of_the_rule_is_told_in_its_prose():
    assert [package for package in rules.RULES if package not in rules.__doc__] == ["__main__"]


def test_as_a_command(tmp_path):
    package = tmp_path / "carrel"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "model.py").write_text("import httpx\n")

    broken = subprocess.run([sys.executable, SCRIPT, package], capture_output=True, text=True, check=False)
    real = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=False)
    nowhere = subprocess.run([sys.executable, SCRIPT, tmp_path / "none"], capture_output=True, text=True, check=False)

    assert (broken.returncode, broken.stdout.count("\n")) == (1, 1)
    assert broken.stdout.startswith("carrel/model.py:1: imports httpx: ")
    assert (real.returncode, real.stdout) == (0, "")
    assert nowhere.returncode == 2
