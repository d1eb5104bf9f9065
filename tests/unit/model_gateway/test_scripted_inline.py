"""The `[[step: …]]` marks of a prompt, and what survives inside them."""

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carrel.model_gateway.scripted.inline import find_steps
from carrel.model_gateway.scripted.steps import (
    Call,
    Calls,
    Count,
    Drop,
    Fail,
    Malformed,
    Repeat,
    Say,
    Step,
    Think,
    Wait,
    bash,
)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("[[say: hello]]", Say("hello")),
        ("[[say:hello]]", Say("hello")),
        ("[[say: hello ]]", Say("hello ")),
        ("[[count: 20]]", Count(20)),
        ("[[count: 20 @2.5]]", Count(20, 2.5)),
        ("[[repeat: ab | 5]]", Repeat("ab", 5)),
        ("[[repeat: a|b | 5]]", Repeat("a|b", 5)),
        ("[[think: hm]]", Think("hm")),
        ("[[bash: ls | wc]]", Calls((bash("ls | wc"),))),
        (r"[[write: a.txt | x\ny\\n]]", Calls((Call("Write", {"file_path": "a.txt", "content": "x\ny\\n"}, True),))),
        ("[[read: /a b.txt]]", Calls((Call("Read", {"file_path": "/a b.txt"}, True),))),
        ('[[tool: mcp__x__y | {"a": [1, [2]]}]]', Calls((Call("mcp__x__y", {"a": [1, [2]]}),))),
        ('[[tool: T | {"a": "]] [[say: no]] }"}  ]]', Calls((Call("T", {"a": "]] [[say: no]] }"}),))),
        ("[[tool: ListAgents]]", Calls((Call("ListAgents", {}),))),
        ("[[parallel: a | b | c]]", Calls((bash("a"), bash("b | c")))),
        ("[[parallel: a || b | c]]", Calls((bash("a || b"), bash("c")))),
        ("[[wait: .5]]", Wait(0.5)),
        ("[[error: 529]]", Fail(529)),
        ("[[error: 429 x3]]", Fail(429, 3)),
        ("[[drop]]", Drop()),
        ("[[ malformed ]]", Malformed()),
    ],
)
def test_each_step_is_understood(prompt: str, expected: Step) -> None:
    assert find_steps(prompt) == (expected,)


@pytest.mark.parametrize(
    "text",
    [
        "if [[ -f x ]]; then echo y; fi",
        "x=${a[${b[0]}]}; [[ -f $x ]] && echo y",
        "a[b[0]] c",
        "list [x]",
        "smile :] now",
        "sad :[ now",
        "use [[bash: ls]] to list",
        "{{}} }} {{",
        'it\'s "quoted" `so`\nsecond line\ttab',
        "zero \u0000 one \u07ff two \uffff three \U0001f600 four \U0010fffd, e\u0301, 👩‍👩‍👧",
        "awk '{print $1}' <<< \"a|b\"",
    ],
)
def test_brackets_quotes_lines_and_every_plane_survive(text: str) -> None:
    assert find_steps(f"do [[say: {text}]] then [[say: end]] ok") == (Say(text), Say("end"))


def test_an_unbalanced_bracket_does_not_swallow_the_next_step() -> None:
    assert find_steps("[[say: :[ a]] [[say: :] b]]") == (Say(":[ a"), Say(":] b"))


def test_prose_in_double_brackets_is_not_a_step() -> None:
    assert find_steps("see [[Main Page]], [[saying: x]], [[say]] and [[say: not closed") == ()


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        ("[[count: many]]", "whole number"),
        ("[[count: 0]]", "from 1"),
        ("[[wait: nan]]", "from 0"),
        ("[[error: 200]]", "from 400"),
        ("[[write: x]]", "PATH | CONTENT"),
        ("[[tool: X | [1]]]", "JSON object"),
        ("[[tool: X | {nope}]]", "not JSON"),
        ("[[say: ]]", "empty"),
    ],
)
def test_a_step_that_cannot_be_done_says_why(prompt: str, problem: str) -> None:
    (step,) = find_steps(prompt)
    assert isinstance(step, Say)
    assert problem in step.text


_SCALARS = st.none() | st.booleans() | st.integers() | st.text(max_size=12)
_JSON = st.recursive(_SCALARS, lambda inner: st.lists(inner, max_size=3), max_leaves=6)


@settings(max_examples=40)
@given(st.dictionaries(st.text(max_size=8), _JSON, max_size=3))
def test_any_json_survives(value: dict[str, Any]) -> None:
    prompt = f"[[tool: T | {json.dumps(value, ensure_ascii=False)}]] [[say: end]]"
    assert find_steps(prompt) == (Calls((Call("T", value),)), Say("end"))


@given(st.text(alphabet=st.characters(exclude_characters="[]"), min_size=1).filter(str.strip))
def test_any_text_without_brackets_survives(text: str) -> None:
    assert find_steps(f"[[say: {text}]]") == (Say(text),)


def test_a_large_prompt_is_read_in_no_time() -> None:
    begin = time.perf_counter()
    find_steps("[[say: x]] " * 5_000 + "a[" * 20_000)
    find_steps("[[say: x " * 2_000)
    assert time.perf_counter() - begin < 5
