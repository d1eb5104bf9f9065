"""A session's history, read for callers from the event log."""

from __future__ import annotations

from dataclasses import dataclass

from carrel import abc
from carrel.errors import SessionNotFound
from carrel.model import Principal, Session
from carrel.protocol.events import StoredEvent
from carrel.protocol.messages import Conversation, Message, says

__all__ = ["History", "MessagePage"]

_PAGE = 500
_PAGE_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True)
class MessagePage:
    """A part of a history."""

    items: list[Message]
    next_after: int | None
    """The `after` of the next part; None at the end."""


class History:
    """Messages of sessions."""

    def __init__(self, store: abc.Store) -> None:
        """Read from `store`."""
        self._store = store

    async def messages(
        self,
        principal: Principal,
        session_id: str,
        *,
        after: int = 0,
        limit: int = 100,
        turn_id: str | None = None,
        thinking: bool = False,
        text: str | None = None,
    ) -> MessagePage:
        """Messages in the order in which they began. The log never changes, so what was complete stays as it was;
        what the session has gone back behind is left out.

        Args:
            principal: who asks.
            session_id: the session.
            after: only messages that began after the event of this number.
            limit: how many at most.
            turn_id: only those of this turn.
            thinking: with what the agent thought.
            text: only those in which this was said, in any case of letters.

        Raises:
            SessionNotFound: there is no such session, or it is somebody else's.
        """

        def check(tx: abc.Transaction) -> tuple[Session, list[StoredEvent]]:
            session = tx.sessions.get(session_id)
            if session is None or not principal.may_see(session):
                raise SessionNotFound
            return session, tx.events.page(session_id, after=after - 1, limit=1) if after > 0 else []

        conversation = Conversation(thinking=thinking)
        session, before = await self._store.read(check)
        if before and before[0].seq == after and before[0].turn_id is not None:
            # A message that had begun by then may go on behind it, and is not one of these.
            await self._replay(conversation, session_id, before[0].turn_id, after)
        found: list[Message] = []

        def keep(messages: list[Message]) -> None:
            found.extend(m for m in messages if wanted(m))

        def wanted(message: Message) -> bool:
            if message.seq <= after or (text is not None and not says(message, text)):
                return False
            return not any(part.after_seq < message.seq <= part.upto_seq for part in session.rewound)

        position = after
        while len(found) <= limit:
            events = await self._page(session_id, position, turn_id)
            if not events:
                keep(conversation.rest())
                break
            position = events[-1].seq
            for event in events:
                conversation.take(event)
            keep(conversation.ready())
        more = len(found) > limit
        return MessagePage(found[:limit], found[limit - 1].seq if more else None)

    async def _replay(self, conversation: Conversation, session_id: str, turn_id: str, upto: int) -> None:
        position = 0
        while events := await self._page(session_id, position, turn_id):
            for event in events:
                if event.seq > upto:
                    return
                conversation.take(event)
            position = events[-1].seq

    async def _page(self, session_id: str, after: int, turn_id: str | None) -> list[StoredEvent]:
        return await self._store.read(
            lambda tx: tx.events.page(session_id, after=after, limit=_PAGE, turn_id=turn_id, max_bytes=_PAGE_BYTES)
        )
