"""The scripted model as an ASGI application."""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Send

from carrel.model_gateway.scripted.conversation import read_conversation
from carrel.model_gateway.scripted.errors import ApiError, error_response, new_id
from carrel.model_gateway.scripted.messages import BROKEN_OFF, Message, StreamDropped
from carrel.model_gateway.scripted.reply import Reply, plan
from carrel.model_gateway.scripted.requests import check_message_request, check_token_request
from carrel.model_gateway.scripted.script import BUILTIN, Script
from carrel.model_gateway.scripted.steps import Drop, Fail, Malformed, Wait
from carrel.model_gateway.scripted.usage import input_tokens

MAX_REQUEST_BYTES = 32 * 1024 * 1024
MODELS = {
    "claude-opus-5-5": "Claude Opus 5.5 (scripted)",
    "claude-sonnet-5-5": "Claude Sonnet 5.5 (scripted)",
    "claude-haiku-5-5": "Claude Haiku 5.5 (scripted)",
    "scripted": "The scripted model",
}
_ATTEMPTS_KEPT = 4096


def create_app(script: Script | None = None, *, api_key: str | None = None) -> Starlette:
    """A Messages API that follows `script`, by default the built-in one. With `api_key`, no other key is let in."""
    model = _ScriptedModel(BUILTIN if script is None else script, api_key)
    return Starlette(
        routes=[
            Route("/v1/messages", model.messages, methods=["POST"]),
            Route("/v1/messages/count_tokens", model.count_tokens, methods=["POST"]),
            Route("/v1/models", model.list_models, methods=["GET"]),
            Route("/v1/models/{id}", model.get_model, methods=["GET"]),
        ],
        exception_handlers={ApiError: _on_api_error, HTTPException: _on_http_exception, Exception: _on_our_error},
    )


class _ScriptedModel:
    """The endpoints, and the one thing remembered between requests: how often a fault has struck."""

    def __init__(self, script: Script, api_key: str | None) -> None:
        self._script = script
        self._api_key = api_key
        self._attempts = _Attempts()

    async def messages(self, request: Request) -> Response:
        body = await self._body(request)
        check_message_request(body)
        conversation = read_conversation(body, session=_session(request, body))
        reply = plan(self._script, conversation)
        key = conversation.fingerprint() if reply.has_fault else None
        if key is not None:
            reply = reply.attempt(self._attempts.count(key))
            if reply.fault:
                self._attempts.add(key)
        message = Message(model=str(body["model"]), reply=reply, input=input_tokens(body))
        if body.get("stream"):
            return await self._stream(message, key)
        response = await _whole(request, message)
        self._passed(reply, key)
        return response

    async def _stream(self, message: Message, key: bytes | None) -> Response:
        first = message.reply.steps[0] if message.reply.steps else None
        if isinstance(first, Fail):
            raise ApiError(first.status, first.message)

        async def events() -> AsyncIterator[bytes]:
            async for chunk in message.events():
                yield chunk
            self._passed(message.reply, key)

        return _EventStream(events())

    def _passed(self, reply: Reply, key: bytes | None) -> None:
        """An answer got through: the same conversation held once more meets its faults anew."""
        if key is not None and not reply.fault:
            self._attempts.forget(key)

    async def count_tokens(self, request: Request) -> Response:
        body = await self._body(request)
        check_token_request(body)
        return _json_response({"input_tokens": input_tokens(body).total})

    async def list_models(self, request: Request) -> Response:
        self._authenticate(request)
        models = [_model(id) for id in MODELS]
        ends = {"first_id": models[0]["id"], "last_id": models[-1]["id"]}
        return _json_response({"data": models, "has_more": False, **ends})

    async def get_model(self, request: Request) -> Response:
        self._authenticate(request)
        id = request.path_params["id"]
        if id not in MODELS:
            raise ApiError(404, f"model: {id}")
        return _json_response(_model(id))

    async def _body(self, request: Request) -> Any:
        self._authenticate(request)
        data = bytearray()
        async for chunk in request.stream():
            data += chunk
            if len(data) > MAX_REQUEST_BYTES:
                raise ApiError(413)
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"The request body is not valid JSON: {error}") from None

    def _authenticate(self, request: Request) -> None:
        if self._api_key is None:
            return
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self._api_key not in (request.headers.get("x-api-key"), bearer):
            raise ApiError(401)


class _Attempts:
    """Counts the faults that have struck each conversation; the longest unused are forgotten."""

    def __init__(self) -> None:
        self._counts: OrderedDict[bytes, int] = OrderedDict()

    def count(self, key: bytes) -> int:
        return self._counts.get(key, 0)

    def add(self, key: bytes) -> None:
        self._counts[key] = self.count(key) + 1
        self._counts.move_to_end(key)
        if len(self._counts) > _ATTEMPTS_KEPT:
            self._counts.popitem(last=False)

    def forget(self, key: bytes) -> None:
        self._counts.pop(key, None)


class _EventStream(StreamingResponse):
    """A stream that can break. Without its last, empty chunk the server has no way but to close the connection."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes]) -> None:
        super().__init__(events, headers={"cache-control": "no-cache", "request-id": new_id("req")})

    async def stream_response(self, send: Send) -> None:
        try:
            await super().stream_response(send)
        except StreamDropped:
            return


async def _whole(request: Request, message: Message) -> Response:
    """The answer without streaming, after the pauses that its script has."""
    for step in message.reply.steps:
        if isinstance(step, Wait):
            await _wait_or_disconnect(request, step.seconds)
    match message.reply.fault:
        case Fail(status=status, message=text):
            raise ApiError(status, text)
        case Drop():
            return _EventStream(_broken_off())
        case Malformed():
            return Response(f'{{"id":"{message.id}","type":', media_type="application/json")
    return _json_response(message.whole())


async def _broken_off() -> AsyncIterator[bytes]:
    yield json.dumps({"type": "message", "content": BROKEN_OFF}).encode()[:-2]
    raise StreamDropped


async def _wait_or_disconnect(request: Request, seconds: float) -> None:
    """Sleeps, but not for a client that has gone."""
    try:
        async with asyncio.timeout(seconds):
            while (await request.receive())["type"] != "http.disconnect":
                pass
    except TimeoutError:
        return
    raise ClientDisconnect


def _session(request: Request, body: Mapping[str, Any]) -> str:
    metadata = body.get("metadata")
    user = metadata.get("user_id") if isinstance(metadata, dict) else None
    return request.headers.get("x-claude-code-session-id") or str(user or "")


def _model(id: str) -> dict[str, str]:
    return {"type": "model", "id": id, "display_name": MODELS[id], "created_at": "2026-01-01T00:00:00Z"}


def _json_response(body: Any) -> JSONResponse:
    return JSONResponse(body, headers={"request-id": new_id("req")})


async def _on_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    detail = f"{request.method} {request.url.path}: not found" if error.status_code == 404 else error.detail
    response = error_response(ApiError(error.status_code, detail))
    response.headers.update(error.headers or {})
    return response


async def _on_our_error(_: Request, __: Exception) -> Response:
    return error_response(ApiError(500))  # the traceback goes to the server's log
