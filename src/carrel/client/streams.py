"""What a stream has seen, and how it goes on when its connection breaks. No I/O, no sleeping."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx
from pydantic_core import from_json

from carrel.client import calls
from carrel.client.calls import Call
from carrel.client.responses import unreachable
from carrel.client.sse import Decoder
from carrel.client.types import Delta, Event, Frame
from carrel.errors import CarrelError, Unavailable
from carrel.model import OnDisconnect

__all__ = ["FollowEvents", "FollowQuery", "FollowTurn", "Patience", "Stream"]

FIRST_DELAY_SECONDS = 0.1
LONGEST_DELAY_SECONDS = 5.0
_FINISHED_BLOCK = frozenset({"message.assistant", "thinking", "tool.called"})


class Patience:
    """How often and for how long a lost server is tried again."""

    def __init__(self, give_up_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._give_up_seconds = give_up_seconds
        self._clock = clock
        self._lost_at: float | None = None
        self._tries = 0

    def renew(self) -> None:
        """The server is there."""
        self._lost_at, self._tries = None, 0

    def next_delay(self) -> float | None:
        """Seconds until the next try; None when it is time to give up."""
        now = self._clock()
        if self._lost_at is None:
            self._lost_at = now
        if now - self._lost_at >= self._give_up_seconds:
            return None
        longest: float = min(LONGEST_DELAY_SECONDS, FIRST_DELAY_SECONDS * 2 ** min(self._tries, 16))
        self._tries += 1
        return longest * random.uniform(0.5, 1)  # so that many clients of one server do not come back all at once


class Stream:
    """One stream over as many connections as it takes.

    Whoever does the I/O opens `request()`, says `opened()`, hands every chunk to `feed` and yields what it gives; if
    the connection ends or fails it asks `lost()` how long to wait, and opens the next, until the stream is `over`.
    """

    def __init__(self, base_url: str, *, after: int, deltas: bool, give_up_seconds: float) -> None:
        self.over = False
        self.seq = after
        self._base_url = base_url
        self._deltas = deltas
        self._patience = Patience(give_up_seconds)
        self._decoder = Decoder()
        self._begun = False
        self._lengths: dict[tuple[str | None, str, int], int] = {}
        self._doubtful: set[tuple[str | None, str]] = set()

    def request(self) -> Call[None]:
        """What to send next."""
        raise NotImplementedError

    def opened(self) -> None:
        """The server has taken the request."""
        self._begun = True
        self._decoder = Decoder()  # what the last connection left incomplete is sent again whole
        # Messages that were being made when the connection broke. If one was begun anew before this connection was
        # there to hear of it, no `reset` came: it shows when its thread goes on with another message.
        self._doubtful = {(parent, message_id) for parent, message_id, _ in self._lengths}

    def feed(self, chunk: bytes) -> Iterator[Frame]:
        """What is new in a chunk; events that were seen before are left out."""
        self._patience.renew()
        for message in self._decoder.feed(chunk):
            if message.event == "interaction.pending":
                continue  # what waits for a person is told beside the log; GET /interactions has it too
            value = from_json(message.data)
            yield from self._delta(value) if message.event == "delta" else self._event(value)
            if self.over:
                return

    def lost(self, error: httpx.TransportError | CarrelError | None) -> float:
        """The connection ended, failed, or was refused: seconds to wait before the next.

        Raises:
            CarrelError: there is no use in a next one.
        """
        broken = error if isinstance(error, httpx.TransportError) else httpx.RemoteProtocolError("the stream ended")
        reason = error if isinstance(error, CarrelError) else unreachable(self._base_url, broken)
        if isinstance(error, httpx.TransportError) and not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            self._begun = True  # the request may have arrived
        delay = self._patience.next_delay() if self._may_retry(error) else None
        if delay is None:
            raise reason
        asked = error.retry_after_seconds if isinstance(error, CarrelError) else None
        return max(delay, float(asked or 0))

    def _may_retry(self, error: httpx.TransportError | CarrelError | None) -> bool:
        if not self._begun:
            return False  # a server that was never there is told at once
        if isinstance(error, CarrelError):
            return isinstance(error, Unavailable) or error.retry_after_seconds is not None
        return True

    def _event(self, value: dict[str, Any]) -> Iterator[Frame]:
        event = Event.model_validate(value)
        if event.seq <= self.seq:
            return
        self.seq = event.seq
        concerns = self._concerns(event.turn_id)
        if event.ends_turn:
            if concerns and self._deltas:
                yield from self._given_up(list(self._doubtful), event.turn_id)
            self._lengths.clear()
            self._doubtful.clear()
        elif event.type in _FINISHED_BLOCK:
            made = (event.data.get("parent_tool_use_id"), event.data.get("message_id"))
            self._lengths.pop((*made, event.data.get("block")), None)  # type: ignore[arg-type]
            self._doubtful.discard(made)
        if concerns:
            self.over = self._is_last(event)
            yield event

    def _delta(self, value: dict[str, Any]) -> Iterator[Delta]:
        delta = Delta.of(value)
        if not self._deltas or not self._concerns(delta.turn_id):
            return
        message = (delta.parent_tool_use_id, delta.message_id)
        self._doubtful.discard(message)
        if delta.kind == "reset":
            self._forget(message)
            yield delta
            return
        others = [other for other in self._doubtful if other[0] == delta.parent_tool_use_id]
        yield from self._given_up(others, delta.turn_id)
        key = (*message, delta.block)
        seen = self._lengths.get(key, 0)
        end = delta.offset + len(delta.text)
        if end <= seen:
            return  # a new connection begins with the text so far
        self._lengths[key] = end
        yield delta if delta.offset >= seen else _from(delta, seen)

    def _given_up(self, messages: list[tuple[str | None, str]], turn_id: str | None) -> Iterator[Delta]:
        for parent, message_id in messages:
            self._doubtful.discard((parent, message_id))
            self._forget((parent, message_id))
            yield Delta(kind="reset", turn_id=turn_id, message_id=message_id, parent_tool_use_id=parent)

    def _forget(self, message: tuple[str | None, str]) -> None:
        self._lengths = {key: length for key, length in self._lengths.items() if key[:2] != message}

    def _concerns(self, turn_id: str | None) -> bool:
        return True

    def _is_last(self, event: Event) -> bool:
        return event.type == "session.deleted"


def _from(delta: Delta, offset: int) -> Delta:
    return Delta(
        kind=delta.kind,
        turn_id=delta.turn_id,
        message_id=delta.message_id,
        block=delta.block,
        offset=offset,
        text=delta.text[offset - delta.offset :],
        parent_tool_use_id=delta.parent_tool_use_id,
    )


class FollowEvents(Stream):
    """Every event of a session from a point on, until the session is deleted."""

    def __init__(self, base_url: str, session_id: str, *, after: int, deltas: bool, give_up_seconds: float) -> None:
        super().__init__(base_url, after=after, deltas=deltas, give_up_seconds=give_up_seconds)
        self._session_id = session_id

    def request(self) -> Call[None]:
        return calls.follow_events(self._session_id, self.seq, self._deltas)


class FollowTurn(Stream):
    """A new turn from its prompt to its end.

    If the connection breaks before the turn's first event, the prompt is sent again under the same Idempotency-Key,
    so that it is one turn all the same; after it, the session's events are followed from the last one seen.
    """

    def __init__(
        self,
        base_url: str,
        session_id: str,
        prompt: str | None,
        options: Mapping[str, Any],
        *,
        deltas: bool,
        idempotency_key: str,
        give_up_seconds: float,
    ) -> None:
        super().__init__(base_url, after=0, deltas=deltas, give_up_seconds=give_up_seconds)
        self._session_id = session_id
        self._first = calls.stream_turn(session_id, prompt, options, deltas, idempotency_key)
        self._stays = options.get("on_disconnect") != OnDisconnect.INTERRUPT
        self.turn_id: str | None = None

    def request(self) -> Call[None]:
        if self.turn_id is None:
            return self._first
        return calls.follow_events(self._session_id, self.seq, self._deltas)

    def _may_retry(self, error: httpx.TransportError | CarrelError | None) -> bool:
        return self._stays and super()._may_retry(error)

    def _concerns(self, turn_id: str | None) -> bool:
        if self.turn_id is None:
            self.turn_id = turn_id
        return turn_id is not None and turn_id == self.turn_id

    def _is_last(self, event: Event) -> bool:
        return event.ends_turn


class FollowQuery(Stream):
    """A one-off prompt to its end. Its session is gone after it, so a broken connection cannot be taken up again."""

    def __init__(self, base_url: str, prompt: str | None, options: Mapping[str, Any], *, deltas: bool) -> None:
        super().__init__(base_url, after=0, deltas=deltas, give_up_seconds=0)
        self._call = calls.stream_query(prompt, options, deltas)

    def request(self) -> Call[None]:
        return self._call

    def _may_retry(self, error: httpx.TransportError | CarrelError | None) -> bool:
        return False

    def _is_last(self, event: Event) -> bool:
        return event.ends_turn or event.type == "session.deleted"
