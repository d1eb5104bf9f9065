"""What the agent asks people: held for a while, put off where it can be, acted on once.

A call that waits is told of by a row of the gateway's. Whoever answers changes the row; here the answer comes by a
frame, or, to an agent that was started after it, by `bind`. Before an answer is acted on, the gateway has stored that
it is: an agent that is lost before that is followed by one that does the same, and one that is lost after it is not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from carrel.model import InteractionKind, PermissionMode, new_id, utc_now
from carrel.protocol.link import Answer, Ask, Asked, Bind, NumberedFrame, Parked, Taken, digest_of

__all__ = ["Asking", "Call", "Ruling", "Way"]

_ALONE = (
    "Nobody has answered yet. The question still stands: if you need this, make the same call again, alone and not "
    "together with others; its answer is kept for that call."
)

Send = Callable[[Callable[[int], NumberedFrame]], None]


class Way(StrEnum):
    """What becomes of a call that a person was asked about."""

    ALLOW = "allow"
    DENY = "deny"
    DEFER = "defer"


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call of a tool, as the agent would make it."""

    tool: str
    tool_use_id: str | None
    input: dict[str, Any]
    about: InteractionKind
    turn_id: str | None


@dataclass(frozen=True)
class Ruling:
    """What a person has said of a call, or that it is put off."""

    way: Way
    message: str = ""
    input: dict[str, Any] | None = None
    permission_mode: PermissionMode | None = None


class Asking:
    """The calls that wait for people."""

    def __init__(self, *, send: Send, stored: Callable[[], Awaitable[None]], at_work: Callable[[], bool]) -> None:
        """Make it; nothing is known before `bind`.

        Args:
            send: queues a numbered frame for the gateway.
            stored: waits until the gateway has stored everything that was queued so far.
            at_work: whether something of the agent's is at work that would end with its process.
        """
        self._send = send
        self._stored = stored
        self._at_work = at_work
        self._held: dict[str, asyncio.Future[Answer]] = {}
        self._ending = asyncio.Event()
        self._lone: set[str] = set()
        self._open: dict[str, Asked] = {}
        self._defer_seconds: float | None = None
        self._hold_seconds = 3600.0
        self._expires_seconds: float | None = None
        self._remind_seconds: float | None = None
        self.deferred: str | None = None
        """The interaction whose call was put off; the process has nothing more to do."""

    def bind(self, bind: Bind) -> None:
        """Take what the session says of waiting, and what earlier agents have asked."""
        self._defer_seconds, self._hold_seconds = bind.defer_after_seconds, bind.live_hold_seconds
        self._expires_seconds, self._remind_seconds = bind.spec.ask_expires_seconds, bind.spec.ask_remind_seconds
        self._open = {each.interaction_id: each for each in bind.asked}

    @property
    def nobody(self) -> bool:
        """Whether nobody is there to be asked."""
        return self._expires_seconds == 0

    @property
    def waiting(self) -> list[str]:
        """The ids of all that are not answered, as far as is known here."""
        return [*self._held, *(each.interaction_id for each in self._open.values() if each.answer is None)]

    def take(self, answer: Answer) -> None:
        """Somebody has answered, or nobody will."""
        held, open_ = self._held.get(answer.interaction_id), self._open.get(answer.interaction_id)
        if held is not None and not held.done():
            held.set_result(answer)
        elif open_ is not None:
            self._open[answer.interaction_id] = open_.model_copy(update={"answer": answer})

    def withdraw(self, message: str) -> None:
        """Deny every call that is held: its turn is being ended."""
        for asked, held in self._held.items():
            if not held.done():
                held.set_result(Answer(id="", interaction_id=asked, allow=False, message=message))

    def put_off(self) -> bool:
        """Have every call put off that can be: the process is to end. Whether there is one."""
        self._ending.set()
        return bool(self._lone)

    def answered(self, call: Call) -> bool:
        """Whether an earlier agent has asked about this very call, and somebody has answered."""
        known = self._known(call)
        return known is not None and known.answer is not None

    def resumes(self, tool_use_id: str | None) -> bool:
        """Whether the call with this id has been answered."""
        return tool_use_id is not None and any(
            each.tool_use_id == tool_use_id and each.answer is not None for each in self._open.values()
        )

    def _known(self, call: Call) -> Asked | None:
        """What was asked about exactly this: of two such calls, the one with its id."""
        digest = digest_of(call.tool, call.input)
        same = [each for each in self._open.values() if each.input_digest == digest]
        by_id = [each for each in same if each.tool_use_id == call.tool_use_id]
        return next(iter([*by_id, *same]), None)

    async def ask(self, call: Call, why: str, *, lone: bool) -> Ruling:
        """Have a person decide, for however long that takes.

        Args:
            call: what would be called.
            why: why it is asked.
            lone: whether it is the one call of its message, by the main agent: such a call can be put off.
        """
        known = self._known(call)
        if known is not None:
            self._open.pop(known.interaction_id)
            if known.answer is not None:
                return await self._act(known.answer)
        asked = known.interaction_id if known is not None else new_id()
        held: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._held[asked] = held
        if lone:
            self._lone.add(asked)
        self._send(
            lambda n: Ask(
                n=n,
                interaction_id=asked,
                turn_id=call.turn_id,
                at=utc_now(),
                about=call.about,
                tool=call.tool,
                tool_use_id=call.tool_use_id,
                input=call.input,
                reason=why,
                lone=lone,
                expires_seconds=self._expires_seconds,
                remind_seconds=self._remind_seconds,
            )
        )
        try:
            answer = await self._hold(held, lone=lone)
        finally:
            self._held.pop(asked, None)
            self._lone.discard(asked)
        if answer is not None:
            return await self._act(answer)
        if lone:
            self.deferred = asked
            return Ruling(Way.DEFER)
        self._open[asked] = Asked(
            interaction_id=asked, tool_use_id=call.tool_use_id, input_digest=digest_of(call.tool, call.input)
        )
        self._send(lambda n: Parked(n=n, interaction_id=asked))
        return Ruling(Way.DENY, _ALONE)

    async def _hold(self, held: asyncio.Future[Answer], *, lone: bool) -> Answer | None:
        """The answer; None when the process has been held for long enough."""
        first = self._hold_seconds if self._defer_seconds is None or not lone else self._defer_seconds
        ending = asyncio.create_task((self._ending if lone else asyncio.Event()).wait(), name="ending")
        either: set[asyncio.Future[Any]] = {held, ending}
        try:
            await asyncio.wait(either, timeout=min(first, self._hold_seconds), return_when=asyncio.FIRST_COMPLETED)
            if not held.done() and not ending.done() and lone and self._at_work():
                more = max(0.0, self._hold_seconds - first)
                await asyncio.wait(either, timeout=more, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ending.cancel()
        return held.result() if held.done() else None

    async def _act(self, answer: Answer) -> Ruling:
        """Have it stored that the answer is acted on; only then may it be."""
        if answer.id:
            self._send(lambda n: Taken(n=n, interaction_id=answer.interaction_id))
            await self._stored()
        if not answer.allow:
            return Ruling(Way.DENY, answer.message)
        return Ruling(Way.ALLOW, input=answer.input, permission_mode=answer.permission_mode)
