"""Environments as things that run: started, stopped, asked how they do."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from carrel import abc
from carrel.errors import CarrelError, McpServerMissing, McpServerUnreachable
from carrel.model import Failure, Principal
from carrel.protocol.environments import CUSTOM_SERVER, Environment, EnvironmentSpec, EnvironmentStatus
from carrel.sessions.environments import open_environment
from carrel.sessions.pool import Pool
from carrel.sessions.runtimes import Runtimes
from carrel.sessions.scheduler import Scheduler

__all__ = ["EnvironmentLife"]


class EnvironmentLife:
    """Starts and stops environments. That one is stopped is a row; whether it does well is looked at when it is asked."""

    def __init__(
        self,
        store: abc.Store,
        pool: Pool,
        runtimes: Runtimes,
        scheduler: Scheduler,
        *,
        check_model: Callable[[str], Awaitable[object]],
        check_environment: Callable[[Environment], object],
        check_secrets: Callable[[EnvironmentSpec], Awaitable[object]],
        check_server: Callable[[EnvironmentSpec, str], Awaitable[CarrelError | None]],
        reachable: Callable[[str], Awaitable[bool]],
        mcp_servers: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """Make it.

        Args:
            store: the rows.
            pool: filled when an environment is started, emptied when it is stopped.
            runtimes: know which commands there are in a sandbox.
            scheduler: has sessions looked at.
            check_model: raises a CarrelError while no turn of this environment could reach the model.
            check_environment: raises a CarrelError for what this installation cannot give.
            check_secrets: raises SecretMissing for a secret of the environment that cannot be had.
            check_server: what is wrong with an MCP server that the gateway answers for.
            reachable: whether anything answers at this address.
            mcp_servers: those of every environment.
        """
        self._store = store
        self._pool = pool
        self._runtimes = runtimes
        self._scheduler = scheduler
        self._check_model = check_model
        self._check_environment = check_environment
        self._check_secrets = check_secrets
        self._check_server = check_server
        self._reachable = reachable
        self._mcp_servers = mcp_servers

    async def start(self, principal: Principal, name: str) -> EnvironmentStatus:
        """Have the environment take prompts, and its pool be filled. Raises EnvironmentNotFound."""
        return await self._set(principal, name, stopped=False)

    async def stop(self, principal: Principal, name: str) -> EnvironmentStatus:
        """Have it take no more prompts. Those it has taken are answered; its sandboxes go when they have nothing to do.

        Raises:
            EnvironmentNotFound: there is none.
        """
        return await self._set(principal, name, stopped=True)

    async def _set(self, principal: Principal, name: str, *, stopped: bool) -> EnvironmentStatus:
        def work(tx: abc.Transaction) -> Sequence[str]:
            open_environment(tx, principal, name)
            tx.environments.set_stopped(name, stopped)
            return tx.environments.with_sandbox(name)

        for session_id in await self._store.write(work):
            self._scheduler.poke(session_id)
        self._pool.poke()
        return await self.status(principal, name)

    async def status(self, principal: Principal, name: str) -> EnvironmentStatus:
        """How the environment does, as it is now. Raises EnvironmentNotFound."""

        def work(tx: abc.Transaction) -> tuple[Environment, bool, int, int]:
            environment = open_environment(tx, principal, name)
            running = name not in tx.environments.stopped()
            live = len(tx.environments.with_sandbox(name))
            return environment, running, tx.environments.sessions(name), live

        environment, running, sessions, live = await self._store.read(work)
        pool = await self._pool.state(name)
        problems = await self._problems(environment)
        if pool.failure is not None and pool.failure not in problems:
            problems.append(pool.failure)
        return EnvironmentStatus(
            name=name,
            version=environment.version,
            running=running,
            warm_wanted=pool.wanted,
            warm=pool.warm,
            starting=pool.starting,
            sessions=sessions,
            live_sessions=live,
            problems=problems,
        )

    async def _problems(self, environment: Environment) -> list[Failure]:
        """Whatever would keep a session of this environment from working as it should, as far as it can be seen."""
        problems = []
        try:
            await self._check_model(environment.name)
        except CarrelError as error:
            problems.append(_told(error))
        try:
            self._check_environment(environment)
        except CarrelError as error:
            problems.append(_told(error))
        if environment.spec.runtime in (None, *self._runtimes.names):
            lacking = await self._runtimes.named(environment.spec.runtime).lacks(environment.spec.sandbox)
            if lacking is not None:
                problems.append(_told(lacking))
        try:
            await self._check_secrets(environment.spec)
        except CarrelError as error:
            problems.append(_told(error))
        servers = dict(self._mcp_servers) | (environment.spec.options.mcp_servers or {})
        servers |= {
            f"{CUSTOM_SERVER}.{tool.name}": {"type": "http", "url": tool.url} for tool in environment.spec.custom_tools
        }
        found = await asyncio.gather(*(self._server(environment, name, server) for name, server in servers.items()))
        for problem in found:
            if problem is not None and problem not in problems:
                problems.append(problem)
        return problems

    async def _server(self, environment: Environment, name: str, server: Mapping[str, Any]) -> Failure | None:
        if name in environment.spec.gateway_servers:
            problem = await self._check_server(environment.spec, name)
            return None if problem is None else _told(problem)
        if server.get("type", "stdio") != "stdio":
            return None if await self._reachable(server["url"]) else _told(McpServerUnreachable(name))
        if environment.spec.runtime not in (None, *self._runtimes.names):
            return None
        runtime = self._runtimes.named(environment.spec.runtime)
        return _told(McpServerMissing(name)) if runtime.finds(server["command"]) is False else None


def _told(error: CarrelError) -> Failure:
    return Failure(code=error.code, message=error.message)
