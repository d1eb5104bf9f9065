"""Runs git on repositories that nobody vouches for: those of agents.

A repository's own settings can name programs (hooks, filters, drivers of diffs, watchers of files), and its files can be
swapped while they are read. So git never sees the workspace: it works on a copy that no agent can reach, as the session's
user, with a settings file of ours, no hooks, no prompts, no helpers, and bounds on time, memory and what it writes.

Everything here blocks, and runs in a thread.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from carrel.errors import FileNotFound, FileTooLarge, NotARepository
from carrel.workspaces.files import WorkspaceFiles

__all__ = ["Diff", "Git", "Owner", "Ran", "diff", "give", "temporary_place"]

Owner = tuple[int, int]

_MOST_BYTES = 2**30
_MOST_DIFF_BYTES = 16 * 2**20
_DIFF_SECONDS = 60
_LOOK_SECONDS = 0.25
_REF = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]{0,200}")
_ID = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_SETTINGS = {
    "core.hooksPath": "/dev/null",
    "core.fsmonitor": "false",
    "core.attributesFile": "/dev/null",
    "core.excludesFile": "/dev/null",
    "core.quotePath": "false",
    "protocol.allow": "never",
    "submodule.recurse": "false",
    "gc.auto": "0",
    "maintenance.auto": "false",
}


@dataclass(frozen=True)
class Diff:
    """What has changed in a repository since its last commit."""

    patch: bytes
    truncated: bool


def diff(files: WorkspaceFiles, owner: Owner | None) -> Diff:
    """`git diff` of the workspace against its last commit, with the files that git does not know yet.

    Raises:
        NotARepository: the workspace is none, or one that git cannot read.
        FileTooLarge: there is too much in it to be copied.
    """
    try:
        if files.stat(".git").type != "directory":
            raise NotARepository("Its .git is not a folder: worktrees and submodules are not read.")
    except FileNotFound:
        raise NotARepository from None
    with temporary_place(owner) as place:
        work, repository = place / "work", place / "repository"
        files.copy_to(work, owner=owner, max_bytes=_MOST_BYTES)
        own = work / ".git"
        _unlink_links(own)
        if (own / "objects/info/alternates").exists():
            raise NotARepository("It has its objects elsewhere.")
        _make_repository(repository)
        head = _head(own)
        wide = head is not None and len(head) == 64
        version = "[core]\nrepositoryformatversion = 1\n[extensions]\nobjectformat = sha256\n" if wide else "[core]\n"
        (repository / "config").write_text(version)
        (repository / "HEAD").write_text(f"{head}\n" if head else "ref: refs/heads/none\n")
        index = own / "index"
        if index.is_file() and not index.is_symlink():
            shutil.copyfile(index, repository / "index")
        give(repository, owner)
        variables = {
            "GIT_DIR": str(repository),
            "GIT_WORK_TREE": str(work),
            "GIT_ALTERNATE_OBJECT_DIRECTORIES": str(own / "objects"),
        }
        git = Git(place, owner, variables, seconds=_DIFF_SECONDS)
        nothing = "4b825dc642cb6eb9a060e54bf8d69288fbee4904"
        flags = ["--no-ext-diff", "--no-textconv", "--no-color", "--ignore-submodules=all", "--no-renames"]
        added = git.run("add", "--intent-to-add", "--ignore-errors", ".", cwd=work)
        shown = git.run("diff", *flags, head or nothing, "--", cwd=work, most_bytes=_MOST_DIFF_BYTES + 1)
        if shown.code != 0 and len(shown.output) <= _MOST_DIFF_BYTES:
            raise NotARepository(operator_detail=f"{added.code} {added.told} {shown.code} {shown.told}")
        return Diff(shown.output[:_MOST_DIFF_BYTES], len(shown.output) > _MOST_DIFF_BYTES)


@dataclass(frozen=True)
class Ran:
    """What came of running it."""

    code: int
    output: bytes
    told: str
    """What it said of errors: for operators alone."""


class Git:
    """Runs git in a place of its own."""

    def __init__(
        self,
        place: Path,
        owner: Owner | None,
        variables: Mapping[str, str],
        *,
        seconds: float,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        """Have it work in `place`, as the owner, for so long at most; `settings` are added to ours, and win."""
        program = shutil.which("git")
        if program is None:
            raise NotARepository("git is not installed on this server.")
        self._place = place
        self._owner = owner
        self._seconds = seconds
        given = {**_SETTINGS, **(settings or {})}
        numbered = {f"GIT_CONFIG_KEY_{n}": name for n, name in enumerate(given)}
        numbered |= {f"GIT_CONFIG_VALUE_{n}": value for n, value in enumerate(given.values())}
        self._variables = {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": str(place),
            "LC_ALL": "C.UTF-8",
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_CONFIG_GLOBAL": "/dev/null",
            "GIT_ATTR_NOSYSTEM": "1",
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_ASKPASS": "/bin/false",
            "GIT_SSH_COMMAND": "/bin/false",
            "GIT_OPTIONAL_LOCKS": "0",
            "GIT_CONFIG_COUNT": str(len(given)),
            **numbered,
            **variables,
        }
        limits = ["prlimit", f"--cpu={int(seconds) + 1}", f"--as={4 * 2**30}", f"--fsize={2 * 2**30}", "--core=0"]
        self._command = [*(limits if shutil.which("prlimit") else []), program]

    def run(
        self, *arguments: str, cwd: Path, most_bytes: int = 65_536, enough: Callable[[], bool] = lambda: False
    ) -> Ran:
        """Run it to its end, to the end of its time, or until it is `enough`; what it says is cut off after so many bytes."""
        user: dict[str, object] = {}
        if self._owner is not None and os.geteuid() == 0:
            user = {"user": self._owner[0], "group": self._owner[1], "extra_groups": []}
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(  # type: ignore[call-overload]
                [*self._command, *arguments],
                cwd=cwd,
                env=self._variables,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
                **user,
            )
            timer = _Timer(process.pid, self._seconds, enough)
            try:
                output = process.stdout.read(most_bytes)
            finally:
                process.stdout.close()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=1.0 if len(output) == most_bytes else self._seconds)
                timer.over()
                _end(process.pid)
                process.wait()
            errors.seek(0)
            told = errors.read(4096).decode("utf-8", "replace")
        return Ran(process.returncode, output, told)


class _Timer:
    """Ends a process group when its time is over, or it is enough."""

    def __init__(self, pid: int, seconds: float, enough: Callable[[], bool]) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(pid, seconds, enough), daemon=True, name="git timer")
        self._thread.start()

    def _watch(self, pid: int, seconds: float, enough: Callable[[], bool]) -> None:
        until = time.monotonic() + seconds
        while not self._over.wait(min(_LOOK_SECONDS, max(0.0, until - time.monotonic()))):
            if time.monotonic() >= until or enough():
                _end(pid)
                return

    def over(self) -> None:
        """It has ended by itself."""
        self._over.set()
        self._thread.join()


def _end(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


@contextlib.contextmanager
def temporary_place(owner: Owner | None) -> Iterator[Path]:
    """A folder that only we and the owner can get at, which no sandbox is shown."""
    with tempfile.TemporaryDirectory(prefix="carrel-git-", dir=_root(owner)) as folder:
        place = Path(folder)
        give(place, owner)
        yield place


def _root(owner: Owner | None) -> str:
    """A folder for temporary ones, and one that the owner can walk through: git wants to know where it is."""
    first = tempfile.gettempdir()
    if owner is None or os.geteuid() != 0:
        return first
    for root in (first, "/var/tmp", "/tmp"):
        path = Path(root).resolve()
        if path.is_dir() and all(each.stat().st_mode & 0o001 for each in (path, *path.parents)):
            return root
    return first


def _make_repository(repository: Path) -> None:
    for name in ("objects/info", "objects/pack", "refs/heads"):
        (repository / name).mkdir(parents=True)


def give(folder: Path, owner: Owner | None) -> None:
    if owner is None or os.geteuid() != 0:
        return
    os.chown(folder, *owner)
    for path, folders, files in os.walk(folder):
        for name in (*folders, *files):
            os.chown(os.path.join(path, name), *owner, follow_symlinks=False)


def _unlink_links(own: Path) -> None:
    """A repository has no links of its own, and what one leads to is not of the workspace."""
    for path, folders, files in os.walk(own):
        for name in (*folders, *files):
            if os.path.islink(os.path.join(path, name)):
                os.unlink(os.path.join(path, name))


def _head(own: Path) -> str | None:
    """The commit that is checked out; None where there is none yet."""
    text = _read(own / "HEAD", 4096).strip()
    if not text.startswith("ref: "):
        return text if _ID.fullmatch(text) else None
    name = text.removeprefix("ref: ").strip()
    if not name.startswith("refs/") or not _REF.fullmatch(name) or ".." in name:
        raise NotARepository("Its HEAD is not one.")
    found = _read(own / name, 200).strip()
    if _ID.fullmatch(found):
        return found
    for line in _read(own / "packed-refs", 16 * 2**20).splitlines():
        commit, _, packed = line.partition(" ")
        if packed == name and _ID.fullmatch(commit):
            return commit
    return None


def _read(path: Path, most: int) -> str:
    """A small file of the copy, which nobody changes any more; a link out of it is not followed."""
    if path.is_symlink() or not path.is_file():
        return ""
    if path.stat().st_size > most:
        raise FileTooLarge(most)
    return path.read_text("utf-8", "replace")
