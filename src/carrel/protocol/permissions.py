"""Who may let a tool call happen: permission modes, and rules in Claude Code's own syntax. No I/O.

`decide` is the one place where this is decided. The runner asks it before every call of a tool, and
`POST /sessions/{id}/permissions/check` asks it to explain. Rules are tried in this order, and the first that speaks
wins: deny rules, ask rules, the mode where it lets everything through, allow rules, what the mode says of this call.

The syntax is that of https://code.claude.com/docs/en/permissions: `Tool`, `Tool(specifier)`, `mcp__server__*`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from posixpath import join, normpath
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from carrel.model import PermissionMode


@dataclass(frozen=True)
class Place:
    """Where an agent works, as it sees it."""

    workspace: str = "/workspace"
    home: str = "/home/agent"
    cwd: str = "/workspace"
    """What relative paths start from."""


class Decision(StrEnum):
    """What happens to a call of a tool."""

    ALLOW = "allow"
    ASK = "ask"
    DENY = "deny"


def _parsed(rule: str) -> str:
    if _RULE.fullmatch(rule) is None:
        raise ValueError(f"{rule!r} is not a rule; write Tool, Tool(what) or mcp__server__tool")
    return rule


_RULE = re.compile(r"(?P<tool>[A-Za-z_][\w-]*\*?)(?:\((?P<what>.+)\))?", re.DOTALL)

_LONGEST_RULE = 2_000
Rule = Annotated[str, Field(min_length=1, max_length=_LONGEST_RULE), AfterValidator(_parsed)]


class PermissionRules(BaseModel):
    """Rules that say of calls of tools what happens to them; `deny` wins over `ask`, and `ask` over `allow`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    allow: tuple[Rule, ...] = Field(default=(), description="These happen without asking.")
    ask: tuple[Rule, ...] = Field(default=(), description="For these a person is asked, whatever the mode.")
    deny: tuple[Rule, ...] = Field(default=(), description="These never happen.")


@dataclass(frozen=True)
class Verdict:
    """What was decided, and why."""

    decision: Decision
    reason: str
    rule: str | None = None
    """The rule that spoke; None where the mode did."""


def decide(
    mode: PermissionMode,
    rules: PermissionRules,
    tool: str,
    given: Mapping[str, Any],
    place: Place = Place(),
) -> Verdict | None:
    """Say what happens to this call.

    Args:
        mode: the session's permission mode.
        rules: every rule that holds for the session, put together.
        tool: the tool's name.
        given: the call's input.
        place: where the agent works. Links are not followed: that a path leads out of the workspace by one is not seen.

    Returns:
        The verdict; None in mode `auto` where no rule speaks: then Claude Code's own classifier decides.
    """
    call = _Call(tool, given, place)
    if (rule := call.first(rules.deny)) is not None:
        return Verdict(Decision.DENY, "a deny rule", rule)
    if (rule := call.first(rules.ask)) is not None:
        if mode is PermissionMode.DONT_ASK:
            return Verdict(Decision.DENY, "an ask rule, and the mode dontAsk asks nobody", rule)
        return Verdict(Decision.ASK, "an ask rule", rule)
    if mode is PermissionMode.BYPASS:
        return Verdict(Decision.ALLOW, "the mode bypassPermissions")
    if (rule := call.first_allowing(rules.allow)) is not None:
        return Verdict(Decision.ALLOW, "an allow rule", rule)
    return _by_mode(mode, call)


def _by_mode(mode: PermissionMode, call: _Call) -> Verdict | None:
    if mode is PermissionMode.AUTO:
        return None
    if call.tool == "ExitPlanMode" or (call.tool == "AskUserQuestion" and mode is not PermissionMode.DONT_ASK):
        return Verdict(Decision.ASK, "it is for a person to answer")
    if call.only_reads():
        return Verdict(Decision.ALLOW, "it changes nothing")
    if mode is PermissionMode.PLAN and call.writes_plan():
        return Verdict(Decision.ALLOW, "it is the plan itself")
    if mode is PermissionMode.PLAN:
        return Verdict(Decision.DENY, "the mode plan: nothing is changed before the plan is approved")
    if mode is PermissionMode.ACCEPT_EDITS and call.edits_workspace():
        return Verdict(Decision.ALLOW, "the mode acceptEdits: it changes files of the workspace")
    if mode is PermissionMode.DONT_ASK:
        return Verdict(Decision.DENY, "no rule allows it, and the mode dontAsk asks nobody")
    return Verdict(Decision.ASK, "no rule allows it")


