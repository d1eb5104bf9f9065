"""Small implementations that break one promise each, to show what holds when a part fails.

Each wraps a good one. Those that keep their contract all the same (a bus may lose frames, a store may be slow) pass the
conformance suite; the others are caught by it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterable, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any, TypeVar

from carrel import abc
from carrel.errors import ObjectStoreUnavailable, SandboxLaunchFailed
from carrel.protocol.events import StoredEvent

__all__ = [
    "BusThatDoublesAndReorders",
    "BusThatForgetsItsBound",
    "BusThatLosesFrames",
    "BusThatMixesSessions",
    "CommitFailed",
    "ObjectsThatAreAway",
    "ObjectsThatCorrupt",
    "ObjectsThatHang",
    "ObjectsThatShowParts",
    "ObjectsThatTruncate",
    "RuntimeThatDiesAfterStart",
    "RuntimeThatFailsToLaunch",
    "RuntimeThatHidesItsOrphans",
    "RuntimeThatLeavesItsProcesses",
    "RuntimeThatMeasuresTheDead",
    "RuntimeThatNeverConnects",
    "RuntimeThatTakesTheLivingForDead",
    "RuntimeThatWritesItsTokensDown",
    "StoreThatFailsCommits",
    "StoreThatIsSlow",
    "StoreThatKeepsHalfOfAFailure",
    "StoreThatPublishesLate",
]

T = TypeVar("T")

# ------------------------------------------------------------------------------------------------------------- buses


class _Bus(abc.EventBus):
    def __init__(self, inner: abc.EventBus) -> None:
        self._inner = inner

    async def start(self, exit_stack: AsyncExitStack) -> None:
        await self._inner.start(exit_stack)

    def publish(self, session_id: str, frames: Sequence[abc.Frame]) -> None:
        self._inner.publish(session_id, frames)

    def subscribe(self, session_id: str, *, max_bytes: int) -> AbstractAsyncContextManager[abc.Subscription]:
        return self._inner.subscribe(session_id, max_bytes=max_bytes)


class BusThatLosesFrames(_Bus):
    """Loses every other frame, by the throw of a die; its contract allows that."""

    def __init__(self, inner: abc.EventBus, *, share: float = 0.5, seed: int = 1) -> None:
        super().__init__(inner)
        self._share = share
        self._die = random.Random(seed)

    def publish(self, session_id: str, frames: Sequence[abc.Frame]) -> None:
        """Publish some of the frames."""
        for frame in frames:
            if self._die.random() >= self._share:
                self._inner.publish(session_id, [frame])


class BusThatDoublesAndReorders(_Bus):
    """Says frames twice and in another order, late ones too; its contract allows that."""

    def __init__(self, inner: abc.EventBus, *, seed: int = 1) -> None:
        super().__init__(inner)
        self._die = random.Random(seed)
        self._late: dict[str, list[abc.Frame]] = {}

    def publish(self, session_id: str, frames: Sequence[abc.Frame]) -> None:
        """Publish them, and some of the earlier ones again, shuffled."""
        late = self._late.setdefault(session_id, [])
        mixed = [*frames, *late]
        self._die.shuffle(mixed)
        self._late[session_id] = [*late, *frames][-5:]
        kept = [frame for frame in mixed if self._die.random() < 0.8]
        for frame in kept:
            self._inner.publish(session_id, [frame])


class BusThatMixesSessions(_Bus):
    """Tells everyone of every session."""

    def __init__(self, inner: abc.EventBus) -> None:
        super().__init__(inner)

    def publish(self, session_id: str, frames: Sequence[abc.Frame]) -> None:
        """Publish to all."""
        self._inner.publish("all", frames)

    def subscribe(self, session_id: str, *, max_bytes: int) -> AbstractAsyncContextManager[abc.Subscription]:
        """Hear of all."""
        return self._inner.subscribe("all", max_bytes=max_bytes)


class BusThatForgetsItsBound(_Bus):
    """Keeps whatever is not taken, however much that is."""

    def subscribe(self, session_id: str, *, max_bytes: int) -> AbstractAsyncContextManager[abc.Subscription]:
        """Hear of frames without a bound."""
        return self._inner.subscribe(session_id, max_bytes=2**62)


# ------------------------------------------------------------------------------------------------------------ stores


class CommitFailed(RuntimeError):
    """The disk is full, say."""


class _Store(abc.Store):
    def __init__(self, inner: abc.Store) -> None:
        self._inner = inner

    async def start(self, exit_stack: AsyncExitStack) -> None:
        await self._inner.start(exit_stack)

    async def read(self, work: Callable[[abc.Transaction], T]) -> T:
        return await self._inner.read(work)

    async def write(self, work: Callable[[abc.Transaction], T]) -> T:
        return await self._inner.write(work)


class StoreThatFailsCommits(_Store):
    """Takes back one write in so many at its very end; `failing` turns that on and off."""

    def __init__(self, inner: abc.Store, *, every: int = 3) -> None:
        super().__init__(inner)
        self._every = every
        self._writes = 0
        self.failing = True
        self.failed = 0

    async def write(self, work: Callable[[abc.Transaction], T]) -> T:
        """Write, or fail to."""
        self._writes += self.failing
        if not self.failing or self._writes % self._every:
            return await self._inner.write(work)

        def fail(tx: abc.Transaction) -> T:
            work(tx)
            raise CommitFailed("on purpose")

        self.failed += 1
        return await self._inner.write(fail)


class StoreThatIsSlow(_Store):
    """Answers late; its contract allows that."""

    def __init__(self, inner: abc.Store, *, seconds: float = 0.002) -> None:
        super().__init__(inner)
        self._seconds = seconds

    async def read(self, work: Callable[[abc.Transaction], T]) -> T:
        """Read, late."""
        await asyncio.sleep(self._seconds)
        return await self._inner.read(work)

    async def write(self, work: Callable[[abc.Transaction], T]) -> T:
        """Write at once, answer late."""
        answer = await self._inner.write(work)
        await asyncio.sleep(self._seconds)
        return answer


class StoreThatKeepsHalfOfAFailure(_Store):
    """Commits what a transaction did before it raised."""

    async def write(self, work: Callable[[abc.Transaction], T]) -> T:
        """Write, whatever happens."""

        def keep(tx: abc.Transaction) -> tuple[Any, Exception | None]:
            try:
                return work(tx), None
            except Exception as error:
                return None, error

        answer, error = await self._inner.write(keep)
        if error is not None:
            raise error
        return answer  # type: ignore[no-any-return]


class StoreThatPublishesLate(_Store):
    """Tells of events a while after the write that made them has returned. Give it `hear` as the inner's on_commit."""

    def __init__(self, open_inner: Callable[[Callable[[list[StoredEvent]], None]], abc.Store], on_commit: Any) -> None:
        super().__init__(open_inner(self.hear))
        self._on_commit = on_commit

    def hear(self, events: list[StoredEvent]) -> None:
        """Pass on, late."""
        asyncio.get_running_loop().call_later(0.02, self._on_commit, events)


