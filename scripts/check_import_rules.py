#!/usr/bin/env python3
"""Who may import whom, held by a machine.

The rule:

    A package stands in a row, and imports only what stands to its left:

        hostnames ← model, errors ← protocol ← abc ← budgets ← {parts} ← api ← cli

    `hostnames` is arithmetic over names, which policies and the egress proxy must do alike: the standard library alone.
    `model` and `errors` do no I/O: of ours they import each other and hostnames alone, and of others pydantic alone.
    `protocol` is what gateway, runner and clients say to each other: model, errors and pydantic alone.
    `abc` holds the contracts. It names concrete types for typing only, under `if TYPE_CHECKING:`.
    `budgets` is arithmetic over the contracts that several parts need: model, errors, protocol and abc alone.
    The parts (store, buses, objects, channels, egress, runtimes, sessions, model_gateway, mcp_gateway, tools, auth, workspaces,
    observability, socket_proxy)
    see contracts and never one another, save that sessions may import workspaces, and tools sessions.
    `runner` and `client` live on the far side of a wire: protocol, model and errors alone.
    `api` speaks for the parts; `cli` alone wires: it alone imports settings and runs servers.
    `killpoints` imports the standard library alone; the parts, api and cli pass or arm them, the sandbox's side never.
    `testing` is for authors of plug-ins: it may import all but api, cli and settings, and nobody imports it.
    `carrel/__init__.py` imports nothing of ours, because every process of ours pays for what it imports.
    The Agent SDK has one door, `runner/agent.py`; the environment has one reader, `settings/sources.py`.

It covers imports inside functions and under TYPE_CHECKING, relative ones, and `import_module("a literal")`.
It sees no name that is put together at run time. A new package has no place until it is written down here.

    scripts/check_import_rules.py [FOLDER OF THE PACKAGE]    exit code 1 and one line for each breach
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = "carrel"

PYDANTIC = frozenset({"pydantic", "pydantic_core"})
CORE = frozenset({"hostnames", "model", "errors", "protocol"})
PARTS = frozenset(
    {
        "auth",
        "buses",
        "channels",
        "egress",
        "mcp_gateway",
        "model_gateway",
        "observability",
        "objects",
        "runtimes",
        "sessions",
        "socket_proxy",
        "store",
        "tools",
        "workspaces",
    }
)


@dataclass(frozen=True)
class Rule:
    """What one package may import of ours, and the sentence to quote when it imports more."""

    sentence: str
    ours: frozenset[str] = frozenset()
    typing_only: frozenset[str] = frozenset()
    others: frozenset[str] | None = None  # None: any; the standard library is always free


PART_SENTENCE = "the parts see model, errors, protocol, abc and budgets, and never one another"

RULES: dict[str, Rule] = {
    "__init__": Rule("carrel/__init__.py imports nothing of ours: every process pays for it"),
    "__main__": Rule("__main__ hands over to cli", ours=frozenset({"cli"})),
    "hostnames": Rule("hostnames imports the standard library alone", others=frozenset()),
    "model": Rule(
        "model and errors do no I/O: they import each other, hostnames, pydantic and the standard library alone",
        ours=frozenset({"errors", "hostnames"}),
        others=PYDANTIC,
    ),
    "errors": Rule(
        "model and errors do no I/O: they import each other, hostnames, pydantic and the standard library alone",
        ours=frozenset({"model", "hostnames"}),
        others=PYDANTIC,
    ),
    "protocol": Rule(
        "protocol imports model, errors, pydantic and the standard library alone",
        ours=frozenset({"model", "errors", "hostnames"}),
        others=PYDANTIC,
    ),
    "abc": Rule(
        "abc imports model, errors and protocol; concrete types come in under TYPE_CHECKING alone",
        ours=CORE,
        typing_only=PARTS,
    ),
    "budgets": Rule("budgets imports model, errors, protocol and abc alone", ours=CORE | {"abc"}),
    "killpoints": Rule("killpoints imports the standard library alone", others=frozenset()),
    **{part: Rule(PART_SENTENCE, ours=CORE | {"abc", "budgets", "killpoints"}) for part in PARTS},
    "sessions": Rule(
        f"{PART_SENTENCE}, save that sessions may import workspaces",
        ours=CORE | {"abc", "budgets", "killpoints", "workspaces"},
    ),
    "tools": Rule(
        f"{PART_SENTENCE}, save that tools may import sessions",
        ours=CORE | {"abc", "budgets", "killpoints", "sessions"},
    ),
    "runner": Rule("runner lives in the sandbox: it imports protocol, model and errors alone", ours=CORE),
    "client": Rule("client lives with its user: it imports protocol, model and errors alone", ours=CORE),
    "settings": Rule("settings holds values: it imports model, errors and protocol alone", ours=CORE),
    "api": Rule("api imports the parts and all to their left", ours=CORE | PARTS | {"abc", "budgets", "killpoints"}),
    "cli": Rule(
        "cli wires all that runs in production; testing is not part of that",
        ours=CORE | PARTS | {"abc", "api", "budgets", "client", "killpoints", "runner", "settings"},
    ),
    "testing": Rule(
        "testing imports all but api, cli and settings",
        ours=CORE | PARTS | {"abc", "budgets", "client", "killpoints", "runner"},
    ),
}

# Imported in one file, and nowhere else.
ONE_DOOR: dict[str, str] = {
    "claude_agent_sdk": "runner/agent.py",
}
# The preloaded parent imports modules by name so that its children need not.
PRELOADS_BY_NAME = frozenset({"runner/nursery.py"})

ENVIRONMENT_SENTENCE = "only settings/sources.py reads the environment; others are handed values"
ENVIRONMENT_NAMES = frozenset({"environ", "environb", "getenv", "getenvb"})
ENVIRONMENT_READERS = frozenset(
    {
        "settings/sources.py",
        "runner/nursery.py",  # clears it before anything of a session runs
        "runner/__main__.py",  # adds to what the image says, before anything of a session runs
    }
)


@dataclass(frozen=True)
class Breach:
    file: str
    line: int
    what: str
    sentence: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.what}: {self.sentence}"


@dataclass(frozen=True)
class Import:
    """One imported module by its full dotted name."""

    module: str
    line: int
    typing_only: bool = False
    by_name: bool = False


def main(arguments: list[str]) -> int:
    package = Path(arguments[0]) if arguments else Path(__file__).resolve().parent.parent / "src" / ROOT
    if not (package / "__init__.py").is_file():
        print(f"{package} is not a package", file=sys.stderr)
        return 2
    breaches = check(package)
    for breach in breaches:
        print(breach)
    return 1 if breaches else 0


def check(package: Path) -> list[Breach]:
    """Every breach in the package, in the order of its files and lines."""
    breaches: list[Breach] = []
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        found = [*_import_breaches(relative, tree), *_environment_breaches(relative, tree)]
        breaches += sorted(found, key=lambda breach: breach.line)
    return breaches


def _import_breaches(file: str, tree: ast.Module) -> Iterator[Breach]:
    home = file.split("/")[0].removesuffix(".py")
    shown = f"{ROOT}/{file}"
    rule = RULES.get(home)
    if rule is None:
        yield Breach(shown, 1, f"{home} has no place", "every package is named in scripts/check_import_rules.py")
        return
    for found in _imports(file, tree):
        top, _, rest = found.module.partition(".")
        if top == ROOT:
            target = rest.split(".")[0]
            allowed = rule.ours | (rule.typing_only if found.typing_only else frozenset())
            if target and target != home and target not in allowed:
                yield Breach(shown, found.line, f"imports {ROOT}.{target}", rule.sentence)
            continue
        door = ONE_DOOR.get(top)
        if door is not None and file != door and not (found.by_name and file in PRELOADS_BY_NAME):
            yield Breach(shown, found.line, f"imports {top}", f"{top} is imported in {door} alone")
        elif rule.others is not None and top not in rule.others and top not in sys.stdlib_module_names:
            yield Breach(shown, found.line, f"imports {top}", rule.sentence)


def _imports(file: str, tree: ast.Module) -> Iterator[Import]:
    package = [ROOT, *file.split("/")[:-1]]
    for node, typing_only in _walk(tree, typing_only=False):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, typing_only)
        elif isinstance(node, ast.ImportFrom):
            base = _base(node, package)
            if base == ROOT:  # `from carrel import store` names a package of ours; `__version__` does not
                for alias in node.names:
                    dunder = alias.name.startswith("__")
                    yield Import(ROOT if dunder else f"{ROOT}.{alias.name}", node.lineno, typing_only)
            else:
                yield Import(base, node.lineno, typing_only)
        elif isinstance(node, ast.Call) and _name(node.func) in {"import_module", "__import__"} and node.args:
            argument = node.args[0]
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield Import(argument.value, node.lineno, typing_only, by_name=True)


def _base(node: ast.ImportFrom, package: list[str]) -> str:
    if not node.level:
        return node.module or ""
    parents = package[: len(package) - node.level + 1]
    return ".".join([*parents, node.module] if node.module else parents)


def _walk(node: ast.AST, *, typing_only: bool) -> Iterator[tuple[ast.AST, bool]]:
    """Like `ast.walk`, and says of each node whether it stands under `if TYPE_CHECKING:`."""
    yield node, typing_only
    if isinstance(node, ast.If) and _name(node.test) == "TYPE_CHECKING":
        for child in node.body:
            yield from _walk(child, typing_only=True)
        for child in node.orelse:
            yield from _walk(child, typing_only=typing_only)
        return
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, typing_only=typing_only)


def _environment_breaches(file: str, tree: ast.Module) -> Iterator[Breach]:
    if file in ENVIRONMENT_READERS:
        return
    os_names = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == "os"
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ENVIRONMENT_NAMES and _name(node.value) in os_names:
            yield Breach(f"{ROOT}/{file}", node.lineno, f"reads os.{node.attr}", ENVIRONMENT_SENTENCE)
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            for alias in node.names:
                if alias.name in ENVIRONMENT_NAMES:
                    yield Breach(f"{ROOT}/{file}", node.lineno, f"reads os.{alias.name}", ENVIRONMENT_SENTENCE)
        elif isinstance(node, ast.keyword) and node.arg == "envvar":  # Typer reads it for an option
            yield Breach(f"{ROOT}/{file}", node.value.lineno, "reads a variable through envvar=", ENVIRONMENT_SENTENCE)


def _name(node: ast.AST) -> str:
    """`x` and `y.x` are both called x."""
    if isinstance(node, ast.Name):
        return node.id
    return node.attr if isinstance(node, ast.Attribute) else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
