"""The calls we make of a Docker engine, each in `protocol/engine_calls.py`, and what its refusals mean."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import structlog

from carrel.errors import DiskFull, ImageMissing, InvalidSettings, RuntimeUnavailable, SandboxLaunchFailed

__all__ = ["Engine", "EngineTls", "Refusal"]

log = structlog.get_logger(__name__)

T = TypeVar("T")


_CALL_SECONDS = 60.0
_AGAIN_SECONDS = 0.25
_CANNOT_CONNECT = 900
"""The status that aiodocker gives to an engine that it cannot reach."""
_REMOVAL_SECONDS = 30.0


class Refusal(Exception):
    """The engine answers that it will not do this."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status

    def told(self) -> SandboxLaunchFailed | DiskFull:
        """What a launch is told."""
        if "no space left on device" in str(self):
            return DiskFull(operator_detail=str(self))
        if self.status >= 500:
            # It could not, which is not for what was asked: an engine that is ending answers so until it is gone.
            return RuntimeUnavailable(operator_detail=str(self))
        return SandboxLaunchFailed(operator_detail=str(self))


@dataclass(frozen=True, kw_only=True)
class EngineTls:
    """How an engine is spoken to by TLS."""

    ca: Path
    """Whose certificate its own is of."""
    cert: Path | None = None
    key: Path | None = None
    """By which it knows us."""

    def context(self) -> ssl.SSLContext:
        """The same for a connection. Raises InvalidSettings where a file cannot be used."""
        try:
            context = ssl.create_default_context(cafile=str(self.ca))
            if self.cert is not None:
                context.load_cert_chain(str(self.cert), None if self.key is None else str(self.key))
        except (OSError, ssl.SSLError) as error:
            raise InvalidSettings(
                "docker.tls_ca, docker.tls_cert and docker.tls_key must be files in PEM that belong together",
                operator_detail=repr(error),
            ) from error
        return context


