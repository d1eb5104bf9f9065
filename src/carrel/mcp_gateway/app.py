"""MCP servers of environments, as agents reach them: by the gateway, which adds the secrets of their headers.

`/mcp/NAME` on the socket that sandboxes see. Whose a request is says the agent's token; which servers there are for it,
and where they stand, says the version of the environment that its session keeps. All that a request decides is its body
and the protocol's own headers: never the address, the query, or the credential.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import anyio
import httpx
import structlog
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from carrel import __version__, abc
from carrel.errors import (
    CarrelError,
    EnvironmentProblem,
    McpServerForbidden,
    McpServerRefused,
    McpServerUnreachable,
    SecretMissing,
    StoreUnavailable,
)
from carrel.mcp_gateway.custom_tools import CustomTools
from carrel.mcp_gateway.hiding import Hider
from carrel.mcp_gateway.open_secrets import OpenSecrets
from carrel.protocol.environments import CUSTOM_SERVER, EnvironmentSpec, secrets_in, with_secrets

__all__ = ["McpGateway"]

log = structlog.get_logger(__name__)

_PASSED_ON = frozenset(["accept", "content-type", "last-event-id", "user-agent"])
_PASSED_BACK = frozenset(["content-type", "cache-control", "retry-after"])
_PROTOCOLS_OWN = "mcp-"
_MOST_BODY_BYTES = 16 * 1024 * 1024
_MOST_ANSWER_BYTES = 64 * 1024 * 1024
_MOST_AT_ONCE = 32
_CALL_SECONDS = httpx.Timeout(600.0, connect=15.0, pool=30.0)
_STREAM_SECONDS = httpx.Timeout(3600.0, connect=15.0, pool=30.0)
_ASK_SECONDS = httpx.Timeout(5.0)
_GREETING = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {
        "protocolVersion": "2025-06-18",
        "capabilities": {},
        "clientInfo": {"name": "carrel", "version": __version__},
    },
}
_WORDS = {
    401: "This gateway wants the token of a running sandbox.",
    404: "There is no such server for this session.",
    413: "The request is larger than the gateway passes on.",
    429: "Too many requests to MCP servers are at work for this session.",
}


@dataclass(frozen=True)
class _Upstream:
    """A server as it is asked: with its secrets."""

    name: str
    session_id: str
    url: str
    headers: dict[str, str] = field(repr=False)
    hider: Hider = field(repr=False)


class McpGateway:
    """Passes requests on to MCP servers, for the agents of one installation."""

    def __init__(self, store: abc.Store, open_secrets: OpenSecrets, client: httpx.AsyncClient) -> None:
        """Make it.

        Args:
            store: says whose a token is, and what its environment declares.
            open_secrets: opens secrets.
            client: connects to what may be connected to, and follows no redirect.
        """
        self._store = store
        self._open_secrets = open_secrets
        self._client = client
        self._custom = CustomTools(client, open_secrets)
        self._at_work: Counter[str] = Counter()

    async def start(self, exit_stack: AsyncExitStack) -> None:
        """Begin to answer; closing is registered with `exit_stack`."""
        await self._custom.start(exit_stack)

    def routes(self) -> list[Route]:
        """What is added to the application that sandboxes talk to."""
        return [Route("/mcp/{server}", self._serve, methods=["GET", "POST", "DELETE"])]

    async def problem(self, spec: EnvironmentSpec, name: str) -> CarrelError | None:
        """What would keep an agent from using a server of the environment, as far as asking it shows."""
        try:
            upstream = await self._upstream(spec, name, "")
        except SecretMissing as error:
            return error
        return await self._ask(upstream)

    # ------------------------------------------------------------------------------------------------- one request

    async def _serve(self, request: Request) -> Response | ASGIApp:
        try:
            found = await self._whose(request)
        except StoreUnavailable as error:
            return _problem(503, error.message)
        if found is None:
            return _problem(401)
        session_id, spec = found
        name = request.path_params["server"]
        if name == CUSTOM_SERVER and spec.custom_tools:
            return self._custom.answering(spec, session_id)
        if name not in spec.gateway_servers:
            return _problem(404)
        if self._at_work[session_id] >= _MOST_AT_ONCE:
            return _problem(429)
        try:
            body = await _body(request)
            if body is None:
                return _problem(413)
            upstream = await self._upstream(spec, name, session_id)
        except ClientDisconnect:
            return Response(status_code=499)
        except SecretMissing as error:
            log.error("mcp.secret_missing", session=session_id, server=name, detail=error.operator_detail)
            return _problem(502, error.message)
        except StoreUnavailable as error:
            return _problem(503, error.message)
        return await self._pass_on(request, upstream, body)

    async def _whose(self, request: Request) -> tuple[str, EnvironmentSpec] | None:
        """The session whose agent asks, and its environment. Looked up each time: a token ends with its sandbox."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            return None
        digest = sha256(token.encode()).hexdigest()

        def work(tx: abc.Transaction) -> tuple[str, EnvironmentSpec] | None:
            sandbox = tx.sandboxes.by_agent_token(digest)
            session = tx.sessions.get(sandbox.session_id) if sandbox is not None else None
            if session is None:
                return None
            environment = tx.environments.get(session.environment, session.environment_version)
            return session.id, EnvironmentSpec() if environment is None else environment.spec

        return await self._store.read(work)

    async def _upstream(self, spec: EnvironmentSpec, name: str, session_id: str) -> _Upstream:
        server = spec.gateway_servers[name]
        headers: Mapping[str, str] = server.get("headers") or {}
        values = dict(await self._open_secrets(spec, secrets_in(dict(headers))))
        filled = {header.lower(): with_secrets(text, values) for header, text in headers.items()}
        return _Upstream(name, session_id, server["url"], filled, Hider(values.values()))

    async def _pass_on(self, request: Request, upstream: _Upstream, body: bytes) -> Response:
        kept = {
            name: value
            for name, value in request.headers.items()
            if name in _PASSED_ON or name.startswith(_PROTOCOLS_OWN)
        }
        timeout = _STREAM_SECONDS if request.method == "GET" else _CALL_SECONDS
        self._at_work[upstream.session_id] += 1
        try:
            answer = await self._send(upstream, request.method, headers=kept, content=body or None, timeout=timeout)
            problem = _problem_of(upstream, answer)
        except BaseException as error:
            self._done(upstream)
            if isinstance(error, EnvironmentProblem):
                return _refusal(upstream, error)
            raise
        if problem is not None:
            await answer.aclose()
            self._done(upstream)
            return _refusal(upstream, problem)
        return _Answer(
            self._stream(answer, upstream), answer, _passed_back(answer, upstream), lambda: self._done(upstream)
        )

    async def _send(self, upstream: _Upstream, method: str, **options: Any) -> httpx.Response:
        """The server's answer, its body still to come. Raises EnvironmentProblem."""
        headers = {**options.pop("headers"), "accept-encoding": "identity", **upstream.headers}
        try:
            asked = self._client.build_request(method, upstream.url, headers=headers, **options)
            return await self._client.send(asked, stream=True, follow_redirects=False)
        except httpx.ConnectError as error:
            private = "private_address" in str(error)
            raise (McpServerForbidden if private else McpServerUnreachable)(upstream.name) from error
        except httpx.LocalProtocolError as error:  # a secret that cannot stand in a header
            raise McpServerRefused(upstream.name) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise McpServerUnreachable(upstream.name) from error

    async def _stream(self, answer: httpx.Response, upstream: _Upstream) -> AsyncIterator[bytes]:
        endless = "text/event-stream" in answer.headers.get("content-type", "")
        left = _MOST_ANSWER_BYTES
        try:
            async for piece in answer.aiter_bytes():
                left -= 0 if endless else len(piece)
                if left < 0:
                    log.warning("mcp.answer_too_large", session=upstream.session_id, server=upstream.name)
                    raise _BrokenOff
                if shown := upstream.hider.feed(piece):
                    yield shown
            if rest := upstream.hider.rest():
                yield rest
        except httpx.HTTPError as error:
            log.info("mcp.broken_off", session=upstream.session_id, server=upstream.name, error=type(error).__name__)
            raise _BrokenOff from error

    def _done(self, upstream: _Upstream) -> None:
        self._at_work[upstream.session_id] -= 1
        if not self._at_work[upstream.session_id]:
            del self._at_work[upstream.session_id]

    # ------------------------------------------------------------------------------------------------ how it does

    async def _ask(self, upstream: _Upstream) -> EnvironmentProblem | None:
        headers = {"accept": "application/json, text/event-stream", "content-type": "application/json"}
        try:
            async with _closing(
                await self._send(upstream, "POST", headers=headers, json=_GREETING, timeout=_ASK_SECONDS)
            ) as answer:
                problem = _problem_of(upstream, answer)
                if problem is None and answer.status_code >= 500:
                    return McpServerUnreachable(upstream.name)
                session = answer.headers.get("mcp-session-id")
            if session is not None:
                left = {"mcp-session-id": session}
                async with _closing(await self._send(upstream, "DELETE", headers=left, timeout=_ASK_SECONDS)):
                    pass
        except EnvironmentProblem as error:
            return error
        return problem


