"""Trees of sessions, within one transaction: how many there may be, and what is done to all that are below one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from carrel import abc
from carrel.errors import ChildLimitReached, TooDeep
from carrel.model import OnParentEnd, Session

__all__ = ["TreeLimits", "stop_with_children"]


@dataclass(frozen=True, kw_only=True)
class TreeLimits:
    """How large a tree of sessions may be. Those that are stopped or failed do not count."""

    depth: int = 5
    """How many sessions may be above one."""
    children: int = 10
    """How many one session may have begun."""
    tree: int = 50
    """How many there may be below the first of a tree."""

    def spend(self, tx: abc.Transaction, parent: Session) -> None:
        """Make sure that there is room for one more child of this parent's, until the transaction ends.

        The lock of the parent's user must be held: all of a tree are one user's.

        Raises:
            TooDeep: there are as many above it as are allowed.
            ChildLimitReached: the parent, or its tree, has as many below it as are allowed.
        """
        if parent.depth + 1 > self.depth:
            raise TooDeep(self.depth)
        if tx.trees.live_children(parent.id) >= self.children:
            raise ChildLimitReached(self.children, of_tree=False)
        if tx.trees.live_below(parent.root_id or parent.id) >= self.tree:
            raise ChildLimitReached(self.tree, of_tree=True)


def stop_with_children(tx: abc.Transaction, session: Session, stop: Callable[[Session], None]) -> list[str]:
    """Stop a session, and all below it that are to stop when their parent does. Answers whose, the session's first."""
    stop(session)
    stopped = {session.id}
    for each in tx.trees.below(session.id):
        if each.parent_id in stopped and each.birth is not None and each.birth.on_parent_end is OnParentEnd.STOP:
            stop(each)
            stopped.add(each.id)
    return [session.id, *(each for each in stopped if each != session.id)]