# ---------------------------------------------------------------------------------------------------------- runtimes


class _Runtime(abc.Runtime):
    def __init__(self, inner: abc.Runtime) -> None:
        self._inner = inner
        self.name = inner.name
        self.isolated = inner.isolated

    async def start(self, exit_stack: AsyncExitStack) -> None:
        await self._inner.start(exit_stack)

    def launch(self, spec: abc.LaunchSpec) -> AsyncIterator[dict[str, Any]]:
        return self._inner.launch(spec)

    async def terminate(self, state: Mapping[str, Any]) -> None:
        await self._inner.terminate(state)

    async def probe(self, states: Mapping[str, Mapping[str, Any]]) -> Mapping[str, bool]:
        return await self._inner.probe(states)

    async def measure(self, states: Mapping[str, Mapping[str, Any]]) -> Mapping[str, abc.SandboxUsage]:
        return await self._inner.measure(states)

    async def owned(self) -> Mapping[str, dict[str, Any]]:
        return await self._inner.owned()

    def logs(self, state: Mapping[str, Any]) -> AsyncIterator[str]:
        return self._inner.logs(state)


class RuntimeThatDiesAfterStart(_Runtime):
    """Its runners die as soon as they are launched, so many times (None: always)."""

    def __init__(self, inner: abc.Runtime, *, times: int | None = None) -> None:
        super().__init__(inner)
        self._times = times
        self.launches = 0

    async def launch(self, spec: abc.LaunchSpec) -> AsyncIterator[dict[str, Any]]:
        """Launch, and end at once."""
        self.launches += 1
        state: dict[str, Any] = {}
        async for state in self._inner.launch(spec):
            yield state
        if self._times is None or self.launches <= self._times:
            await self._inner.terminate(state)


