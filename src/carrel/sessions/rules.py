"""Rules about calls of tools: written by people, listed and revoked; and what would become of a call, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import Field

from carrel import abc
from carrel.errors import (
    EnvironmentForbids,
    EnvironmentNotFound,
    MissingScope,
    RuleNotFound,
    SessionNotFound,
    ValidationFailed,
    WorkspaceNotFound,
)
from carrel.model import (
    Frozen,
    PermissionMode,
    PermissionRule,
    Principal,
    RuleScope,
    Scope,
    Session,
    new_id,
    utc_now,
)
from carrel.protocol.environments import Environment
from carrel.protocol.permissions import Decision, PermissionRules, decide
from carrel.protocol.spec import SessionSpec
from carrel.sessions.environments import environment_of
from carrel.sessions.narrowing import refuses_allowing
from carrel.sessions.owner import Owner

__all__ = ["PermissionVerdict", "Rules", "remembered"]

_AUTO = "the mode auto: Claude Code's own classifier decides"
_NOBODY = "nobody is there to be asked"


class PermissionVerdict(Frozen):
    """What would become of a call, and why."""

    decision: str = Field(
        description="`allow`, `ask`, `deny`; `classifier`: Claude Code's own decides, in mode `auto`."
    )
    reason: str
    rule: str | None = Field(description="The rule that speaks; null where the mode does.")
    layer: str | None = Field(
        description="Whose rule it is: `environment`, `session`, `settings`; or one that was written."
    )
    rule_id: str | None = Field(description="With a rule that was written: which one; it can be revoked.")
    mode: PermissionMode = Field(description="The session's permission mode, as its next call would meet it.")


class Rules:
    """Rules that people have written, for callers."""

    def __init__(self, store: abc.Store, owner: Owner) -> None:
        """Make it over the rows, and over who tells agents of changes."""
        self._store = store
        self._owner = owner

    async def page(
        self, principal: Principal, *, scope: RuleScope | None, target: str | None, cursor: str | None, limit: int
    ) -> abc.Page[PermissionRule]:
        """The caller's own, oldest first; an admin's: everybody's. Raises InvalidCursor."""
        which = abc.RuleFilter(owner=None if principal.is_admin else principal.user, scope=scope, target=target)
        return await self._store.read(lambda tx: tx.rules.page(which, cursor=cursor, limit=limit))

    async def create(
        self, principal: Principal, *, scope: RuleScope, target: str | None, effect: str, rule: str
    ) -> PermissionRule:
        """Write a rule. Agents that it holds for are told at once.

        Args:
            principal: who writes it.
            scope: what it holds for.
            target: which one; of a user: None for the caller.
            effect: allow, ask or deny.
            rule: in Claude Code's syntax.

        Raises:
            ValidationFailed: no target is given.
            SessionNotFound: it names a session that the caller has not.
            WorkspaceNotFound: the same of a workspace.
            EnvironmentNotFound: the same of an environment.
            MissingScope: it is for an admin to write.
            EnvironmentForbids: the session's environment does not let it have this.
        """

        def work(tx: abc.Transaction) -> PermissionRule:
            named, owner = _target(tx, principal, scope, target)
            if scope is RuleScope.SESSION and effect == "allow":
                session = tx.sessions.get(named)
                if session is not None:
                    _check_allowed(environment_of(tx, session), rule)
            made = _made(principal, scope, named, owner, effect, rule)
            tx.rules.add(made)
            return made

        made = await self._store.write(work)
        await self._owner.apply_rules()
        return made

    async def delete(self, principal: Principal, rule_id: str) -> None:
        """Revoke a rule. Agents that it held for are told at once. Raises RuleNotFound."""

        def work(tx: abc.Transaction) -> None:
            rule = tx.rules.get(rule_id)
            if rule is None or not (principal.is_admin or rule.owner == principal.user):
                raise RuleNotFound
            tx.rules.remove(rule_id)

        await self._store.write(work)
        await self._owner.apply_rules()

    async def check(
        self, principal: Principal, session_id: str, *, tool: str, given: dict[str, Any]
    ) -> PermissionVerdict:
        """What would become of this call in the session, and why. Nothing happens. Raises SessionNotFound."""

        def work(tx: abc.Transaction) -> tuple[Session, Environment, Sequence[PermissionRule]]:
            session = tx.sessions.get(session_id)
            if session is None or not principal.may_see(session):
                raise SessionNotFound
            return session, environment_of(tx, session), self._owner.rules_of(tx, session)

        session, environment, written = await self._store.read(work)
        spec, mode = await self._owner.options_of(session)
        verdict = decide(mode, spec.permission_rules(), tool, given)
        if verdict is None:
            return PermissionVerdict(
                decision="classifier", reason=_AUTO, rule=None, layer=None, rule_id=None, mode=mode
            )
        decision, reason = verdict.decision, verdict.reason
        if decision is Decision.ASK and spec.ask_expires_seconds == 0:
            decision, reason = Decision.DENY, f"{reason}, and {_NOBODY}"
        layer, rule_id = None, None
        if verdict.rule is not None:
            effect = verdict.reason.split()[1]
            layer, rule_id = next(_layers(environment, session, written, effect, verdict.rule), ("settings", None))
        return PermissionVerdict(
            decision=decision, reason=reason, rule=verdict.rule, layer=layer, rule_id=rule_id, mode=mode
        )


