"""Transcripts that a Claude Code of another service has left on disk, as an agent of ours would have written them."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from carrel.runner.transcripts import project_key

__all__ = ["ForeignTranscripts", "Found"]

_WORKSPACE = "/workspace"
_NAME = re.compile(r"[A-Za-z0-9._-]+")
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True)
class Found:
    """A conversation."""

    transcripts: Sequence[tuple[str, Sequence[str]]]
    """Each with its subpath (empty for the main one) and its lines; none where there is no conversation."""
    broken: int
    """How many lines could not be read."""


class ForeignTranscripts:
    """The transcripts of one Claude Code's configuration folder."""

    def __init__(self, claude_dir: Path) -> None:
        """Look at `claude_dir`, such as `~/.claude`."""
        self._projects = claude_dir / "projects"

    def read(self, foreign_id: str, cwd: str, session_id: str) -> Found:
        """A conversation and its sub-agents'.

        Args:
            foreign_id: the name it was kept under.
            cwd: the directory its agent worked in; becomes `/workspace`.
            session_id: the name it gets.
        """
        main = self._main(foreign_id, cwd)
        if main is None:
            return Found([], 0)
        found: list[tuple[str, list[str]]] = []
        broken = 0
        for subpath, path in [("", main), *_beneath(main.with_suffix(""))]:
            lines = []
            for line in _lines(path):
                entry = _entry(line)
                if entry is None:
                    broken += 1
                    continue
                lines.append(_ours(entry, cwd, foreign_id, session_id))
            if lines:
                found.append((subpath, lines))
        return Found(found if found and not found[0][0] else [], broken)

    def _main(self, foreign_id: str, cwd: str) -> Path | None:
        if not _NAME.fullmatch(foreign_id) or foreign_id in (".", ".."):
            return None
        expected = self._projects / project_key(cwd) / f"{foreign_id}.jsonl"
        # Claude Code shortens the names of deep folders, and resolves symbolic links before it names one.
        others = sorted(self._projects.glob(f"*/{foreign_id}.jsonl"))
        return next((path for path in [expected, *others] if path.is_file()), None)


def _beneath(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*.jsonl")):
        parts = path.relative_to(folder).parts
        if all(_NAME.fullmatch(part) for part in parts):
            yield "/".join(parts).removesuffix(".jsonl"), path


def _lines(path: Path) -> Iterator[bytes]:
    """The file's lines; none of what is no regular file. The agent that wrote there may have put a link in its place."""
    try:
        descriptor = os.open(path, _READ)
    except OSError:
        return
    with open(descriptor, "rb") as file:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            yield from (line for line in file if line.strip())


def _entry(line: bytes) -> dict[str, object] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _ours(entry: dict[str, object], cwd: str, foreign_id: str, session_id: str) -> str:
    there = entry.get("cwd")
    if isinstance(there, str):
        below = there.removeprefix(cwd.rstrip("/")) if (there + "/").startswith(cwd.rstrip("/") + "/") else ""
        entry["cwd"] = _WORKSPACE + below
    if entry.get("sessionId") == foreign_id:
        entry["sessionId"] = session_id
    return json.dumps(entry, separators=(",", ":"))
