"""What a scripted model can do, one frozen object per step, and how a step's argument is written.

The same names serve `[[name: argument]]` in a prompt and `name: argument` in a script file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

MAX_COUNT = 10_000_000
MAX_REPEAT_BYTES = 256 * 1024 * 1024
MAX_WAIT_SECONDS = 86_400.0


class StepError(ValueError):
    """The argument of a step cannot be understood."""


@dataclass(frozen=True)
class Say:
    """A text block."""

    text: str


@dataclass(frozen=True)
class Count:
    """A text block `1 2 … to `, one delta per number, `rate` a second or as fast as it goes."""

    to: int
    rate: float | None = None


@dataclass(frozen=True)
class Repeat:
    """A text block of `text` over and over, cut at the last whole character within `size_bytes` of UTF-8."""

    text: str
    size_bytes: int


@dataclass(frozen=True)
class Think:
    """A thinking block with its signature."""

    text: str


@dataclass(frozen=True)
class Call:
    """One tool call. With `from_cwd` a relative `file_path` starts at the agent's working directory."""

    name: str
    input: Mapping[str, Any] = field(default_factory=dict)
    from_cwd: bool = False


@dataclass(frozen=True)
class Calls:
    """Tool calls made in one message, which ends with them."""

    calls: tuple[Call, ...]


@dataclass(frozen=True)
class Wait:
    """A pause before whatever comes next."""

    seconds: float


@dataclass(frozen=True)
class Fail:
    """An API error, given `times` times before the conversation goes on."""

    status: int
    times: int = 1
    message: str | None = None


@dataclass(frozen=True)
class Drop:
    """The connection closes in the middle of a text, once."""

    times: int = 1


@dataclass(frozen=True)
class Malformed:
    """The answer is not valid JSON from some point on, once."""

    times: int = 1


Fault: TypeAlias = Fail | Drop | Malformed
Speech: TypeAlias = Say | Count | Repeat
Step: TypeAlias = Speech | Think | Calls | Wait | Fault

FAULTS = (Fail, Drop, Malformed)
SPEECH = (Say, Count, Repeat)


def from_text(name: str, argument: str) -> Step:
    """The step `name` with its argument as written in a prompt; `StepError` says what is wrong with it."""
    return _FROM_TEXT[name](argument)


def from_value(name: str, value: Any) -> Step:
    """The step `name` with its value from a YAML file, which may be the prompt's way of writing it."""
    if isinstance(value, str):
        return from_text(name, value)
    if name == "parallel" and isinstance(value, Sequence):
        return Calls(tuple(_parallel_call(each) for each in value))
    if name in _BARE and value is None:
        return from_text(name, "")
    if isinstance(value, Mapping) and name in _FROM_MAPPING:
        return _from_mapping(name, value)
    if isinstance(value, int | float) and not isinstance(value, bool) and name in _NUMERIC:
        return from_text(name, str(value))
    raise StepError(f"{_SHAPES[name]}, not {_kind(value)}")


def bash(command: str) -> Call:
    """A call of the Bash tool."""
    return Call("Bash", {"command": _filled(command, "command"), "description": "Run a scripted command"})


def is_bare(name: str) -> bool:
    """Whether the step can be written without an argument."""
    return name in _BARE


def _count(argument: str) -> Count:
    number, at, rate = argument.partition("@")
    to = _integer(number, "count", 1, MAX_COUNT)
    return Count(to, _number(rate, "the rate", 0.001, 1e6) if at else None)


def _repeat(argument: str) -> Repeat:
    text, bar, size = argument.rpartition("|")
    if not bar:
        raise StepError("repeat is written `TEXT | BYTES`")
    return _repeated(text.removesuffix(" "), _integer(size, "repeat", 1, MAX_REPEAT_BYTES))


def _repeated(text: str, size_bytes: int) -> Repeat:
    if not text:
        raise StepError("the text to repeat must not be empty")
    if len(text[0].encode("utf-8", "replace")) > size_bytes:
        raise StepError(f"{size_bytes} bytes hold no character of the text")
    return Repeat(text, size_bytes)


def _write(argument: str) -> Calls:
    path, bar, content = argument.partition("|")
    if not bar:
        raise StepError("write is written `PATH | CONTENT`")
    return _file_call("Write", path, content=_unescape(content.removeprefix(" ")))


def _read(argument: str) -> Calls:
    return _file_call("Read", argument)


def _file_call(tool: str, path: str, **more: str) -> Calls:
    return Calls((Call(tool, {"file_path": _filled(path, "path").strip(), **more}, from_cwd=True),))


def _tool(argument: str) -> Calls:
    name, bar, text = argument.partition("|")
    try:
        arguments = json.loads(text) if bar else {}
    except ValueError as error:
        raise StepError(f"the input of the tool is not JSON: {error}") from None
    return Calls((_call(name.strip(), arguments),))


def _call(name: str, arguments: Any) -> Call:
    if not name or not re.fullmatch(r"[\w.:-]{1,200}", name):
        raise StepError(f"{name!r} is not the name of a tool")
    if not isinstance(arguments, Mapping):
        raise StepError(f"the input of a tool is a JSON object, not {_kind(arguments)}")
    return Call(name, dict(arguments))