def remembered(
    tx: abc.Transaction, principal: Principal, session: Session, scope: RuleScope, effect: str, rule: str
) -> PermissionRule:
    """Write the rule that an answer asks to remember.

    Raises:
        MissingScope: it is for an admin to write.
        ValidationFailed: the session has no workspace that outlives it.
        EnvironmentForbids: its environment does not let it have this.
    """
    target = {
        RuleScope.SESSION: session.id,
        RuleScope.WORKSPACE: session.workspace_id,
        RuleScope.ENVIRONMENT: session.environment,
    }.get(scope)
    if target is None:
        raise ValidationFailed("remember: the session has no persistent workspace that could keep a rule")
    if scope is RuleScope.ENVIRONMENT and not principal.is_admin:
        raise MissingScope(Scope.ADMIN)
    if effect == "allow" and scope is not RuleScope.ENVIRONMENT:
        _check_allowed(environment_of(tx, session), rule)
    made = _made(principal, scope, target, None if scope is RuleScope.ENVIRONMENT else session.owner, effect, rule)
    tx.rules.add(made)
    return made


def _made(
    principal: Principal, scope: RuleScope, target: str, owner: str | None, effect: str, rule: str
) -> PermissionRule:
    return PermissionRule.model_validate(
        {
            "id": new_id(),
            "owner": owner,
            "scope": scope,
            "target": target,
            "effect": effect,
            "rule": rule,
            "created_by": principal.name,
            "created_at": utc_now(),
        }
    )


def _check_allowed(environment: Environment, rule: str) -> None:
    if refuses_allowing(environment.spec, rule):
        raise EnvironmentForbids(
            f"The environment {environment.name} names the rules that allow calls, and {rule} is none of them.",
            environment=environment.name,
            option="permissions",
        )


def _target(tx: abc.Transaction, principal: Principal, scope: RuleScope, target: str | None) -> tuple[str, str | None]:
    """What a rule is written for, and whose it is."""
    if scope is RuleScope.USER:
        if target not in (None, principal.user) and not principal.is_admin:
            raise MissingScope(Scope.ADMIN)
        return target or principal.user, target or principal.user
    if target is None:
        raise ValidationFailed(f"target: a rule of scope {scope} names what it holds for")
    if scope is RuleScope.SESSION:
        session = tx.sessions.get(target)
        if session is None or not principal.may_see(session):
            raise SessionNotFound
        return session.id, session.owner
    if scope is RuleScope.WORKSPACE:
        workspace = tx.workspaces.get(target)
        if workspace is None or not (principal.is_admin or workspace.owner == principal.user):
            raise WorkspaceNotFound
        return workspace.id, workspace.owner
    if not principal.is_admin:
        raise MissingScope(Scope.ADMIN)
    if tx.environments.get(target) is None:
        raise EnvironmentNotFound
    return target, None


def _layers(
    environment: Environment, session: Session, written: Sequence[PermissionRule], effect: str, rule: str
) -> Iterator[tuple[str, str | None]]:
    """Where a rule stands, the widest first."""
    if rule in getattr(environment.spec.options.permission_rules(), effect):
        yield "environment", None
    order = list(reversed(RuleScope))
    for each in sorted(written, key=lambda found: order.index(found.scope)):
        if (each.effect, each.rule) == (effect, rule):
            yield each.scope.value, each.id
    if rule in _of_session(session, effect):
        yield "session", None


def _of_session(session: Session, effect: str) -> tuple[str, ...]:
    rules: PermissionRules = SessionSpec.model_validate(session.spec).permission_rules()
    found: tuple[str, ...] = getattr(rules, effect)
    return found