def rule_for(tool: str, given: Mapping[str, Any]) -> str | None:
    """The narrowest rule that lets this call, and little else, happen again; None where there is none.

    A command that a rule could not cover as it stands has none: something is hidden in it, or it is made of parts.
    """
    call = _Call(tool, given, Place())
    rule: str | None = tool
    if tool == "Bash":
        rule = f"Bash({given.get('command', '')})"
    elif tool in _EDITING or tool in _READING:
        path = call.path()
        if path is None:
            rule = tool
        else:
            inside = path.removeprefix(call.place.workspace)
            written = inside if inside != path and inside else f"/{path}"
            rule = f"{'Edit' if tool in _EDITING else 'Read'}({written})"
    elif tool == "WebFetch":
        try:
            host = urlsplit(str(given.get("url", ""))).hostname
        except ValueError:
            host = None
        rule = f"WebFetch(domain:{host})" if host else None
    if rule is None or len(rule) > _LONGEST_RULE or any(sign in rule.removeprefix(tool) for sign in "*?["):
        return None  # what stands for itself there would stand for more in a rule
    parsed = _RULE.fullmatch(rule)
    return rule if parsed is not None and call.first_allowing((rule,)) is not None else None


# ------------------------------------------------------------------------------------------------------------- calls

_READING = frozenset({"Read", "Grep", "Glob", "LS", "NotebookRead", "BashOutput", "TaskOutput", "ListMcpResourcesTool"})
_HARMLESS = frozenset(
    {
        *("Agent", "Task", "TodoWrite", "ToolSearch", "EnterPlanMode", "KillShell", "TaskStop"),
        *("TaskCreate", "TaskGet", "TaskList", "TaskUpdate", "StructuredOutput"),
    }
)
"""Tools that touch nothing but the agent's own business; what its sub-agents do is asked about in its turn."""
_EDITING = frozenset({"Edit", "MultiEdit", "NotebookEdit", "Write"})
_PATHS = ("file_path", "notebook_path", "path")
_PROTECTED = (".git", ".claude", ".mcp.json")
"""In the workspace, and yet not files like others: what is written there is run or believed later."""


@dataclass(frozen=True)
class _Call:
    tool: str
    given: Mapping[str, Any]
    place: Place

    def first(self, rules: Iterable[str]) -> str | None:
        """The first rule that speaks of this call, or of any part of it."""
        return next((rule for rule in rules if self._matches(rule, every_part=False)), None)

    def first_allowing(self, rules: Sequence[str]) -> str | None:
        """A rule that allows it; a command of several parts wants every part allowed, or harmless."""
        whole = next((rule for rule in rules if self._matches(rule, every_part=True)), None)
        if whole is not None or self.tool != "Bash":
            return whole
        parts = _parts(str(self.given.get("command", "")))
        used: list[str] = []
        for part in parts:
            rule = next((rule for rule in rules if _bash_rule(rule) and _part_matches(_what(rule), part)), None)
            if rule is None and not self._part_reads(part):
                return None
            used += [rule] if rule is not None else []
        return used[0] if used else None

    def only_reads(self) -> bool:
        """It changes nothing, and looks at nothing outside the workspace."""
        if self.tool == "Bash":
            parts = _parts(str(self.given.get("command", "")))
            return bool(parts) and all(self._part_reads(part) for part in parts)
        return self.tool in _HARMLESS or (self.tool in _READING and self._inside(self.path() or self.place.cwd))

    def edits_workspace(self) -> bool:
        if self.tool == "Bash":
            parts = _parts(str(self.given.get("command", "")))
            return bool(parts) and all(self._part_reads(part) or self._part_edits(part) for part in parts)
        return self.tool in _EDITING and (path := self.path()) is not None and self._is_ordinary(path)

    def writes_plan(self) -> bool:
        """It writes down the plan, where Claude Code has the agent do that."""
        path = self.path() if self.tool in _EDITING else None
        return (
            path is not None
            and re.fullmatch(re.escape(self.place.home) + r"/\.claude/plans/[\w.-]+\.md", path) is not None
        )

    def path(self) -> str | None:
        """The file it is about, absolute and without dots; None where it names none."""
        name = next((self.given[key] for key in _PATHS if isinstance(self.given.get(key), str)), None)
        return None if name is None else self._absolute(name)

    def _absolute(self, name: str) -> str:
        if name == "~" or name.startswith("~/"):
            name = self.place.home + name[1:]
        return normpath(join(self.place.cwd, name))

    def _inside(self, path: str) -> bool:
        return path == self.place.workspace or path.startswith(self.place.workspace + "/")

    def _is_ordinary(self, path: str) -> bool:
        return self._inside(path) and not any(part in _PROTECTED for part in path.split("/"))

    def _part_reads(self, part: _Part) -> bool:
        return _only_reads(part) and all(self._stays(word) for word in part.words[1:])

    def _stays(self, word: str) -> bool:
        """Whether a word of a command, should it name a file, names one of the workspace's."""
        if "$" in word or (word.startswith("-") and "/" in word.partition("=")[0]):
            return False
        name = word.partition("=")[2] if word.startswith("-") else word
        return not (name.startswith(("/", "~")) or ".." in name.split("/")) or self._inside(self._absolute(name))

    def _part_edits(self, part: _Part) -> bool:
        if part.unclear or part.writes or not part.words or part.words[0] not in _FILE_COMMANDS:
            return False
        names = [word for word in part.words[1:] if not word.startswith("-")]
        return (
            bool(names)
            and all(self._stays(word) for word in part.words[1:])
            and all(self._is_ordinary(self._absolute(name)) for name in names)
        )

    def _matches(self, rule: str, *, every_part: bool) -> bool:
        parsed = _RULE.fullmatch(rule)
        if parsed is None:
            return False
        tool, what = parsed["tool"], parsed["what"]
        if not _tool_matches(tool, self.tool):
            return False
        if what is None or what == "*":
            return True
        if self.tool == "Bash":
            return not every_part and _command_matches(what, str(self.given.get("command", "")))
        return self._specified(what)

    def _specified(self, what: str) -> bool:
        match self.tool:
            case "WebFetch":
                return _domain_matches(what, str(self.given.get("url", "")))
            case "Agent" | "Task":
                return _glob(what).fullmatch(str(self.given.get("subagent_type", ""))) is not None
            case "Skill":
                named = str(self.given.get("skill") or self.given.get("command") or "")
                return (
                    _glob(what).fullmatch(" ".join(filter(None, (named, str(self.given.get("args", "")))))) is not None
                )
        path = self.path() or (self.place.cwd if self.tool in _READING else None)
        return path is not None and _path_matches(what, path, self.place)