class RuntimeThatNeverConnects(_Runtime):
    """Its runners live and never dial the gateway."""

    def __init__(self, inner: abc.Runtime) -> None:
        super().__init__(inner)
        self._alive: set[str] = set()
        self.launches = 0

    async def launch(self, spec: abc.LaunchSpec) -> AsyncIterator[dict[str, Any]]:
        """Launch something that keeps quiet."""
        self.launches += 1
        self._alive.add(spec.sandbox_id)
        yield {"sandbox_id": spec.sandbox_id, "pid": self.launches}

    async def terminate(self, state: Mapping[str, Any]) -> None:
        """End it."""
        self._alive.discard(str(state["sandbox_id"]))

    async def probe(self, states: Mapping[str, Mapping[str, Any]]) -> Mapping[str, bool]:
        """It is alive until it is ended."""
        return {sandbox_id: sandbox_id in self._alive for sandbox_id in states}

    async def measure(self, states: Mapping[str, Mapping[str, Any]]) -> Mapping[str, abc.SandboxUsage]:
        """It takes nothing."""
        return {}

    async def owned(self) -> Mapping[str, dict[str, Any]]:
        """What was not ended."""
        return {sandbox_id: {"sandbox_id": sandbox_id} for sandbox_id in self._alive}

    async def logs(self, state: Mapping[str, Any]) -> AsyncIterator[str]:
        """It says nothing."""
        nothing: tuple[str, ...] = ()
        for line in nothing:
            yield line


class RuntimeThatFailsToLaunch(_Runtime):
    """Fails after its first checkpoint, so many times (None: always)."""

    def __init__(self, inner: abc.Runtime, *, times: int | None = None) -> None:
        super().__init__(inner)
        self._times = times
        self.launches = 0

    async def launch(self, spec: abc.LaunchSpec) -> AsyncIterator[dict[str, Any]]:
        """Begin, and fail."""
        self.launches += 1
        failing = self._times is None or self.launches <= self._times
        async for state in self._inner.launch(spec):
            yield state
            if failing:
                raise SandboxLaunchFailed(operator_detail="on purpose")


class RuntimeThatHidesItsOrphans(_Runtime):
    """Says that it owns nothing."""

    async def owned(self) -> Mapping[str, dict[str, Any]]:
        """Nothing."""
        return {}


class RuntimeThatLeavesItsProcesses(_Runtime):
    """Says that it has ended a sandbox, and has not."""

    async def terminate(self, state: Mapping[str, Any]) -> None:
        """Do nothing."""


class RuntimeThatMeasuresTheDead(_Runtime):
    """Goes on telling what a sandbox took when last it ran."""

    def __init__(self, inner: abc.Runtime) -> None:
        super().__init__(inner)
        self._known: dict[str, abc.SandboxUsage] = {}

    async def measure(self, states: Mapping[str, Mapping[str, Any]]) -> Mapping[str, abc.SandboxUsage]:
        """Measure, or remember."""
        self._known |= await self._inner.measure(states)
        return {sandbox_id: usage for sandbox_id, usage in self._known.items() if sandbox_id in states}


class RuntimeThatTakesTheLivingForDead(_Runtime):
    """Says that every runner is gone."""

    async def probe(self, states: Mapping[str, Mapping[str, Any]]) -> Mapping[str, bool]:
        """All gone."""
        return dict.fromkeys(states, False)


