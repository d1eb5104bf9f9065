"""The road from a sandbox to the model.

Takes what an agent sends to the Messages API, checks its token, puts the real credential in the token's place, and
passes the answer on as it comes, metered. Everything else is refused: this is all that a sandbox can reach.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping
from hashlib import sha256
from typing import Any

import httpx
import structlog
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from carrel import abc
from carrel.errors import CarrelError, UpstreamUnreachable
from carrel.model import Sandbox
from carrel.model_gateway.meter import Meter, Reading

log = structlog.get_logger(__name__)

_PASSED_ON = frozenset(["accept", "content-type", "user-agent", "x-app", "x-client-request-id"])
_PASSED_ON_PREFIXES = ("anthropic-", "x-stainless-", "x-claude-")
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,199}")
_NOT_PASSED_BACK = frozenset(
    [
        "connection",
        "keep-alive",
        "transfer-encoding",
        "content-length",
        "content-encoding",
        "set-cookie",
        "server",
        "date",
    ]
)
_HIDDEN = b"[hidden by Carrel]"
_SHORTEST_SECRET = 8
_LAST_EVENT = b"event: message_stop"
_API_VERSION = "2023-06-01"
_MAX_BODY_BYTES = 64 * 1024 * 1024


class ModelGateway:
    """Passes model requests on, for the agents of one installation."""

    def __init__(
        self,
        store: abc.Store,
        meter: Meter,
        credentials: abc.CredentialSource,
        client: httpx.AsyncClient,
    ) -> None:
        """Make the gateway.

        Args:
            store: says whose a token is.
            meter: told what each request took.
            credentials: the real credential.
            client: its base URL is the upstream.
        """
        self._store = store
        self._meter = meter
        self._credentials = credentials
        self._client = client
        self._late: set[asyncio.Task[None]] = set()

    def app(self) -> Starlette:
        """The application that sandboxes talk to."""
        routes = [
            Route("/v1/messages", self._messages, methods=["POST"]),
            Route("/v1/messages/count_tokens", self._count_tokens, methods=["POST"]),
            Route("/v1/models", self._models, methods=["GET"]),
            Route("/v1/models/{model}", self._model, methods=["GET"]),
            Route("/{path:path}", _nothing_here, methods=["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]),
        ]
        return Starlette(routes=routes)

    # The path that is asked for upstream is always one of ours, and never what a request says: there are too many ways
    # to write one.

    async def _messages(self, request: Request) -> Response:
        return await self._forward(request, "/v1/messages", metered=True)

    async def _count_tokens(self, request: Request) -> Response:
        return await self._forward(request, "/v1/messages/count_tokens")

    async def _models(self, request: Request) -> Response:
        return await self._forward(request, "/v1/models")

    async def _model(self, request: Request) -> Response:
        model = request.path_params["model"]
        if not _MODEL_NAME.fullmatch(model):
            return await _nothing_here(request)
        return await self._forward(request, f"/v1/models/{model}")

    async def _forward(self, request: Request, path: str, *, metered: bool = False) -> Response:
        sandbox = await self._sandbox(request)
        if sandbox is None:
            return _problem(401, "authentication_error", "This gateway wants the token of a running sandbox.")
        try:
            credential = self._credentials.headers()
        except CarrelError as error:
            return _problem(401, "authentication_error", error.message)
        try:
            body = await _body(request)
        except ClientDisconnect:
            return Response(status_code=499)
        if body is None:
            return _problem(413, "request_too_large", "The request is larger than the gateway passes on.")
        upstream = self._client.build_request(
            request.method,
            path,
            params=request.scope["query_string"] or None,
            headers=_headers(request, credential),
            content=body,
        )
        try:
            answer = await self._client.send(upstream, stream=True)
        except httpx.HTTPError as error:
            log.warning("model.unreachable", error=repr(error))
            return _problem(502, "api_error", "The model's API cannot be reached.")
        secrets = _secrets(credential)
        passed_back = {
            name: _hide(value.encode(), secrets).decode()
            for name, value in answer.headers.items()
            if name.lower() not in _NOT_PASSED_BACK
        }
        if not metered or answer.status_code != 200:
            return await _whole(answer, passed_back, secrets)
        if "text/event-stream" in answer.headers.get("content-type", ""):
            return StreamingResponse(self._stream(answer, sandbox), headers=passed_back)
        response = await _whole(answer, passed_back, secrets)
        reading = Reading()
        reading.take_whole(bytes(response.body))
        await self._settle(reading, sandbox)
        return response

    async def _stream(self, answer: httpx.Response, sandbox: Sandbox) -> AsyncIterator[bytes]:
        reading = Reading()
        settled = False
        try:
            async for chunk in answer.aiter_raw():
                reading.take(chunk)
                if reading.stopped and not settled:
                    # On record before the agent can know that the answer is whole, so that a turn's end never
                    # comes before its usage; what is said before the end need not wait for that.
                    settled = True
                    head, end, tail = chunk.rpartition(_LAST_EVENT)
                    if head:
                        yield head
                    await self._settle(reading, sandbox)
                    yield end + tail
                    continue
                yield chunk
        finally:
            if not settled:
                self._settle_late(reading, sandbox)
            await answer.aclose()

    async def _settle(self, reading: Reading, sandbox: Sandbox) -> None:
        if reading.usage is not None:
            await self._meter.record(sandbox.session_id, reading.model or "unknown", reading.usage)

    def _settle_late(self, reading: Reading, sandbox: Sandbox) -> None:
        """An answer that broke off is charged what it had said by then; its request may be cancelled already."""
        task = asyncio.create_task(self._settle(reading, sandbox), name="settle-usage")
        self._late.add(task)
        task.add_done_callback(self._late.discard)

    async def offered(self) -> list[dict[str, Any]]:
        """The models that the upstream offers.

        Raises:
            MissingCredential: none is set.
            UpstreamUnreachable: it did not answer as it should.
        """
        headers = {"anthropic-version": _API_VERSION, **self._credentials.headers()}
        try:
            answer = await self._client.get("/v1/models", params={"limit": 1000}, headers=headers, timeout=30)
            answer.raise_for_status()
            found: list[dict[str, Any]] = answer.json()["data"]
        except (httpx.HTTPError, ValueError, KeyError) as error:
            raise UpstreamUnreachable(operator_detail=repr(error)) from error
        return found

    async def close(self) -> None:
        """Wait for what is still to be recorded."""
        await asyncio.gather(*self._late, return_exceptions=True)

    async def _sandbox(self, request: Request) -> Sandbox | None:
        # Looked up each time: a token ends with its sandbox, and not a moment later.
        token = _token(request.headers)
        if token is None:
            return None
        digest = sha256(token.encode()).hexdigest()
        return await self._store.read(lambda tx: tx.sandboxes.by_agent_token(digest))


def _headers(request: Request, credential: Mapping[str, str]) -> dict[str, str]:
    """What goes upstream: headers that the Messages API knows. Others could have a meaning to whatever stands there."""
    headers = {
        name: value
        for name, value in request.headers.items()
        if name in _PASSED_ON or name.startswith(_PASSED_ON_PREFIXES)
    }
    headers["accept-encoding"] = "identity"
    for name, value in credential.items():
        given = headers.get(name) if name == "anthropic-beta" else None
        headers[name] = f"{given},{value}" if given and value not in given.split(",") else value
    return headers


def _secrets(credential: Mapping[str, str]) -> list[bytes]:
    found = [value.rpartition(" ")[2] for name, value in credential.items() if name != "anthropic-beta"]
    return [value.encode() for value in found if len(value) >= _SHORTEST_SECRET]


def _hide(data: bytes, secrets: list[bytes]) -> bytes:
    """An upstream that repeats what it was sent, in an error for instance, must not tell the agent its credential."""
    for secret in secrets:
        data = data.replace(secret, _HIDDEN)
    return data


def _token(headers: Mapping[str, str]) -> str | None:
    given = headers.get("x-api-key")
    if given:
        return given
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token or None if scheme.lower() == "bearer" else None


async def _body(request: Request) -> bytes | None:
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > _MAX_BODY_BYTES:
            return None
        parts.append(part)
    return b"".join(parts)


async def _whole(answer: httpx.Response, headers: dict[str, str], secrets: list[bytes]) -> Response:
    try:
        body = await answer.aread()
    except httpx.HTTPError:
        return _problem(502, "api_error", "The model's API broke off.")
    finally:
        await answer.aclose()
    return Response(_hide(body, secrets), status_code=answer.status_code, headers=headers)


def _problem(status: int, kind: str, message: str) -> Response:
    return JSONResponse({"type": "error", "error": {"type": kind, "message": message}}, status_code=status)


async def _nothing_here(request: Request) -> Response:
    return _problem(404, "not_found_error", f"A sandbox cannot reach {json.dumps(request.url.path)} here.")
