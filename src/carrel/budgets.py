"""What may be spent, what of it is left, and whether a model request fits. Arithmetic over the rows of a transaction.

Four budgets hold at once: of a turn, a session, a user in all, and a user a day (UTC). The smallest remainder wins.
A session's holds for all that is spent below it too, and so those of the sessions above hold as well.
Whoever reserves holds the locks of the session and of its user, so that two requests never count on the same remainder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final

from carrel import abc
from carrel.errors import BudgetReached, PriceUnknown
from carrel.model import Budget, Frozen, Session, Turn

__all__ = [
    "UNLIMITED",
    "Account",
    "Allowances",
    "Bound",
    "BudgetKind",
    "accounts_of",
    "day_of",
    "grant",
    "only_held",
    "spent",
]


class BudgetKind(StrEnum):
    """Whose budget it is."""

    TURN = "turn"
    SESSION = "session"
    USER = "user"
    USER_DAY = "user_day"


class Allowances(Frozen):
    """The budgets of turns, sessions and users that have none of their own."""

    turn: Budget = Budget()
    session: Budget = Budget()
    user: Budget = Budget()
    user_day: Budget = Budget()


UNLIMITED: Final = Allowances()
"""No budget but those that turns, sessions and users have of their own."""


@dataclass(frozen=True, kw_only=True)
class Bound:
    """What a model request may come to at most."""

    model: str
    input_tokens: int
    max_tokens: int
    least_max_tokens: int
    """Below it `max_tokens` cannot be lowered."""
    input_usd: float | None
    """What all of its input may cost; None where the model's price is not known."""
    output_usd: float | None
    """What each token of its output costs."""

    def usd(self, max_tokens: int) -> float | None:
        """What it may cost with this many tokens of output."""
        if self.input_usd is None or self.output_usd is None:
            return None
        return self.input_usd + max_tokens * self.output_usd


@dataclass(frozen=True, kw_only=True)
class Account:
    """A budget, and what is gone of it."""

    kind: BudgetKind
    of: str
    """The id of the turn, session or user."""
    budget: Budget
    spent_tokens: int
    spent_usd: float
    """Requests whose price is not known are not in it."""
    reserved_tokens: int
    reserved_usd: float
    resets_at: datetime | None = None

    @property
    def left_tokens(self) -> int | None:
        """Tokens that are neither spent nor reserved; None without a limit."""
        if self.budget.max_tokens is None:
            return None
        return max(0, self.budget.max_tokens - self.spent_tokens - self.reserved_tokens)

    @property
    def left_usd(self) -> float | None:
        """US dollars that are neither spent nor reserved; None without a limit."""
        if self.budget.max_usd is None:
            return None
        return max(0.0, self.budget.max_usd - self.spent_usd - self.reserved_usd)

    def room(self, bound: Bound) -> int:
        """How many tokens of output fit beside the request's input, up to what it asks for; below 0: not even that.

        Raises:
            PriceUnknown: the budget is in US dollars, and the model has no price.
        """
        room = bound.max_tokens
        if self.left_tokens is not None:
            room = min(room, self.left_tokens - bound.input_tokens)
        if self.left_usd is None:
            return room
        if bound.input_usd is None or bound.output_usd is None:
            raise PriceUnknown(bound.model)
        if bound.input_usd > self.left_usd:
            return -1
        affordable = (self.left_usd - bound.input_usd) / bound.output_usd if bound.output_usd > 0 else math.inf
        if affordable < room:
            room = int(affordable) + 1
        # Division rounds, and may round up.
        while room > 0 and (bound.usd(room) or 0.0) > self.left_usd:
            room -= 1
        return room


def accounts_of(
    tx: abc.Transaction,
    allowances: Allowances,
    *,
    user_id: str,
    session: Session | None = None,
    turn: Turn | None = None,
    now: datetime,
    unlimited: bool = False,
) -> list[Account]:
    """The budgets that hold for a turn of a session of a user; `unlimited`: also those that limit nothing."""
    user = tx.users.get(user_id)
    midnight = day_of(now)
    own = user.budget if user is not None else None
    own_daily = user.daily_budget if user is not None else None
    of_user = abc.UsageFilter(user_id=user_id)
    of_today = abc.UsageFilter(user_id=user_id, since=midnight)
    found: list[tuple[BudgetKind, str, Budget, abc.UsageFilter, abc.UsageFilter, datetime | None]] = []
    if turn is not None:
        given = turn.options.get("budget")
        budget = allowances.turn if given is None else Budget.model_validate(given)
        which = abc.UsageFilter(turn_id=turn.id)
        found.append((BudgetKind.TURN, turn.id, budget, which, which, None))
    if session is not None:
        for each in (session, *(tx.trees.above(session) if session.lineage else ())):
            # What is spent below a session is spent of its own budget too.
            which = abc.UsageFilter(tree_of=each.id)
            found.append((BudgetKind.SESSION, each.id, _or(each.budget, allowances.session), which, which, None))
    found.append((BudgetKind.USER, user_id, _or(own, allowances.user), of_user, of_user, None))
    # What is reserved now will be spent today, whenever its request began.
    daily = _or(own_daily, allowances.user_day)
    found.append((BudgetKind.USER_DAY, user_id, daily, of_today, of_user, midnight + timedelta(days=1)))
    return [
        _account(tx, kind, of, budget, spent=spent, reserved=reserved, resets_at=resets_at)
        for kind, of, budget, spent, reserved, resets_at in found
        if unlimited or not budget.unlimited
    ]