class _BrokenOff(Exception):
    """The server's answer ended before its end."""


class _Answer(StreamingResponse):
    """An answer that is passed on as it comes; one that breaks off is cut, so that nobody takes it for whole."""

    def __init__(
        self, content: AsyncIterator[bytes], answer: httpx.Response, headers: dict[str, str], done: Callable[[], None]
    ) -> None:
        super().__init__(content, status_code=answer.status_code, headers=headers)
        self._answer = answer
        self._at_end = done

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        # Not by the content's own end: whoever went away before its first piece never begins it.
        try:
            await super().__call__(scope, receive, send)
        except _BrokenOff:
            return
        finally:
            self._at_end()
            with anyio.CancelScope(shield=True):
                await self._answer.aclose()


@asynccontextmanager
async def _closing(answer: httpx.Response) -> AsyncIterator[httpx.Response]:
    try:
        yield answer
    finally:
        await answer.aclose()


def _problem_of(upstream: _Upstream, answer: httpx.Response) -> EnvironmentProblem | None:
    """What an answer says of us rather than of the request."""
    if answer.status_code in (401, 407):
        return McpServerRefused(upstream.name)
    return McpServerUnreachable(upstream.name) if answer.is_redirect else None


def _refusal(upstream: _Upstream, error: EnvironmentProblem) -> Response:
    log.warning(
        "mcp.not_passed_on",
        session=upstream.session_id,
        server=upstream.name,
        code=error.code,
        cause=type(error.__cause__).__name__ if error.__cause__ is not None else None,
    )
    return _problem(502, error.message)


def _passed_back(answer: httpx.Response, upstream: _Upstream) -> dict[str, str]:
    return {
        name: upstream.hider.whole(value)
        for name, value in answer.headers.items()
        if name in _PASSED_BACK or name.startswith(_PROTOCOLS_OWN)
    }


async def _body(request: Request) -> bytes | None:
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > _MOST_BODY_BYTES:
            return None
        parts.append(part)
    return b"".join(parts)


def _problem(status: int, message: str | None = None) -> Response:
    error = {"code": -32000, "message": message or _WORDS[status]}
    return JSONResponse({"jsonrpc": "2.0", "id": None, "error": error}, status_code=status)
