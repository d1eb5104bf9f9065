"""Script files: what they can say, and what is said about bad ones."""

from pathlib import Path

import pytest

from carrel.model_gateway.scripted import BUILTIN, Script, ScriptError, load_script, parse_script
from carrel.model_gateway.scripted.steps import (
    Call,
    Calls,
    Count,
    Drop,
    Fail,
    Malformed,
    Repeat,
    Say,
    Think,
    Wait,
    bash,
)

ALL_STEPS = """
rules:
  - pattern: "(?i)everything"
    steps:
      - think: Let me see.
      - say: "Raw [[bash: text]] | stays"
      - count: 3
      - count: {to: 3, rate: 10}
      - count: 3 @10
      - repeat: {text: ab, bytes: 7}
      - bash: ls | wc -l
      - write: {path: a.txt, content: "one\\ntwo"}
      - read: a.txt
      - tool: {name: mcp__x__y, input: {a: [1, 2]}}
      - parallel: [ls, pwd]
      - parallel: [{name: Read, input: {file_path: /x}}, {name: ListAgents}]
      - wait: 0.5
      - error: 529
      - error: {status: 429, times: 2, message: Slow down.}
      - drop
      - malformed:
default:
  - say: Pardon?
"""


def test_a_file_can_say_every_step(tmp_path: Path) -> None:
    path = tmp_path / "script.yaml"
    path.write_text(ALL_STEPS)
    script = load_script(path)
    assert script.steps_for("Do Everything") == (
        Think("Let me see."),
        Say("Raw [[bash: text]] | stays"),
        Count(3),
        Count(3, 10),
        Count(3, 10),
        Repeat("ab", 7),
        Calls((bash("ls | wc -l"),)),
        Calls((Call("Write", {"file_path": "a.txt", "content": "one\ntwo"}, True),)),
        Calls((Call("Read", {"file_path": "a.txt"}, True),)),
        Calls((Call("mcp__x__y", {"a": [1, 2]}),)),
        Calls((bash("ls"), bash("pwd"))),
        Calls((Call("Read", {"file_path": "/x"}), Call("ListAgents", {}))),
        Wait(0.5),
        Fail(529),
        Fail(429, 2, "Slow down."),
        Drop(),
        Malformed(),
    )
    assert script.steps_for("something else") == (Say("Pardon?"),)


def test_the_first_rule_that_matches_answers() -> None:
    script = parse_script("rules: [{pattern: a, steps: [say: one]}, {pattern: ab, steps: [say: two]}]")
    assert script.steps_for("xab") == (Say("one"),)


def test_without_a_default_the_marks_of_the_prompt_count() -> None:
    script = parse_script("rules: [{pattern: never, steps: []}]")
    assert script.steps_for("[[say: marked]]") == (Say("marked"),)
    assert Script() == BUILTIN


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("", 0, ["empty"]),
        ("- say: x", 1, ["mapping", "rules"]),
        ("rules: [\n", 2, ["not valid YAML"]),
        ("rulez: []", 1, ["rulez", "known: default, rules"]),
        ("rules: 3", 1, ["rules", "list"]),
        ("rules:\n  - steps: []", 2, ["rules[0]", "lacks pattern"]),
        ("rules:\n  - pattern: '('\n    steps: []", 2, ["rules[0].pattern", "regular expression"]),
        ("rules:\n  - pattern: 3\n    steps: []", 2, ["rules[0].pattern", "text"]),
        ("default:\n  - say: a\n  - shout: b", 3, ["default[1]", "shout"]),
        ("default:\n  - say: a\n    bash: b", 2, ["default[0]", "more than one"]),
        ("default:\n  - say: a\n    say: b", 3, ["default[0]", "twice"]),
        ("default:\n  - hello", 2, ["default[0]", "say: Hello"]),
        ("default:\n  - error: soon", 2, ["default[0].error", "whole number"]),
        ("default:\n  - error: {times: 2}", 2, ["default[0].error", "lacks status"]),
        ("default:\n  - count: {to: 2, speed: 3}", 2, ["default[0].count", "speed"]),
        ("default:\n  - bash: true", 2, ["default[0].bash", "a truth value"]),
        ("default:\n  - tool: {name: x, input: [1]}", 2, ["default[0].tool", "object"]),
        ("default:\n  - [say]: x", 2, ["default[0]"]),
    ],
)
def test_a_bad_script_is_told_by_line_and_key(text: str, line: int, words: list[str]) -> None:
    with pytest.raises(ScriptError) as caught:
        parse_script(text, name="my.yaml")
    message = str(caught.value)
    assert message.startswith(f"my.yaml, line {line}: " if line else "my.yaml: ")
    for word in words:
        assert word in message


def test_a_missing_or_binary_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ScriptError, match="cannot be read: No such file"):
        load_script(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ScriptError, match="not UTF-8"):
        load_script(tmp_path / "binary.yaml")
