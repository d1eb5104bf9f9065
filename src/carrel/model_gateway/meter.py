"""Reserves what a model request may cost, reads what it took from its answer, and puts that on record."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import structlog

from carrel import abc
from carrel.budgets import UNLIMITED, Allowances, Bound, accounts_of, grant, only_held
from carrel.errors import BudgetReached, PriceUnknown, SessionNotFound, TurnFailure
from carrel.killpoints import reached
from carrel.model import Failure, Sandbox, Session, StopReason, Turn, Usage, new_id, utc_now
from carrel.model_gateway.bounds import Counted, ModelRequest
from carrel.model_gateway.prices import Prices
from carrel.protocol.events import NewEvent, UsageRecorded

log = structlog.get_logger(__name__)

_USAGE_FIELDS = tuple(Usage.model_fields)
_INTERESTING = (b'"message_start"', b'"message_delta"')
_PIECE = b'"content_block_delta"'
_PIECE_FRAME_BYTES = 80
_PIECE_BYTES_PER_TOKEN = 3
_LONGEST_MODEL = 200
_LOOK_AGAIN_SECONDS = 1.0


class Reading:
    """What one answer says of its usage, taken from its bytes as they pass."""

    def __init__(self) -> None:
        self.model: str | None = None
        self.stopped = False
        self.refused = False
        """The answer was an error from its first word: nothing was made, and nothing is charged for."""
        self.one_hour_tokens = 0
        """Of those written to the cache: how many are kept there for an hour."""
        self._counts: dict[str, int] = {}
        self._made = 0
        self._rest = b""

    @property
    def usage(self) -> Usage | None:
        """The tokens, or None while the answer has said nothing of them.

        Of an answer that broke off, the tokens of its output are estimated from what had come of it.
        """
        if not self._counts:
            return None
        if self.stopped:
            return Usage(**self._counts)
        return Usage(**self._counts | {"output_tokens": max(self._counts.get("output_tokens", 0), self._made)})

    def take(self, chunk: bytes) -> None:
        """Read a piece of a server-sent event stream; lines may be cut anywhere."""
        data = self._rest + chunk if self._rest else chunk
        *lines, self._rest = data.split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            head = line[:64]
            if _PIECE in head:
                # Not parsed: there may be twenty thousand a second. A piece is at least a token.
                self._made += max(1, (len(line) - _PIECE_FRAME_BYTES) // _PIECE_BYTES_PER_TOKEN)
            elif any(word in head for word in _INTERESTING):
                self._take_event(line[5:])
            elif b'"error"' in head and not self._counts:
                self.refused = True
            elif b'"message_stop"' in head:
                self.stopped = True

    def take_whole(self, body: bytes) -> None:
        """Read an answer that was not streamed."""
        try:
            message = json.loads(body)
        except ValueError:
            return
        if isinstance(message, dict):
            self._take_message(message)
            self.stopped = True

    def _take_event(self, data: bytes) -> None:
        try:
            event = json.loads(data)
        except ValueError:
            return
        if event.get("type") == "message_start":
            self._take_message(event.get("message") or {})
        else:
            self._count(event.get("usage"))

    def _take_message(self, message: dict[str, Any]) -> None:
        if isinstance(message.get("model"), str):
            self.model = message["model"]
        self._count(message.get("usage"))

    def _count(self, usage: Any) -> None:
        if not isinstance(usage, dict):
            return
        for name in _USAGE_FIELDS:
            if isinstance(usage.get(name), int):
                self._counts[name] = max(0, usage[name])
        written = usage.get("cache_creation")
        if isinstance(written, dict) and isinstance(written.get("ephemeral_1h_input_tokens"), int):
            self.one_hour_tokens = max(0, written["ephemeral_1h_input_tokens"])


@dataclass(frozen=True, kw_only=True)
class Grant:
    """A request that may be sent: what is reserved for it, and how it may ask."""

    reservation: abc.Reservation
    request: ModelRequest
    input_tokens: int
    max_tokens: int

    @property
    def whole(self) -> bool:
        """Whether the request may be sent as it came."""
        return self.max_tokens == self.request.max_tokens


class Meter:
    """Reserves before a request, and settles after it: a row, an event, and the session's sums, in one transaction."""

    def __init__(
        self,
        store: abc.Store,
        prices: Prices,
        *,
        allowances: Allowances = UNLIMITED,
        poke: Callable[[str], None] = lambda session_id: None,
        wait_seconds: float = 300.0,
    ) -> None:
        """Make the meter.

        Args:
            store: the rows.
            prices: what tokens cost.
            allowances: the budgets of turns, sessions and users that have none of their own.
            poke: told the session's id when a budget has ended its turn.
            wait_seconds: how long a request waits for what others have reserved.
        """
        self._store = store
        self._prices = prices
        self._allowances = allowances
        self._poke = poke
        self._wait_seconds = wait_seconds
        self._counted = Counted()
        self._freed = asyncio.Event()

    async def reserve(
        self, sandbox: Sandbox, request: ModelRequest, gone: Callable[[], Awaitable[bool]] | None = None
    ) -> Grant | None:
        """Reserve the most that a request may come to; lower its `max_tokens` where only that fits.

        Where it would fit but for what other requests have reserved, it waits for these: they will take less.

        Args:
            sandbox: whose agent asks.
            request: what it asks.
            gone: says whether whoever asks has gone away meanwhile; then the answer is None.

        Raises:
            BudgetReached: it does not fit into a budget. The turn is marked to end, and its owner is poked.
            PriceUnknown: a budget is in US dollars, and the model has no price. Likewise.
            TurnFailure: the turn is being ended for one of these already.
            SessionNotFound: the sandbox's session is gone.
        """
        input_tokens = self._counted.bound(request)
        price = self._prices.ceiling(request.model, input_tokens, one_hour=request.one_hour)
        bound = Bound(
            model=request.model,
            input_tokens=input_tokens,
            max_tokens=request.max_tokens,
            least_max_tokens=request.least_max_tokens,
            input_usd=price[0] if price is not None else None,
            output_usd=price[1] if price is not None else None,
        )
        deadline = time.monotonic() + self._wait_seconds
        while True:
            freed = self._freed
            last = time.monotonic() >= deadline
            found = await self._store.write(
                lambda tx, last=last: _reserve(tx, sandbox.session_id, bound, self._allowances, last=last)  # type: ignore[misc]
            )
            if found is not None:
                break
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_AGAIN_SECONDS):
                    await freed.wait()
            if gone is not None and await gone():
                return None
        if isinstance(found, TurnFailure):
            log.info("model.refused", session=sandbox.session_id, model=request.model, code=found.code)
            self._poke(sandbox.session_id)
            raise found
        reached("usage.reserved")
        max_tokens = found.tokens - input_tokens
        return Grant(reservation=found, request=request, input_tokens=input_tokens, max_tokens=max_tokens)

    async def release(self, given: Grant) -> None:
        """Nothing was spent: the request never reached the model, or was refused there."""
        await self._store.write_surely(lambda tx: _release(tx, given.reservation))
        self._free()

    async def settle(self, given: Grant, reading: Reading) -> None:
        """Record what an answer took; all that was reserved, where the answer does not say."""
        if reading.refused:
            await self.release(given)
            return
        held = given.reservation
        usage, cost, model = reading.usage, held.cost_usd, held.model
        if usage is None:
            usage = Usage(input_tokens=given.input_tokens, output_tokens=given.max_tokens)
        else:
            model = reading.model or model
            # An answer may bear a longer name than its request, and that one may have no price.
            named = self._prices.cost_usd(model, usage, one_hour_tokens=reading.one_hour_tokens)
            cost = named
            if named is None:
                cost = self._prices.cost_usd(held.model, usage, one_hour_tokens=reading.one_hour_tokens)
            if reading.stopped:
                read = usage.total - usage.output_tokens
                self._counted.learn(given.request, read)
        await self._store.write_surely(lambda tx: _settle(tx, held, model, usage, cost))
        reached("usage.recorded")
        self._free()

    def _free(self) -> None:
        """Wake every request that waits for room."""
        self._freed.set()
        self._freed = asyncio.Event()

    async def settle_stale(self, before: datetime) -> int:
        """Count what a gateway that died had reserved as spent: nobody can say that it was not. Answers how many."""
        stale = await self._store.read(lambda tx: list(tx.usage.stale(before)))
        for held in stale:
            usage = Usage(input_tokens=held.tokens)
            await self._store.write_surely(lambda tx, h=held, u=usage: _settle(tx, h, h.model, u, h.cost_usd))  # type: ignore[misc]
        if stale:
            log.warning("usage.stale", requests=len(stale), why="their gateway died before their answers were whole")
        return len(stale)


