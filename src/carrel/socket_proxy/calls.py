"""The calls of the Engine API that are passed on, all of them. What is not here is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from carrel.errors import EngineCallRefused

__all__ = ["CALLS", "Call", "Scope", "checked_filters", "find"]

_NAME = r"(?P<name>[A-Za-z0-9][A-Za-z0-9_.-]{0,127})"
_IMAGE = r"(?P<name>[A-Za-z0-9][A-Za-z0-9_.:/@-]{0,254})"
_VERSION = re.compile(r"/v1\.(\d{2})(?=/)")
# Older ones read fields that newer ones ignore: before 1.24 even a start could say what the container may do.
_OLDEST_MINOR = 40
_FILTERS = frozenset({"event", "exited", "health", "id", "label", "name", "status", "type"})


class Scope(StrEnum):
    """What a call is about, and so what is looked at before it is passed on."""

    ENGINE = "engine"
    IMAGE = "image"
    CREATE = "create"
    LIST = "list"
    EVENTS = "events"
    INSPECT = "inspect"
    CONTAINER = "container"
    START = "start"
    ATTACH = "attach"


@dataclass(frozen=True)
class Call:
    """One call that is passed on."""

    method: str
    path: str
    """Without the version; `{}` is the name or id of a container or an image."""
    scope: Scope
    query: frozenset[str] = frozenset()

    def match(self, method: str, path: str) -> str | None:
        """The name in the path, an empty one where the call has none; None where it is another call."""
        name = _IMAGE if self.scope is Scope.IMAGE else _NAME
        found = re.fullmatch(re.escape(self.path).replace(r"\{\}", name), path)
        if method != self.method or found is None:
            return None
        return found.groupdict().get("name") or ""


def _call(method: str, path: str, scope: Scope, *query: str) -> Call:
    return Call(method, path, scope, frozenset(query))


CALLS = (
    _call("GET", "/_ping", Scope.ENGINE),
    _call("HEAD", "/_ping", Scope.ENGINE),
    _call("GET", "/version", Scope.ENGINE),
    _call("GET", "/info", Scope.ENGINE),
    _call("GET", "/images/{}/json", Scope.IMAGE),
    _call("POST", "/containers/create", Scope.CREATE, "name", "platform"),
    _call("GET", "/containers/json", Scope.LIST, "all", "filters", "limit", "size"),
    _call("GET", "/events", Scope.EVENTS, "filters", "since", "stream", "until"),
    _call("GET", "/containers/{}/json", Scope.INSPECT, "size"),
    _call("POST", "/containers/{}/start", Scope.START),
    _call("POST", "/containers/{}/attach", Scope.ATTACH, "detachKeys", "logs", "stderr", "stdin", "stdout", "stream"),
    _call("POST", "/containers/{}/wait", Scope.CONTAINER, "condition"),
    _call("POST", "/containers/{}/kill", Scope.CONTAINER, "signal"),
    _call("POST", "/containers/{}/stop", Scope.CONTAINER, "signal", "t"),
    _call("GET", "/containers/{}/stats", Scope.CONTAINER, "one-shot", "stream"),
    _call(
        "GET",
        "/containers/{}/logs",
        Scope.CONTAINER,
        *("follow", "since", "stderr", "stdout", "tail", "timestamps", "until"),
    ),
    _call("DELETE", "/containers/{}", Scope.CONTAINER, "force", "v"),
)


def find(method: str, path: str, query: Mapping[str, str]) -> tuple[Call, str, str]:
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
        name = call.match(method, path)
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
