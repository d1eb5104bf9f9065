"""Patches of whole workspaces: what has changed between two, and doing the same to a third.

git makes and applies them, as everywhere here never in a workspace itself: on copies that no agent can reach. So a patch
has new files and binary ones in it, and links as links; repositories' own folders (`.git`) and empty folders are in none.
What is changed in a workspace is written by `WorkspaceFiles`, after all of it was found to fit.

Everything here blocks, and runs in a thread.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from carrel.errors import CarrelError, FileNotFound, FileTooLarge, NoPatch, PatchConflict
from carrel.workspaces.descriptors import lstat, translated
from carrel.workspaces.files import WorkspaceFiles
from carrel.workspaces.git import Git, Owner, give, temporary_place
from carrel.workspaces.paths import parse_new

__all__ = ["apply_patch", "make_patch"]

_MOST_BYTES = 2**30
_MOST_PATCH_BYTES = 64 * 2**20
_MOST_LIST_BYTES = 16 * 2**20
_SECONDS = 120
_FLAGS = ("--binary", "--no-prefix", "--no-renames", "--no-color", "--no-ext-diff", "--no-textconv")
_TOLD = re.compile(r"^error: (?:patch failed: (?P<failed>.*):\d+|(?P<other>.*?): .*)$", re.MULTILINE)
_CHUNK = 1 << 20


def make_patch(base: WorkspaceFiles, files: WorkspaceFiles, owner: Owner | None) -> bytes:
    """What turns `base` into `files`, in git's words; nothing where they are the same.

    Raises:
        FileTooLarge: there is too much in them, or in the patch.
        NoPatch: git could not make one.
    """
    with temporary_place(owner) as place:
        for name, each in (("a", base), ("b", files)):
            each.copy_to(place / name, owner=owner, max_bytes=_MOST_BYTES)
            _forget_repositories(place / name)
        git = Git(place, owner, {"GIT_CEILING_DIRECTORIES": str(place)}, seconds=_SECONDS)
        made = git.run("diff", "--no-index", *_FLAGS, "a", "b", cwd=place, most_bytes=_MOST_PATCH_BYTES + 1)
        if len(made.output) > _MOST_PATCH_BYTES:
            raise FileTooLarge(_MOST_PATCH_BYTES)
        if made.code not in (0, 1):
            raise NoPatch(operator_detail=f"{made.code} {made.told}")
        return made.output


def apply_patch(patch: bytes, target: WorkspaceFiles, owner: Owner | None) -> list[str]:
    """Do to a workspace what a patch says: all of it, or nothing. Answers the paths that have changed, sorted.

    Raises:
        PatchConflict: it does not fit; nothing was changed.
    """
    if not patch:
        return []
    with temporary_place(owner) as place:
        (place / "patch").write_bytes(patch)
        work = place / "work"
        work.mkdir()
        give(place, owner)
        git = Git(place, owner, {"GIT_CEILING_DIRECTORIES": str(place)}, seconds=_SECONDS)
        paths = _paths(git, work)
        before = {path: _found(target, path) for path in paths}
        for path, found in before.items():
            _lay_out(target, path, found, work)
        give(work, owner)
        applied = git.run("apply", "--whitespace=nowarn", "../patch", cwd=work)
        if applied.code != 0:
            raise PatchConflict(_blamed(applied.told, paths))
        after = {path: _result(work / path) for path in paths}
        changed = [path for path in paths if after[path] != before[path]]
        # Its agent may be at work: what it has changed meanwhile is not written over.
        if moved := [path for path in changed if _found(target, path) != before[path]]:
            raise PatchConflict(moved)
        for path in sorted(changed, key=lambda each: after[each] is not None):  # a folder may take a file's place
            _put(target, path, before[path], after[path], work / path, owner)
    return sorted(changed)


@dataclass(frozen=True)
class _Entry:
    """What stands at a path."""

    link: str | None
    """Where it leads, of a symbolic link."""
    digest: str | None
    executable: bool


def _paths(git: Git, work: Path) -> list[str]:
    listed = git.run("apply", "--numstat", "-z", "../patch", cwd=work, most_bytes=_MOST_LIST_BYTES)
    if listed.code != 0:
        raise NoPatch(operator_detail=f"{listed.code} {listed.told}")
    paths = [os.fsdecode(line.split(b"\t", 2)[2]) for line in listed.output.split(b"\0") if line]
    for path in paths:
        parse_new(path)
    return paths


def _found(target: WorkspaceFiles, path: str) -> _Entry | None:
    """What stands at a path of the workspace; None: nothing."""
    try:
        entry = target.stat(path)
    except FileNotFound:
        return None
    except CarrelError:  # a link, or something else that is no folder, stands above it
        raise PatchConflict([path]) from None
    if entry.type == "symlink":
        return _Entry(_link(target, path), None, False)
    if entry.type != "file":
        raise PatchConflict([path])
    with target.open_read(path) as file:
        digest = sha256()
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return _Entry(None, digest.hexdigest(), bool(entry.mode & stat.S_IXUSR))


def _link(target: WorkspaceFiles, path: str) -> str:
    names = parse_new(path)
    with target.opened(names[:-1], path) as directory, translated(path):
        return os.fsdecode(os.readlink(names[-1], dir_fd=directory))


def _lay_out(target: WorkspaceFiles, path: str, found: _Entry | None, work: Path) -> None:
    """Copy one file to where the patch is applied."""
    if found is None:
        return
    place = work / path
    place.parent.mkdir(parents=True, exist_ok=True)
    if found.link is not None:
        place.symlink_to(found.link)
        return
    with target.open_read(path) as source, place.open("wb") as copy:
        shutil.copyfileobj(source, copy)
    place.chmod(0o755 if found.executable else 0o644)


def _result(place: Path) -> _Entry | None:
    """What the patch has made of a path, in a folder that nobody changes any more."""
    try:
        found = place.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if stat.S_ISLNK(found.st_mode):
        return _Entry(os.readlink(place), None, False)
    if not stat.S_ISREG(found.st_mode):
        return None
    digest = sha256()
    with place.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return _Entry(None, digest.hexdigest(), bool(found.st_mode & stat.S_IXUSR))


def _put(
    target: WorkspaceFiles, path: str, before: _Entry | None, after: _Entry | None, place: Path, owner: Owner | None
) -> None:
    same_kind = (
        before is not None
        and after is not None
        and before.link is None
        and after.link is None
        and before.executable == after.executable
    )
    if before is not None and not same_kind:
        target.delete(path)
    if after is None:
        return
    if after.link is not None:
        _put_link(target, path, after.link, owner)
        return
    with place.open("rb") as file:
        target.write(path, iter(lambda: file.read(_CHUNK), b""), mode=0o755 if after.executable else 0o644)


def _put_link(target: WorkspaceFiles, path: str, leads_to: str, owner: Owner | None) -> None:
    names = parse_new(path)
    with target.opened(names[:-1], path, create=True) as directory, translated(path):
        temporary = b".carrel-%s.tmp" % secrets.token_hex(8).encode()
        os.symlink(os.fsencode(leads_to), temporary, dir_fd=directory)
        if owner is not None and os.geteuid() == 0 and stat.S_ISLNK(lstat(temporary, directory).st_mode):
            os.chown(temporary, *owner, dir_fd=directory, follow_symlinks=False)
        os.rename(temporary, names[-1], src_dir_fd=directory, dst_dir_fd=directory)


def _blamed(told: str, paths: list[str]) -> list[str]:
    """The paths that git says it could not change; all, where it does not say."""
    named = [match["failed"] or match["other"] for match in _TOLD.finditer(told)]
    return sorted({name for name in named if name in set(paths)}) or sorted(paths)


def _forget_repositories(root: Path) -> None:
    """Commits are brought back by git itself; what is in the folder `.git` fits no other repository."""
    for folder, names, files in os.walk(root):
        if ".git" in names:
            shutil.rmtree(os.path.join(folder, ".git"), ignore_errors=True)
            names.remove(".git")
        if ".git" in files:
            os.unlink(os.path.join(folder, ".git"))
