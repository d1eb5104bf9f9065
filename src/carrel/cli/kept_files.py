"""Where the files of sessions are kept: the object store, the keeper, and what callers see of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import timedelta

from carrel import abc
from carrel.cli.objects import objects_of
from carrel.egress import Dialler, Judge, NotDialled
from carrel.errors import CloneFailed
from carrel.sessions.cloning import Cloner, CloneRules
from carrel.sessions.keeper import Keeper
from carrel.sessions.secrets import Secrets
from carrel.sessions.vault import SnapshotVault
from carrel.settings import Settings
from carrel.workspaces import Folders, KeepRules
from carrel.workspaces.clones import CloneBounds
from carrel.workspaces.snapshots import Snapshots

__all__ = ["KeptFiles"]


@dataclass(frozen=True)
class KeptFiles:
    """The parts that keep files."""

    objects: abc.ObjectStore
    vault: SnapshotVault
    keeper: Keeper

    @classmethod
    async def open(
        cls,
        settings: Settings,
        store: abc.Store,
        folders: Folders,
        poke: Callable[[str], None],
        stack: AsyncExitStack,
        *,
        secrets: Secrets,
    ) -> KeptFiles:
        """Make them; the keeper does nothing before it is started."""
        objects = objects_of(settings)
        await objects.start(stack)
        wanted = settings.snapshots
        snapshots = Snapshots(objects, max_bytes=wanted.max_mb * 2**20, ignored=wanted.ignored)
        vault = SnapshotVault(objects, snapshots, folders)
        keeper = Keeper(
            store,
            folders,
            vault if wanted.enabled else None,
            poke,
            run_blocking=asyncio.to_thread,
            cloner=Cloner(store, folders, await _clone_rules(settings, stack, secrets)),
            rules=KeepRules(
                last=wanted.keep,
                max_age=None if wanted.keep_days is None else timedelta(days=wanted.keep_days),
                max_bytes=_bytes(wanted.keep_mb),
                max_bytes_of_user=_bytes(wanted.keep_mb_per_user),
            ),
        )
        return cls(objects, vault, keeper)


async def _clone_rules(settings: Settings, stack: AsyncExitStack, secrets: Secrets) -> CloneRules:
    git = settings.git
    dialler = Dialler(Judge(git.private_networks))
    await dialler.start(stack)

    async def resolve(host: str, port: int) -> list[str]:
        try:
            return await dialler.addresses(host, port)
        except NotDialled as error:
            raise CloneFailed(error.reason) from None

    return CloneRules(
        protocols=frozenset(git.protocols),
        folders=tuple(git.folders),
        bounds=CloneBounds(seconds=git.timeout_seconds, bytes=git.max_mb * 2**20),
        resolve=resolve,
        secrets=secrets.opened,
    )


def _bytes(mb: int | None) -> int | None:
    return None if mb is None else mb * 2**20
