"""Where settings are said: the file, the environment, the command line. The only reader of the environment."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from carrel.errors import InvalidSettings
from carrel.settings.aliases import ALIASES, Alias, OldSession
from carrel.settings.names import Leaf, groups, leaves, nearest

__all__ = ["Given", "Layer", "command_line", "config_file", "environment", "known", "provider_environment", "read_file"]

_MAX_SECRET_BYTES = 65_536

_OLD = "CLAUDE_AGENT_"
_CONFIG = "CARREL_CONFIG"
_NOT_OURS = (
    _CONFIG,  # names the file of settings, and is none itself
    "CARREL_KEY",  # an example's, as the next
    "CARREL_URL",
    "CARREL_REQUIRE",  # the test suite's
    "CARREL_STRICT_LOOP",
    "CARREL_UPDATE_GOLDEN",
    "CARREL_SANDBOX",  # the mark of a sandbox: Carrel may be developed inside of one
    "CLAUDE_AGENT_SDK_",
)
"""Beginnings of variables that look like settings and are none."""


_PROVIDERS = (
    "ANTHROPIC_AWS_",
    "ANTHROPIC_BEDROCK_",
    "ANTHROPIC_DEFAULT_",
    "ANTHROPIC_SMALL_FAST_MODEL",
    "ANTHROPIC_VERTEX_",
    "AWS_",
    "CLAUDE_CODE_SKIP_BEDROCK_AUTH",
    "CLAUDE_CODE_SKIP_VERTEX_AUTH",
    "CLAUDE_CODE_USE_BEDROCK",
    "CLAUDE_CODE_USE_VERTEX",
    "CLOUD_ML_REGION",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "GOOGLE_CLOUD_PROJECT",
    "VERTEX_REGION_",
)
"""Beginnings of the variables by which Claude Code is told of Bedrock and Vertex (its documentation names them)."""


def provider_environment() -> dict[str, str]:
    """The variables of model providers that are set for this process; for `credentials: direct` alone."""
    return {name: value for name, value in os.environ.items() if value and name.startswith(_PROVIDERS)}


class Layer(IntEnum):
    """Who says it; the higher one wins."""

    DEFAULT = 0
    FILE = 1
    ENVIRONMENT = 2
    COMMAND_LINE = 3


@dataclass(frozen=True)
class Given:
    """Somebody says a setting."""

    name: str
    """The setting's own name."""
    value: Any
    layer: Layer
    written: str
    """The name it was said by."""
    where: str
    """Where that stands."""
    alias: Alias | None = None
    from_file: bool = False


@dataclass(frozen=True)
class _Known:
    """Every name there is."""

    leaves: Mapping[str, Leaf]
    """By dotted name; the older service's `session.` too."""
    names: Mapping[str, str]
    """What a file may write, to the setting's own name."""
    variables: Mapping[str, str]
    """What the environment may write, to the setting's own name."""
    groups: frozenset[str]


def _all_names() -> _Known:
    ours = {leaf.name: leaf for leaf in leaves()}
    old = {leaf.name: leaf for leaf in leaves(OldSession, "session.")}
    names = {name: name for name in (*ours, *old)}
    names |= {alias.name: alias.of for alias in ALIASES.values() if "." in alias.name}
    variables = {leaf.variable: leaf.name for leaf in ours.values()}
    variables |= {alias.name: alias.of for alias in ALIASES.values() if "." not in alias.name}
    return _Known(leaves=ours | old, names=names, variables=variables, groups=groups(names))


known = _all_names()


# ---------------------------------------------------------------------------------------------------------- the file


def config_file() -> Path | None:
    """The file that the environment names, for a command that names none."""
    named = os.environ.get(_CONFIG)
    return Path(named) if named else None


