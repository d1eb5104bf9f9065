"""Warm pools: sandboxes with a connected agent that wait for sessions which are not made yet.

Each belongs to a session that is nobody's: it has its id, its number, its folders and its tokens from the start, is
launched and bound by its owner's steps as any other, and is hidden from every caller, list and count. Making a session
takes one in the transaction that counts limits: from there on it is somebody's, and its events begin. So nothing is
moved when a session is made, no two ever get the same, and nothing can be half taken.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import structlog
from pydantic_core import to_json

from carrel import abc
from carrel.killpoints import reached
from carrel.model import Failure, PermissionMode, Session, SessionStatus, Workspace, new_id, utc_now
from carrel.protocol.environments import DEFAULT_ENVIRONMENT, Environment
from carrel.protocol.events import SessionCreated
from carrel.protocol.spec import LIVE_FIELDS, SessionSpec
from carrel.sessions import steps, transitions
from carrel.sessions.environments import AS_SETTINGS_SAY
from carrel.sessions.narrowing import agents_options
from carrel.sessions.owner import Owner
from carrel.sessions.scheduler import Scheduler

__all__ = ["Pool", "PoolState", "Recipe", "Recipes", "why_cold"]

log = structlog.get_logger(__name__)

_LOOK_SECONDS = 1.0
_MOST_ENVIRONMENTS = 1000
_STARTING_AT_ONCE = 2
_AFTER_TAKING_SECONDS = 0.25
"""The turn that is about to begin needs the processor more than the sandbox that is to fill the gap."""
_FIRST_BACKOFF_SECONDS = 1.0
_LONGEST_BACKOFF_SECONDS = 60.0
_CALM_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What the sandboxes of one pool are launched with, and how many of them wait."""

    environment: Environment
    size: int
    spec: SessionSpec
    """The options in the row of a session whose creator names none."""
    permission_mode: PermissionMode | None
    """What its agents are launched with; None: what is usual for their runtime."""

    @property
    def name(self) -> str:
        """Of which environment it is the pool."""
        return self.environment.name

    @property
    def key(self) -> str:
        """The pool's name in the rows: another one for another version or other options."""
        digest = sha256(to_json([self.name, self.environment.version, self.environment.spec.digest, self.spec]))
        return f"{self.name[:40]}:{digest.hexdigest()[:20]}"


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """Which pools there are: one for each environment that wants one, in its newest version."""

    defaults: SessionSpec = field(default_factory=SessionSpec)
    """What the settings say of agents."""
    default_size: int = 0
    """How many wait for `default`, while nobody has written that."""

    def of(self, environment: Environment) -> Recipe:
        """The pool of a version of an environment."""
        spec, written = environment.spec, environment.version > 0
        return Recipe(
            environment=environment,
            size=spec.warm_pool if written else self.default_size,
            spec=SessionSpec() if written else self.defaults,
            permission_mode=agents_options(spec, SessionSpec(), self.defaults).permission_mode,
        )

    def all(self, tx: abc.Transaction) -> list[Recipe]:
        """Every pool that is wanted now."""
        newest = list(tx.environments.page(cursor=None, limit=_MOST_ENVIRONMENTS).items)
        if DEFAULT_ENVIRONMENT not in {each.name for each in newest}:
            newest.append(AS_SETTINGS_SAY)
        stopped = tx.environments.stopped()
        recipes = [self.of(environment) for environment in newest if environment.name not in stopped]
        return [recipe for recipe in recipes if recipe.size > 0]


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
        spec: the options in the session's row.
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
    if spec.permission_mode is PermissionMode.BYPASS and recipe.permission_mode not in bypasses:
        return "bypassPermissions is for agents that were launched with it"
    return None


