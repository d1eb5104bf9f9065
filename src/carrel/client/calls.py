"""Every call of the API as a value: what to send, and how to read the answer. No I/O."""

from __future__ import annotations

from collections.abc import AsyncIterable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel

from carrel.client.responses import EXTRA, model_of, nothing, object_of
from carrel.client.types import (
    ApiKey,
    Artifact,
    BudgetState,
    BudgetStates,
    Diff,
    Environment,
    EnvironmentStatus,
    FileEntry,
    Interaction,
    Message,
    NamedWorkspace,
    NetworkReport,
    Page,
    Patch,
    Secret,
    Session,
    Snapshot,
    Turn,
    UnpackedArchive,
    UsageReport,
    User,
)
from carrel.protocol.results import TurnResult

__all__ = ["Call", "Listing"]

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

API = "/api/v1"
EVENT_STREAM = "text/event-stream"
_NO_LIMIT = httpx.Timeout(10, read=None)


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request, and the reader of its answer."""

    method: str
    path: str
    read: Callable[[httpx.Response], T]
    params: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    json: Any = None
    content: bytes | Iterable[bytes] | AsyncIterable[bytes] | None = None
    timeout: httpx.Timeout | None = None

    def arguments(self) -> dict[str, Any]:
        """The call as arguments of httpx."""
        given: dict[str, Any] = {"method": self.method, "url": self.path, "headers": dict(self.headers)}
        if self.params:
            given["params"] = {name: _text(value) for name, value in self.params.items() if value is not None}
        if self.json is not None:
            given["json"] = self.json
        if self.content is not None:
            given["content"] = self.content
        if self.timeout is not None:
            given["timeout"] = self.timeout
        return given


@dataclass(frozen=True)
class Listing(Generic[M]):
    """A list that comes in pages."""

    path: str
    item: type[M]
    params: Mapping[str, Any]

    def page(self, cursor: str | None) -> Call[Page]:
        """The call for the page at a cursor."""
        return Call("GET", self.path, model_of(Page), params={**self.params, "cursor": cursor})

    def items(self, page: Page) -> list[M]:
        """What is on a page."""
        return [self.item.model_validate(entry, extra=EXTRA) for entry in page.data]


def _text(value: Any) -> Any:
    return str(value).lower() if isinstance(value, bool) else value


def _part(text: str) -> str:
    # httpx would resolve "." and ".." by itself; what a path may be is for the server to say.
    return quote(text, safe="").replace(".", "%2E") if text in (".", "..") else quote(text, safe="")


def _session(session_id: str, *rest: str) -> str:
    return "/".join([API, "sessions", _part(session_id), *rest])


def _key(idempotency_key: str | None) -> dict[str, str]:
    return {} if idempotency_key is None else {"Idempotency-Key": idempotency_key}


# --------------------------------------------------------------------------------------------------------- sessions


def create_session(spec: Mapping[str, Any], idempotency_key: str | None) -> Call[Session]:
    return Call("POST", f"{API}/sessions", model_of(Session), json=dict(spec), headers=_key(idempotency_key))


def get_session(session_id: str) -> Call[Session]:
    return Call("GET", _session(session_id), model_of(Session))


def list_sessions(status: str | None, text: str | None, page_size: int | None) -> Listing[Session]:
    return Listing(f"{API}/sessions", Session, {"status": status, "q": text, "limit": page_size})


def list_messages(session_id: str, options: Mapping[str, Any]) -> Listing[Message]:
    return Listing(_session(session_id, "messages"), Message, options)


def update_session(session_id: str, changes: Mapping[str, Any]) -> Call[Session]:
    return Call("PATCH", _session(session_id), model_of(Session), json=dict(changes))


def delete_session(session_id: str) -> Call[None]:
    return Call("DELETE", _session(session_id), nothing, timeout=_NO_LIMIT)


def stop_session(session_id: str) -> Call[Session]:
    return Call("POST", _session(session_id, "stop"), model_of(Session), timeout=_NO_LIMIT)


def resume_session(session_id: str) -> Call[Session]:
    return Call("POST", _session(session_id, "resume"), model_of(Session))


def interrupt_session(session_id: str, turn_id: str | None) -> Call[Turn]:
    body = {} if turn_id is None else {"turn_id": turn_id}
    return Call("POST", _session(session_id, "interrupt"), model_of(Turn), json=body)


def fork_session(session_id: str, turn_id: str | None, idempotency_key: str | None) -> Call[Session]:
    body = {} if turn_id is None else {"turn_id": turn_id}
    path = _session(session_id, "fork")
    return Call("POST", path, model_of(Session), json=body, headers=_key(idempotency_key), timeout=_NO_LIMIT)


def rewind_session(session_id: str, turn_id: str | None, seq: int | None, files: bool) -> Call[Session]:
    given = {"turn_id": turn_id, "seq": seq, "files": files}
    body = {name: value for name, value in given.items() if value is not None}
    return Call("POST", _session(session_id, "rewind"), model_of(Session), json=body, timeout=_NO_LIMIT)


def list_snapshots(session_id: str, page_size: int | None) -> Listing[Snapshot]:
    return Listing(_session(session_id, "snapshots"), Snapshot, {"limit": page_size})


def take_snapshot(session_id: str) -> Call[Snapshot]:
    return Call("POST", _session(session_id, "snapshots"), model_of(Snapshot), timeout=_NO_LIMIT)


def restore_snapshot(session_id: str, snapshot_id: str) -> Call[Session]:
    path = _session(session_id, "snapshots", _part(snapshot_id), "restore")
    return Call("POST", path, model_of(Session), timeout=_NO_LIMIT)


def export_session(session_id: str) -> Call[None]:
    return Call("GET", _session(session_id, "export"), nothing, timeout=_NO_LIMIT)


def export_audit(filters: Mapping[str, Any], media_type: str) -> Call[None]:
    return Call("GET", f"{API}/audit", nothing, params=filters, headers={"Accept": media_type}, timeout=_NO_LIMIT)


# ------------------------------------------------------------------------------------------------------------ turns


def create_turn(
    session_id: str, prompt: str | None, options: Mapping[str, Any], idempotency_key: str | None
) -> Call[Turn]:
    path, body = _session(session_id, "turns"), _prompted(prompt, options)
    return Call("POST", path, model_of(Turn), json=body, headers=_key(idempotency_key))


def stream_turn(
    session_id: str, prompt: str | None, options: Mapping[str, Any], deltas: bool, idempotency_key: str
) -> Call[None]:
    headers = {"Accept": EVENT_STREAM, **_key(idempotency_key)}
    path, body = _session(session_id, "turns"), _prompted(prompt, options)
    return Call("POST", path, nothing, params={"deltas": deltas}, json=body, headers=headers)


def get_turn(session_id: str, turn_id: str) -> Call[Turn]:
    return Call("GET", _session(session_id, "turns", _part(turn_id)), model_of(Turn))


def list_turns(session_id: str, page_size: int | None) -> Listing[Turn]:
    return Listing(_session(session_id, "turns"), Turn, {"limit": page_size})


def cancel_turn(session_id: str, turn_id: str) -> Call[Turn]:
    return Call("POST", _session(session_id, "turns", _part(turn_id), "cancel"), model_of(Turn))


def query(prompt: str | None, options: Mapping[str, Any], idempotency_key: str | None) -> Call[TurnResult]:
    body = _prompted(prompt, options) | {"wait": True}
    headers = _key(idempotency_key)
    return Call("POST", f"{API}/query", model_of(TurnResult), json=body, headers=headers, timeout=_NO_LIMIT)


def stream_query(prompt: str | None, options: Mapping[str, Any], deltas: bool) -> Call[None]:
    body, headers = _prompted(prompt, options), {"Accept": EVENT_STREAM}
    return Call("POST", f"{API}/query", nothing, params={"deltas": deltas}, json=body, headers=headers)


def _prompted(prompt: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    return dict(options) if prompt is None else {"prompt": prompt, **options}


# ------------------------------------------------------------------------------------------------- events and files


def list_events(session_id: str, after: int, limit: int | None) -> Call[Page]:
    return Call("GET", _session(session_id, "events"), model_of(Page), params={"after": after, "limit": limit})


def follow_events(session_id: str, after: int, deltas: bool) -> Call[None]:
    headers = {"Accept": EVENT_STREAM, "Last-Event-ID": str(after)}
    path = _session(session_id, "events")
    return Call("GET", path, nothing, params={"after": after, "deltas": deltas}, headers=headers)


def _file(session_id: str, path: str) -> str:
    return _session(session_id, "files", *map(_part, path.split("/")))


def list_files(session_id: str, path: str, recursive: bool, page_size: int | None) -> Listing[FileEntry]:
    params = {"path": path or None, "recursive": recursive, "limit": page_size}
    return Listing(_session(session_id, "files"), FileEntry, params)


def read_file(session_id: str, path: str) -> Call[bytes]:
    return Call("GET", _file(session_id, path), lambda response: response.content)


def write_file(session_id: str, path: str, content: bytes) -> Call[FileEntry]:
    headers = {"Content-Type": "application/octet-stream"}
    return Call("PUT", _file(session_id, path), model_of(FileEntry), content=content, headers=headers)


def delete_file(session_id: str, path: str) -> Call[None]:
    return Call("DELETE", _file(session_id, path), nothing)


def upload_archive(
    session_id: str, content: bytes | Iterable[bytes] | AsyncIterable[bytes], path: str, links: str
) -> Call[UnpackedArchive]:
    return Call(
        "PUT",
        _session(session_id, "archive"),
        model_of(UnpackedArchive),
        params={"path": path or None, "links": links},
        content=content,
        headers={"Content-Type": "application/octet-stream"},
        timeout=_NO_LIMIT,
    )


def download_archive(session_id: str, path: str, format: str) -> Call[None]:
    params = {"path": path or None, "format": format}
    return Call("GET", _session(session_id, "archive"), nothing, params=params, timeout=_NO_LIMIT)


def diff(session_id: str, snapshot_id: str | None) -> Call[Diff]:
    params = {"snapshot": snapshot_id}
    return Call("GET", _session(session_id, "diff"), model_of(Diff), params=params, timeout=_NO_LIMIT)


def patch(session_id: str) -> Call[Patch]:
    def read(response: httpx.Response) -> Patch:
        return Patch(content=response.content, truncated=response.headers.get("X-Carrel-Truncated") == "true")

    return Call("GET", _session(session_id, "diff"), read, params={"kind": "git"}, timeout=_NO_LIMIT)


def create_artifact(session_id: str, path: str, idempotency_key: str | None) -> Call[Artifact]:
    headers = _key(idempotency_key)
    place = _session(session_id, "artifacts")
    return Call("POST", place, model_of(Artifact), json={"path": path}, headers=headers, timeout=_NO_LIMIT)


def list_artifacts(session_id: str, page_size: int | None) -> Listing[Artifact]:
    return Listing(_session(session_id, "artifacts"), Artifact, {"limit": page_size})


def read_artifact(session_id: str, artifact_id: str) -> Call[bytes]:
    place = _session(session_id, "artifacts", _part(artifact_id))
    return Call("GET", place, lambda response: response.content, timeout=_NO_LIMIT)


def delete_artifact(session_id: str, artifact_id: str) -> Call[None]:
    return Call("DELETE", _session(session_id, "artifacts", _part(artifact_id)), nothing)


def get_network(session_id: str, cursor: str | None, limit: int | None) -> Call[NetworkReport]:
    params = {"cursor": cursor, "limit": limit}
    return Call("GET", _session(session_id, "network"), model_of(NetworkReport), params=params)


# ----------------------------------------------------------------------------------------------------- interactions


def list_interactions(session_id: str | None, status: str | None, page_size: int | None) -> Listing[Interaction]:
    path = f"{API}/interactions" if session_id is None else _session(session_id, "interactions")
    return Listing(path, Interaction, {"status": status, "limit": page_size})


def get_interaction(interaction_id: str) -> Call[Interaction]:
    return Call("GET", f"{API}/interactions/{_part(interaction_id)}", model_of(Interaction))


def answer_interaction(
    interaction_id: str, decision: str, options: Mapping[str, Any], idempotency_key: str | None
) -> Call[Interaction]:
    path, body = f"{API}/interactions/{_part(interaction_id)}/answer", {"decision": decision, **options}
    return Call("POST", path, model_of(Interaction), json=body, headers=_key(idempotency_key))


# ------------------------------------------------------------------------------------------------------- workspaces


def create_workspace(name: str, options: Mapping[str, Any], idempotency_key: str | None) -> Call[NamedWorkspace]:
    body = {"name": name, **options}
    return Call("POST", f"{API}/workspaces", model_of(NamedWorkspace), json=body, headers=_key(idempotency_key))


def get_workspace(workspace_id: str) -> Call[NamedWorkspace]:
    return Call("GET", f"{API}/workspaces/{_part(workspace_id)}", model_of(NamedWorkspace))


def list_workspaces(page_size: int | None) -> Listing[NamedWorkspace]:
    return Listing(f"{API}/workspaces", NamedWorkspace, {"limit": page_size})


def update_workspace(workspace_id: str, changes: Mapping[str, Any]) -> Call[NamedWorkspace]:
    return Call("PATCH", f"{API}/workspaces/{_part(workspace_id)}", model_of(NamedWorkspace), json=dict(changes))


def delete_workspace(workspace_id: str) -> Call[None]:
    return Call("DELETE", f"{API}/workspaces/{_part(workspace_id)}", nothing, timeout=_NO_LIMIT)


# ----------------------------------------------------------------------------------------------------- environments


def _environment(name: str, *rest: str) -> str:
    return "/".join([API, "environments", _part(name), *rest])


def put_environment(name: str, spec: Mapping[str, Any]) -> Call[tuple[Environment, bool]]:
    read = model_of(Environment)
    return Call(
        "PUT", _environment(name), lambda response: (read(response), response.status_code == 201), json=dict(spec)
    )


def get_environment(name: str, version: int | None) -> Call[Environment]:
    return Call("GET", _environment(name), model_of(Environment), params={"version": version})


def list_environments(page_size: int | None) -> Listing[Environment]:
    return Listing(f"{API}/environments", Environment, {"limit": page_size})


def list_environment_versions(name: str) -> Listing[Environment]:
    return Listing(_environment(name, "versions"), Environment, {})


def delete_environment(name: str) -> Call[None]:
    return Call("DELETE", _environment(name), nothing)


def put_secret(name: str, value: str) -> Call[None]:
    return Call("PUT", f"{API}/secrets/{_part(name)}", nothing, json={"value": value})


def list_secrets() -> Listing[Secret]:
    return Listing(f"{API}/secrets", Secret, {})


def delete_secret(name: str) -> Call[None]:
    return Call("DELETE", f"{API}/secrets/{_part(name)}", nothing)


def environment_status(name: str) -> Call[EnvironmentStatus]:
    return Call("GET", _environment(name, "status"), model_of(EnvironmentStatus))


def start_environment(name: str) -> Call[EnvironmentStatus]:
    return Call("POST", _environment(name, "start"), model_of(EnvironmentStatus))


def stop_environment(name: str) -> Call[EnvironmentStatus]:
    return Call("POST", _environment(name, "stop"), model_of(EnvironmentStatus))


# --------------------------------------------------------------------------------------------------- users and keys


def create_key(options: Mapping[str, Any], idempotency_key: str | None) -> Call[ApiKey]:
    return Call("POST", f"{API}/keys", model_of(ApiKey), json=dict(options), headers=_key(idempotency_key))


def get_key(key_id: str) -> Call[ApiKey]:
    return Call("GET", f"{API}/keys/{_part(key_id)}", model_of(ApiKey))


def list_keys(user: str | None, page_size: int | None) -> Listing[ApiKey]:
    return Listing(f"{API}/keys", ApiKey, {"user": user, "limit": page_size})


def revoke_key(key_id: str) -> Call[None]:
    return Call("DELETE", f"{API}/keys/{_part(key_id)}", nothing)


def create_user(user_id: str, options: Mapping[str, Any]) -> Call[User]:
    return Call("POST", f"{API}/users", model_of(User), json={"id": user_id, **options})


def get_user(user_id: str) -> Call[User]:
    return Call("GET", f"{API}/users/{_part(user_id)}", model_of(User))


def list_users(page_size: int | None) -> Listing[User]:
    return Listing(f"{API}/users", User, {"limit": page_size})


def update_user(user_id: str, changes: Mapping[str, Any]) -> Call[User]:
    return Call("PATCH", f"{API}/users/{_part(user_id)}", model_of(User), json=dict(changes))


# ------------------------------------------------------------------------------------------------ usage and budgets


def get_usage(group_by: Sequence[str], options: Mapping[str, Any]) -> Call[UsageReport]:
    params = {"group_by": ",".join(group_by) or None, **{name: _moment(value) for name, value in options.items()}}
    return Call("GET", f"{API}/usage", model_of(UsageReport), params=params)


def get_budgets(user: str | None, session_id: str | None) -> Call[list[BudgetState]]:
    read = model_of(BudgetStates)
    params = {"user": user, "session_id": session_id}
    return Call("GET", f"{API}/usage/budgets", lambda response: read(response).data, params=params)


def _moment(value: Any) -> Any:
    return value.isoformat() if isinstance(value, date) else value


def health() -> Call[dict[str, Any]]:
    return Call("GET", "/health", object_of)
