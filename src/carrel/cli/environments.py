"""`carrel env`: apply, list, show, delete and export environments; start and stop them, see how they do, sign in for one. `carrel secrets`: set, list, delete."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from carrel.cli.context import context_of
from carrel.cli.keys import AsJson
from carrel.cli.logins import login, logout
from carrel.cli.output import clean, print_json, print_table, when
from carrel.client import Carrel, EnvironmentStatus
from carrel.errors import EnvironmentNotFound, OperatorError

__all__ = ["app", "secrets"]

app = typer.Typer(help="Apply, list, show, delete and export environments; start and stop them.", no_args_is_help=True)
secrets = typer.Typer(help="Set, list and delete secrets of environments.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="The environment.")]
Version = Annotated[int | None, typer.Option("--version", help="Which version. (default: the newest)")]


app.command("login")(login)
app.command("logout")(logout)


@app.command("apply")
def apply_environments(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="YAML, one or several documents; - for stdin.")],
) -> None:
    """Write environments from a file, and say what has changed. What is as it says already stays as it is."""
    documents = list(_documents(file))
    with context_of(context).connect() as carrel:
        for name, spec in documents:
            before = _spec_of(carrel, name)
            environment, new = carrel.environments.put(name, spec)
            sys.stdout.write(f"{clean(name)}  version {environment.version}  {'new' if new else 'unchanged'}\n")
            for line in _changes(before, environment.spec) if new else ():
                sys.stdout.write(f"  {clean(line)}\n")


def _documents(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    text = sys.stdin.read() if str(file) == "-" else file.read_text()
    try:
        found = [each for each in yaml.safe_load_all(text) if each is not None]
    except yaml.YAMLError as error:
        raise OperatorError(f"{file} is not YAML: {str(error).splitlines()[0]}") from error
    if not found:
        raise OperatorError(f"{file} has no environment in it.")
    for document in found:
        if not isinstance(document, dict) or not isinstance(document.get("name"), str):
            raise OperatorError(f"{file}: each document is a mapping with a name.")
        spec = {key: value for key, value in document.items() if key != "name"}
        if (mcp := spec.pop("mcp_json", None)) is not None:
            options = spec.setdefault("options", {})
            options["mcp_servers"] = {**_servers(file.parent / str(mcp)), **(options.get("mcp_servers") or {})}
        yield document["name"], spec


def _servers(path: Path) -> dict[str, Any]:
    """The servers of a `.mcp.json`."""
    try:
        found = json.loads(path.read_text())["mcpServers"]
    except (ValueError, KeyError, TypeError) as error:
        raise OperatorError(f"{path} is no .mcp.json: it needs mcpServers.") from error
    return dict(found)


def _spec_of(carrel: Carrel, name: str) -> dict[str, Any]:
    try:
        return carrel.environments.get(name).spec
    except EnvironmentNotFound:
        return {}


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {p: v for key, part in value.items() for p, v in _flat(part, f"{path}.{key}" if path else key).items()}
    return {path: value}


def _changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    old, new = (_flat(spec) if spec else {} for spec in (before, after))
    said = []
    for path in sorted({*old, *new}):
        if path not in old:
            said.append(f"+ {path}: {json.dumps(new[path], ensure_ascii=False)}")
        elif path not in new:
            said.append(f"- {path}: {json.dumps(old[path], ensure_ascii=False)}")
        elif old[path] != new[path]:
            one, other = (json.dumps(spec[path], ensure_ascii=False) for spec in (old, new))
            said.append(f"~ {path}: {one} -> {other}")
    return said


@app.command("list")
def list_environments(context: typer.Context, as_json: AsJson = False) -> None:
    """List environments, each in its newest version."""
    with context_of(context).connect() as carrel:
        found = list(carrel.environments.list())
    if as_json:
        print_json(found)
        return
    rows = [
        [
            each.name,
            str(each.version),
            each.spec.get("runtime", ""),
            ", ".join(each.spec.get("allowed_roles", ["user"])),
            when(each.created_at) if each.version else "",
            each.spec.get("description", ""),
        ]
        for each in found
    ]
    print_table(["environment", "version", "runtime", "for", "written", "description"], rows)


@app.command("show")
def show_environment(context: typer.Context, name: Name, version: Version = None) -> None:
    """Show an environment, with its versions."""
    with context_of(context).connect() as carrel:
        environment = carrel.environments.get(name, version=version)
        versions = list(carrel.environments.versions(name))
    print_json({**environment.model_dump(mode="json"), "versions": [each.version for each in versions]})


@app.command("export")
def export_environment(context: typer.Context, name: Name, version: Version = None) -> None:
    """Write an environment as YAML, as `carrel env apply` takes it."""
    with context_of(context).connect() as carrel:
        environment = carrel.environments.get(name, version=version)
    document = {"name": environment.name, **environment.spec}
    sys.stdout.write(clean(yaml.safe_dump(document, sort_keys=False, allow_unicode=True)))


@app.command("delete")
def delete_environments(
    context: typer.Context, names: Annotated[list[str], typer.Argument(metavar="NAME...", help="The environments.")]
) -> None:
    """Delete environments with all of their versions; refused while sessions are in them."""
    with context_of(context).connect() as carrel:
        for name in names:
            carrel.environments.delete(name)
            sys.stdout.write(f"{clean(name)}  deleted\n")


@app.command("status")
def show_status(context: typer.Context, name: Name, as_json: AsJson = False) -> None:
    """Show whether it takes prompts, its warm pool, its sessions, and what is wrong with it."""
    with context_of(context).connect() as carrel:
        _show(carrel.environments.status(name), as_json=as_json)


@app.command("start")
def start_environment(context: typer.Context, name: Name, as_json: AsJson = False) -> None:
    """Have it take prompts, and its warm pool be filled."""
    with context_of(context).connect() as carrel:
        _show(carrel.environments.start(name), as_json=as_json)


@app.command("stop")
def stop_environment(context: typer.Context, name: Name, as_json: AsJson = False) -> None:
    """Have it take no more prompts. Those it has taken are answered."""
    with context_of(context).connect() as carrel:
        _show(carrel.environments.stop(name), as_json=as_json)


def _show(status: EnvironmentStatus, *, as_json: bool) -> None:
    if as_json:
        print_json(status)
        return
    lines = {
        "environment": f"{status.name}, version {status.version}",
        "takes prompts": "yes" if status.running else "no, it is stopped",
        "warm": f"{status.warm} of {status.warm_wanted}" + (f", {status.starting} starting" if status.starting else ""),
        "sessions": f"{status.sessions}, {status.live_sessions} with a sandbox",
    }
    for name, value in lines.items():
        print(f"{name + ':':15}{value}")
    for problem in status.problems:
        print(f"{problem.code}: {problem.message}", file=sys.stderr)


@secrets.command("set")
def set_secret(
    context: typer.Context, name: Annotated[str, typer.Argument(metavar="NAME", help="The secret.")]
) -> None:
    """Keep a secret; its value is read from stdin, to the end, without the last line feed."""
    value = sys.stdin.read().removesuffix("\n")
    with context_of(context).connect() as carrel:
        carrel.secrets.put(name, value)
    sys.stdout.write(f"{clean(name)}  set\n")


@secrets.command("list")
def list_secrets(context: typer.Context, as_json: AsJson = False) -> None:
    """List the names of secrets; their values are never told."""
    with context_of(context).connect() as carrel:
        found = list(carrel.secrets.list())
    if as_json:
        print_json(found)
        return
    rows = [[each.name, each.key_id, when(each.updated_at), each.updated_by or ""] for each in found]
    print_table(["secret", "key", "set", "by"], rows)


@secrets.command("delete")
def delete_secret(
    context: typer.Context, name: Annotated[str, typer.Argument(metavar="NAME", help="The secret.")]
) -> None:
    """Forget a secret that no environment uses."""
    with context_of(context).connect() as carrel:
        carrel.secrets.delete(name)
    sys.stdout.write(f"{clean(name)}  deleted\n")
