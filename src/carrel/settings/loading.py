"""From all that is said to one frozen object, and to the lines that `carrel settings` prints."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import SecretStr, ValidationError
from pydantic_core import ErrorDetails, to_json

from carrel.errors import InvalidSettings
from carrel.settings.aliases import OLD_DEFAULTS, OLD_PORTS, OldSession, database_url
from carrel.settings.model import Settings
from carrel.settings.names import Leaf, leaves
from carrel.settings.sources import Given, Layer, command_line, config_file, environment, known, read_file

__all__ = ["SettingLine", "describe", "load_settings"]

_SECRET = "********"
_NATIVE_PORT_BESIDE = 8100

Said = dict[str, Given]


@dataclass(frozen=True)
class SettingLine:
    """A setting as `carrel settings` shows it."""

    name: str
    value: str
    source: str
    description: str
    variable: str


def load_settings(
    config: Path | None = None, overrides: Mapping[str, Any] | None = None, assignments: Sequence[str] = ()
) -> Settings:
    """Read every setting.

    Args:
        config: the YAML file; without it that of CARREL_CONFIG, else `DATA/config.yaml` where it exists.
        overrides: what the command line's options say; values of None say nothing.
        assignments: what `--set` says: `NAME=VALUE`.

    Raises:
        InvalidSettings: a value is wrong, or somewhere is a name that is not one of ours.
        UnsafeConfiguration: the settings together are unsafe.
    """
    return _build(_said(config, overrides, assignments))


def describe(
    config: Path | None = None, overrides: Mapping[str, Any] | None = None, assignments: Sequence[str] = ()
) -> list[SettingLine]:
    """Every setting with its value, where the value comes from, and what it means. Secrets are not shown.

    Raises:
        InvalidSettings: as `load_settings`.
        UnsafeConfiguration: as `load_settings`.
    """
    said = _said(config, overrides, assignments)
    settings = _build(said)
    found = []
    for leaf in leaves():
        value = _value(settings, leaf.name)
        source = _source(said[leaf.name]) if leaf.name in said else "default"
        found.append(SettingLine(leaf.name, shown(leaf, value), source, leaf.description, leaf.variable))
    return found


def shown(leaf: Leaf, value: Any) -> str:
    """A value as a person may see it: no secret in it, empty for null."""
    if value is None:
        return ""
    if isinstance(value, SecretStr):
        return _SECRET
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, str):
        return _without_credentials(value)
    if leaf.is_list:
        return to_json(value).decode()
    if leaf.opaque:
        return to_json({name: _masked(server) for name, server in value.items()}).decode()
    return str(value)


def _masked(server: Mapping[str, Any]) -> dict[str, Any]:
    """An MCP server without what may hold secrets."""
    found: dict[str, Any] = {}
    for name, value in server.items():
        if name == "url" and isinstance(value, str):
            found[name] = _without_credentials(value).partition("?")[0]
        elif name in ("type", "command"):
            found[name] = value
        else:
            found[name] = _SECRET
    return found


def _without_credentials(text: str) -> str:
    return re.sub(r"(?<=://)[^/@\s]+(?=@)", _SECRET, text)


def _source(given: Given) -> str:
    if given.written in (given.name, given.where):
        return given.where
    return f"{given.where} ({given.written})" if given.layer is not Layer.DEFAULT else given.where


def _value(settings: Settings, name: str) -> Any:
    value: Any = settings
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else getattr(value, part)
        if value is None:
            return None
    return value


# ------------------------------------------------------------------------------------------------------ what is said


def _said(config: Path | None, overrides: Mapping[str, Any] | None, assignments: Sequence[str]) -> Said:
    """The one value of each setting that anybody names, in our names."""
    given = [*environment(), *command_line(overrides, assignments)]
    path = config or config_file() or _default_file(given)
    if path is not None:
        given += read_file(path)
    return _resolved(given)


def _default_file(given: list[Given]) -> Path | None:
    said = _winners([one for one in given if one.name == "data"])
    try:
        data = Settings(data=said["data"].value if "data" in said else Settings.model_fields["data"].default).data
    except ValidationError as error:
        raise InvalidSettings(_explain(error, said)) from error
    path = data / "config.yaml"
    return path if path.is_file() else None


def _resolved(given: list[Given]) -> Said:
    given = _counting(given)
    said = _winners(given)
    said = _winners([*given, *_storage(said)])
    said = {name: one for name, one in said.items() if not name.startswith("session.")}
    return said | _by_dialects(said)


def _counting(given: list[Given]) -> list[Given]:
    """Without what counts only where a dialect is on that is not on."""
    on = {_dialect(one.name) for one in given if one.alias is None or one.alias.dialect is None}
    return [one for one in given if one.alias is None or one.alias.dialect is None or one.alias.dialect in on]


def _dialect(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if parts[0] == "dialects" and len(parts) > 1 else None


def _winners(given: list[Given]) -> Said:
    """Of each setting what the highest layer says.

    Raises:
        InvalidSettings: one layer says it under two names, and not the same.
    """
    by_name: dict[str, list[Given]] = {}
    for one in given:
        by_name.setdefault(one.name, []).append(one)
    return {name: _winner(name, ones) for name, ones in by_name.items()}


def _winner(name: str, given: list[Given]) -> Given:
    top = max(one.layer for one in given)
    ones = [one for one in given if one.layer is top]
    ones = [one for one in ones if one.alias is None or not one.alias.ambient] or ones
    first = ones[0]
    for other in ones[1:]:
        if other.from_file != first.from_file:
            raise InvalidSettings(f"{_place(first)} and {_place(other)} are both given; give one of them.")
        if _text(other.value) != _text(first.value):
            raise InvalidSettings(
                f"{_place(first)} and {_place(other)} both set {name}, and not to the same value; give one of them."
            )
    return first


def _place(given: Given) -> str:
    return given.where if given.where == given.written else f"{given.written} ({given.where})"


def _text(value: Any) -> str:
    """Equal for values that mean the same although one was written as text."""
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    return str(value).lower() if isinstance(value, bool) else str(value)


def _storage(said: Said) -> list[Given]:
    """What the older service's `session.` names say together, in our names."""
    old = {name.removeprefix("session."): one for name, one in said.items() if name.startswith("session.")}
    if not old:
        return []
    storage = old.get("storage")
    if storage is None or storage.value is None:
        first = next(iter(old.values()))
        raise InvalidSettings(f"{_place(first)} says nothing without session.storage; set that to postgresql.")
    try:
        values = OldSession.model_validate({name: one.value for name, one in old.items() if one.value is not None})
    except ValidationError as error:
        raise InvalidSettings(_explain(error, said, prefix="session.")) from error
    here = replace(storage, name="memory", value=values.storage == "memory")
    url = database_url(values) if values.storage == "postgresql" else None
    return [here, replace(here, name="database.url", value=url)]


