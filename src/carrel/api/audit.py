"""The audit log: who did what to which object, from where, with what outcome.

Every request that changes something is on record, and every one that was refused. Records are written in batches, off
the road of the request; an orderly end writes the last ones. They hold no secret, and no text of prompts unless the
operator wants it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Any

import structlog
from pydantic_core import from_json
from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from carrel import abc
from carrel.api.operations import Operation
from carrel.model import Principal, new_id, utc_now
from carrel.observability.metrics import Metrics
from carrel.observability.redaction import Redactor

__all__ = ["Audit", "AuditLog", "audited", "note"]

log = structlog.get_logger(__name__)

ANONYMOUS = "anonymous"

_BATCH_SECONDS = 0.2
_BATCH = 500
_MOST_WAITING = 20_000
_RETRY_SECONDS = 1.0
_PRUNE_SECONDS = 3600.0
_CLOSE_SECONDS = 10.0
_REFUSALS = frozenset({401, 403, 404, 429})
_LONGEST_ID = 128
_LONGEST_PROMPT = 100_000
_BODY_BYTES = 64 * 1024
_PROMPT_BYTES = 1024 * 1024
_WITH_PROMPT = frozenset({"turn.create", "query.run", "session.create"})
_PROMPTS = ("prompt", "message", "initial_prompt")
_NOTES = "carrel.notes"
_CLOSED_AS = {4001: 401, 4003: 403, 4004: 404}
_CLIENT_WENT_AWAY = 499


class AuditLog:
    """Takes records, and has them stored soon."""

    def __init__(
        self,
        store: abc.Store,
        *,
        days: int = 365,
        prompts: bool = False,
        redactor: Redactor | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        """Keep records in `store`.

        Args:
            store: where they are kept.
            days: for how long.
            prompts: whether the text of prompts is part of them.
            redactor: hides what looks like a secret in their details.
            metrics: told of records that could not be stored.
        """
        self.prompts = prompts
        self._store = store
        self._days = days
        self._redactor = redactor or Redactor()
        self._metrics = metrics
        self._waiting: list[abc.AuditRecord] = []
        self._some = asyncio.Event()
        self._writing = asyncio.Lock()

    async def start(self, exit_stack: AsyncExitStack) -> None:
        """Begin to store; closing, which stores what still waits, is registered with `exit_stack`."""
        tasks = [
            asyncio.create_task(self._write(), name="audit"),
            asyncio.create_task(self._prune(), name="audit-prune"),
        ]

        async def close() -> None:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            try:
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await self.flush()
            except Exception:  # the store is gone for good: the rest of the shutdown must go on
                log.exception("audit.lost", records=len(self._waiting))

        exit_stack.push_async_callback(close)

    def record(
        self,
        action: str,
        *,
        outcome: int,
        principal: Principal | None,
        object_type: str | None,
        object_id: str | None,
        address: str | None,
        request_id: str | None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        """Put something on record. It is stored soon; never waits."""
        if len(self._waiting) >= _MOST_WAITING:
            # The store has been away for long. What came first is kept: it tells how it began.
            log.error("audit.full", action=action, outcome=outcome)
            if self._metrics is not None:
                self._metrics.audit_lost(1)
            return
        self._waiting.append(
            abc.AuditRecord(
                id=new_id(),
                at=utc_now(),
                principal=principal.name if principal is not None else ANONYMOUS,
                user_id=principal.user if principal is not None else None,
                action=action,
                object_type=object_type,
                object_id=object_id[:_LONGEST_ID] if object_id is not None else None,
                address=address,
                request_id=request_id,
                outcome=outcome,
                details=self._redactor.value(dict(details or {})),
            )
        )
        self._some.set()

    async def flush(self) -> None:
        """Store what has been put on record so far."""
        async with self._writing:
            while self._waiting:
                batch = self._waiting[:_BATCH]
                await self._store.write(lambda tx, records=_merged(batch): tx.audit.add(records))  # type: ignore[misc]
                del self._waiting[: len(batch)]

    async def _write(self) -> None:
        while True:
            await self._some.wait()
            await asyncio.sleep(_BATCH_SECONDS)
            self._some.clear()
            try:
                await self.flush()
            except Exception:  # they are kept, and tried again
                log.exception("audit.not_stored", waiting=len(self._waiting))
                await asyncio.sleep(_RETRY_SECONDS)
                self._some.set()

    async def _prune(self) -> None:
        while True:
            before = utc_now() - timedelta(days=self._days)
            try:
                await self._store.write(lambda tx, before=before: tx.audit.prune(before))  # type: ignore[misc]
            except Exception:  # an hour later is soon enough
                log.exception("audit.not_pruned")
            await asyncio.sleep(_PRUNE_SECONDS)


def _merged(records: list[abc.AuditRecord]) -> list[abc.AuditRecord]:
    """The same refusals over and over become one record with their number, or a guesser of keys could fill the disk."""
    found: dict[Any, abc.AuditRecord] = {}
    for record in records:
        same: Any = record.id
        if record.outcome in _REFUSALS:
            same = (record.principal, record.action, record.object_id, record.address, record.outcome)
        first = found.get(same)
        if first is None:
            found[same] = record
            continue
        times = first.details.get("times", 1) + 1
        found[same] = abc.AuditRecord(**{**vars(first), "details": {**first.details, "times": times}})
    return list(found.values())


def audited(
    connection: HTTPConnection,
    action: str,
    *,
    outcome: int,
    object_type: str | None = None,
    object_id: str | None = None,
    principal: Principal | None = None,
    details: Mapping[str, Any] | None = None,
    prompt: str | None = None,
) -> None:
    """Put on record what the layer around the routes cannot see: a message over a WebSocket, a dialect's request.

    A request that is put on record so is not put on record again by that layer. Does nothing where there is no log.

    Args:
        connection: the request or WebSocket it came by; address and request id are taken from there.
        action: a stable word, such as `session.create`.
        outcome: a status of HTTP.
        object_type: what it was done to: `session`, `turn`, `file`, `key`, `user`.
        object_id: which one.
        principal: who did it; default: as the request's layers found.
        details: facts beside it; no secrets, and no text of prompts.
        prompt: the text of the prompt; kept only where the operator wants it.
    """
    scope = connection.scope
    edges = getattr(getattr(scope["app"].state, "services", None), "edges", None)
    found: AuditLog | None = getattr(edges, "audit", None)
    if found is None:
        return
    if scope["type"] == "http":
        scope["carrel.audited"] = True
    told = dict(details or {})
    if prompt is not None and found.prompts:
        told["prompt"] = prompt[:_LONGEST_PROMPT]
    found.record(
        action,
        outcome=outcome,
        principal=principal or scope.get("carrel.principal"),
        object_type=object_type,
        object_id=object_id,
        address=scope.get("carrel.address"),
        request_id=scope.get("carrel.request_id"),
        details=told,
    )


def note(connection: HTTPConnection, *, outcome: int | None = None, **ids: str) -> None:
    """Tell the record of this request what neither its path nor its answer's form tells. Does nothing without a log.

    Args:
        connection: the request.
        outcome: a status of HTTP, where the answer's own does not say what came of it.
        ids: objects that it is about: `session_id`, `turn_id`.
    """
    notes: dict[str, Any] = connection.scope.get(_NOTES, {})
    notes.update(ids)
    if outcome is not None:
        notes["outcome"] = outcome


class Audit:
    """Puts on record every request that changes something, and every one that is refused."""

    def __init__(self, app: ASGIApp, audit: AuditLog) -> None:
        """Stand before `app`; further out than whatever refuses requests."""
        self._app = app
        self._audit = audit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        operation: Operation | None = scope.get("carrel.operation")
        changes = scope["type"] == "http" and scope["method"] not in ("GET", "HEAD", "OPTIONS")
        answer = _Answer()
        scope[_NOTES] = {}  # one that is changed, not replaced: a mounted application may have a scope of its own
        prompt = _Prompt(receive) if self._wants_prompt(operation) else None

        async def seen(message: Message) -> None:
            answer.take(message, body_wanted=changes)
            await send(message)

        try:
            await self._app(scope, prompt or receive, seen)
        except Exception:
            answer.status = answer.status or 500
            raise
        finally:
            outcome = scope[_NOTES].get("outcome") or answer.status or _CLIENT_WENT_AWAY
            if not scope.get("carrel.audited") and (changes or outcome in (401, 403)):
                self._record(scope, operation, outcome, answer, prompt)

    def _wants_prompt(self, operation: Operation | None) -> bool:
        return self._audit.prompts and operation is not None and operation.action in _WITH_PROMPT

    def _record(
        self, scope: Scope, operation: Operation | None, outcome: int, answer: _Answer, prompt: _Prompt | None
    ) -> None:
        values: dict[str, str] = {**(scope.get("carrel.path_values") or {}), **scope[_NOTES]}
        details: dict[str, Any] = {}
        action, object_type, object_id = "request.unmatched", None, None
        if operation is not None:
            action = operation.action
            object_type, object_id = operation.object_of(values)
            if object_id is None:
                object_id = answer.made(object_type)
            for name in ("session_id", "turn_id"):
                if name in values and name != f"{object_type}_id":
                    details[name] = values[name]
            if operation.dialect is not None:
                details["dialect"] = operation.dialect
        if prompt is not None and (text := prompt.text()) is not None:
            details["prompt"] = text[:_LONGEST_PROMPT]
        self._audit.record(
            action,
            outcome=outcome,
            principal=scope.get("carrel.principal"),
            object_type=object_type,
            object_id=object_id,
            address=scope.get("carrel.address"),
            request_id=scope.get("carrel.request_id"),
            details=details,
        )


class _Answer:
    """What an answer tells of its outcome."""

    def __init__(self) -> None:
        self.status: int | None = None
        self._headers: Headers | None = None
        self._body = b""

    def take(self, message: Message, *, body_wanted: bool) -> None:
        """Look at a message on its way to the caller."""
        match message["type"]:
            case "http.response.start" | "websocket.http.response.start":
                self.status = message["status"]
                self._headers = Headers(raw=message.get("headers") or [])
            case "http.response.body" if body_wanted and not self._body and self.status in (200, 201, 202):
                body = message.get("body", b"")
                self._body = body if len(body) <= _BODY_BYTES else b""
            case "websocket.accept":
                self.status = 101
            case "websocket.close":
                refused = 403 if self.status is None else self.status
                self.status = _CLOSED_AS.get(message.get("code") or 0, refused)

    def made(self, kind: str) -> str | None:
        """The id of the object of this kind that the answer tells of."""
        headers: Mapping[str, str] = self._headers or {}
        if (told := headers.get(f"x-carrel-{kind}")) is not None:
            return str(told)
        if not self._body or "json" not in headers.get("content-type", ""):
            return None
        try:
            value = from_json(self._body)
        except ValueError:  # the first of several pieces
            return None
        if not isinstance(value, dict):
            return None
        found = value.get("id")
        if kind == "session" and "session_id" in value:
            found = value["session_id"]  # a turn's result
        return found if isinstance(found, str) else None


class _Prompt:
    """Hears a request's body as it passes, to know the prompt in it."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._parts: list[bytes] = []
        self._size = 0

    async def __call__(self) -> Message:
        message = await self._receive()
        part = message.get("body", b"")
        self._size += len(part)
        if self._size <= _PROMPT_BYTES:
            self._parts.append(part)
        return message

    def text(self) -> str | None:
        """The prompt's text; None where there is none, or too much of it."""
        if self._size > _PROMPT_BYTES:
            return None
        try:
            value = from_json(b"".join(self._parts))
        except ValueError:  # refused, then
            return None
        if not isinstance(value, dict):
            return None
        for name in _PROMPTS:
            if isinstance(value.get(name), str):
                return str(value[name])
        blocks = value.get("content")
        texts = [block.get("text") for block in blocks if isinstance(block, dict)] if isinstance(blocks, list) else []
        return "\n".join(text for text in texts if isinstance(text, str)) or None
