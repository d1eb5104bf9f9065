"""What was spent and what is left, for callers: each sees their own, an administrator everybody's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from carrel import abc
from carrel.budgets import Account, Allowances, BudgetKind, accounts_of
from carrel.errors import Forbidden, SessionNotFound
from carrel.model import Principal, Usage, utc_now

__all__ = ["GROUPS", "Report", "Spending"]

GROUPS = ("user", "session", "turn", "model", "day")
"""What usage may be grouped by."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Sums of usage, by group, and of all of them."""

    rows: Sequence[abc.UsageSum]
    total: abc.UsageSum


class Spending:
    """Usage and budgets."""

    def __init__(self, store: abc.Store, allowances: Allowances) -> None:
        """Read from `store`; `allowances` are the budgets of those that have none of their own."""
        self._store = store
        self._allowances = allowances

    async def usage(self, principal: Principal, which: abc.UsageFilter, group_by: Sequence[str]) -> Report:
        """What the requests that the caller may see have taken, in the order of `group_by`."""
        seen = which
        if not principal.is_admin:
            # Somebody else's is not refused but not there, as everywhere.
            if which.user_id not in (None, principal.user):
                return Report(rows=[], total=_nothing())
            seen = replace(seen, user_id=principal.user)
        if principal.session_id is not None:
            if which.session_id not in (None, principal.session_id):
                return Report(rows=[], total=_nothing())
            seen = replace(seen, session_id=principal.session_id)

        def work(tx: abc.Transaction) -> Report:
            (total,) = tx.usage.sums(seen)
            rows = tx.usage.sums(seen, group_by) if group_by else [total]
            return Report(rows=[row for row in rows if row.requests], total=total)

        return await self._store.read(work)

    async def budgets(self, principal: Principal, *, user_id: str | None, session_id: str | None) -> list[Account]:
        """The budgets of a user (by default the caller) and, where one is named, of a session and its turn at work.

        Raises:
            Forbidden: another user's may be seen by an administrator alone.
            SessionNotFound: there is no such session, or it is somebody else's.
        """
        bound = principal.session_id
        session_id = session_id or bound
        if user_id is not None and user_id != principal.user and not principal.is_admin:
            raise Forbidden("Another user's budgets can be seen by an administrator alone.")

        def work(tx: abc.Transaction) -> list[Account]:
            session = tx.sessions.get(session_id) if session_id is not None else None
            if session_id is not None and (session is None or not principal.may_see(session)):
                raise SessionNotFound
            owner = session.owner if session is not None else user_id or principal.user
            turn = tx.turns.live(session.id) if session is not None else None
            found = accounts_of(
                tx, self._allowances, user_id=owner, session=session, turn=turn, now=utc_now(), unlimited=True
            )
            # Who is bound to a session has no business with what its user spends elsewhere.
            return [a for a in found if bound is None or a.kind in (BudgetKind.TURN, BudgetKind.SESSION)]

        return await self._store.read(work)


def _nothing() -> abc.UsageSum:
    return abc.UsageSum(group={}, requests=0, usage=Usage(), cost_usd=0.0, known_cost_usd=0.0)