def _tool_matches(ruled: str, tool: str) -> bool:
    if ruled == tool or (ruled.endswith("*") and tool.startswith(ruled[:-1])):
        return True
    if ruled.startswith("mcp__") and ruled.count("__") == 1:
        return tool.startswith(ruled + "__")
    # Rules for reading and for editing speak of every tool that does it; an agent and a task are one thing.
    return tool in {"Read": _READING, "Edit": _EDITING, "Agent": {"Task"}, "Task": {"Agent"}}.get(ruled, ())


def _domain_matches(what: str, url: str) -> bool:
    kind, _, domain = what.partition(":")
    try:
        host = (urlsplit(url).hostname or "").rstrip(".").lower()
    except ValueError:
        return False
    return kind == "domain" and _glob(domain.lower()).fullmatch(host) is not None


@lru_cache(maxsize=1024)
def _glob(pattern: str) -> re.Pattern[str]:
    return re.compile(
        "".join(".*" if part == "*" else re.escape(part) for part in re.split(r"(\*)", pattern)), re.DOTALL
    )


# ------------------------------------------------------------------------------------------------------------- paths


def _path_matches(what: str, path: str, place: Place) -> bool:
    """As in .gitignore: `//etc` from the root, `~/x` from home, `/x` from the workspace, `x` at any depth below."""
    if what.startswith("//"):
        base, pattern, anchored = "", what[1:], True
    elif what.startswith("~/"):
        base, pattern, anchored = place.home, what[1:], True
    elif what.startswith("/"):
        base, pattern, anchored = place.workspace, what, True
    else:
        pattern = what.removeprefix("./")
        base, anchored = place.cwd, what.startswith("./") or "/" in pattern.rstrip("/")
    if not path.startswith(base + "/") and path != base:
        return False
    return _ignore_pattern(pattern.strip("/"), anchored).fullmatch(path[len(base) :].strip("/")) is not None


@lru_cache(maxsize=1024)
def _ignore_pattern(pattern: str, anchored: bool) -> re.Pattern[str]:
    made = "" if anchored else "(?:.*/)?"
    for token in re.split(r"(\*\*/|/\*\*$|\*\*|\*|\?)", pattern):
        made += {"**/": "(?:.*/)?", "/**": "(?:/.*)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}.get(token) or re.escape(
            token
        )
    return re.compile(made + "(?:/.*)?", re.DOTALL)


# ---------------------------------------------------------------------------------------------------------- commands


def _words(names: str) -> frozenset[str]:
    return frozenset(names.split())


_READ_COMMANDS = _words(
    """basename cat cd cksum cmp comm cut date df diff dirname du echo expr false fold grep egrep fgrep head id join ls
    md5sum nl od paste pwd readlink realpath rg sha1sum sha256sum stat strings tac tail test tr true uname uniq wc
    which whoami"""
)
_READ_GIT = _words("blame cat-file describe diff log ls-files ls-tree rev-parse shortlog show status")
_FILE_COMMANDS = _words("cp mkdir mv rm rmdir touch")
_WRAPPERS = _words("command exec nice nohup stdbuf time timeout")
_PUNCTUATION = frozenset("();<>|&\n")
_SEPARATING = frozenset(";|&\n")
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")
_HIDDEN = re.compile(r"\$\(|`|<\(|>\(|\$\{|<<|\$'")
"""What a shell runs, or makes into something else, before the words are what they are."""
_RISKY_OPTIONS = re.compile(r"--(?:output|ext-diff|textconv|pre|hostname-bin)\b|-o\b")


