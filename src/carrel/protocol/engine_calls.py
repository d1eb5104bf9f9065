"""What a gateway asks of a Docker engine, all of it: the runtime makes these calls, the socket proxy passes on no others."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["CALLS", "EngineCall", "Scope"]


class Scope(StrEnum):
    """What a call is about, and so what a proxy looks at before it passes it on."""

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
class EngineCall:
    """A call of the Engine API."""

    method: str
    path: str
    """Without the version; `{}` is the name or id of a container or an image."""
    scope: Scope
    why: str
    query: frozenset[str] = frozenset()
    """The parameters that it may have."""


def _call(method: str, path: str, scope: Scope, why: str, *query: str) -> EngineCall:
    return EngineCall(method, path, scope, why, frozenset(query))


CALLS = (
    _call("GET", "/version", Scope.ENGINE, "the API's version; whether the engine is there"),
    _call("GET", "/info", Scope.ENGINE, "which runtimes, storage driver and controllers it has"),
    _call("GET", "/images/{}/json", Scope.IMAGE, "whether the image is there, said at start"),
    _call("POST", "/containers/create", Scope.CREATE, "a sandbox: named and labelled", "name", "platform"),
    _call(
        "POST",
        "/containers/{}/attach",
        Scope.ATTACH,
        "the road of the bootstrap into its runner: its standard input",
        *("detachKeys", "logs", "stderr", "stdin", "stdout", "stream"),
    ),
    _call("POST", "/containers/{}/start", Scope.START, "its start"),
    _call(
        "GET", "/containers/json", Scope.LIST, "our containers by label: which are there, which run", "all", "filters"
    ),
    _call("GET", "/containers/{}/json", Scope.INSPECT, "why it ended; where our own container has its folders"),
    _call("GET", "/containers/{}/stats", Scope.CONTAINER, "what it takes", "one-shot", "stream"),
    _call(
        "GET",
        "/containers/{}/logs",
        Scope.CONTAINER,
        "what its runner wrote",
        *("follow", "since", "stderr", "stdout", "tail", "timestamps", "until"),
    ),
    _call("DELETE", "/containers/{}", Scope.CONTAINER, "its end, forced", "force", "v"),
    _call("GET", "/events", Scope.EVENTS, "what happened to it from outside", "filters", "since", "stream", "until"),
)
