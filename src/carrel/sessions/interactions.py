"""What waits for a person: listed and answered here, asked by agents.

An interaction is a row. The agent's process that waits for it is told of the answer if it is there; one that comes back
after a while asks again by the interaction's id, and finds the answer in the row.
"""

from __future__ import annotations

from collections.abc import Callable
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
from carrel.model import (
    Interaction,
    InteractionKind,
    InteractionStatus,
    PermissionMode,
    Principal,
    RuleScope,
    StopReason,
    utc_now,
)
from carrel.protocol.events import PendingInteraction, SessionUpdated
from carrel.protocol.spec import SessionSpec
from carrel.sessions import transitions
from carrel.sessions.environments import environment_of
from carrel.sessions.hub import Hub
from carrel.sessions.narrowing import check_options
from carrel.sessions.owner import Owner
from carrel.sessions.rules import remembered

__all__ = ["Interactions"]

_FIRST_TOLD = 100


class Interactions:
    """Interactions, for callers."""

    def __init__(
        self, store: abc.Store, hub: Hub, owner: Owner, *, check_mode: Callable[[PermissionMode | None], None]
    ) -> None:
        """Make it over the rows and the runners that are connected.

        Args:
            store: the rows.
            hub: who is told of answers.
            owner: who tells agents of rules.
            check_mode: raises Forbidden for a permission mode that is not allowed here.
        """
        self._store = store
        self._hub = hub
        self._owner = owner
        self._check_mode = check_mode

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

    async def first_told(self, principal: Principal, session_id: str) -> list[PendingInteraction]:
        """What whoever attaches to the session is told first. Raises SessionNotFound."""
        waiting = InteractionStatus.PENDING
        page = await self.page(principal, session_id=session_id, status=waiting, cursor=None, limit=_FIRST_TOLD)
        return [PendingInteraction(each) for each in page.items]

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
        remember: RuleScope | None = None,
        permission_mode: PermissionMode | None = None,
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
            remember: what a rule is written for, so that such calls are decided the same way from here on.
            permission_mode: of a plan: the session's mode from here on.

        Raises:
            InteractionNotFound: there is none for the caller.
            InteractionResolved: it is not pending any more.
            InteractionExpired: nobody has answered in time.
            InteractionChanged: the answer is meant for another call.
            Forbidden: an agent would answer for itself, or the mode is not allowed here.
            MissingScope: only an admin may have that remembered.
            EnvironmentForbids: the session's environment does not let it have this.
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
            given.update(self._mode_after(tx, asked, allow=allow, mode=permission_mode))
            if remember is not None:
                rule = _rule_of(asked)
                session = tx.sessions.get(asked.session_id)
                assert session is not None  # it was just found
                written = remembered(tx, principal, session, remember, given["decision"], rule)
                given.update(remember=remember.value, rule_id=written.id)
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
        if "rule_id" in given:
            await self._owner.apply_rules()
        await self._hub.tell_answer(resolved)
        self._hub.poke(resolved.session_id)
        return resolved

    def _mode_after(
        self, tx: abc.Transaction, asked: Interaction, *, allow: bool, mode: PermissionMode | None
    ) -> dict[str, Any]:
        """A plan that is approved ends the mode plan: in its row too, for agents to come."""
        if mode is not None and (asked.kind is not InteractionKind.PLAN or not allow):
            raise ValidationFailed("permission_mode: it belongs to a plan that is approved")
        if asked.kind is not InteractionKind.PLAN or not allow:
            return {}
        session = tx.sessions.get(asked.session_id)
        assert session is not None  # it was just found
        environment = environment_of(tx, session)
        planning = session.spec.get("permission_mode") or environment.spec.options.permission_mode
        mode = mode or (PermissionMode.DEFAULT if planning == PermissionMode.PLAN else None)
        if mode is None:
            return {}  # the agent had begun to plan by itself, and goes back to what it may
        self._check_mode(mode)
        check_options(environment.name, environment.spec, SessionSpec(permission_mode=mode))
        tx.sessions.update(session.id, spec=session.spec | {"permission_mode": mode.value})
        transitions.emit(tx, session.id, SessionUpdated(changed=["permission_mode"], at_next_launch=[]))
        return {"permission_mode": mode.value}


def _interaction(tx: abc.Transaction, principal: Principal, interaction_id: str) -> Interaction:
    found = tx.interactions.get(interaction_id)
    session = tx.sessions.get(found.session_id) if found is not None else None
    if found is None or session is None or not principal.may_see(session):
        raise InteractionNotFound
    return found


def _rule_of(asked: Interaction) -> str:
    if not asked.suggestions:
        raise ValidationFailed("remember: there is no rule that would speak of this call and of little else")
    return asked.suggestions[0]


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
