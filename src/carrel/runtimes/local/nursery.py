"""The gateway's side of the preloaded parent (`carrel.runner.nursery`): starts it, asks it for runners."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import structlog

from carrel.errors import SandboxLaunchFailed
from carrel.protocol.bootstrap import Bootstrap

log = structlog.get_logger(__name__)


_ANSWER_SECONDS = 30.0
_PARENTS = 2


class _ParentDied(Exception):
    """The preloaded parent ended before it answered."""


class Nursery:
    """One preloaded parent at a time; a new one is started when it is asked for a runner and is gone."""

    def __init__(self, log_path: Path, *, max_bytes: int) -> None:
        self._log_path = log_path
        self._max_bytes = max_bytes
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reader: asyncio.Task[None] | None = None
        self._asked: dict[str, asyncio.Future[int]] = {}
        self._starting = asyncio.Lock()

    async def start(self, exit_stack: AsyncExitStack) -> None:
        """Start the parent, so that the first runner need not wait for its imports."""
        exit_stack.push_async_callback(self._close)
        await self._ensure()

    @property
    def pid(self) -> int | None:
        """The parent's process id."""
        return self._process.pid if self._process else None

    async def fork(self, bootstrap: Bootstrap) -> int:
        """Have a runner forked; answers its pid.

        Raises:
            SandboxLaunchFailed: it could not be forked.
        """
        for _ in range(_PARENTS):
            try:
                return await self._ask(bootstrap)
            except _ParentDied as error:
                log.warning("nursery.died", error=str(error))
                # Asked again, a new one forks at most one runner too: whatever the old one forked holds the lock.
                await self._gone()
        raise SandboxLaunchFailed(operator_detail="the preloaded parent died, and so did the next")

    async def _ask(self, bootstrap: Bootstrap) -> int:
        await self._ensure()
        assert self._writer is not None
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._asked[bootstrap.sandbox_id] = answer
        try:
            self._writer.write(bootstrap.model_dump_json().encode() + b"\n")
            await self._writer.drain()
            async with asyncio.timeout(_ANSWER_SECONDS):
                return await answer
        except TimeoutError as error:
            raise SandboxLaunchFailed(operator_detail="the preloaded parent did not answer") from error
        except OSError as error:
            raise _ParentDied(repr(error)) from error
        finally:
            self._asked.pop(bootstrap.sandbox_id, None)

    async def _gone(self) -> None:
        """Wait until the death of the parent was noticed."""
        if self._reader is not None:
            await asyncio.wait({self._reader}, timeout=_ANSWER_SECONDS)

    async def _ensure(self) -> None:
        async with self._starting:
            if self._reader is not None and not self._reader.done():
                return
            ours, theirs = socket.socketpair()
            with theirs, open(self._log_path, "ab") as output:  # noqa: ASYNC230  (a descriptor for the child)
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-I",
                    "-m",
                    "carrel.runner.nursery",
                    str(theirs.fileno()),
                    pass_fds=[theirs.fileno()],
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    # Each runner writes its own mark over this; see `_show_environment` there.
                    env={"PATH": os.defpath, "LANG": "C.UTF-8", "CARREL_ROOM": "-" * 256},
                    start_new_session=True,
                )
            reader, self._writer = await asyncio.open_unix_connection(sock=ours, limit=self._max_bytes)
            self._reader = asyncio.create_task(self._read(reader), name="nursery")
            log.debug("nursery.started", pid=self._process.pid)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError):
            while line := await reader.readline():
                answer = json.loads(line)
                waiting = self._asked.get(answer["sandbox_id"])
                if waiting is None or waiting.done():
                    continue
                if "pid" in answer:
                    waiting.set_result(int(answer["pid"]))
                else:
                    waiting.set_exception(SandboxLaunchFailed(operator_detail=answer.get("error")))
        for waiting in self._asked.values():
            if not waiting.done():
                waiting.set_exception(_ParentDied("it answered nothing"))
        if self._writer is not None:
            self._writer.close()
        if self._process is not None:
            await self._process.wait()

    async def _close(self) -> None:
        """Let go of the parent: it ends once its last runner has."""
        if self._writer is not None:
            self._writer.close()
        if self._reader is not None:
            done, _ = await asyncio.wait({self._reader}, timeout=5)
            if not done:
                self._reader.cancel()
                await asyncio.gather(self._reader, return_exceptions=True)
