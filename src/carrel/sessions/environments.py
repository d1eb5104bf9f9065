"""Environments, for callers: written by admins, read and opened by those whom they admit."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError

from carrel import abc
from carrel.errors import (
    EnvironmentFixed,
    EnvironmentForbids,
    EnvironmentInUse,
    EnvironmentNotFound,
    EnvironmentStopped,
    SessionLimitReached,
    ValidationFailed,
)
from carrel.model import Budget, PermissionMode, Principal, RuleScope, Session, utc_now
from carrel.protocol.environments import DEFAULT_ENVIRONMENT, Environment, EnvironmentSpec, smaller_budget
from carrel.sessions.runtimes import Runtimes

__all__ = [
    "AS_SETTINGS_SAY",
    "Environments",
    "check_environment",
    "check_running",
    "environment_of",
    "environments_budget",
    "kept_environment",
    "open_environment",
    "spend_environment",
]

AS_SETTINGS_SAY: Final = Environment(
    name=DEFAULT_ENVIRONMENT, version=0, spec=EnvironmentSpec(), created_at=datetime(1970, 1, 1, tzinfo=UTC)
)
"""`default` before anybody has written it: it says nothing, and so the settings hold."""


class Environments:
    """Environments, with their versions."""

    def __init__(self, store: abc.Store, *, check: Callable[[EnvironmentSpec], None]) -> None:
        """Keep them in `store`. `check` raises ValidationFailed for what this installation cannot give."""
        self._store = store
        self._check = check

    async def put(self, principal: Principal, name: str, spec: EnvironmentSpec) -> tuple[Environment, bool]:
        """Write the next version; answers it, and whether it is new. The same content again makes none.

        Raises:
            ValidationFailed: this installation cannot give what it says.
        """
        self._check(spec)

        def work(tx: abc.Transaction) -> tuple[Environment, bool]:
            tx.lock(f"environment {name}")
            for use in spec.secrets:
                if tx.secrets.get(use.name) is None:
                    raise ValidationFailed(f"secrets: there is no secret {use.name}; set it first")
            newest = tx.environments.get(name)
            if newest is not None and newest.spec.digest == spec.digest:
                return newest, False
            made = Environment(
                name=name,
                version=1 if newest is None else newest.version + 1,
                spec=spec,
                created_at=utc_now(),
                created_by=principal.user,
            )
            tx.environments.add(made)
            return made, True

        return await self._store.write(work)

    async def get(self, principal: Principal, name: str, version: int | None = None) -> Environment:
        """A version of the environment, by default the newest. Raises EnvironmentNotFound."""
        return await self._store.read(lambda tx: open_environment(tx, principal, name, version))

    async def versions(self, principal: Principal, name: str) -> list[Environment]:
        """Every version of the environment that is kept, newest first. Raises EnvironmentNotFound."""

        def work(tx: abc.Transaction) -> list[Environment]:
            open_environment(tx, principal, name)
            return list(tx.environments.versions(name)) or [AS_SETTINGS_SAY]

        found = await self._store.read(work)
        return [each for each in found if each.spec.admits(principal)]

    async def page(self, principal: Principal, *, cursor: str | None, limit: int) -> abc.Page[Environment]:
        """The newest version of each that the caller may use, by name. Raises InvalidCursor."""

        def work(tx: abc.Transaction) -> abc.Page[Environment]:
            page = tx.environments.page(cursor=cursor, limit=limit)
            found = [each for each in page.items if each.spec.admits(principal)]
            if cursor is None and tx.environments.get(DEFAULT_ENVIRONMENT) is None:
                found.insert(0, AS_SETTINGS_SAY)
            return abc.Page(found, page.next_cursor)

        return await self._store.read(work)

    async def delete(self, name: str) -> None:
        """Delete the environment with all of its versions.

        Raises:
            EnvironmentNotFound: there is none.
            EnvironmentFixed: it is `default`.
            EnvironmentInUse: sessions are in it.
        """

        def work(tx: abc.Transaction) -> None:
            tx.lock(f"environment {name}")
            if name == DEFAULT_ENVIRONMENT:
                raise EnvironmentFixed
            if tx.environments.get(name) is None:
                raise EnvironmentNotFound
            sessions = tx.environments.sessions(name)
            if sessions:
                raise EnvironmentInUse(sessions=sessions)
            tx.rules.forget(RuleScope.ENVIRONMENT, name)
            tx.environments.remove(name)

        await self._store.write(work)


def check_environment(
    spec: EnvironmentSpec, runtimes: Runtimes, *, allow_bypass: bool, metered: bool, allow_open: bool = True
) -> None:
    """Look whether this installation can give what an environment says.

    Args:
        spec: what it says.
        runtimes: those that there are.
        allow_bypass: whether agents may act without asking.
        metered: whether budgets hold.
        allow_open: whether agents may reach everything; not where anyone who reaches this server may drive it.

    Raises:
        ValidationFailed: it cannot; the message says what.
    """
    if spec.runtime is not None and spec.runtime not in runtimes.names:
        raise ValidationFailed(f"runtime: there is no {spec.runtime} on this server, but {', '.join(runtimes.names)}")
    runtimes.named(spec.runtime).check(spec.sandbox)
    _check_schemas(spec)
    for folder in spec.sandbox.plugins or ():
        if "\0" in folder or not Path(folder, ".claude-plugin", "plugin.json").is_file():
            raise ValidationFailed(f"sandbox.plugins: {folder!r} is no folder with a .claude-plugin/plugin.json")
    if spec.options.permission_mode is PermissionMode.BYPASS and not allow_bypass:
        raise ValidationFailed("options.permission_mode: bypassPermissions is refused where sandboxes are not isolated")
    network = spec.sandbox.network
    if network is not None and network.mode == "open" and not allow_open:
        raise ValidationFailed("sandbox.network: open would let an agent drive this server, which wants no key")
    budget = spec.limits.session_budget
    if budget is not None and not budget.unlimited and not metered:
        raise ValidationFailed("limits.session_budget: none can hold, since agents ask the model's provider themselves")


def _check_schemas(spec: EnvironmentSpec) -> None:
    for tool in spec.custom_tools:
        try:
            Draft202012Validator.check_schema(tool.input_schema)
        except SchemaError as error:
            raise ValidationFailed(
                f"custom_tools.{tool.name}.input_schema: {error.json_path}: {error.message}"[:500]
            ) from None


def check_running(tx: abc.Transaction, name: str) -> None:
    """Make sure that the environment takes prompts. Raises EnvironmentStopped."""
    if name in tx.environments.stopped():
        raise EnvironmentStopped


def kept_environment(tx: abc.Transaction, session: Session) -> Environment | None:
    """The version that the session keeps; None where it is gone, as in rows from elsewhere."""
    if session.environment_version == 0:
        return AS_SETTINGS_SAY
    return tx.environments.get(session.environment, session.environment_version)


def environment_of(tx: abc.Transaction, session: Session) -> Environment:
    """The version that the session keeps. Raises EnvironmentNotFound."""
    found = kept_environment(tx, session)
    if found is None:
        raise EnvironmentNotFound
    return found


def open_environment(tx: abc.Transaction, principal: Principal, name: str, version: int | None = None) -> Environment:
    """A version of the environment, if the caller may use it; the newest by default. Raises EnvironmentNotFound."""
    newest = tx.environments.get(name)
    if newest is None and name == DEFAULT_ENVIRONMENT:
        newest = AS_SETTINGS_SAY
    # The newest version says who may use any: so that who is shut out is not let in by an older one.
    if newest is None or not newest.spec.admits(principal):
        raise EnvironmentNotFound
    if version is None or version == newest.version:
        return newest
    if version == 0 and name == DEFAULT_ENVIRONMENT:
        return AS_SETTINGS_SAY
    found = tx.environments.get(name, version)
    if found is None:
        raise EnvironmentNotFound
    return found


def spend_environment(tx: abc.Transaction, environment: Environment, owner: str) -> None:
    """Make sure that there is room for one more session of this owner's in it, until the transaction ends.

    Raises:
        SessionLimitReached: there is none.
    """
    if environment.version == 0:
        return
    tx.lock(f"environment {environment.name}")
    if tx.environments.get(environment.name, environment.version) is None:
        raise EnvironmentNotFound
    limits = environment.spec.limits
    of_user, in_all = limits.max_sessions_per_user, limits.max_sessions
    if of_user is not None and tx.environments.sessions(environment.name, owner) >= of_user:
        raise SessionLimitReached(of_user, of_user=True)
    if in_all is not None and tx.environments.sessions(environment.name) >= in_all:
        raise SessionLimitReached(in_all, of_user=False)


def environments_budget(environment: Environment, wish: Budget | None, *, given: bool = True) -> Budget | None:
    """What a session of the environment may spend in all.

    Args:
        environment: the version that it keeps.
        wish: what it is to have, where its environment lets it.
        given: whether somebody asks for it now; otherwise more than it may have becomes what it may have.

    Raises:
        EnvironmentForbids: it is given more than its environment lets it have.
    """
    most = environment.spec.limits.session_budget
    both = smaller_budget(wish, most)
    if given and wish is not None and both is not None and _more(wish, both):
        raise EnvironmentForbids(f"budget: the environment {environment.name} lets a session have less.")
    return both


def _more(wish: Budget, least: Budget) -> bool:
    return any(
        getattr(wish, kind) is not None and getattr(wish, kind) != getattr(least, kind) for kind in Budget.model_fields
    )
