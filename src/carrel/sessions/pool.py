"""Warm pools: sandboxes with a connected agent that wait for sessions which are not made yet.

Each belongs to a session that is nobody's: it has its id, its number, its folders and its tokens from the start, is
launched and bound by its owner's steps as any other, and is hidden from every caller, list and count. Making a session
takes one in the transaction that counts limits: from there on it is somebody's, and its events begin. So nothing is
moved when a session is made, no two ever get the same, and nothing can be half taken.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import structlog
from pydantic_core import to_json

from carrel import abc
from carrel.killpoints import reached
from carrel.model import Failure, PermissionMode, Session, SessionStatus, Workspace, new_id, utc_now
from carrel.protocol.events import SessionCreated
from carrel.protocol.spec import LIVE_FIELDS, SessionSpec
from carrel.sessions import steps, transitions
from carrel.sessions.owner import Owner
from carrel.sessions.scheduler import Scheduler

__all__ = ["DEFAULT_POOL", "Pool", "PoolState", "Recipe", "why_cold"]

log = structlog.get_logger(__name__)

DEFAULT_POOL = "default"
"""The pool of sessions that name no environment."""

_LOOK_SECONDS = 1.0
_STARTING_AT_ONCE = 2
_AFTER_TAKING_SECONDS = 0.25
"""The turn that is about to begin needs the processor more than the sandbox that is to fill the gap."""
_FIRST_BACKOFF_SECONDS = 1.0
_LONGEST_BACKOFF_SECONDS = 60.0
_CALM_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What the sandboxes of one pool are launched with, and how many of them wait."""

    name: str
    """Of what it is the pool; one recipe of a name holds at a time."""
    size: int
    spec: SessionSpec = field(default_factory=SessionSpec)
    """The options of a session whose creator names none."""

    @property
    def key(self) -> str:
        """The pool's name in the rows: another one for other options."""
        digest = hashlib.sha256(to_json([self.name, self.spec])).hexdigest()
        return f"{self.name[:40]}:{digest[:20]}"


@dataclass(frozen=True, kw_only=True)
class PoolState:
    """How a pool does."""

    wanted: int = 0
    warm: int = 0
    """Sandboxes that could be taken now."""
    starting: int = 0
    failure: Failure | None = None
    """Why the last one was lost, until another one is connected."""


@dataclass
class _Trouble:
    failure: Failure | None = None
    count: int = 0
    not_before: float = 0.0

    def add(self, failure: Failure) -> float:
        """One more was lost. Answers in how many seconds another is begun: later and later, until there is a calm."""
        now = time.monotonic()
        if now > self.not_before + _CALM_SECONDS:
            self.count = 0
        wait = min(_FIRST_BACKOFF_SECONDS * 2.0**self.count, _LONGEST_BACKOFF_SECONDS)
        self.failure, self.count, self.not_before = failure, self.count + 1, now + wait
        return wait


def why_cold(recipe: Recipe, spec: SessionSpec, workspace: Workspace | None, *, user_config: bool) -> str | None:
    """Why a session is not taken from the pool; None where it may be. All that disqualifies one stands here.

    Args:
        recipe: what the pool's agents are launched with.
        spec: the session's options, the defaults among them.
        workspace: where its files are to be.
        user_config: whether its user has set up anything that each agent of theirs is shown.
    """
    if workspace is not None and workspace != Workspace():
        return "its files are not its own, in a folder that is new"
    if user_config:
        return "its user has set up skills, settings or the like for each of their sessions"
    launched = [name for name in SessionSpec.model_fields if name not in LIVE_FIELDS]
    own = [name for name in launched if getattr(spec, name) != getattr(recipe.spec, name)]
    if own:
        return "it has launch options of its own: " + ", ".join(own)
    bypasses = {None, PermissionMode.BYPASS}
    if spec.permission_mode is PermissionMode.BYPASS and recipe.spec.permission_mode not in bypasses:
        return "bypassPermissions is for agents that were launched with it"
    return None


