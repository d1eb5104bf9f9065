"""The agent's transcript files: found, written for a resume, read back after a loss.

They stand in the agent's home, where the agent may put what it likes in their place, and the runner may be root. So
every folder is opened from the one above it and no symbolic link is followed: not to read what belongs to others, not
to write where others look.
"""

from __future__ import annotations

import json
import os
import re
import stat
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_SUBPATH = re.compile(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*")
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: a FIFO in a file's place must not hold us up.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_APPEND = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_DEEPEST = 16
_PUT_OFF = "hook_deferred_tool"
_TAKEN_BACK = "hook_cancelled"


def project_key(cwd: str) -> str:
    """The folder Claude Code keeps a working directory's transcripts in (every other character becomes a dash)."""
    return re.sub(r"[^A-Za-z0-9]", "-", cwd)


class Transcripts:
    """The transcript files of one conversation in an agent's home."""

    def __init__(self, home: Path, cwd: str, owner: tuple[int, int] | None) -> None:
        """Look at `home`, as the runner sees it, for an agent that works in `cwd`, as the agent sees it."""
        self._home = home
        self._folder = (".claude", "projects", project_key(cwd))
        self._owner = owner

    def exists(self, agent_session_id: str) -> bool:
        """Whether the conversation has a file."""
        return self._read([*self._folder, f"{agent_session_id}.jsonl"]) is not None

    def write(self, agent_session_id: str, subpath: str, lines: Iterable[str], *, first: bool) -> None:
        """Write lines for a resume: the first batch of a file begins it anew, the later ones go on.

        Sub-agents' files stand in a folder beside the main one. What is in the way of a file or a folder goes.
        """
        *folders, name = self._parts(agent_session_id, subpath)
        with self._walk(folders, make=True) as folder:
            if first:
                _clear(folder, name)
            with open(os.open(name, _CREATE if first else _APPEND, 0o600, dir_fd=folder), "ab") as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise OSError(f"not a file: {name}")
                if self._owner is not None:
                    os.fchown(file.fileno(), *self._owner)
                for line in lines:
                    file.write(line.encode("utf-8", "surrogatepass") + b"\n")

    def found(self, agent_session_id: str) -> Iterator[tuple[str, list[str]]]:
        """Every transcript on disk: its subpath and its whole lines."""
        main = self._read([*self._folder, f"{agent_session_id}.jsonl"])
        if main is not None:
            yield "", _whole_lines(main)
        for parts in self._beneath([*self._folder, agent_session_id]):
            data = self._read([*self._folder, agent_session_id, *parts])
            if data is not None:
                yield "/".join(parts).removesuffix(".jsonl"), _whole_lines(data)

    def holds(self, agent_session_id: str, message: str) -> bool:
        """Whether a message with this uuid stands in the main transcript."""
        return any(entry.get("uuid") == message for entry in self._entries(agent_session_id))

    def held_call(self, agent_session_id: str) -> tuple[str, str] | None:
        """The call that the conversation stands at, the one of its last message, without a result: its id and tool."""
        entries = self._entries(agent_session_id)
        last = next((_message(each) for each in reversed(entries) if each.get("type") == "assistant"), {})
        same = [
            each for each in entries if each.get("type") == "assistant" and _message(each).get("id") == last.get("id")
        ]
        calls = [block for each in same for block in _blocks(each) if block.get("type") == "tool_use"]
        if len(calls) != 1 or not isinstance(calls[0].get("id"), str):
            return None
        found = str(calls[0]["id"])
        results = (block for each in entries if each.get("type") == "user" for block in _blocks(each))
        if any(block.get("tool_use_id") == found for block in results):
            return None
        return found, str(calls[0].get("name"))

    def over(self, agent_session_id: str) -> bool:
        """Whether the conversation stands at the end of a turn."""
        entries = self._entries(agent_session_id)
        last = next((_message(each) for each in reversed(entries) if each.get("type") in ("assistant", "user")), {})
        return last.get("role") == "assistant" and last.get("stop_reason") == "end_turn"

    def put_off(self, agent_session_id: str, tool_use_id: str) -> str | None:
        """Have the next agent take the call up that the conversation stands at: Claude Code does so where it says so.

        It says so itself when it has put a call off; one that was lost while it waited could not. Answers the line
        that was added, if one was.
        """
        entries = self._entries(agent_session_id)
        marks = [each for each in entries if _mark(each).get("toolUseID") == tool_use_id]
        if any(_mark(each).get("type") == _PUT_OFF for each in marks):
            return None
        call, entry = next(
            (block, each)
            for each in reversed(entries)
            for block in _blocks(each)
            if block.get("type") == "tool_use" and block.get("id") == tool_use_id
        )
        behind = next(each for each in reversed(entries) if each.get("uuid") and not each.get("isSidechain"))
        kept = ("isSidechain", "userType", "entrypoint", "cwd", "sessionId", "version", "gitBranch")
        line = json.dumps(
            {
                "parentUuid": behind["uuid"],
                **{name: entry[name] for name in kept if name in entry},
                "type": "attachment",
                "uuid": str(uuid.uuid4()),
                "timestamp": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
                "attachment": {
                    "type": _PUT_OFF,
                    "toolUseID": tool_use_id,
                    "toolName": call.get("name"),
                    "toolInput": call.get("input"),
                    "hookName": "settings",
                    "hookEvent": "PreToolUse",
                    "permissionMode": "default",
                },
            },
            separators=(",", ":"),
        )
        self.write(agent_session_id, "", [line], first=False)
        return line

    def take_back(self, agent_session_id: str) -> None:
        """Have the next agent take no call up that was put off: nobody waits for it any more."""
        data = self._read([*self._folder, f"{agent_session_id}.jsonl"])
        if data is None or _PUT_OFF.encode() not in data:
            return
        lines = [_taken_back(line) for line in _whole_lines(data)]
        self.write(agent_session_id, "", lines, first=True)

    def _entries(self, agent_session_id: str) -> list[dict[str, Any]]:
        data = self._read([*self._folder, f"{agent_session_id}.jsonl"])
        return [entry for line in (data or b"").split(b"\n") if (entry := _entry(line))]

    def _parts(self, agent_session_id: str, subpath: str) -> list[str]:
        if not subpath:
            return [*self._folder, f"{agent_session_id}.jsonl"]
        if not _SUBPATH.fullmatch(subpath) or {".", ".."} & set(subpath.split("/")):
            raise ValueError(f"not a transcript's subpath: {subpath!r}")
        *folders, name = subpath.split("/")
        return [*self._folder, agent_session_id, *folders, f"{name}.jsonl"]

    @contextmanager
    def _walk(self, folders: list[str], *, make: bool = False) -> Iterator[int]:
        """The descriptor of a folder beneath the home."""
        current = os.open(self._home, _FOLDER)
        try:
            for name in folders:
                following = self._open_or_make(name, current) if make else os.open(name, _FOLDER, dir_fd=current)
                os.close(current)
                current = following
            yield current
        finally:
            os.close(current)

    def _open_or_make(self, name: str, parent: int) -> int:
        try:
            return os.open(name, _FOLDER, dir_fd=parent)
        except OSError:
            _clear(parent, name)
            os.mkdir(name, 0o700, dir_fd=parent)
            found = os.open(name, _FOLDER, dir_fd=parent)
            if self._owner is not None:
                os.fchown(found, *self._owner)
            return found

    def _read(self, parts: list[str]) -> bytes | None:
        """A file's content; None where there is no file that is reached by folders alone."""
        try:
            with self._walk(parts[:-1]) as folder, open(os.open(parts[-1], _READ, dir_fd=folder), "rb") as file:
                return file.read() if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else None
        except OSError:
            return None

    def _beneath(self, folders: list[str]) -> Iterator[list[str]]:
        """Every `.jsonl` beneath a folder, as the names that lead to it from there."""
        try:
            with self._walk(folders) as folder, os.scandir(folder) as entries:
                names = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)
        except OSError:
            return
        for name, is_folder in names:
            if is_folder and len(folders) < _DEEPEST:
                yield from ([name, *below] for below in self._beneath([*folders, name]))
            elif name.endswith(".jsonl") and _SUBPATH.fullmatch(name):
                yield [name]