class RuntimeThatWritesItsTokensDown(_Runtime):
    """Puts the link token into its checkpoints."""

    async def launch(self, spec: abc.LaunchSpec) -> AsyncIterator[dict[str, Any]]:
        """Launch, and tell."""
        async for state in self._inner.launch(spec):
            yield state | {"token": spec.link_token}


# ----------------------------------------------------------------------------------------------------------- objects


class _Objects(abc.ObjectStore):
    def __init__(self, inner: abc.ObjectStore) -> None:
        self._inner = inner

    async def start(self, exit_stack: AsyncExitStack) -> None:
        await self._inner.start(exit_stack)

    async def put(self, key: str, chunks: AsyncIterable[bytes]) -> abc.ObjectInfo:
        return await self._inner.put(key, chunks)

    async def get(self, key: str, *, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        async for piece in self._inner.get(key, start=start, end=end):
            yield piece

    async def stat(self, key: str) -> abc.ObjectInfo:
        return await self._inner.stat(key)

    async def list(self, prefix: str) -> AsyncIterator[abc.ObjectInfo]:
        async for info in self._inner.list(prefix):
            yield info

    async def delete(self, key: str) -> None:
        await self._inner.delete(key)


class ObjectsThatAreAway(_Objects):
    """Answers nothing while `away`; its contract allows that."""

    def __init__(self, inner: abc.ObjectStore) -> None:
        super().__init__(inner)
        self.away = False
        self.refused = 0

    def _look(self) -> None:
        if self.away:
            self.refused += 1
            raise ObjectStoreUnavailable(operator_detail="on purpose")

    async def put(self, key: str, chunks: AsyncIterable[bytes]) -> abc.ObjectInfo:
        """Store, unless away; also if it goes away meanwhile."""
        self._look()

        async def looked() -> AsyncIterator[bytes]:
            async for chunk in chunks:
                self._look()
                yield chunk

        return await self._inner.put(key, looked())

    async def get(self, key: str, *, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """Give, unless away."""
        self._look()
        async for piece in self._inner.get(key, start=start, end=end):
            self._look()
            yield piece

    async def stat(self, key: str) -> abc.ObjectInfo:
        """Tell, unless away."""
        self._look()
        return await self._inner.stat(key)

    async def list(self, prefix: str) -> AsyncIterator[abc.ObjectInfo]:
        """List, unless away."""
        self._look()
        async for info in self._inner.list(prefix):
            yield info

    async def delete(self, key: str) -> None:
        """Delete, unless away."""
        self._look()
        await self._inner.delete(key)


class ObjectsThatHang(_Objects):
    """Never answers a `put` while `hanging`."""

    def __init__(self, inner: abc.ObjectStore) -> None:
        super().__init__(inner)
        self.hanging = True

    async def put(self, key: str, chunks: AsyncIterable[bytes]) -> abc.ObjectInfo:
        """Wait for ever."""
        if self.hanging:
            await asyncio.Event().wait()
        return await self._inner.put(key, chunks)


class ObjectsThatTruncate(_Objects):
    """Gives all but the last bytes, and says nothing."""

    async def get(self, key: str, *, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """Give less than there is."""
        size = (await self._inner.stat(key)).size
        most = size - size // 10 if end is None else min(end, size - size // 10)
        async for piece in self._inner.get(key, start=start, end=most):
            yield piece


class ObjectsThatCorrupt(_Objects):
    """Gives content with one bit changed, and says nothing."""

    async def get(self, key: str, *, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """Give something else."""
        async for piece in self._inner.get(key, start=start, end=end):
            yield bytes([piece[0] ^ 1]) + piece[1:]


class ObjectsThatShowParts(_Objects):
    """Shows an object before it is whole, and keeps what there is of one that failed."""

    async def put(self, key: str, chunks: AsyncIterable[bytes]) -> abc.ObjectInfo:
        """Store it anew with each piece."""
        have = b""

        async def one(data: bytes) -> AsyncIterator[bytes]:
            yield data

        async for chunk in chunks:
            have += chunk
            await self._inner.put(key, one(have))
        return await self._inner.put(key, one(have))
