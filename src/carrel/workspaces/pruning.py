"""Which snapshots are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

__all__ = ["KeepRules", "SnapshotAge", "superfluous"]


@dataclass(frozen=True)
class SnapshotAge:
    """What pruning knows of one snapshot."""

    id: str
    created_at: datetime
    turn_id: str | None = None
    """The turn at whose end it was made, if it was."""
    referenced: bool = False
    """Whether something needs it: a fork, an artifact, a restore under way, a person who has said so."""


@dataclass(frozen=True, kw_only=True)
class KeepRules:
    """A snapshot is kept if one of these keeps it."""

    last: int = 10
    """So many of the newest."""
    turns: int = 50
    """The last one of each of so many of the newest turns: a session can be rewound to these."""
    hourly: int = 24
    """The last one of each of so many hours that have one, from the newest back (UTC)."""
    daily: int = 14
    """The same of days."""


def superfluous(snapshots: Iterable[SnapshotAge], rules: KeepRules, *, now: datetime) -> list[str]:
    """The ids of those that no rule keeps, the oldest first. The newest one is always kept.

    Those of the last minute are kept too, whatever the rules: what refers to them may not be stored yet.
    """
    newest_first = sorted(snapshots, key=lambda each: (each.created_at, each.id), reverse=True)
    kept = {each.id for each in newest_first[: max(rules.last, 1)]}
    kept |= {each.id for each in newest_first if each.referenced or each.created_at > now - timedelta(minutes=1)}
    kept |= _one_each(newest_first, lambda each: each.turn_id, rules.turns)
    kept |= _one_each(newest_first, lambda each: each.created_at.strftime("%Y-%m-%d %H"), rules.hourly)
    kept |= _one_each(newest_first, lambda each: each.created_at.date().isoformat(), rules.daily)
    return [each.id for each in reversed(newest_first) if each.id not in kept]


def _one_each(newest_first: list[SnapshotAge], group_of: Callable[[SnapshotAge], str | None], most: int) -> set[str]:
    """The newest one of each of the first so many groups."""
    first: dict[str, str] = {}
    for each in newest_first:
        group = group_of(each)
        if group is None or group in first:
            continue
        if len(first) == most:
            break
        first[group] = each.id
    return set(first.values())