class Engine:
    """A connection to a Docker engine."""

    def __init__(self, host: str, *, wait_seconds: float, tls: EngineTls | None = None) -> None:
        """Name an engine; nothing is asked of it before `start`.

        Args:
            host: where it is, such as `unix:///var/run/docker.sock` or `tcp://socket-proxy:2375`.
            wait_seconds: how long a launch waits for one that is away.
            tls: how it is spoken to there; None: in plain.
        """
        self.host = host
        self._tls = tls
        self._wait_seconds = wait_seconds
        self._docker: Any = None

    async def start(self, exit_stack: AsyncExitStack) -> None:
        """Open; closing is registered with `exit_stack`.

        Raises:
            InvalidSettings: the extra is missing, or the files for TLS cannot be used.
        """
        try:
            import aiodocker
        except ImportError as error:
            raise InvalidSettings("runtime docker needs a package more: pip install 'carrel[docker]'") from error
        if self._tls is None:
            self._docker = aiodocker.Docker(url=self.host)
        else:
            url = self.host.replace("tcp://", "https://", 1)
            self._docker = aiodocker.Docker(url=url, ssl_context=self._tls.context())
        exit_stack.push_async_callback(self._docker.close)

    async def _ask(self, asked: Awaitable[T], *, seconds: float = _CALL_SECONDS) -> T:
        """Ask, and have an engine that is away told from one that refuses.

        Raises:
            RuntimeUnavailable: it is away.
            Refusal: it will not.
        """
        import aiodocker
        import aiohttp

        try:
            async with asyncio.timeout(seconds):
                return await asked
        except aiodocker.DockerError as error:
            if error.status == _CANNOT_CONNECT:
                raise RuntimeUnavailable(operator_detail=repr(error)) from error
            raise Refusal(error.status, str(error.message)) from error
        except (OSError, TimeoutError, aiohttp.ClientError) as error:
            raise RuntimeUnavailable(operator_detail=repr(error)) from error

    async def wait(self) -> None:
        """Wait until the engine answers, as long as is right for a launch.

        Raises:
            RuntimeUnavailable: it does not.
        """
        deadline = time.monotonic() + self._wait_seconds
        while True:
            try:
                await self._ask(self._docker.version(), seconds=max(1.0, self._wait_seconds))
                return
            except RuntimeUnavailable:
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(_AGAIN_SECONDS)

    async def info(self) -> Mapping[str, Any]:
        """What it says of itself."""
        return await self._ask(self._docker.system.info())

    async def has_image(self, image: str) -> bool:
        """Whether there is such an image."""
        try:
            await self._ask(self._docker.images.inspect(image))
        except Refusal as error:
            if error.status == 404:
                return False
            raise
        return True

    async def create(self, name: str, config: Mapping[str, Any], *, platform: str | None) -> None:
        """Make a container.

        Raises:
            ImageMissing: there is no such image.
            DiskFull: there is no room for it.
            SandboxLaunchFailed: it cannot be made, for another reason.
        """
        # Not through aiodocker's own method, which knows no platform.
        named = {"name": name} | ({} if platform is None else {"platform": platform})
        try:
            await self._ask(self._docker._query_json("containers/create", "POST", params=named, data=dict(config)))
        except Refusal as error:
            if error.status == 404:
                raise ImageMissing(
                    f"The image {config['Image']} that the session's sandbox is to be made of is not there; the "
                    "operator builds or pulls it.",
                    operator_detail=str(error),
                ) from error
            raise error.told() from error

    async def run(self, name: str, told: bytes) -> None:
        """Start a container, with these bytes for its standard input, and nothing after them.

        Raises:
            SandboxLaunchFailed: it cannot be started.
            RuntimeUnavailable: the engine went away; the container has not had a byte of it.
        """
        container = self._docker.containers.container(name)
        stream = container.attach(stdin=True)
        try:
            await self._ask(stream._init())  # before the start: what it reads first is there when it reads
            await self._ask(container.start())
            try:
                await self._ask(stream.write_in(told))
            except RuntimeUnavailable as error:
                # It may have come or not: who waits for its runner finds out.
                log.warning("docker.bootstrap_in_doubt", container=name, detail=error.operator_detail)
        except Refusal as error:
            raise error.told() from error
        finally:
            await stream.close()

    async def ours(self, labels: list[str]) -> list[Mapping[str, Any]]:
        """Every container with all these labels, in whatever state."""
        filters = json.dumps({"label": labels})
        found = await self._ask(self._docker.containers.list(all=1, filters=filters))
        return [container._container for container in found]

    async def inspect(self, name: str) -> Mapping[str, Any] | None:
        """All about a container; None where there is none."""
        try:
            return await self._ask(self._docker.containers.container(name).show())
        except Refusal as error:
            if error.status == 404:
                return None
            raise

    async def stats(self, name: str) -> Mapping[str, Any] | None:
        """What a container takes now; None where it is gone."""
        # Not through aiodocker's own method: without `one-shot` an engine takes two seconds to compare two samples.
        once = {"stream": "0", "one-shot": "1"}
        try:
            found: Mapping[str, Any] = await self._ask(
                self._docker._query_json(f"containers/{name}/stats", params=once)
            )
        except Refusal as error:
            if error.status in (404, 409):
                return None
            raise
        return found

    async def logs(self, name: str, tail: int) -> list[str]:
        """The last lines that it wrote; none where it is gone."""
        try:
            return await self._ask(self._docker.containers.container(name).log(stdout=True, stderr=True, tail=tail))
        except Refusal as error:
            if error.status == 404:
                return []
            raise

    async def remove(self, name: str) -> None:
        """Kill a container and remove it. When this returns, it is gone."""
        container = self._docker.containers.container(name)
        deadline = time.monotonic() + _REMOVAL_SECONDS
        while True:
            try:
                await self._ask(container.delete(force=True, v=True))
                return
            except Refusal as error:
                if error.status == 404:
                    return
                # 409: somebody else is removing it already. 500: it was just being started or ended.
                if error.status not in (409, 500) or time.monotonic() > deadline:
                    raise error.told() from error
            await asyncio.sleep(_AGAIN_SECONDS)

    async def events(self, labels: list[str], kinds: list[str]) -> AsyncIterator[Mapping[str, Any]]:
        """What happens to containers with these labels, from now on; ends when the engine does."""
        import aiodocker
        import aiohttp

        filters = json.dumps({"type": ["container"], "event": kinds, "label": labels})
        heard = self._docker.events.subscribe(create_task=False)
        listening = asyncio.create_task(self._docker.events.run(filters=filters), name="docker-events")
        try:
            while (event := await heard.get()) is not None:
                yield event
        finally:
            listening.cancel()
            try:
                await listening
            except (asyncio.CancelledError, aiodocker.DockerError, aiohttp.ClientError, OSError) as error:
                log.debug("docker.events_ended", error=repr(error))
