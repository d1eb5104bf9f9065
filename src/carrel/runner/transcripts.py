"""The agent's transcript files: found, written for a resume, read back after a loss."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

_SUBPATH = re.compile(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*")


def project_key(cwd: str) -> str:
    """The folder Claude Code keeps a working directory's transcripts in (every other character becomes a dash)."""
    return re.sub(r"[^A-Za-z0-9]", "-", cwd)


class Transcripts:
    """The transcript files of one conversation in an agent's home."""

    def __init__(self, home: Path, cwd: str, owner: tuple[int, int] | None) -> None:
        """Look at `home`, as the runner sees it, for an agent that works in `cwd`, as the agent sees it."""
        self._folder = home / ".claude" / "projects" / project_key(cwd)
        self._owner = owner

    def main(self, agent_session_id: str) -> Path:
        """The conversation's own file."""
        return self._folder / f"{agent_session_id}.jsonl"

    def path(self, agent_session_id: str, subpath: str) -> Path:
        """The file of a transcript; sub-agents' ones stand in a folder beside the main one."""
        if not subpath:
            return self.main(agent_session_id)
        if not _SUBPATH.fullmatch(subpath) or ".." in subpath.split("/"):
            raise ValueError(f"not a transcript's subpath: {subpath!r}")
        return self._folder / agent_session_id / f"{subpath}.jsonl"

    def write(self, agent_session_id: str, subpath: str, lines: Iterable[str], *, first: bool) -> None:
        """Write lines for a resume: the first batch of a file begins it anew, the later ones go on."""
        path = self.path(agent_session_id, subpath)
        self._make(path.parent)
        with open(path, "wb" if first else "ab") as file:
            for line in lines:
                file.write(line.encode("utf-8", "surrogatepass") + b"\n")
            if self._owner is not None:
                os.fchown(file.fileno(), *self._owner)

    def _make(self, folder: Path) -> None:
        missing = [folder]
        while not missing[-1].parent.exists():
            missing.append(missing[-1].parent)
        for part in reversed(missing):
            if not part.exists():
                part.mkdir(mode=0o700)
                if self._owner is not None:
                    os.chown(part, *self._owner)

    def found(self, agent_session_id: str) -> Iterator[tuple[str, list[str]]]:
        """Every transcript on disk: its subpath and its whole lines."""
        main = self.main(agent_session_id)
        if main.is_file():
            yield "", _lines(main)
        beside = self._folder / agent_session_id
        for path in sorted(beside.rglob("*.jsonl")) if beside.is_dir() else ():
            if path.is_file() and not path.is_symlink():
                yield path.relative_to(beside).with_suffix("").as_posix(), _lines(path)

    def holds(self, agent_session_id: str, uuid: str) -> bool:
        """Whether a message with this uuid stands in the main transcript."""
        main = self.main(agent_session_id)
        return main.is_file() and any(_entry(line).get("uuid") == uuid for line in _lines(main))


def _lines(path: Path) -> list[str]:
    with open(path, "rb") as file:
        data = file.read()
    # A process that was killed may have left half a line.
    return [line.decode("utf-8", "replace") for line in data.split(b"\n") if _entry(line)]


def _entry(line: str | bytes) -> dict[str, object]:
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