def _account(
    tx: abc.Transaction,
    kind: BudgetKind,
    of: str,
    budget: Budget,
    *,
    spent: abc.UsageFilter,
    reserved: abc.UsageFilter,
    resets_at: datetime | None,
) -> Account:
    (gone,) = tx.usage.sums(spent)
    tokens, usd = tx.usage.reserved(reserved)
    return Account(
        kind=kind,
        of=of,
        budget=budget,
        spent_tokens=gone.usage.total,
        spent_usd=gone.known_cost_usd,
        reserved_tokens=tokens,
        reserved_usd=usd,
        resets_at=resets_at,
    )


def grant(accounts: Sequence[Account], bound: Bound) -> int:
    """How many tokens of output the request may ask for, so that no budget can be overspent.

    Raises:
        BudgetReached: a budget has no room for it.
        PriceUnknown: the model has no price, and a budget is in US dollars.
    """
    rooms = [(account.room(bound), account) for account in accounts]
    if not rooms:
        return bound.max_tokens
    room, tightest = min(rooms, key=lambda pair: pair[0])
    if room < min(bound.max_tokens, bound.least_max_tokens):
        raise _reached(tightest)
    return min(room, bound.max_tokens)


def only_held(accounts: Sequence[Account], bound: Bound) -> bool:
    """Whether a request that does not fit now would, if nothing were reserved: then it is worth waiting.

    Raises:
        PriceUnknown: the model has no price, and a budget is in US dollars.
    """
    least = min(bound.max_tokens, bound.least_max_tokens)
    return all(replace(account, reserved_tokens=0, reserved_usd=0.0).room(bound) >= least for account in accounts)


def spent(accounts: Sequence[Account]) -> BudgetReached | None:
    """The error to fail a turn with, where a budget is spent to the last; what is only reserved may come back."""
    for account in accounts:
        free = replace(account, reserved_tokens=0, reserved_usd=0.0)
        if free.left_tokens == 0 or free.left_usd == 0:
            return _reached(account)
    return None


def day_of(now: datetime) -> datetime:
    """The midnight (UTC) a day began with."""
    return now.replace(hour=0, minute=0, second=0, microsecond=0)


def _or(own: Budget | None, default: Budget) -> Budget:
    return default if own is None else own


def _reached(account: Account) -> BudgetReached:
    match account.kind:
        case BudgetKind.TURN:
            whose, remedy = "the turn's budget", "Send a prompt with a larger `budget`."
        case BudgetKind.SESSION:
            whose = "the session's budget"
            remedy = f'Raise it with PATCH /api/v1/sessions/{account.of} and {{"budget": …}}, and send the next prompt.'
        case BudgetKind.USER:
            whose = f"the budget of the user {account.of}"
            remedy = f'An administrator can raise it with PATCH /api/v1/users/{account.of} and {{"budget": …}}.'
        case BudgetKind.USER_DAY:
            whose = f"the daily budget of the user {account.of}"
            remedy = (
                f"Go on from {account.resets_at:%Y-%m-%d %H:%M} UTC, or have an administrator raise it with "
                f'PATCH /api/v1/users/{account.of} and {{"daily_budget": …}}.'
            )
    sizes: list[str] = []
    if account.budget.max_usd is not None:
        size = account.budget.max_usd
        exact = f"{size:.2f}" if round(size, 2) == size else f"{size:.6f}".rstrip("0")
        sizes.append(f"${exact} (${account.spent_usd:.4f} spent{_held(account.reserved_usd)})")
    if account.budget.max_tokens is not None:
        taken = f"{account.spent_tokens:,} spent" + (
            f", {account.reserved_tokens:,} reserved" if account.reserved_tokens else ""
        )
        sizes.append(f"{account.budget.max_tokens:,} tokens ({taken})")
    return BudgetReached(f"{whose} of {' and '.join(sizes)}", remedy)


def _held(usd: float) -> str:
    return f", ${usd:.4f} reserved" if usd else ""
