"""What model requests took."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from carrel import abc
from carrel.model import Usage
from carrel.store import tables
from carrel.store.rows.base import Rows


class SqlUsage(Rows, abc.UsageRows):
    """What model requests took."""

    def add(self, record: abc.UsageRecord) -> None:
        """Store a record."""
        self._connection.execute(
            tables.usage.insert().values(
                id=record.id,
                session_id=record.session_id,
                user_id=record.user_id,
                turn_id=record.turn_id,
                model=record.model,
                cost_usd=record.cost_usd,
                at=record.at,
                **record.usage.model_dump(),
            )
        )

    def of_turn(self, turn_id: str) -> tuple[Usage, float | None, int]:
        """The sums of a turn: tokens, cost (None where any part of it is unknown), and how many requests."""
        u = tables.usage.c
        names = list(Usage.model_fields)
        sums = [sa.func.coalesce(sa.func.sum(u[name]), 0).label(name) for name in names]
        row = (
            self._connection.execute(
                sa.select(
                    *sums,
                    sa.func.count().label("requests"),
                    sa.func.count(u.cost_usd).label("priced"),
                    sa.func.coalesce(sa.func.sum(u.cost_usd), 0.0).label("cost"),
                ).where(u.turn_id == turn_id)
            )
        ).one()
        total = Usage(**{name: int(getattr(row, name)) for name in names})
        return total, (float(row.cost) if row.priced == row.requests else None), int(row.requests)

    def sums(self, which: abc.UsageFilter, group_by: Sequence[str] = ()) -> Sequence[abc.UsageSum]:
        """Sums by `user`, `session`, `turn`, `model` or `day` (UTC), in the order of their names; one without any."""
        u = tables.usage.c
        names = list(Usage.model_fields)
        groups = {name: self._group(name).label(f"by_{name}") for name in group_by}
        query = sa.select(
            *groups.values(),
            *[sa.func.coalesce(sa.func.sum(u[name]), 0).label(name) for name in names],
            sa.func.count(u.id).label("requests"),
            sa.func.count(u.cost_usd).label("priced"),
            sa.func.coalesce(sa.func.sum(u.cost_usd), 0.0).label("cost"),
        ).where(*_which(tables.usage, which))
        if groups:
            query = query.group_by(*groups.values()).order_by(*groups.values())
        return [
            abc.UsageSum(
                group={name: str(getattr(row, f"by_{name}") or "") for name in groups},
                requests=row.requests,
                usage=Usage(**{name: int(getattr(row, name)) for name in names}),
                cost_usd=float(row.cost) if row.priced == row.requests else None,
                known_cost_usd=float(row.cost),
            )
            for row in self._connection.execute(query)
        ]

    def _group(self, name: str) -> sa.ColumnElement[Any]:
        u = tables.usage.c
        if name != "day":
            return {"user": u.user_id, "session": u.session_id, "turn": u.turn_id, "model": u.model}[name]
        if self._connection.dialect.name == "sqlite":
            return sa.func.strftime("%Y-%m-%d", u.at)
        return sa.func.to_char(sa.func.timezone("UTC", u.at), "YYYY-MM-DD")

    def reserve(self, reservation: abc.Reservation) -> None:
        """Store a reservation."""
        self._connection.execute(tables.reservations.insert(), vars(reservation))

    def release(self, reservation_id: str) -> abc.Reservation | None:
        """Take a reservation away, and answer it; None where it is not there."""
        r = tables.reservations
        row = self._one(r.delete().where(r.c.id == reservation_id).returning(*r.c))
        return abc.Reservation(**row) if row else None

    def reserved(self, which: abc.UsageFilter) -> tuple[int, float]:
        """The tokens and US dollars that are reserved now."""
        r = tables.reservations
        query = sa.select(
            sa.func.coalesce(sa.func.sum(r.c.tokens), 0), sa.func.coalesce(sa.func.sum(r.c.cost_usd), 0.0)
        ).where(*_which(r, which))
        tokens, cost = self._connection.execute(query).one()
        return int(tokens), float(cost)

    def stale(self, before: datetime) -> Sequence[abc.Reservation]:
        """Reservations made before: their requests ended without a word."""
        query = sa.select(tables.reservations).where(tables.reservations.c.at < before)
        return [abc.Reservation(**row) for row in self._all(query)]


def _which(table: sa.Table, which: abc.UsageFilter) -> list[sa.ColumnElement[bool]]:
    c = table.c
    asked: list[sa.ColumnElement[bool]] = [
        c[name] == value
        for name in ("user_id", "session_id", "turn_id", "model")
        if (value := getattr(which, name)) is not None
    ]
    if which.tree_of is not None:
        a = tables.ancestry.c
        below = sa.select(a.session_id).where(a.ancestor_id == which.tree_of)
        asked.append((c.session_id == which.tree_of) | c.session_id.in_(below))
    if which.since is not None:
        asked.append(c.at >= which.since)
    if which.until is not None:
        asked.append(c.at < which.until)
    return asked
