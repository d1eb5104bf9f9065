"""Whether there is memory for one more sandbox, and who waits until there is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

from carrel.errors import OutOfMemory

__all__ = ["Memory"]

EXPECTED_BYTES = 160 * 1024 * 1024
"""What a sandbox is counted as from its admission until it is measured."""

_EXPECTED_SECONDS = 60.0


class Memory:
    """The soft limit on what all sandboxes take together. Above it none is started; it ends nothing by itself."""

    def __init__(self, limit_bytes: int | None = None, *, wait_seconds: float = 30.0) -> None:
        """Bound what sandboxes take.

        Args:
            limit_bytes: the soft limit; None: none.
            wait_seconds: how long `wait_for_room` waits.
        """
        self.limit_bytes = limit_bytes
        self._wait_seconds = wait_seconds
        self._taken = 0
        self._expected: dict[str, float] = {}
        self._waiting: dict[asyncio.Future[None], str] = {}

    @property
    def expected_bytes(self) -> int:
        """What those will take that have been admitted and are not measured yet."""
        now = time.monotonic()
        self._expected = {session_id: until for session_id, until in self._expected.items() if until > now}
        return len(self._expected) * EXPECTED_BYTES

    def room(self, session_id: str | None = None) -> bool:
        """Whether a sandbox may be started now; for a session that has been admitted, always."""
        if self.limit_bytes is None:
            return True
        expected = self.expected_bytes
        return session_id in self._expected or self._taken + expected < self.limit_bytes

    def spare(self) -> bool:
        """Whether one more could be started and still leave room for the next: a warm pool takes no more than that."""
        if self.limit_bytes is None:
            return True
        return not self._waiting and self._taken + self.expected_bytes + EXPECTED_BYTES < self.limit_bytes

    def admit(self, session_id: str) -> bool:
        """Count the session's sandbox as started, if there is room for it. Whether there was."""
        if not self.room(session_id):
            return False
        if self.limit_bytes is not None:
            self._expected[session_id] = time.monotonic() + _EXPECTED_SECONDS
        return True

    def release(self, session_id: str) -> None:
        """Count the session's sandbox no longer: it is not started after all."""
        self._expected.pop(session_id, None)

    async def wait_for_room(self, session_id: str) -> None:
        """Wait until the session is admitted; whoever came first is first.

        Raises:
            OutOfMemory: there was no room within the time that may be waited.
        """
        if not self._waiting and self.admit(session_id):
            return
        admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[admitted] = session_id
        try:
            async with asyncio.timeout(self._wait_seconds):
                await admitted
        except TimeoutError as error:
            raise OutOfMemory from error
        finally:
            self._waiting.pop(admitted, None)

    def report(self, taken_bytes: int, measured: Iterable[str]) -> None:
        """Say what all sandboxes take now, and whose are among them with all they need. Who finds room now goes on."""
        self._taken = taken_bytes
        for session_id in measured:
            self._expected.pop(session_id, None)
        for admitted, session_id in list(self._waiting.items()):
            if admitted.done():
                continue
            if not self.admit(session_id):
                return
            admitted.set_result(None)
