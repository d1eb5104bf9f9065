"""What a request asks for, by a stable word: also of one that was refused before it came to its route."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from re import Pattern

from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from starlette.routing import BaseRoute, Mount, compile_path
from starlette.types import Scope

__all__ = ["Operation", "Operations"]

_NAMES = {
    "query": "query.run",
    "stream": "session.stream",
    "export_session": "session.export",
    "list_models": "model.list",
    "list_children": "child.list",
}
"""Of routes that are not called after a verb and what it is done to."""
_STANDS_FOR = {
    "query": "session",
    "event": "session",
    "archive": "session",
    "network": "session",
    "tree": "session",
    "result": "session",
    "patch": "session",
    "request": "route",
    "environment_version": "environment",
}
"""What is named as the object where it is not what the action is called after."""


@dataclass(frozen=True)
class Operation:
    """One route and method."""

    method: str
    """`WEBSOCKET` for a WebSocket."""
    template: str
    """The path with names in the place of values: the same for every session."""
    action: str
    """Such as `session.create`."""
    dialect: str | None = None
    """The dialect it is asked for in; None: the native API."""

    @property
    def changes(self) -> bool:
        """Whether it changes anything."""
        return self.method not in ("GET", "HEAD", "OPTIONS", "WEBSOCKET")

    def object_of(self, values: Mapping[str, str]) -> tuple[str, str | None]:
        """The type and id of what it is done to; no id where that is not in the path, because it is yet to be made."""
        kind = self.action.partition(".")[0]
        kind = _STANDS_FOR.get(kind, kind)
        return kind, values.get("path" if kind == "file" else f"{kind}_id")


class Operations:
    """Every operation of an application."""

    def __init__(self, app: FastAPI) -> None:
        """They are read from the application when one is first looked for: all routes must be there by then."""
        self._app = app

    @cached_property
    def _all(self) -> list[tuple[Pattern[str], Operation]]:
        return [(compile_path(operation.template)[0], operation) for operation in _operations(self._app.router.routes)]

    def __iter__(self) -> Iterator[Operation]:
        return iter(operation for _, operation in self._all)

    def find(self, scope: Scope) -> tuple[Operation | None, dict[str, str]]:
        """What a request asks for, and the values in its path; None where there is no such route."""
        method = "WEBSOCKET" if scope["type"] == "websocket" else scope["method"]
        nearest: tuple[Operation | None, dict[str, str]] = (None, {})
        for pattern, operation in self._all:
            match = pattern.match(scope["path"])
            if match is None:
                continue
            if operation.method == method:
                return operation, match.groupdict()
            if nearest[0] is None:
                # The path is one of ours, and the method is not: the path is known at least.
                refused = Operation(method, operation.template, "request.refused", operation.dialect)
                nearest = refused, match.groupdict()
        return nearest


def _operations(routes: Iterable[BaseRoute], prefix: str = "", dialect: str | None = None) -> Iterator[Operation]:
    routes = list(routes)
    for route in routes:
        if isinstance(route, Mount):
            yield from _operations(route.routes, prefix + route.path, route.name)
    for context in iter_route_contexts([route for route in routes if not isinstance(route, Mount)]):
        if context.path is None:
            continue
        methods = sorted(context.methods or ()) if hasattr(context, "methods") else []
        for method in methods or ["WEBSOCKET"]:
            yield Operation(method, prefix + context.path, _action(context.name or ""), dialect)


def _action(name: str) -> str:
    if name in _NAMES:
        return _NAMES[name]
    verb, _, noun = name.partition("_")
    noun = noun[:-1] if noun.endswith("s") and not noun.endswith("ss") else noun
    return f"{noun}.{verb}" if noun else verb