def _reserve(
    tx: abc.Transaction, session_id: str, bound: Bound, allowances: Allowances, *, last: bool
) -> abc.Reservation | TurnFailure | None:
    """Reserve, or say why not; None: not yet."""
    session = tx.sessions.get(session_id)
    if session is None or session.reserved is not None:
        raise SessionNotFound  # an agent in a warm pool has nobody to pay for it
    now = utc_now()
    tx.users.ensure(session.owner, now)
    tx.users.lock(session.owner)
    turn = tx.turns.live(session_id)
    if turn is not None and turn.error is not None:
        # It is being ended for such a reason already.
        return TurnFailure(turn.error.message)
    accounts = accounts_of(tx, allowances, user_id=session.owner, session=session, turn=turn, now=now)
    try:
        max_tokens = grant(accounts, bound)
    except (BudgetReached, PriceUnknown) as error:
        if not last and isinstance(error, BudgetReached) and only_held(accounts, bound):
            return None
        _end_turn(tx, turn, error)
        return error
    reservation = abc.Reservation(
        id=new_id(),
        session_id=session_id,
        user_id=session.owner,
        turn_id=turn.id if turn is not None else None,
        model=bound.model[:_LONGEST_MODEL],
        tokens=bound.input_tokens + max_tokens,
        cost_usd=bound.usd(max_tokens),
        at=now,
    )
    tx.usage.reserve(reservation)
    return reservation


