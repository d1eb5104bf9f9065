"""Which of the calls that a gateway makes a request is, and with what; any other is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from carrel.errors import EngineCallRefused
from carrel.protocol.engine_calls import CALLS, EngineCall, Scope

__all__ = ["checked_filters", "find"]

_NAME = r"(?P<name>[A-Za-z0-9][A-Za-z0-9_.-]{0,127})"
_IMAGE = r"(?P<name>[A-Za-z0-9][A-Za-z0-9_.:/@-]{0,254})"
_VERSION = re.compile(r"/v1\.(\d{2})(?=/)")
# Older ones read fields that newer ones ignore: before 1.24 even a start could say what the container may do.
_OLDEST_MINOR = 40
_FILTERS = frozenset({"event", "exited", "health", "id", "label", "name", "status", "type"})


def _name_in(call: EngineCall, method: str, path: str) -> str | None:
    """The name in the path, an empty one where the call has none; None where it is another call."""
    name = _IMAGE if call.scope is Scope.IMAGE else _NAME
    found = re.fullmatch(re.escape(call.path).replace(r"\{\}", name), path)
    if method != call.method or found is None:
        return None
    return found.groupdict().get("name") or ""


def find(method: str, path: str, query: Mapping[str, str]) -> tuple[EngineCall, str, str]:
    """The call that a request makes, the version that it is made in (such as `/v1.41`, or nothing), and its name.

    Raises:
        EngineCallRefused: it is not passed on.
    """
    version = ""
    if (found := _VERSION.match(path)) is not None:
        if int(found[1]) < _OLDEST_MINOR:
            raise EngineCallRefused(f"The Engine API before 1.{_OLDEST_MINOR} is not passed on.")
        version, path = found[0], path[found.end() :]
    if ".." in path or "//" in path:
        raise EngineCallRefused("A path with `..` or `//` is not passed on.")
    for call in CALLS:
        name = _name_in(call, method, path)
        if name is None:
            continue
        if unknown := sorted(query.keys() - call.query):
            raise EngineCallRefused(f"{method} {call.path} is not passed on with `{unknown[0]}`.")
        return call, version, name
    raise EngineCallRefused(f"{method} {path} is not among the calls that are passed on.")


def checked_filters(text: str | None, label: str) -> str:
    """Filters that hold for containers with this label alone, whatever they were.

    Raises:
        EngineCallRefused: they cannot be read.
    """
    try:
        asked = json.loads(text) if text else {}
    except ValueError:
        asked = None
    if not isinstance(asked, dict):
        raise EngineCallRefused("Filters that are not a JSON object are not passed on.")
    filters: dict[str, list[str]] = {}
    for name, values in asked.items():
        if name not in _FILTERS:
            raise EngineCallRefused(f"The filter `{name}` is not passed on.")
        filters[name] = _values(name, values)
    filters["label"] = [*filters.get("label", []), label]
    return json.dumps(filters)


def _values(name: str, values: Any) -> list[str]:
    """A filter's values: a list, or, as older clients write it, an object of them."""
    if isinstance(values, dict):
        values = [value for value, wanted in values.items() if wanted is True]
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise EngineCallRefused(f"The filter `{name}` is not a list of texts.")
    return list(values)
