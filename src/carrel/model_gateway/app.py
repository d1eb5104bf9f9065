"""The road from a sandbox to the model.

Takes what an agent sends to the Messages API, checks its token, puts the real credential in the token's place, and
passes the answer on as it comes, metered. Everything else is refused: this is all that a sandbox can reach.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from hashlib import sha256
from typing import Any

import httpx
import structlog
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from carrel import abc
from carrel.errors import CarrelError, SessionNotFound, StoreUnavailable, TurnFailure, UpstreamUnreachable
from carrel.model import Sandbox
from carrel.model_gateway.bounds import ModelRequest
from carrel.model_gateway.logins import Logins
from carrel.model_gateway.meter import Grant, Meter, Reading

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
_LATE_SECONDS = 10.0
_QUICK_BODY_BYTES = 256 * 1024
_NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.UnsupportedProtocol)


class ModelGateway:
    """Passes model requests on, for the agents of one installation."""

    def __init__(
        self,
        store: abc.Store,
        meter: Meter,
        credentials: abc.CredentialSource,
        client: httpx.AsyncClient,
        logins: Logins | None = None,
    ) -> None:
        """Make the gateway.

        Args:
            store: says whose a token is.
            meter: told what each request took.
            credentials: the real credential.
            client: its base URL is the upstream.
            logins: credentials of environments, which take the real one's place for their sessions.
        """
        self._store = store
        self._meter = meter
        self._credentials = credentials
        self._client = client
        self._logins = logins
        self._late: set[asyncio.Task[None]] = set()

    def app(self, beside: Sequence[Route] = ()) -> Starlette:
        """The application that sandboxes talk to. `beside`: what else they reach by it."""
        routes = [
            *beside,
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
        """A request that costs: what it may come to is reserved before it is sent, and settled after it."""
        taken = await self._take(request)
        if isinstance(taken, Response):
            return taken
        sandbox, credential, body = taken
        asked = await _read(body)
        if asked is None:
            return _problem(400, "invalid_request_error", "This is no request that a model could answer.")
        try:
            given = await self._meter.reserve(sandbox, asked, request.is_disconnected)
        except TurnFailure as error:
            # A client that asked again would be refused again; this header is how it is told.
            return _problem(402, "billing_error", error.message, headers={"x-should-retry": "false"})
        except SessionNotFound:
            return _unknown_token()
        except StoreUnavailable as error:
            return _away(error)
        if given is None:
            return Response(status_code=499)
        if not given.whole:
            body = await asyncio.to_thread(asked.with_max_tokens, given.max_tokens)
        try:
            answer = await self._client.send(self._upstream(request, "/v1/messages", credential, body), stream=True)
        except _NEVER_SENT as error:
            await self._meter.release(given)
            return _unreachable(error)
        except httpx.HTTPError as error:
            await self._meter.settle(given, Reading())
            return _unreachable(error)
        except BaseException:
            self._settle_late(Reading(), given)
            raise
        return await self._answer(answer, given, _secrets(credential))

    async def _answer(self, answer: httpx.Response, given: Grant, secrets: list[bytes]) -> Response:
        headers = _passed_back(answer, secrets)
        if answer.status_code != 200:
            # Errors are not charged for.
            await self._meter.release(given)
            return await _whole(answer, headers, secrets)
        if "text/event-stream" in answer.headers.get("content-type", ""):
            return StreamingResponse(self._stream(answer, given), headers=headers)
        reading = Reading()
        try:
            response = await _whole(answer, headers, secrets)
            if response.status_code == 200:
                reading.take_whole(bytes(response.body))
        except BaseException:
            self._settle_late(reading, given)
            raise
        await self._meter.settle(given, reading)
        return response

    async def _count_tokens(self, request: Request) -> Response:
        return await self._forward(request, "/v1/messages/count_tokens")

    async def _models(self, request: Request) -> Response:
        return await self._forward(request, "/v1/models")

    async def _model(self, request: Request) -> Response:
        model = request.path_params["model"]
        if not _MODEL_NAME.fullmatch(model):
            return await _nothing_here(request)
        return await self._forward(request, f"/v1/models/{model}")

    async def _forward(self, request: Request, path: str) -> Response:
        taken = await self._take(request)
        if isinstance(taken, Response):
            return taken
        _, credential, body = taken
        try:
            answer = await self._client.send(self._upstream(request, path, credential, body), stream=True)
        except httpx.HTTPError as error:
            return _unreachable(error)
        secrets = _secrets(credential)
        return await _whole(answer, _passed_back(answer, secrets), secrets)

    async def _take(self, request: Request) -> tuple[Sandbox, Mapping[str, str], bytes] | Response:
        """Who asks, the credential that is to be used, and the body; or what the asker is refused with."""
        try:
            found = await self._sandbox(request)
        except StoreUnavailable as error:
            return _away(error)
        if found is None:
            return _unknown_token()
        sandbox, environment = found
        try:
            credential = await self._credential(environment)
        except CarrelError as error:
            return _problem(401, "authentication_error", error.message)
        try:
            body = await _body(request)
        except ClientDisconnect:
            return Response(status_code=499)
        if body is None:
            return _problem(413, "request_too_large", "The request is larger than the gateway passes on.")
        return sandbox, credential, body

    def _upstream(self, request: Request, path: str, credential: Mapping[str, str], body: bytes) -> httpx.Request:
        return self._client.build_request(
            request.method,
            path,
            params=request.scope["query_string"] or None,
            headers=_headers(request, credential),
            content=body,
        )

    async def _stream(self, answer: httpx.Response, given: Grant) -> AsyncIterator[bytes]:
        reading = Reading()
        settled = False
        try:
            async for chunk in answer.aiter_raw():
                reading.take(chunk)
                if reading.stopped and not settled:
                    # On record before the agent can know that the answer is whole, so that a turn's end never
                    # comes before its usage; what is said before the end need not wait for that.
                    head, end, tail = chunk.rpartition(_LAST_EVENT)
                    if head:
                        yield head
                    # The agent may give up before a store that is away is back; what it took is recorded all the same.
                    settled = True
                    await asyncio.shield(self._settle_late(reading, given))
                    yield end + tail
                    continue
                yield chunk
        finally:
            if not settled:
                self._settle_late(reading, given)
            await answer.aclose()

    def _settle_late(self, reading: Reading, given: Grant) -> asyncio.Task[None]:
        """An answer that broke off is charged what it had said by then; its request may be cancelled already."""
        task = asyncio.create_task(self._meter.settle(given, reading), name="settle-usage")
        self._late.add(task)
        task.add_done_callback(self._late.discard)
        return task

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
        """Wait for what is still to be recorded; not for ever, for the store may be away."""
        late = list(self._late)
        if late:
            _, over = await asyncio.wait(late, timeout=_LATE_SECONDS)
            for task in over:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    async def _credential(self, environment: str) -> Mapping[str, str]:
        login = await self._logins.headers(environment) if self._logins is not None else None
        return self._credentials.headers() if login is None else login

    async def _sandbox(self, request: Request) -> tuple[Sandbox, str] | None:
        """Who asks, and the environment of their session."""
        # Looked up each time: a token ends with its sandbox, and not a moment later.
        token = _token(request.headers)
        if token is None:
            return None
        digest = sha256(token.encode()).hexdigest()

        def work(tx: abc.Transaction) -> tuple[Sandbox, str] | None:
            sandbox = tx.sandboxes.by_agent_token(digest)
            if sandbox is None:
                return None
            # What it was launched for, which its session may have left since; earlier releases did not say.
            return sandbox, (sandbox.environment or "").rpartition(":")[0]

        return await self._store.read(work)


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


def _passed_back(answer: httpx.Response, secrets: list[bytes]) -> dict[str, str]:
    return {
        name: _hide(value.encode(), secrets).decode()
        for name, value in answer.headers.items()
        if name.lower() not in _NOT_PASSED_BACK
    }


async def _read(body: bytes) -> ModelRequest | None:
    if len(body) <= _QUICK_BODY_BYTES:
        return ModelRequest.read(body)
    return await asyncio.to_thread(ModelRequest.read, body)


def _problem(status: int, kind: str, message: str, headers: Mapping[str, str] | None = None) -> Response:
    body = {"type": "error", "error": {"type": kind, "message": message}}
    return JSONResponse(body, status_code=status, headers=headers)


def _unknown_token() -> Response:
    return _problem(401, "authentication_error", "This gateway wants the token of a running sandbox.")


def _unreachable(error: httpx.HTTPError) -> Response:
    log.warning("model.unreachable", error=repr(error))
    return _problem(502, "api_error", "The model's API cannot be reached.")


def _away(error: StoreUnavailable) -> Response:
    """Overloaded, in the words of the Messages API: the agent asks again."""
    answer = _problem(529, "overloaded_error", error.message)
    answer.headers["retry-after"] = "1"
    return answer


async def _nothing_here(request: Request) -> Response:
    return _problem(404, "not_found_error", f"A sandbox cannot reach {json.dumps(request.url.path)} here.")
