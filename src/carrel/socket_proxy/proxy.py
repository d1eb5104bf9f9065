"""The server: it reads a request, looks whom it is about, and passes it on or refuses it."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import structlog

from carrel.errors import EngineCallRefused, InvalidSettings
from carrel.protocol.engine_calls import Scope
from carrel.socket_proxy.calls import checked_filters, find
from carrel.socket_proxy.containers import checked_container
from carrel.socket_proxy.folders import Bindable
from carrel.socket_proxy.wire import HEAD_BYTES, Request, answer, head_of, read_request, relay, status_of

__all__ = ["SocketProxy", "SocketProxyOptions"]

log = structlog.get_logger(__name__)

LABEL = "carrel.owner"
_PROJECT = "com.docker.compose.project"
_ASK_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class SocketProxyOptions:
    """What a proxy is told by its operator."""

    listen: Path
    engine: Path
    owner: str | None = None
    """What its containers are labelled with; None: the compose project that it is of itself."""
    bindable: Path = Path("/data")
    images: tuple[str, ...] = ("*",)
    networks: tuple[str, ...] = ("none",)


class SocketProxy:
    """A door in the engine's socket that is as wide as sandboxes need it.

    Every container that is made through it bears a label of its own; a call about a container without that label is
    answered as if there were none. Its own compose project's containers may be asked where their folders are.
    """

    def __init__(self, options: SocketProxyOptions, bindable: Bindable | None = None) -> None:
        """Make a proxy that has not begun.

        Args:
            options: what the operator says.
            bindable: folders that may be bound; None: what our own container is shown below `options.bindable`.
        """
        self._options = options
        self._bindable = bindable
        self._owner = options.owner
        self._project: str | None = None
        self._serving: set[asyncio.Task[Any]] = set()

    async def start(self, exit_stack: AsyncExitStack) -> None:
        """Look at the engine, and listen; closing is registered with `exit_stack`.

        Raises:
            InvalidSettings: the engine does not answer, or nothing says what the proxy is to guard.
        """
        await self._look_at_ourselves()
        listen = self._options.listen
        listen.unlink(missing_ok=True)
        server = await asyncio.start_unix_server(self._serve, path=listen, limit=HEAD_BYTES)
        exit_stack.callback(listen.unlink, missing_ok=True)
        exit_stack.push_async_callback(self._end)
        exit_stack.callback(server.close)
        # Who may open the folder may ask: it is a volume that nobody but the gateway is shown.
        listen.chmod(0o666)
        assert self._bindable is not None
        log.info("socket_proxy.listening", socket=str(listen), owner=self._owner, bindable=self._bindable.on_host)

    async def _look_at_ourselves(self) -> None:
        try:
            inspected = await self._ask(f"/containers/{socket.gethostname()}/json")
        except OSError as error:
            raise InvalidSettings(f"No engine answers at {self._options.engine}: {error.strerror or error}.") from error
        if inspected is not None:
            self._project = inspected["Config"]["Labels"].get(_PROJECT)
            self._owner = self._owner or self._project
            self._bindable = self._bindable or Bindable.shown_below(self._options.bindable, inspected)
        if self._bindable is None or not self._owner:
            raise InvalidSettings(
                "The socket proxy runs in a container, of a compose project or with --owner: by its own folders it "
                "knows what sandboxes may be shown, by its name whose they are."
            )

    async def _end(self) -> None:
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving = asyncio.current_task()
        assert serving is not None
        self._serving.add(serving)
        serving.add_done_callback(self._serving.discard)
        request: Request | None = None
        try:
            request = await read_request(reader)
            if request is not None:
                await self._pass(request, reader, writer)
        except EngineCallRefused as error:
            asked = {} if request is None else {"method": request.method, "path": request.path}
            log.warning("socket_proxy.refused", reason=error.message, detail=error.operator_detail, **asked)
            writer.write(answer(error.http_status, {"message": f"socket proxy: {error.message}"}))
        except asyncio.CancelledError:
            # The proxy ends. asyncio's server asks each task for its exception, and has no answer for this one.
            log.debug("socket_proxy.cut_off")
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            log.warning("socket_proxy.engine_away", error=repr(error))
            with suppress(OSError):  # it may be the caller who is gone
                writer.write(answer(HTTPStatus.BAD_GATEWAY, {"message": "socket proxy: the engine does not answer"}))
        finally:
            with suppress(OSError):  # whoever asked has gone; there is nobody to tell
                writer.close()
                await writer.wait_closed()

    async def _pass(self, request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        call, version, name = find(request.method, request.path, request.query)
        target, query, body = f"{version}{call.path}".replace("{}", name), dict(request.query), b""
        if request.body and call.scope is not Scope.CREATE:
            raise EngineCallRefused(f"{call.method} {call.path} is not passed on with a body.")
        if request.upgrade and call.scope is not Scope.ATTACH:
            raise EngineCallRefused(f"{call.method} {call.path} does not become a stream.")
        match call.scope:
            case Scope.LIST | Scope.EVENTS:
                query["filters"] = checked_filters(query.get("filters"), f"{LABEL}={self._owner}")
            case Scope.CREATE:
                body = self._container(request.body)
            case Scope.INSPECT | Scope.CONTAINER | Scope.START | Scope.ATTACH:
                found = await self._ask(f"/containers/{name}/json")
                if not self._is_ours(found):
                    writer.write(self._stranger(call.scope, name, found))
                    return
                assert found is not None
                if call.scope is Scope.START:
                    self._look_again(found)
                # By its id: a name could have become another's since.
                target = f"{version}{call.path}".replace("{}", found["Id"])
        head = head_of(call.method, target, query, body, upgrade=request.upgrade)
        await self._hand_over(head, request, reader, writer)

    def _container(self, asked: bytes) -> bytes:
        assert self._owner is not None
        assert self._bindable is not None
        return checked_container(
            asked,
            label=(LABEL, self._owner),
            bindable=self._bindable,
            images=self._options.images,
            networks=self._options.networks,
        )

    def _is_ours(self, found: Mapping[str, Any] | None) -> bool:
        return found is not None and (found["Config"].get("Labels") or {}).get(LABEL) == self._owner

    def _stranger(self, scope: Scope, name: str, found: Mapping[str, Any] | None) -> bytes:
        """The answer about a container that the gateway did not make: there is none, unless it is the gateway's own."""
        labels = (found["Config"].get("Labels") or {}) if found is not None else {}
        if scope is Scope.INSPECT and self._project is not None and labels.get(_PROJECT) == self._project:
            assert found is not None
            return answer(HTTPStatus.OK, {key: found.get(key) for key in ("Id", "Name", "Mounts")})
        if found is not None:
            log.warning("socket_proxy.refused", reason="the container is somebody else's", container=name)
        return answer(HTTPStatus.NOT_FOUND, {"message": f"No such container: {name}"})

    def _look_again(self, found: Mapping[str, Any]) -> None:
        """The engine resolves what is bound when a container starts, which may be long after it was made."""
        assert self._bindable is not None
        for mount in found["HostConfig"].get("Mounts") or ():
            self._bindable.check(mount["Source"])

    async def _hand_over(
        self, head: bytes, request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        from_engine, to_engine = await asyncio.open_unix_connection(self._options.engine, limit=HEAD_BYTES)
        try:
            to_engine.write(head)
            await to_engine.drain()
            told = await from_engine.readuntil(b"\r\n\r\n")
            writer.write(told)
            await writer.drain()
            async with asyncio.TaskGroup() as tasks:
                back = tasks.create_task(relay(from_engine, writer), name="socket-proxy-answer")
                if request.upgrade and status_of(told) == HTTPStatus.SWITCHING_PROTOCOLS:
                    forth = relay(reader, to_engine)
                else:  # nothing of what else may come is handed on: it would be a request that nobody has looked at
                    forth = _until_gone(reader, back)
                going = tasks.create_task(forth, name="socket-proxy-request")
                back.add_done_callback(lambda _: going.cancel())
        except* (ConnectionError, BrokenPipeError) as errors:
            # One of the two has left in the middle; the other is told by the end of its connection.
            log.debug("socket_proxy.broke_off", error=repr(errors.exceptions[0]))
        finally:
            with suppress(OSError):  # the engine may have closed it
                to_engine.close()
                await to_engine.wait_closed()

    async def _ask(self, path: str) -> dict[str, Any] | None:
        """What the engine says of a container; None where there is none.

        Raises:
            OSError: the engine does not answer.
        """
        async with asyncio.timeout(_ASK_SECONDS):
            reader, writer = await asyncio.open_unix_connection(self._options.engine, limit=HEAD_BYTES)
            try:
                # HTTP/1.0: the answer is one piece, which ends with the connection.
                writer.write(head_of("GET", path, {}, b"", upgrade=False).replace(b"HTTP/1.1", b"HTTP/1.0", 1))
                await writer.drain()
                told = await reader.readuntil(b"\r\n\r\n")
                content = await reader.read()
            finally:
                writer.close()
        if (status := status_of(told)) == HTTPStatus.NOT_FOUND:
            return None
        if status != HTTPStatus.OK:
            raise ConnectionError(f"the engine answers {status}")
        found: dict[str, Any] = json.loads(content)
        return found


async def _until_gone(reader: asyncio.StreamReader, back: asyncio.Task[None]) -> None:
    """Drop what comes; when whoever asked has gone, the answer has no reader any more."""
    while await reader.read(HEAD_BYTES):
        pass
    back.cancel()
