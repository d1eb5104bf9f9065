"""What is set up for all sessions of a user or an environment: skills, sub-agents, commands, CLAUDE.md, settings.

It lies in the `.claude` folder of the user's own directory, or of the environment's, and is shown to each agent as its
`~/.claude`. It is copied when an agent is started, so that a session moves between hosts and runtimes with what it was
started with.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from carrel.errors import CarrelError
from carrel.workspaces.files import FileEntry, WorkspaceFiles

_FOLDER = ".claude"
_SHOWN = ("CLAUDE.md", "agents", "commands", "output-styles", "rules", "settings.json", "skills")
_MAX_FILES = 5_000
_MAX_BYTES = 64 * 2**20
_CHUNK = 2**20


def show_user_config(sources: Mapping[str, WorkspaceFiles], home: WorkspaceFiles, record: Path) -> None:
    """Bring what stands in the home up to date with what is set up for it. No agent may be at work there.

    Args:
        sources: directories with a `.claude`, by what they are called in the record; where two have the same file, the
            later is shown. None need be there.
        home: the agent's home.
        record: a file of ours that remembers what was copied, so that only what has changed is copied again.
    """
    before = json.loads(record.read_text()) if record.is_file() else {}
    found: dict[str, tuple[str, FileEntry]] = {}
    for name, source in sources.items():
        found |= {entry.path: (name, entry) for entry in _files(source)}
    states = {
        path: [entry.size, entry.modified_at.timestamp(), entry.mode, name] for path, (name, entry) in found.items()
    }
    if states == before:
        return
    for path in before.keys() - found.keys():
        with contextlib.suppress(CarrelError):  # the agent has removed it, or put something else there
            home.delete(path)
    copied = {}
    for path, (name, entry) in found.items():
        # What cannot be copied (a file that went away, a folder of the agent's in its place) is left out.
        with contextlib.suppress(CarrelError):
            if before.get(path) != states[path]:
                _copy(sources[name], home, path, entry.mode)
            copied[path] = states[path]
    record.write_text(json.dumps(copied))


def has_user_config(source: WorkspaceFiles) -> bool:
    """Whether there is anything to show; `source` is the user's own directory, which need not be there."""
    return bool(_files(source))


def _files(source: WorkspaceFiles) -> list[FileEntry]:
    found: list[FileEntry] = []
    for name in _SHOWN:
        with contextlib.suppress(CarrelError):
            entry = source.stat(f"{_FOLDER}/{name}")
            found += [entry] if entry.type == "file" else source.tree(entry.path, limit=_MAX_FILES)
    total = 0
    kept = []
    for entry in found[:_MAX_FILES]:
        total += entry.size
        if entry.type == "file" and total <= _MAX_BYTES:
            kept.append(entry)
    return kept


def _copy(source: WorkspaceFiles, home: WorkspaceFiles, path: str, mode: int) -> None:
    with source.open_read(path) as file:
        left = os.fstat(file.fileno()).st_size
        chunks = iter(lambda: file.read(_CHUNK), b"")
        with contextlib.suppress(CarrelError):
            home.delete(path)
        home.write(path, chunks, max_bytes=max(left, 1), mode=mode & 0o755 | 0o400)