def read_file(path: Path) -> list[Given]:
    """What a YAML file says.

    Raises:
        InvalidSettings: it cannot be read, is not YAML, or has a name twice or one that is not ours.
    """
    try:
        loader = yaml.SafeLoader(path.read_text())
        root = loader.get_single_node()
        if root is None:
            return []
        if not isinstance(root, yaml.MappingNode):
            raise InvalidSettings(f"{path} must have a setting a line, such as `port: 8000`.")
        return list(_walk(loader, root, "", path))
    except OSError as error:
        raise InvalidSettings(f"The file {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InvalidSettings(f"The file {path} is not UTF-8.") from error
    except yaml.MarkedYAMLError as error:  # its own text quotes the file, which may hold secrets
        line = f":{error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        raise InvalidSettings(f"{path}{line} is not valid YAML: {error.problem}.") from None
    except yaml.YAMLError as error:
        raise InvalidSettings(f"{path} is not valid YAML: it has a character that is not allowed.") from error


def _walk(loader: yaml.SafeLoader, node: yaml.MappingNode, prefix: str, path: Path) -> Iterator[Given]:
    loader.flatten_mapping(node)
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        name = f"{prefix}{key_node.value}"
        line = key_node.start_mark.line + 1
        where = f"{path}:{line}"
        if name in seen:
            raise InvalidSettings(f"{where}: {name} is there twice, first in line {seen[name]}.")
        seen[name] = line
        secret = _secret_of(name, known.names)
        if name in known.names or secret is not None:
            value = loader.construct_object(value_node, deep=True)
            if secret is not None and value is None:
                continue
            yield _given(name, secret, value, Layer.FILE, where)
        elif name in known.groups or name == "":
            if isinstance(value_node, yaml.MappingNode):
                yield from _switch(name, not value_node.value, Layer.FILE, where)
                yield from _walk(loader, value_node, f"{name}.", path)
            elif value_node.tag.endswith(":null"):
                yield from _switch(name, True, Layer.FILE, where)
            else:
                raise InvalidSettings(f"{where}: {name} is a group of settings; write them below it, indented.")
        else:
            raise InvalidSettings(f"{where}: there is no setting {name!r}.{_hint(name, known.names)}")


def _switch(name: str, empty: bool, layer: Layer, where: str) -> Iterator[Given]:
    """`dialects: {sdk-server: {}}` says something although it holds nothing."""
    if empty and name.startswith("dialects."):
        yield Given(name, {}, layer, name, where)


# --------------------------------------------------------------------------------------------------- the environment


def environment(variables: Mapping[str, str] | None = None) -> list[Given]:
    """What the environment says. An empty variable says nothing.

    Raises:
        InvalidSettings: a variable of ours is not a setting, or has not the form of its value.
    """
    found = []
    for spelled, text in sorted((os.environ if variables is None else variables).items()):
        variable = spelled.upper()
        if not text:
            continue
        secret = _secret_of(variable, known.variables)
        if variable in known.variables or secret is not None:
            name = known.variables.get(variable, "")
            value = text if secret is not None else _parsed(known.leaves[name], text, spelled)
            found.append(_given(variable, secret, value, Layer.ENVIRONMENT, spelled))
        elif variable.startswith(("CARREL_", _OLD)) and not variable.startswith(_NOT_OURS):
            group = _group_of(variable)
            if group is None:
                raise InvalidSettings(
                    f"There is no setting for the environment variable {spelled}.{_hint(variable, known.variables)}"
                )
            found += _flattened(group, _json(text, spelled, "a mapping"), Layer.ENVIRONMENT, spelled)
    return found


def _group_of(variable: str) -> str | None:
    """A whole group in JSON: `CARREL_LIMITS='{"max_sessions": 20}'`."""
    for group in known.groups:
        if variable == "CARREL_" + group.upper().replace("-", "_").replace(".", "__"):
            return group
    return None


# -------------------------------------------------------------------------------------------------- the command line


def command_line(overrides: Mapping[str, Any] | None, assignments: Sequence[str] = ()) -> list[Given]:
    """What the command line says.

    Args:
        overrides: options by the settings' names, groups as mappings; a top one of None says nothing.
        assignments: `NAME=VALUE`, as `--set` takes them.

    Raises:
        InvalidSettings: there is no such setting, its value has not its form, or it is a secret.
    """
    found: list[Given] = []
    for name, value in (overrides or {}).items():
        if value is not None:
            found += _flattened(name, value, Layer.COMMAND_LINE, "command line")
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        name = name.strip()
        where = f"--set {name}"
        if not equals or not name:
            raise InvalidSettings("--set wants NAME=VALUE, such as --set limits.max_sessions=20.")
        secret = _secret_of(name, known.names)
        if name in known.names or secret is not None:
            if secret is None and known.leaves[known.names[name]].secret:
                raise InvalidSettings(
                    f"{where}: everyone on this host can read a command line. Set the environment variable, or "
                    f"--set {name}_file=FILE."
                )
            value = text if secret is not None else _parsed(known.leaves[known.names[name]], text, where)
            found.append(_given(name, secret, value, Layer.COMMAND_LINE, where))
        elif name in known.groups:
            found += _flattened(name, _json(text, where, "a mapping"), Layer.COMMAND_LINE, where)
        else:
            raise InvalidSettings(f"{where}: there is no such setting.{_hint(name, known.names)}")
    return found


def _flattened(name: str, value: Any, layer: Layer, where: str) -> Iterator[Given]:
    """The settings of a group that is given as a whole."""
    if isinstance(value, BaseModel):
        value = {field: getattr(value, field) for field in value.model_fields_set}
    if name in known.names:
        yield _given(name, None, value, layer, where)
    elif name in known.groups and isinstance(value, Mapping):
        yield from _switch(name, not value, layer, where)
        for key, item in value.items():
            yield from _flattened(f"{name}.{key}", item, layer, where)
    elif name in known.groups:
        raise InvalidSettings(f"{where}: {name} is a group of settings, so it wants a mapping.")
    else:
        raise InvalidSettings(f"{where}: there is no setting {name!r}.{_hint(name, known.names)}")


# -------------------------------------------------------------------------------------------------------- what is said


def _given(written: str, secret: str | None, value: Any, layer: Layer, where: str) -> Given:
    """One setting as it was said; a secret from the file that was named."""
    if secret is not None:
        original = _without_file(written)
        return Given(secret, _content(value, where), layer, written, where, ALIASES.get(original), from_file=True)
    alias = ALIASES.get(written)
    name = alias.of if alias is not None else known.names.get(written) or known.variables[written]
    return Given(name, value, layer, written, where, alias)


def _without_file(name: str) -> str:
    return name[: -len("_file")]


def _secret_of(name: str, names: Mapping[str, str]) -> str | None:
    """The secret setting whose file a name such as `jwt.secret_file` names."""
    if name in names or not name.lower().endswith("_file"):
        return None
    found = names.get(_without_file(name))
    return found if found is not None and known.leaves[found].secret else None


def _content(path: Any, where: str) -> str:
    if not isinstance(path, str):
        raise InvalidSettings(f"{where}: wants a file's path.")
    try:
        with Path(path).expanduser().open("rb") as file:
            text = file.read(_MAX_SECRET_BYTES + 1).decode().rstrip("\r\n")
    except OSError as error:
        raise InvalidSettings(f"{where}: the file {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError:
        raise InvalidSettings(f"{where}: the file {path} is not a text.") from None
    if not text or len(text) >= _MAX_SECRET_BYTES:
        raise InvalidSettings(f"{where}: the file {path} is {'too large' if text else 'empty'}; it wants a secret.")
    return text


def _parsed(leaf: Leaf, text: str, where: str) -> Any:
    """A value that was written as text."""
    if leaf.optional and text == "null":
        return None
    if leaf.structured or (leaf.is_list and text.lstrip().startswith("[")):
        return _json(text, where, leaf.allowed)
    if leaf.is_list:
        return [part.strip() for part in text.split(",") if part.strip()]
    return text


def _json(text: str, where: str, wanted: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise InvalidSettings(f"{where}: is not valid JSON; it wants {wanted}.") from None


def _hint(name: str, names: Mapping[str, str]) -> str:
    near = nearest(name, names)
    return f" Did you mean {near!r}?" if near is not None else " `carrel settings` lists them all."
