"""Which snapshots are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from carrel.model import Snapshot

__all__ = ["KeepRules", "over_total", "superfluous"]


@dataclass(frozen=True, kw_only=True)
class KeepRules:
    """A snapshot goes when one of these says so. The newest of a workspace never does. None: no limit."""

    last: int | None = None
    """So many of the newest of one workspace are kept."""
    max_age: timedelta | None = None
    """Older ones go."""
    max_bytes: int | None = None
    """What the snapshots of one workspace may take, the newest counted first."""
    max_bytes_of_user: int | None = None
    """The same of all that one user's sessions have."""


def superfluous(snapshots: Sequence[Snapshot], rules: KeepRules, *, now: datetime) -> list[str]:
    """Of the snapshots of one workspace, newest first, the ids of those that go."""
    after = None if rules.max_age is None else now - rules.max_age
    gone = [
        each.id
        for place, each in enumerate(snapshots)
        if place
        and ((rules.last is not None and place >= rules.last) or (after is not None and each.created_at < after))
    ]
    rest = [each for each in snapshots if each.id not in set(gone)]
    return gone + ([] if rules.max_bytes is None else over_total(rest, rules.max_bytes))


def over_total(snapshots: Sequence[Snapshot], max_bytes: int) -> list[str]:
    """Of snapshots of any workspaces, newest first, the ids of those with which they take more than so many bytes.

    What several have in common, because nothing had changed, is counted once.
    """
    gone: list[str] = []
    seen: set[str] = set()
    keys: set[str] = set()
    # The newest of each workspace stays whatever it takes, so it is counted before all others.
    newest = {each.workspace_id or each.session_id: each for each in reversed(snapshots)}
    for each in newest.values():
        keys.add(each.key)
        seen.add(each.id)
    total = sum({each.key: each.stored_bytes for each in newest.values()}.values())
    for each in snapshots:
        if each.id in seen or each.key in keys:
            continue
        if total + each.stored_bytes > max_bytes:
            gone.append(each.id)
            continue
        keys.add(each.key)
        total += each.stored_bytes
    return gone