def _end_turn(tx: abc.Transaction, turn: Turn | None, error: BudgetReached | PriceUnknown) -> None:
    """Mark the turn: its owner interrupts it, and however its agent takes that, it ends with this failure."""
    if turn is None or turn.interrupt_reason is not None:
        return
    reason = StopReason.BUDGET_REACHED if isinstance(error, BudgetReached) else StopReason.ERROR
    tx.turns.update(turn.id, interrupt_reason=reason, error=Failure(code=error.code, message=error.message))


def _release(tx: abc.Transaction, held: abc.Reservation) -> None:
    tx.users.lock(held.user_id)
    tx.usage.release(held.id)


def _settle(tx: abc.Transaction, held: abc.Reservation, model: str, usage: Usage, cost: float | None) -> None:
    session = tx.sessions.get(held.session_id)
    tx.users.lock(held.user_id)
    if tx.usage.release(held.id) is None:
        return
    live = tx.turns.live(held.session_id)
    turn_id = held.turn_id or (live.id if live is not None else None)
    record = abc.UsageRecord(
        id=held.id,
        session_id=held.session_id,
        user_id=held.user_id,
        turn_id=turn_id,
        model=model[:_LONGEST_MODEL],
        usage=usage,
        cost_usd=cost,
        at=utc_now(),
    )
    tx.usage.add(record)
    if session is None:
        # It was deleted meanwhile. What was spent stays spent.
        return
    told = UsageRecorded(request_id=record.id, model=record.model, usage=usage, cost_usd=cost)
    tx.events.append(session.id, [NewEvent.of(told, at=record.at, turn_id=turn_id)])
    tx.sessions.update(session.id, usage=session.usage + usage, cost_usd=_sum(session, cost))
    if turn_id is not None and (live is None or live.id != turn_id) and tx.turns.get(turn_id) is not None:
        # Its turn has ended without it: an interrupt does not wait for the answer it breaks off.
        spent, spent_usd, _ = tx.usage.of_turn(turn_id)
        tx.turns.update(turn_id, usage=spent, cost_usd=spent_usd)


def _sum(session: Session, cost: float | None) -> float | None:
    """Once any part of a session's cost is unknown, so is the whole."""
    return None if session.cost_usd is None or cost is None else session.cost_usd + cost