class Pool:
    """Keeps every pool filled, and gives of them."""

    def __init__(
        self,
        store: abc.Store,
        owner: Owner,
        scheduler: Scheduler,
        recipes: Recipes,
        *,
        shows_config: Callable[[str], bool],
        run_blocking: Callable[..., Any],
    ) -> None:
        """Make it; nothing is filled before `start`.

        Args:
            store: the rows.
            owner: launches what is begun.
            scheduler: has sessions looked at.
            recipes: which pools there are.
            shows_config: whether a user has set up anything that each agent of theirs is shown; looks at the disk.
            run_blocking: runs a function that waits for the disk in another thread.
        """
        self._store = store
        self._owner = owner
        self._scheduler = scheduler
        self.recipes = recipes
        self._shows_config = shows_config
        self._run_blocking = run_blocking
        self._wanted: list[Recipe] = []
        self._troubles: dict[str, _Trouble] = defaultdict(_Trouble)
        self._poked = asyncio.Event()
        self._taken_at = 0.0

    def poke(self) -> None:
        """Have every pool looked at soon."""
        self._poked.set()

    async def forget(self) -> None:
        """Throw away whatever an earlier life of the gateway has left; its settings may have been others."""

        def work(tx: abc.Transaction) -> None:
            for session in tx.pools.waiting():
                steps.discard(tx, session.id)

        await self._store.write(work)

    async def start(self, exit_stack: AsyncExitStack) -> None:
        """Fill the pools from now on; closing is registered with `exit_stack`."""
        self._owner.heard_of_pool = self._heard
        task = asyncio.create_task(self._repeat(), name="pool")

        async def close() -> None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        exit_stack.push_async_callback(close)

    # -------------------------------------------------------------------------------------------------------- taking

    async def shows(self, user: str) -> bool:
        """Whether the user has set up anything that each agent of theirs is shown; asked before `take`."""
        return bool(self._wanted) and bool(await self._run_blocking(self._shows_config, user))

    def take(
        self, tx: abc.Transaction, environment: Environment, wanted: Session, *, user_config: bool
    ) -> Session | None:
        """Make a waiting session the one that is wanted; None where it is to start cold.

        Args:
            tx: counts limits too.
            environment: the version that the session is to be in.
            wanted: the session as it would be stored if it started cold; its id is given up.
            user_config: what `shows` has answered.
        """
        recipe = self.recipes.of(environment)
        if recipe.size == 0 or self._owner.draining:
            return None
        if (
            why_cold(recipe, SessionSpec.model_validate(wanted.spec), wanted.workspace, user_config=user_config)
            is not None
        ):
            return None
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
        await self._owner.apply_live_options(session.id)
        self._scheduler.poke(session.id)

    # ------------------------------------------------------------------------------------------------------- filling

    async def look(self) -> None:
        """Look once at every pool: throw away what is not wanted, and begin what is missing."""
        waiting, self._wanted = await self._store.read(lambda tx: (list(tx.pools.waiting()), self.recipes.all(tx)))
        found: dict[str, list[Session]] = {recipe.key: [] for recipe in self._wanted}
        surplus = []
        sizes = {recipe.key: recipe.size for recipe in self._wanted}
        for session in waiting:
            kept = found.get(session.reserved or "")
            if kept is None or len(kept) >= sizes[session.reserved or ""]:
                surplus.append(session)
            else:
                kept.append(session)
        for session in surplus:
            await self._store.write(lambda tx, s=session.id: steps.discard(tx, s))  # type: ignore[misc]
            self._scheduler.poke(session.id)
        starting = sum(session.status is not SessionStatus.READY for kept in found.values() for session in kept)
        for recipe in self._wanted:
            missing = recipe.size - len(found[recipe.key])
            now = time.monotonic()
            while missing > 0 and starting < _STARTING_AT_ONCE and now >= self._troubles[recipe.name].not_before:
                if self._owner.draining or not self._owner.memory.spare():
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
                environment=recipe.environment.name,
                environment_version=recipe.environment.version,
                cost_usd=0.0,
                created_at=now,
                last_active_at=now,
                reserved=recipe.key,
            )
            tx.sessions.add(session)
            return session

        session = await self._store.write(work)
        reached("pool.stored")
        self._scheduler.poke(session.id)

    async def state(self, name: str) -> PoolState:
        """How the pool of an environment does."""
        waiting, recipes = await self._store.read(lambda tx: (list(tx.pools.waiting()), self.recipes.all(tx)))
        recipe = next((each for each in recipes if each.name == name), None)
        if recipe is None:
            return PoolState()
        mine = [session for session in waiting if session.reserved == recipe.key]
        warm = sum(session.status is SessionStatus.READY for session in mine)
        failure = self._troubles[name].failure
        return PoolState(wanted=recipe.size, warm=warm, starting=len(mine) - warm, failure=failure)

    def _heard(self, session: Session, failure: Failure | None) -> None:
        """One of a pool's is connected, or lost."""
        trouble = self._troubles[session.environment]
        if failure is None:
            trouble.failure = None
        else:
            again = trouble.add(failure)
            log.warning("pool.lost_one", environment=session.environment, code=failure.code, again_in_seconds=again)
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