@dataclass(frozen=True)
class _Part:
    """One simple command of a command line."""

    text: str
    words: tuple[str, ...]
    writes: bool
    """Its output goes to a file."""
    unclear: bool
    """It has something in it that only a shell could tell the meaning of."""


def _parts(command: str) -> list[_Part]:
    """The simple commands of a command line; what cannot be taken apart is one part, and unclear."""
    lexer = shlex.shlex(command, posix=False, punctuation_chars="".join(sorted(_PUNCTUATION)))
    lexer.whitespace, lexer.commenters, lexer.whitespace_split = " \t\r", "", True
    try:
        tokens = list(lexer)
    except ValueError:
        return [_Part(command, (command,), writes=False, unclear=True)]
    groups: list[list[str]] = [[]]
    for token in tokens:
        if set(token) <= _SEPARATING:
            groups.append([])
        else:
            groups[-1].append(token)
    return [_part(group) for group in groups if group]


def _part(tokens: list[str]) -> _Part:
    words: list[str] = []
    writes = unclear = False
    rest = iter(tokens)
    for token in rest:
        if set(token) & set("<>") and set(token) <= _PUNCTUATION:
            target = next(rest, "")
            if words and words[-1].isdigit():
                words.pop()
            writes |= ">" in token and target != "/dev/null" and not (token.endswith("&") and target.isdigit())
            unclear |= bool(set(token) & set("()")) or "<<" in token
        else:
            unclear |= bool(set(token) & set("()")) or _HIDDEN.search(token) is not None
            words.append(re.sub(r"[\"'\\\\]", "", token))
    return _Part(" ".join(tokens), tuple(words), writes, unclear)


def _bare(part: _Part) -> tuple[str, ...]:
    """The command's own words, without the variables and the programs it is wrapped in."""
    words = list(part.words)
    while words:
        if _ASSIGNMENT.match(words[0]):
            words.pop(0)
        elif words[0] in _WRAPPERS and len(words) > 1:
            words.pop(0)
            while words and (words[0].startswith("-") or words[0].rstrip("smhd").replace(".", "").isdigit()):
                words.pop(0)
        else:
            break
    return tuple(words)


def _only_reads(part: _Part) -> bool:
    """Whether its program changes nothing; what it looks at is another question."""
    if part.unclear or part.writes or not part.words:
        return False
    first, *rest = part.words
    if first == "git":
        return bool(rest) and rest[0] in _READ_GIT and not any(_RISKY_OPTIONS.match(word) for word in rest)
    if first == "rg" and any(_RISKY_OPTIONS.match(word) for word in rest):
        return False
    if first == "uniq" and sum(not word.startswith("-") for word in rest) > 1:  # its second name is written to
        return False
    return first in _READ_COMMANDS


def _bash_rule(rule: str) -> bool:
    parsed = _RULE.fullmatch(rule)
    return parsed is not None and parsed["tool"] == "Bash" and parsed["what"] is not None


def _what(rule: str) -> str:
    parsed = _RULE.fullmatch(rule)
    return (parsed["what"] or "") if parsed is not None else ""


def _part_matches(what: str, part: _Part) -> bool:
    """Whether an allow rule covers this part: nothing hidden in it, no file written by the shell."""
    return not part.unclear and not part.writes and _command_pattern(what).fullmatch(" ".join(part.words)) is not None


def _command_matches(what: str, command: str) -> bool:
    """Whether a deny or an ask rule speaks of the command, of any part of it, or of what is hidden in it."""
    pattern = _command_pattern(what)
    hidden = [found for found in re.findall(r"\$\(([^()]*)\)|`([^`]*)`", command) for found in found if found]
    for line in [command, *hidden]:
        if pattern.fullmatch(line.strip()):
            return True
        for part in _parts(line.replace("(", " ; ").replace(")", " ; ").replace("`", " ; ").replace("{ ", " ; ")):
            if pattern.fullmatch(" ".join(part.words)) or pattern.fullmatch(" ".join(_bare(part))):
                return True
    return False


@lru_cache(maxsize=1024)
def _command_pattern(what: str) -> re.Pattern[str]:
    """`npm run test *` (or its older form `npm run test:*`) is that command, alone or with anything behind it."""
    if what.endswith(":*"):
        what = what[:-2] + " *"
    if what.endswith(" *"):
        return re.compile(_glob(what[:-2]).pattern + r"(?:\s.*)?", re.DOTALL)
    return _glob(what)