@dataclass
class Pool:
    """Keeps every pool filled, and gives of them."""

    store: abc.Store
    owner: Owner
    scheduler: Scheduler
    shows_config: Callable[[str], bool] = lambda user: False
    """Whether a user has set up anything that each agent of theirs is shown; looks at the disk."""
    run_blocking: Callable[..., Any] = asyncio.to_thread
    _recipes: dict[str, Recipe] = field(default_factory=dict)
    _troubles: dict[str, _Trouble] = field(default_factory=lambda: defaultdict(_Trouble))
    _poked: asyncio.Event = field(default_factory=asyncio.Event)
    _taken_at: float = 0.0

    def want(self, recipes: Sequence[Recipe]) -> None:
        """Have these pools, and no other: what was launched for others is thrown away."""
        self._recipes = {recipe.name: recipe for recipe in recipes if recipe.size > 0}
        self._troubles.clear()
        self._poked.set()

    async def forget(self) -> None:
        """Throw away whatever an earlier life of the gateway has left; its settings may have been others."""

        def work(tx: abc.Transaction) -> None:
            for session in tx.pools.waiting():
                steps.discard(tx, session.id)

        await self.store.write(work)

    async def start(self, exit_stack: AsyncExitStack) -> None:
        """Fill the pools from now on; closing is registered with `exit_stack`."""
        self.owner.heard_of_pool = self._heard
        task = asyncio.create_task(self._repeat(), name="pool")

        async def close() -> None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        exit_stack.push_async_callback(close)

    # -------------------------------------------------------------------------------------------------------- taking

    async def recipe_for(self, name: str, user: str, spec: SessionSpec, workspace: Workspace | None) -> Recipe | None:
        """The pool that a session of this user's may be taken from; None where it is to start cold."""
        recipe = self._recipes.get(name)
        if recipe is None or self.owner.draining or why_cold(recipe, spec, workspace, user_config=False) is not None:
            return None
        config = await self.run_blocking(self.shows_config, user)
        return None if why_cold(recipe, spec, workspace, user_config=config) is not None else recipe

    def take(self, tx: abc.Transaction, recipe: Recipe, wanted: Session) -> Session | None:
        """Make a waiting session the one that is wanted; None where none waits.

        Args:
            tx: counts limits too.
            recipe: of `recipe_for`.
            wanted: the session as it would be stored if it started cold; its id is given up.
        """
        waiting = tx.pools.take(recipe.key)
        if waiting is None:
            return None
        own = {"id", "number", "uid_number", "status", "generation", "agent_session_id", "last_seq", "reserved"}
        changes = {name: getattr(wanted, name) for name in type(wanted).model_fields if name not in own}
        # Lists are in the order of numbers: it gets the one that it would have got, and keeps the user of its files.
        session = tx.sessions.update(waiting.id, number=wanted.number, uid_number=waiting.number, **changes)
        transitions.emit(tx, session.id, SessionCreated(title=session.title))
        transitions.tell_of_start(tx, session)
        return session

    async def taken(self, session: Session) -> None:
        """A session was taken, and that is stored: give its agent what is its own, and fill the gap."""
        reached("pool.taken")
        self._taken_at = time.monotonic()
        self._poked.set()
        await self.owner.apply_live_options(session)
        self.scheduler.poke(session.id)

    # ------------------------------------------------------------------------------------------------------- filling

    async def look(self) -> None:
        """Look once at every pool: throw away what is not wanted, and begin what is missing."""
        waiting = await self.store.read(lambda tx: list(tx.pools.waiting()))
        found: dict[str, list[Session]] = {recipe.key: [] for recipe in self._recipes.values()}
        surplus = []
        sizes = {recipe.key: recipe.size for recipe in self._recipes.values()}
        for session in waiting:
            kept = found.get(session.reserved or "")
            if kept is None or len(kept) >= sizes[session.reserved or ""]:
                surplus.append(session)
            else:
                kept.append(session)
        for session in surplus:
            await self.store.write(lambda tx, s=session.id: steps.discard(tx, s))  # type: ignore[misc]
            self.scheduler.poke(session.id)
        starting = sum(session.status is not SessionStatus.READY for kept in found.values() for session in kept)
        for recipe in self._recipes.values():
            missing = recipe.size - len(found[recipe.key])
            now = time.monotonic()
            while missing > 0 and starting < _STARTING_AT_ONCE and now >= self._troubles[recipe.name].not_before:
                if self.owner.draining or not self.owner.memory.spare():
                    return
                await self._begin(recipe)
                missing, starting = missing - 1, starting + 1

    async def _begin(self, recipe: Recipe) -> None:
        def work(tx: abc.Transaction) -> Session:
            now = utc_now()
            session = Session(
                id=new_id(),
                number=tx.sessions.next_number(),
                owner="",
                status=SessionStatus.IDLE,
                spec=recipe.spec.model_dump(mode="json", exclude_none=True),
                cost_usd=0.0,
                created_at=now,
                last_active_at=now,
                reserved=recipe.key,
            )
            tx.sessions.add(session)
            return session

        session = await self.store.write(work)
        reached("pool.stored")
        self.scheduler.poke(session.id)

    async def states(self) -> dict[str, PoolState]:
        """How every pool does, by its name."""
        waiting = await self.store.read(lambda tx: list(tx.pools.waiting()))
        states = {}
        for name, recipe in self._recipes.items():
            mine = [session for session in waiting if session.reserved == recipe.key]
            warm = sum(session.status is SessionStatus.READY for session in mine)
            failure = self._troubles[name].failure
            states[name] = PoolState(wanted=recipe.size, warm=warm, starting=len(mine) - warm, failure=failure)
        return states

    def _heard(self, session: Session, failure: Failure | None) -> None:
        """One of a pool's is connected, or lost."""
        name = next((name for name, recipe in self._recipes.items() if recipe.key == session.reserved), None)
        if name is not None and failure is None:
            self._troubles[name].failure = None
        elif name is not None and failure is not None:
            again = self._troubles[name].add(failure)
            log.warning("pool.lost_one", pool=name, code=failure.code, again_in_seconds=again)
        self._poked.set()

    async def _repeat(self) -> None:
        while True:
            # Nobody tells of memory that has become free, or of a wait that is over.
            with contextlib.suppress(TimeoutError):
                # Not `wait_for`, which loses a cancellation that comes at the same moment.
                async with asyncio.timeout(_LOOK_SECONDS):
                    await self._poked.wait()
            self._poked.clear()
            await asyncio.sleep(max(0.0, self._taken_at + _AFTER_TAKING_SECONDS - time.monotonic()))
            try:
                await self.look()
            except Exception:
                # The store may be away for a while; who comes meanwhile starts cold.
                log.exception("pool.failed")