def _by_dialects(said: Said) -> Said:
    """What follows from the dialects that are on, where nobody says otherwise."""
    on = {dialect for name in said if (dialect := _dialect(name)) is not None}
    found: Said = {}

    def follow(name: str, value: Any, why: str) -> None:
        if name not in said:
            found[name] = Given(name, value, Layer.DEFAULT, name, why)

    for dialect in sorted(on):
        for name, value in OLD_DEFAULTS.get(dialect, {}).items():
            follow(name, value, f"default of {dialect}")
        host = said.get(f"dialects.{dialect}.host")
        if host is not None and host.alias is not None and dialect in OLD_PORTS:
            follow(f"dialects.{dialect}.port", OLD_PORTS[dialect], f"default of {dialect}")
    native = str(Settings.model_fields["port"].default)
    for dialect in sorted(on):
        name = f"dialects.{dialect}.port"
        taken = said.get(name) or found.get(name)
        wanted = said.get("port")
        if taken is not None and str(taken.value) == native and (wanted is None or str(wanted.value) == native):
            why = f"moved, because {name} is {native}"
            found["port"] = Given("port", _NATIVE_PORT_BESIDE, Layer.DEFAULT, "port", why)
    return found


# --------------------------------------------------------------------------------------------------------- the object


def _build(said: Said) -> Settings:
    nested: dict[str, Any] = {}
    for name, one in said.items():
        if one.value is None and name in known.leaves and not known.leaves[name].optional:
            continue  # an empty line of the file says nothing
        if isinstance(one.value, bool) and name in known.leaves and known.leaves[name].numeric:
            raise InvalidSettings(_wrong(name, one, known.leaves[name].allowed))
        *path, last = name.split(".")
        group = nested
        for part in path:
            group = group.setdefault(part, {})
        if _dialect(name) == last:
            group.setdefault(last, {})
        else:
            group[last] = one.value
    try:
        return Settings.model_validate(nested)
    except ValidationError as error:
        raise InvalidSettings(_explain(error, said)) from error


def _explain(error: ValidationError, said: Said, prefix: str = "") -> str:
    told: dict[str, None] = {}
    for detail in error.errors(include_url=False, include_input=False):
        told[_one(detail, said, prefix)] = None
    return " ".join(told)


def _one(detail: ErrorDetails, said: Said, prefix: str) -> str:
    parts = [str(part) for part in detail["loc"]]
    own_words = detail["msg"].removeprefix("Value error, ") if detail["type"] == "value_error" else None
    for count in range(len(parts), 0, -1):
        name = prefix + ".".join(parts[:count])
        if name not in known.leaves:
            continue
        leaf = known.leaves[name]
        if leaf.structured and own_words is None and count < len(parts):
            own_words = f"{'.'.join(parts[count:])}: {detail['msg']}"
        return _wrong(name, said.get(name), leaf.allowed, own_words)
    return f"{(own_words or detail['msg']).rstrip('.')}."


def _wrong(name: str, given: Given | None, allowed: str, own_words: str | None = None) -> str:
    """A sentence on a wrong value, without the value where it may be a secret."""
    place = ""
    if given is not None and given.where != name:
        place = f" ({given.where if given.written == name else _place(given)})"
    if own_words is not None:
        return f"{name}{place}: {own_words}."
    leaf = known.leaves[name]
    what = "this value"
    if given is not None and not leaf.opaque:
        what = to_json(given.value, fallback=str).decode()
    return f"{name}{place}: {what} is not allowed; it wants {allowed}."
