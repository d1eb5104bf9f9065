"""Reads what a model request took from its answer, and puts it on record."""

from __future__ import annotations

import json
from typing import Any

from carrel import abc
from carrel.killpoints import reached
from carrel.model import Session, Usage, new_id, utc_now
from carrel.model_gateway.prices import Prices
from carrel.protocol.events import NewEvent, UsageRecorded

_USAGE_FIELDS = tuple(Usage.model_fields)
_INTERESTING = (b'"message_start"', b'"message_delta"')


class Reading:
    """What one answer says of its usage, taken from its bytes as they pass."""

    def __init__(self) -> None:
        self.model: str | None = None
        self.stopped = False
        self._counts: dict[str, int] = {}
        self._rest = b""

    @property
    def usage(self) -> Usage | None:
        """The tokens, or None while the answer has said nothing of them."""
        return Usage(**self._counts) if self._counts else None

    def take(self, chunk: bytes) -> None:
        """Read a piece of a server-sent event stream; lines may be cut anywhere."""
        data = self._rest + chunk if self._rest else chunk
        *lines, self._rest = data.split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            head = line[:64]
            if any(word in head for word in _INTERESTING):
                self._take_event(line[5:])
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


class Meter:
    """Puts usage on record: a row, an event, and the session's sums, in one transaction."""

    def __init__(self, store: abc.Store, prices: Prices) -> None:
        """Meter into `store`, at `prices`."""
        self._store = store
        self._prices = prices

    async def record(self, session_id: str, model: str, usage: Usage) -> None:
        """Record an answered request of the session's turn at work. Nothing happens where the session is gone."""
        cost = self._prices.cost_usd(model, usage)
        await self._store.write(lambda tx: _record(tx, session_id, model, usage, cost))
        reached("usage.recorded")


def _record(tx: abc.Transaction, session_id: str, model: str, usage: Usage, cost: float | None) -> None:
    session = tx.sessions.get(session_id)
    if session is None:
        return
    live = tx.turns.live(session_id)
    turn_id = live.id if live is not None else None
    now = utc_now()
    record = abc.UsageRecord(
        id=new_id(), session_id=session_id, turn_id=turn_id, model=model, usage=usage, cost_usd=cost, at=now
    )
    tx.usage.add(record)
    told = UsageRecorded(request_id=record.id, model=model, usage=usage, cost_usd=cost)
    tx.events.append(session_id, [NewEvent.of(told, at=now, turn_id=turn_id)])
    tx.sessions.update(session_id, usage=session.usage + usage, cost_usd=_sum(session, cost))


def _sum(session: Session, cost: float | None) -> float | None:
    """Once any part of a session's cost is unknown, so is the whole."""
    return None if session.cost_usd is None or cost is None else session.cost_usd + cost
