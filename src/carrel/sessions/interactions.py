"""What waits for a person: listed and answered here, asked by agents.

An interaction is a row. The agent's process that waits for it is told of the answer if it is there; one that comes back
after a while asks again by the interaction's id, and finds the answer in the row.
"""

from __future__ import annotations

from typing import Any

from carrel import abc
from carrel.errors import (
    Forbidden,
    InteractionChanged,
    InteractionExpired,
    InteractionNotFound,
    InteractionResolved,
    SessionNotFound,
    ValidationFailed,
)
from carrel.killpoints import reached
from carrel.model import Interaction, InteractionKind, InteractionStatus, Principal, StopReason, utc_now
from carrel.sessions import transitions
from carrel.sessions.hub import Hub

__all__ = ["Interactions"]


class Interactions:
    """Interactions, for callers."""

    def __init__(self, store: abc.Store, hub: Hub) -> None:
        """Make it over the rows and the runners that are connected."""
        self._store = store
        self._hub = hub

    async def page(
        self,
        principal: Principal,
        *,
        session_id: str | None = None,
        status: InteractionStatus | None = None,
        cursor: str | None,
        limit: int,
    ) -> abc.Page[Interaction]:
        """Those the caller may see, oldest first; of a session without parent, those of all below it too.

        Raises:
            SessionNotFound: there is no such session for the caller.
            InvalidCursor: it is none of ours.
        """
        session_id = session_id or principal.session_id

        def work(tx: abc.Transaction) -> abc.Page[Interaction]:
            if session_id is None:
                which = abc.InteractionFilter(owner=None if principal.is_admin else principal.user, status=status)
                return tx.interactions.page(which, cursor=cursor, limit=limit)
            session = tx.sessions.get(session_id)
            if session is None or not principal.may_see(session):
                raise SessionNotFound
            root = session.parent_id is None
            which = abc.InteractionFilter(
                session_id=None if root else session_id, tree=session_id if root else None, status=status
            )
            return tx.interactions.page(which, cursor=cursor, limit=limit)

        return await self._store.read(work)

    async def get(self, principal: Principal, interaction_id: str) -> Interaction:
        """One of them. Raises InteractionNotFound."""
        return await self._store.read(lambda tx: _interaction(tx, principal, interaction_id))

    async def answer(
        self,
        principal: Principal,
        interaction_id: str,
        *,
        allow: bool,
        updated_input: dict[str, Any] | None = None,
        answers: dict[str, str] | None = None,
        message: str | None = None,
        stop: bool = False,
        input_digest: str | None = None,
    ) -> Interaction:
        """Answer it. Of several answers, exactly the first counts.

        Args:
            principal: who answers; never the agent that asks.
            interaction_id: what is answered.
            allow: whether the call may happen.
            updated_input: what the tool is called with instead.
            answers: of a question: the answer to each, by the question's text.
            message: what the agent is told where the call may not happen.
            stop: with a denial: the turn is interrupted too.
            input_digest: of the call that the answer is meant for, as it was shown.

        Raises:
            InteractionNotFound: there is none for the caller.
            InteractionResolved: it is not pending any more.
            InteractionExpired: nobody has answered in time.
            InteractionChanged: the answer is meant for another call.
            Forbidden: an agent would answer for itself.
            ValidationFailed: the answer does not fit what was asked.
        """
        if principal.name.startswith("sandbox:"):
            raise Forbidden("An agent cannot answer what a person is asked.")
        given: dict[str, Any] = {"decision": "allow" if allow else "deny"}
        given |= {"message": message} if message is not None else {}

        def work(tx: abc.Transaction) -> Interaction:
            asked = _interaction(tx, principal, interaction_id)
            late = asked.expires_at is not None and asked.expires_at <= utc_now()
            if asked.status is InteractionStatus.EXPIRED or (asked.status is InteractionStatus.PENDING and late):
                raise InteractionExpired
            if input_digest is not None and input_digest != asked.input_digest:
                raise InteractionChanged
            given.update(_changed_input(asked, allow=allow, updated_input=updated_input, answers=answers))
            resolved = transitions.resolve(
                tx, asked.id, InteractionStatus.ANSWERED, answer=given, answered_by=principal.name
            )
            if resolved is None:
                raise InteractionResolved
            if stop and not allow and resolved.turn_id is not None:
                tx.turns.update(resolved.turn_id, interrupt_reason=StopReason.INTERRUPTED)
            return resolved

        resolved = await self._store.write(work)
        reached("interaction.answered")
        await self._hub.tell_answer(resolved)
        self._hub.poke(resolved.session_id)
        return resolved


def _interaction(tx: abc.Transaction, principal: Principal, interaction_id: str) -> Interaction:
    found = tx.interactions.get(interaction_id)
    session = tx.sessions.get(found.session_id) if found is not None else None
    if found is None or session is None or not principal.may_see(session):
        raise InteractionNotFound
    return found


def _changed_input(
    asked: Interaction, *, allow: bool, updated_input: dict[str, Any] | None, answers: dict[str, str] | None
) -> dict[str, Any]:
    if answers is not None and asked.kind is not InteractionKind.QUESTION:
        raise ValidationFailed("answers: this is no question; give a decision")
    if asked.kind is InteractionKind.QUESTION and allow and not answers:
        raise ValidationFailed("answers: a question wants the answer to each of its questions, by the question's text")
    if not allow and updated_input is not None:
        raise ValidationFailed("updated_input: what may not happen has no input")
    if answers is not None:
        return {"answers": answers, "updated_input": (updated_input or asked.input) | {"answers": answers}}
    return {} if updated_input is None else {"updated_input": updated_input}
