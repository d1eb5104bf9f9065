"""Clones repositories of strangers into a folder that no agent can reach.

Git runs here as the session's user, in a place of its own, with a settings file of ours: no hooks, filters, helpers or
prompts, no submodules, no protocol but the one that is meant, no redirect, and no address but those that were checked. It is
bounded in time and in what it writes. A credential goes by its environment alone: it stands in no file and no argument.

Everything here blocks, and runs in a thread.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from carrel.errors import CloneFailed, FileTooLarge
from carrel.workspaces.files import WorkspaceFiles
from carrel.workspaces.git import Git, Ran, temporary_place

__all__ = ["CloneBounds", "Repository", "clone"]

Owner = tuple[int, int]

_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_ENTRIES_LOOK = 4.0
_SAID = (
    ("redirected", ("returned error: 30", "redirect")),
    (
        "authentication",
        ("Authentication failed", "could not read Username", "returned error: 401", "returned error: 403"),
    ),
    ("ref_not_found", ("Remote branch", "couldn't find remote ref", "not our ref", "Server does not allow request")),
    ("not_found", ("not found", "does not appear to be a git repository", "returned error: 404")),
    ("unreachable", ("Could not resolve", "Failed to connect", "Couldn't connect", "timed out", "unable to access")),
)
"""Why it failed, by what git and curl say in English, the first that fits."""


@dataclass(frozen=True, kw_only=True)
class Repository:
    """What is to be cloned."""

    url: str
    ref: str | None = None
    depth: int | None = None
    addresses: tuple[str, ...] = ()
    """Of its host: nothing else is connected to."""
    authorization: str | None = field(default=None, repr=False)
    """The value of the header that opens it."""


@dataclass(frozen=True, kw_only=True)
class CloneBounds:
    """How much a clone may take."""

    seconds: float
    bytes: int


def clone(
    repository: Repository,
    target: Path,
    owner: Owner | None,
    bounds: CloneBounds,
    *,
    cancelled: Callable[[], bool] = lambda: False,
) -> str | None:
    """Clone a repository into a folder that is not there yet and whose parent only we can write to.

    Args:
        repository: what, and what opens it.
        target: the folder; it is the owner's afterwards.
        owner: whose files they are, where we are root.
        bounds: of time and size.
        cancelled: asked again and again; true ends it with `timeout`.

    Returns:
        The commit that is checked out; None where the repository is empty.

    Raises:
        CloneFailed: it cannot be had; nothing is left at `target`.
    """
    with temporary_place(owner) as place:
        cloning = _Cloning(repository, place, owner, bounds, cancelled)
        commit = cloning.run()
        try:
            WorkspaceFiles(place / "work").copy_to(target, owner=owner, max_bytes=bounds.bytes)
        except FileTooLarge:
            raise CloneFailed("too_large") from None
        return commit


class _Cloning:
    """One clone under way."""

    def __init__(
        self,
        repository: Repository,
        place: Path,
        owner: Owner | None,
        bounds: CloneBounds,
        cancelled: Callable[[], bool],
    ) -> None:
        self._repository = repository
        self._place = place
        self._bounds = bounds
        self._cancelled = cancelled
        self._until = time.monotonic() + bounds.seconds
        self._look_at = 0.0
        self._too_large = False
        self._git = Git(
            place, owner, _variables(repository, place), seconds=bounds.seconds, settings=_settings(repository)
        )

    def run(self) -> str | None:
        """Clone and check out."""
        ref, url = self._repository.ref, self._repository.url
        depth = [] if self._repository.depth is None else [f"--depth={self._repository.depth}"]
        if ref is not None and _COMMIT.fullmatch(ref):
            self._do("init", "--quiet", "--template=", "work", cwd=self._place)
            work = self._place / "work"
            self._do("remote", "add", "origin", url, cwd=work)
            self._do("fetch", "--quiet", "--no-recurse-submodules", *depth, "origin", ref, cwd=work)
            self._do("checkout", "--quiet", "--detach", "FETCH_HEAD", cwd=work)
        else:
            branch = [] if ref is None else ["--branch", ref]
            what = ["--quiet", "--template=", "--no-recurse-submodules", *depth, *branch, "--", url, "work"]
            self._do("clone", *what, cwd=self._place)
        head = self._git.run("rev-parse", "--verify", "--quiet", "HEAD", cwd=self._place / "work")
        found = head.output.decode("ascii", "replace").strip()
        return found if head.code == 0 and _COMMIT.fullmatch(found) else None

    def _do(self, *arguments: str, cwd: Path) -> None:
        ran = self._git.run(*arguments, cwd=cwd, enough=self._enough)
        if ran.code != 0:
            raise CloneFailed(self._reason(ran), operator_detail=f"git {arguments[0]}: {ran.code} {ran.told[:2000]}")

    def _enough(self) -> bool:
        now = time.monotonic()
        if now >= self._until or self._cancelled():
            return True
        if now >= self._look_at:
            size = _size(self._place)
            # A tree that takes long to look at is looked at less often.
            self._look_at = now + max(0.5, _ENTRIES_LOOK * (time.monotonic() - now))
            self._too_large = size > 2 * self._bounds.bytes  # its objects, and its files
        return self._too_large

    def _reason(self, ran: Ran) -> str:
        if self._too_large or "File size limit exceeded" in ran.told:
            return "too_large"
        if time.monotonic() >= self._until or self._cancelled():
            return "timeout"
        return next((reason for reason, words in _SAID if any(word in ran.told for word in words)), "failed")


def _settings(repository: Repository) -> dict[str, str]:
    there = urlsplit(repository.url)
    settings = {
        f"protocol.{there.scheme}.allow": "always",
        "http.followRedirects": "false",
        "http.proxy": "",
        "http.emptyAuth": "false",
        "http.lowSpeedLimit": "1",
        "http.lowSpeedTime": "60",
        "credential.helper": "",
        "init.defaultBranch": "main",
        "advice.detachedHead": "false",
        "filter.lfs.process": "",
        "filter.lfs.smudge": "",
        "filter.lfs.required": "false",
    }
    if there.scheme == "file":
        return settings
    port = there.port or (443 if there.scheme == "https" else 80)
    addresses = ",".join(f"[{each}]" if ":" in each else each for each in repository.addresses)
    settings["http.curloptResolve"] = f"{there.hostname}:{port}:{addresses}"
    if repository.authorization is not None:
        settings[f"http.{there.scheme}://{there.netloc}/.extraHeader"] = f"Authorization: {repository.authorization}"
    return settings


def _variables(repository: Repository, place: Path) -> Mapping[str, str]:
    if not repository.url.startswith("file://"):
        return {}
    # What the operator has named is not the session's user's, and the side that serves it sees a settings file alone.
    trusting = place / "trusting"
    trusting.write_text("[safe]\n\tdirectory = *\n")
    trusting.chmod(0o644)
    return {"GIT_CONFIG_GLOBAL": str(trusting)}


def _size(place: Path) -> int:
    total = 0
    for path, _, files in os.walk(place):
        for name in files:
            try:
                total += os.lstat(os.path.join(path, name)).st_blocks * 512
            except FileNotFoundError:  # it has just been renamed or removed
                continue
    return total
