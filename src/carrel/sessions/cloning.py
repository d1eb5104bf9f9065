"""Workspaces that begin with a clone of a git repository: what may be cloned, with what, and that it is done."""

from __future__ import annotations

import asyncio
import threading
from base64 import b64encode
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import structlog

from carrel import abc, hostnames
from carrel.errors import CloneFailed, EnvironmentForbids
from carrel.model import Session, Workspace
from carrel.protocol.environments import EnvironmentSpec
from carrel.protocol.events import WorkspaceCloned
from carrel.sessions.environments import environment_of
from carrel.workspaces.clones import CloneBounds, Repository, clone
from carrel.workspaces.folders import Folders

__all__ = ["CloneRules", "Cloner"]

log = structlog.get_logger(__name__)

_AT_ONCE = 4
_NAME_OF_TOKENS = "x-access-token"

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""From a name and a port to the addresses that may be connected to. Raises CloneFailed."""


async def _nowhere(host: str, port: int) -> Sequence[str]:
    raise CloneFailed("forbidden")


async def _no_secrets(spec: EnvironmentSpec, names: Collection[str]) -> Mapping[str, str]:
    raise CloneFailed("authentication")


@dataclass(frozen=True, kw_only=True)
class CloneRules:
    """What may be cloned."""

    protocols: frozenset[str] = frozenset()
    """`https`, `http`."""
    folders: tuple[Path, ...] = ()
    """Below these `file://` is allowed."""
    bounds: CloneBounds = field(default_factory=lambda: CloneBounds(seconds=300.0, bytes=4 * 2**30))
    resolve: Resolve = _nowhere
    secrets: Callable[[EnvironmentSpec, Collection[str]], Awaitable[Mapping[str, str]]] = _no_secrets
    """The values of these secrets of an environment, by their names. Raises SecretMissing."""


class Cloner:
    """Clones repositories into workspaces that are not there yet."""

    def __init__(self, store: abc.Store, folders: Folders, rules: CloneRules) -> None:
        """Clone what `rules` allow into `folders`."""
        self._store = store
        self._folders = folders
        self._rules = rules
        self._places = asyncio.Semaphore(_AT_ONCE)
        # Threads of its own: hosts that are slow must hold up nobody but those who clone.
        self._threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="clone")

    def close(self) -> None:
        """Clone nothing any more. Nobody may be at it."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def check(self, environment: str, spec: EnvironmentSpec, workspace: Workspace) -> None:
        """Look whether sessions of an environment may have this workspace.

        Raises:
            CloneFailed: this server does not clone from there.
            EnvironmentForbids: the environment does not have its credential sent there.
        """
        if workspace.repo is None:
            return
        self._check_place(workspace.repo)
        if workspace.credential is None:
            return
        host, port = _host(workspace.repo)
        for use in spec.secrets:
            if use.name == workspace.credential and hostnames.permits(use.git_hosts, host, port):
                return
        raise EnvironmentForbids(
            f"workspace.credential: the environment {environment} has no secret {workspace.credential} for {host}; an "
            "admin names the host in its git_hosts."
        )

    def _check_place(self, repo: str) -> None:
        there = urlsplit(repo)
        if there.scheme != "file":
            _host(repo)
            if there.scheme not in self._rules.protocols:
                raise CloneFailed("forbidden")
            return
        path = Path(there.path).resolve()
        if not any(path.is_relative_to(folder.resolve()) for folder in self._rules.folders):
            raise CloneFailed("forbidden")

    async def clone(self, session: Session) -> WorkspaceCloned:
        """Put a clone beside the session's folder, ready to take its place.

        Raises:
            CloneFailed, SecretMissing: it cannot be had now; it can be tried again.
            EnvironmentForbids: its environment does not have the credential sent there any more.
        """
        workspace = session.workspace
        assert workspace.repo is not None
        environment = await self._store.read(lambda tx: environment_of(tx, session))
        self.check(environment.name, environment.spec, workspace)
        try:
            repository = await self._repository(environment.spec, workspace)
            async with self._places:  # before the threads: who waits here can still be called off
                commit = await self._run(session, repository)
        except CloneFailed as error:
            reason, detail = error.context["reason"], error.operator_detail
            log.warning("workspace.not_cloned", session=session.id, reason=reason, detail=detail)
            raise
        log.info("workspace.cloned", session=session.id, commit=commit)
        return WorkspaceCloned(repo=workspace.repo, ref=workspace.ref, commit=commit)

    async def _repository(self, spec: EnvironmentSpec, workspace: Workspace) -> Repository:
        repo = workspace.repo or ""
        there = urlsplit(repo)
        addresses: tuple[str, ...] = ()
        authorization: str | None = None
        if there.scheme == "file":
            repo = f"file://{Path(there.path).resolve()}"
        else:
            addresses = tuple(await self._rules.resolve(*_host(repo)))
        if workspace.credential is not None:
            given = (await self._rules.secrets(spec, [workspace.credential]))[workspace.credential]
            name_and_password = given if ":" in given else f"{_NAME_OF_TOKENS}:{given}"
            authorization = f"Basic {b64encode(name_and_password.encode()).decode()}"
        return Repository(
            url=repo, ref=workspace.ref, depth=workspace.depth, addresses=addresses, authorization=authorization
        )

    async def _run(self, session: Session, repository: Repository) -> str | None:
        over = threading.Event()

        def work() -> str | None:
            self._folders.clear_staged(session)
            target, owner = self._folders.staged(session), self._folders.owner(session)
            return clone(repository, target, owner, self._rules.bounds, cancelled=over.is_set)

        working = asyncio.get_running_loop().run_in_executor(self._threads, work)
        try:
            return await asyncio.shield(working)
        except asyncio.CancelledError:
            over.set()
            await asyncio.wait({working})
            raise


def _host(repo: str) -> tuple[str, int]:
    """The host in its one form, and the port. Raises CloneFailed for what is no name."""
    there = urlsplit(repo)
    try:
        host = hostnames.canonical_host(there.hostname or "")
        port = there.port or (443 if there.scheme == "https" else 80)
    except ValueError:
        raise CloneFailed("forbidden") from None
    if not 0 < port < 65536:
        raise CloneFailed("forbidden")
    return host, port
