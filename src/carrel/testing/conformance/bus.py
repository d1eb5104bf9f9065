"""The promises of an `EventBus`. It may lose, double or reorder frames; what it may not do is checked here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime

from carrel import abc
from carrel.protocol.events import Delta, MessageAssistant, StoredEvent
from carrel.testing.conformance.checks import PATIENCE_SECONDS, NotConforming, collect, must, must_equal

__all__ = ["CHECKS", "OpenBus", "stored_event", "text_delta"]

OpenBus = Callable[[], AbstractAsyncContextManager[abc.EventBus]]
"""Opens a started bus."""

CHECKS: dict[str, Callable[[OpenBus], Awaitable[None]]] = {}
"""What every bus promises."""

_ROOM = 1_000_000
_check = collect(CHECKS)


def stored_event(session_id: str, seq: int, text: str = "", turn_id: str | None = None) -> StoredEvent:
    """An event as a store would hand it out."""
    at = datetime(2026, 1, 1, tzinfo=UTC)
    data = MessageAssistant(message_id="m", block=0, text=text).model_dump_json()
    return StoredEvent(session_id=session_id, seq=seq, turn_id=turn_id, type="message.assistant", at=at, raw_data=data)


def text_delta(session_id: str, offset: int, text: str) -> Delta:
    """A piece of a text."""
    return Delta(session_id=session_id, turn_id=None, kind="text", message_id="m", offset=offset, text=text)


async def _hear(bus: abc.EventBus, subscription: abc.Subscription, session_id: str) -> list[abc.Frame]:
    """Publish until something arrives: one frame may get lost, all of them may not."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    seq = 0
    while time.monotonic() < deadline:
        seq += 1
        bus.publish(session_id, [stored_event(session_id, seq)])
        if frames := await subscription.get(0.05):
            return frames
    raise NotConforming("what is published reaches a subscription")


@_check
async def frames_reach_every_subscription(open_bus: OpenBus) -> None:
    """Of their session, whole."""
    async with (
        open_bus() as bus,
        bus.subscribe("a", max_bytes=_ROOM) as one,
        bus.subscribe("a", max_bytes=_ROOM) as two,
    ):
        for subscription in (one, two):
            frame = (await _hear(bus, subscription, "a"))[-1]
            must(isinstance(frame, StoredEvent) and frame.session_id == "a", "what arrives is what was published")
        bus.publish("a", [text_delta("a", 0, "hi")])


@_check
async def sessions_are_kept_apart(open_bus: OpenBus) -> None:
    """Nobody hears of another session's frames."""
    async with (
        open_bus() as bus,
        bus.subscribe("a", max_bytes=_ROOM) as one,
        bus.subscribe("ab", max_bytes=_ROOM) as two,
    ):
        for i in range(1, 50):
            bus.publish("a", [stored_event("a", i)])
        heard = await _hear(bus, one, "a")
        must_equal({frame.session_id for frame in heard}, {"a"}, "a subscription hears its own session")
        must_equal(await two.get(0.1), [], "and no other")


@_check
async def waiting_has_an_end(open_bus: OpenBus) -> None:
    """With no frames `get` answers an empty list when its time is over, and not long after."""
    async with open_bus() as bus, bus.subscribe("a", max_bytes=_ROOM) as subscription:
        started = time.monotonic()
        must_equal(await subscription.get(0.05), [], "nothing happened")
        must(0.04 <= time.monotonic() - started < 5, "after the time that was given")
        waiting = asyncio.ensure_future(subscription.get(PATIENCE_SECONDS))
        await asyncio.sleep(0)
        while not waiting.done():
            bus.publish("a", [stored_event("a", 1)])
            await asyncio.wait({waiting}, timeout=0.05)
        must(await waiting, "who waits is woken")


@_check
async def a_slow_subscription_is_bounded(open_bus: OpenBus) -> None:
    """It is told that frames were lost, holds up neither the publisher nor others, and goes on from there."""
    async with (
        open_bus() as bus,
        bus.subscribe("a", max_bytes=10_000) as slow,
        bus.subscribe("a", max_bytes=100_000_000) as roomy,
    ):
        started = time.monotonic()
        for i in range(1, 2_001):
            bus.publish("a", [stored_event("a", i, "x" * 100)])
        must(time.monotonic() - started < 5, "publishing waits for nobody")
        deadline = time.monotonic() + PATIENCE_SECONDS
        taken: list[abc.Frame] | None = []
        held = 0
        while taken is not None:
            taken = await slow.get(0.05)
            held += sum(len(frame.sse()) for frame in taken or ())
            must(held <= 10_000, "no more than max_bytes wait")
            must(time.monotonic() < deadline, "loss is told by None")
        must(await _hear(bus, slow, "a"), "after a loss it goes on")
        must(await roomy.get(1.0), "a subscription with room has lost nothing")


@_check
async def a_frame_larger_than_the_bound_is_told(open_bus: OpenBus) -> None:
    """It is lost to that subscription, which hears None."""
    async with open_bus() as bus, bus.subscribe("a", max_bytes=1_000) as subscription:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            bus.publish("a", [stored_event("a", 1, "x" * 5_000)])
            taken = await subscription.get(0.05)
            if taken is None:
                return
            must_equal(taken, [], "nothing larger than the bound arrives")
            must(time.monotonic() < deadline, "loss is told by None")


@_check
async def nobody_need_listen(open_bus: OpenBus) -> None:
    """Publishing without a subscription, or after the last has gone, is no error."""
    async with open_bus() as bus:
        bus.publish("a", [stored_event("a", 1)])
        for _ in range(3):
            async with bus.subscribe("a", max_bytes=_ROOM) as one, bus.subscribe("a", max_bytes=_ROOM):
                must(await _hear(bus, one, "a"), "it is heard while somebody listens")
            bus.publish("a", [stored_event("a", 2)])


@_check
async def who_leaves_takes_nobody_along(open_bus: OpenBus) -> None:
    """Also when it leaves by an error, or while it waits."""
    async with open_bus() as bus, bus.subscribe("a", max_bytes=_ROOM) as stays:

        async def leave() -> None:
            async with bus.subscribe("a", max_bytes=_ROOM) as leaves:
                await leaves.get(PATIENCE_SECONDS)
                raise LookupError("on purpose")

        task = asyncio.ensure_future(leave())
        while not task.done():
            bus.publish("a", [stored_event("a", 1)])
            await asyncio.wait({task}, timeout=0.05)
        must(isinstance(task.exception(), LookupError), "its error is its own")
        cancelled = asyncio.ensure_future(leave())
        await asyncio.sleep(0.01)
        cancelled.cancel()
        await asyncio.wait({cancelled})
        must(await _hear(bus, stays, "a"), "who stays goes on hearing")