def _parallel(argument: str) -> Calls:
    parts = re.split(r"(?<!\|)\|(?!\|)", argument, maxsplit=1)
    if len(parts) != 2:
        raise StepError("parallel is written `COMMAND | COMMAND`")
    return Calls(tuple(bash(part.strip()) for part in parts))


def _parallel_call(value: Any) -> Call:
    if isinstance(value, str):
        return bash(value)
    if isinstance(value, Mapping) and set(value) in ({"name"}, {"name", "input"}):
        return _call(str(value["name"]), value.get("input", {}))
    raise StepError("each call of parallel is a command or a mapping of name and input")


def _wait(argument: str) -> Wait:
    return Wait(_number(argument, "wait", 0, MAX_WAIT_SECONDS))


def _error(argument: str) -> Fail:
    status, mark, times = argument.replace("×", "x").partition("x")
    return Fail(_integer(status, "the status", 400, 599), _times(times if mark else None))


def _times(text: Any) -> int:
    return 1 if text is None else _integer(text, "the number of times", 1, 1000)


def _no_argument(step: type[Drop] | type[Malformed]) -> Callable[[str], Step]:
    def parse(argument: str) -> Step:
        if argument.strip():
            raise StepError(f"{step.__name__.lower()} takes no argument")
        return step()

    return parse


def _integer(text: Any, what: str, low: int, high: int) -> int:
    try:
        number = int(str(text).strip())
    except ValueError:
        raise StepError(f"{what} wants a whole number, not {str(text).strip()!r}") from None
    if not low <= number <= high:
        raise StepError(f"{what} wants a number from {low} to {high}, not {number}")
    return number


def _number(text: Any, what: str, low: float, high: float) -> float:
    try:
        number = float(str(text).strip())
    except ValueError:
        raise StepError(f"{what} wants a number, not {str(text).strip()!r}") from None
    if not math.isfinite(number) or not low <= number <= high:
        raise StepError(f"{what} wants a number from {low:g} to {high:g}, not {number:g}")
    return number


def _filled(text: str, what: str) -> str:
    if not text.strip():  # the API takes no blank blocks back in the next request
        raise StepError(f"the {what} must not be empty")
    return text


def _optional(value: Mapping[str, Any], key: str) -> str | None:
    return None if value.get(key) is None else str(value[key])


def _unescape(text: str) -> str:
    return re.sub(r"\\([nt\\])", lambda m: {"n": "\n", "t": "\t", "\\": "\\"}[m[1]], text)


def _kind(value: Any) -> str:
    kinds = {dict: "a mapping", list: "a list", str: "a text", bool: "a truth value", type(None): "nothing"}
    return kinds.get(type(value), "a number")


_FROM_TEXT: dict[str, Callable[[str], Step]] = {
    "say": lambda text: Say(_filled(text, "text")),
    "count": _count,
    "repeat": _repeat,
    "think": lambda text: Think(_filled(text, "thought")),
    "bash": lambda command: Calls((bash(command),)),
    "write": _write,
    "read": _read,
    "tool": _tool,
    "parallel": _parallel,
    "wait": _wait,
    "error": _error,
    "drop": _no_argument(Drop),
    "malformed": _no_argument(Malformed),
}
NAMES = tuple(_FROM_TEXT)

_BARE = ("drop", "malformed")
_NUMERIC = ("count", "wait", "error", "say")
_SHAPES = dict.fromkeys(NAMES, "wants a text") | {
    "count": "wants a number or a mapping of to and rate",
    "wait": "wants a number of seconds",
    "error": "wants a status or a mapping of status, times and message",
    "repeat": "wants a mapping of text and bytes",
    "write": "wants a mapping of path and content",
    "tool": "wants a mapping of name and input",
    "parallel": "wants a list of commands",
    "drop": "takes no value",
    "malformed": "takes no value",
}

# step -> (keys it must have, keys it may have, how it is made of them)
_FROM_MAPPING: dict[str, tuple[set[str], set[str], Callable[[Mapping[str, Any]], Step]]] = {
    "count": (
        {"to"},
        {"rate"},
        lambda m: _count(f"{m['to']}@{m['rate']}" if m.get("rate") is not None else str(m["to"])),
    ),
    "repeat": (
        {"text", "bytes"},
        set(),
        lambda m: _repeated(str(m["text"]), _integer(m["bytes"], "bytes", 1, MAX_REPEAT_BYTES)),
    ),
    "write": ({"path", "content"}, set(), lambda m: _file_call("Write", str(m["path"]), content=str(m["content"]))),
    "tool": ({"name"}, {"input"}, lambda m: Calls((_call(str(m["name"]), m.get("input", {})),))),
    "error": (
        {"status"},
        {"times", "message"},
        lambda m: Fail(_integer(m["status"], "the status", 400, 599), _times(m.get("times")), _optional(m, "message")),
    ),
}


def _from_mapping(name: str, value: Mapping[str, Any]) -> Step:
    needed, allowed, make = _FROM_MAPPING[name]
    if missing := sorted(needed - set(value)):
        raise StepError(f"lacks {', '.join(missing)}")
    if unknown := sorted(str(key) for key in set(value) - needed - allowed):
        raise StepError(f"does not know {', '.join(unknown)}")
    return make(value)