def _clear(folder: int, name: str) -> None:
    """Remove what stands in the place of ours, if anything does."""
    try:
        os.unlink(name, dir_fd=folder)
    except FileNotFoundError:
        return


def _whole_lines(data: bytes) -> list[str]:
    # A process that was killed may have left half a line.
    return [line.decode("utf-8", "replace") for line in data.split(b"\n") if _entry(line)]


def calls_in(entry: Any) -> list[str]:
    """The ids of the calls of tools that a line of a conversation makes."""
    if not isinstance(entry, dict) or entry.get("type") != "assistant":
        return []
    return [str(block.get("id")) for block in _blocks(entry) if block.get("type") == "tool_use"]


def _message(entry: dict[str, Any]) -> dict[str, Any]:
    value = entry.get("message")
    return value if isinstance(value, dict) else {}


def _blocks(entry: dict[str, Any]) -> list[dict[str, Any]]:
    value = _message(entry).get("content")
    return [block for block in value if isinstance(block, dict)] if isinstance(value, list) else []


def _mark(entry: dict[str, Any]) -> dict[str, Any]:
    value = entry.get("attachment") if entry.get("type") == "attachment" else None
    return value if isinstance(value, dict) else {}


def _taken_back(line: str) -> str:
    entry = _entry(line)
    mark = _mark(entry)
    if mark.get("type") != _PUT_OFF:
        return line
    told = {"type": _TAKEN_BACK, **{name: mark.get(name) for name in ("hookName", "toolUseID", "hookEvent")}}
    return json.dumps({**entry, "attachment": told}, separators=(",", ":"))


def _entry(line: str | bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
