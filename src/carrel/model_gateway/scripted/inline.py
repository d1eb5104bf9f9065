"""Finds the `[[step: argument]]` marks in a prompt.

A mark ends at its matching `]]`. What matches is not a matter of one rule, because shell, JSON and prose use
brackets differently: JSON is read by a JSON parser, other arguments end where all brackets balance, and where they
never do (`:[` in a sentence), only double brackets are counted.
"""

from __future__ import annotations

import json
import re

from carrel.model_gateway.scripted import steps
from carrel.model_gateway.scripted.steps import Say, Step, StepError

_OPEN = re.compile(r"\[\[\s*(" + "|".join(steps.NAMES) + r")\s*(:|\]\])")
_BRACKET = re.compile(r"[\[\]]")
_DOUBLE_BRACKET = re.compile(r"\[\[|\]\]")
_TOOL_HEAD = re.compile(r"[^|\[\]]*\|\s*")
_CLOSE = re.compile(r"\s*\]\]")


def find_steps(prompt: str) -> tuple[Step, ...]:
    """The steps a prompt asks for, in order; a known step with a bad argument becomes a text that says so."""
    found: list[Step] = []
    at = 0
    while mark := _OPEN.search(prompt, at):
        name = mark[1]
        if mark[2] == "]]":
            at = mark.end()
            if steps.is_bare(name):
                found.append(_step(name, "", mark[0]))
            continue
        end = _end_of_argument(prompt, name, mark.start(), mark.end())
        if end is None:  # never closed: prose
            at = mark.end()
            continue
        at = end + 2
        found.append(_step(name, prompt[mark.end() : end].removeprefix(" "), prompt[mark.start() : at]))
    return tuple(found)


def _step(name: str, argument: str, source: str) -> Step:
    try:
        return steps.from_text(name, argument)
    except StepError as error:
        return Say(f"I cannot do {source[:200]}: {error}.")


def _end_of_argument(prompt: str, name: str, opened: int, start: int) -> int | None:
    """Where the closing `]]` of the mark opened at `opened` stands."""
    if "]]" not in prompt[start:]:
        return None
    if name == "tool" and (end := _end_of_json(prompt, start)) is not None:
        return end
    by_double = _balance_double(prompt, start)
    by_single = _balance_single(prompt, opened)
    if by_double is None or by_single is None:
        return by_double if by_single is None else by_single
    if by_double < by_single and _OPEN.search(prompt, by_double, by_single):
        return by_double  # all brackets balance only by swallowing the next mark
    return by_single


def _end_of_json(prompt: str, start: int) -> int | None:
    head = _TOOL_HEAD.match(prompt, start)
    if not head:
        return None
    try:
        _, end = json.JSONDecoder().raw_decode(prompt, head.end())
    except (ValueError, RecursionError):
        return None
    close = _CLOSE.match(prompt, end)
    return close.end() - 2 if close else None


def _balance_single(prompt: str, opened: int) -> int | None:
    depth = 0
    for bracket in _BRACKET.finditer(prompt, opened):
        depth += 1 if bracket[0] == "[" else -1
        if depth == 0:
            end = bracket.start() - 1
            return end if prompt[end] == "]" else None
    return None


def _balance_double(prompt: str, start: int) -> int | None:
    depth = 1
    for bracket in _DOUBLE_BRACKET.finditer(prompt, start):
        depth += 1 if bracket[0] == "[[" else -1
        if depth == 0:
            return bracket.start()
    return None
