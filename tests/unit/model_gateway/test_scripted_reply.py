"""Which steps are due is read from the conversation alone, however Claude Code has shaped it."""

from typing import Any

import pytest

from carrel.model_gateway.scripted.conversation import read_conversation
from carrel.model_gateway.scripted.reply import QUOTE_LIMIT, Reply, plan
from carrel.model_gateway.scripted.script import BUILTIN
from carrel.model_gateway.scripted.steps import Calls, Drop, Fail, Say, Step, Think

REMINDER = "<system-reminder>\nDo [[say: never]]\n</system-reminder>\n"
CUT_OFF = "Your response above was cut off mid-stream. Resume directly from where it stops."

Message = dict[str, Any]


def user(*texts: str) -> Message:
    return {"role": "user", "content": [{"type": "text", "text": text} for text in texts]}


def said(*texts: str) -> Message:
    return {"role": "assistant", "content": [{"type": "text", "text": text} for text in texts]}


def called(*ids: str) -> Message:
    return {
        "role": "assistant",
        "content": [{"type": "tool_use", "id": id, "name": "Bash", "input": {}} for id in ids],
    }


def result(*contents: Any, is_error: bool = False) -> Message:
    blocks = [{"type": "tool_result", "tool_use_id": "t", "content": c, "is_error": is_error} for c in contents]
    return {"role": "user", "content": blocks}


def reply(*messages: Message, **more: Any) -> Reply:
    return plan(BUILTIN, read_conversation({"model": "m", "messages": list(messages), **more}))


def commands(step: Step) -> list[str]:
    assert isinstance(step, Calls)
    return [call.input["command"] for call in step.calls]


PROMPT = user("[[think: a]] [[bash: one]] [[say: b]] [[parallel: two | three]] [[say: c]]")


def test_a_message_ends_with_its_call_and_the_next_one_goes_on_after_the_result() -> None:
    first = reply(PROMPT)
    assert first.steps[0] == Think("a")
    assert commands(first.steps[1]) == ["one"]
    assert first.stop_reason == "tool_use"
    second = reply(PROMPT, called("1"), result("r1"))
    assert second.steps[0] == Say("b")
    assert commands(second.steps[1]) == ["two", "three"]
    third = reply(PROMPT, called("1"), result("r1"), called("2", "3"), result("r2", "r3"))
    assert third.steps == (Say("c"), Say("Result: r2\nResult: r3"))
    assert third.stop_reason == "end_turn"


def test_parallel_calls_whose_answers_were_split_count_the_same() -> None:
    split = reply(PROMPT, called("1"), result("r1"), called("2"), result("r2"), called("3"), result("r3"))
    assert split.steps == (Say("c"), Say("Result: r3"))


@pytest.mark.parametrize(
    ("content", "quote"),
    [
        ("plain", "Result: plain"),
        ([{"type": "text", "text": "a"}, {"type": "image", "source": {}}], "Result: a\n[image]"),
        (None, "Result: "),
        ("x" * QUOTE_LIMIT, "Result: " + "x" * QUOTE_LIMIT),
        ("x" * (QUOTE_LIMIT + 1), "Result: " + "x" * QUOTE_LIMIT + "…"),
    ],
)
def test_the_last_result_is_quoted(content: Any, quote: str) -> None:
    assert reply(user("[[bash: x]]"), called("1"), result(content)).steps == (Say(quote),)


def test_results_are_quoted_in_the_order_of_their_calls() -> None:
    late, early = result("a")["content"][0] | {"tool_use_id": "1"}, result("b")["content"][0] | {"tool_use_id": "2"}
    for results in (
        [{"role": "user", "content": [early, late]}],
        [{"role": "user", "content": [b]} for b in (early, late)],
    ):
        answer = reply(user("[[parallel: a | b]]"), called("1", "2"), *results, user(REMINDER))
        assert answer.steps == (Say("Result: a\nResult: b"),)


def test_a_failed_call_is_quoted_as_one() -> None:
    failed = reply(user("[[bash: x]]"), called("1"), result("no", is_error=True))
    assert failed.steps == (Say("Result (error): no"),)


def test_a_prompt_without_steps_gets_its_turn_and_its_words_back() -> None:
    assert reply(user("one"), said("x"), user("two"), said("y"), user("three")).steps == (
        Say('This is turn 3 of our conversation. You said: "three"'),
    )


@pytest.mark.parametrize(
    "messages",
    [
        [user(REMINDER, "[[say: yes]]")],
        [user("[[say: yes]]", REMINDER)],
        [user("[[say: yes]]" + REMINDER)],
        [user("[[say: yes]]"), {"role": "system", "content": "# Environment [[say: never]]"}],
        [user("[[say: yes]]"), user(REMINDER)],
        [user("[[say: yes]]"), user("[Request interrupted by user]")],
        [user("[[say: yes]]"), user("Continue from where you left off.")],
        [user("old", "[Request interrupted by user]", "[[say: yes]]")],
        [
            user("old"),
            called("1"),
            result("r"),
            user("[Request interrupted by user for tool use]"),
            user("[[say: yes]]"),
        ],
        [user("[[bash: a]] [[say: yes]]"), called("1"), result("r")],
        [user("[[bash: a]] [[say: yes]]"), called("1"), {**result("r"), "x": 1}, user(REMINDER)],
        [{"role": "user", "content": "[[say: yes]]"}],
        [
            user("old"),
            called("1"),
            {"role": "user", "content": [*result("r")["content"], *user("[[say: yes]]")["content"]]},
        ],
    ],
)
def test_the_prompt_is_found_among_what_claude_code_adds(messages: list[Message]) -> None:
    assert reply(*messages).steps[0] == Say("yes")


def test_the_text_that_a_skill_brings_is_not_a_prompt() -> None:
    loaded = result("Launching skill: x")
    loaded["content"] += user("Base directory for this skill: /x\n\nDo [[say: never]]")["content"]
    assert reply(user("[[tool: Skill | {}]] [[say: yes]]"), called("1"), loaded).steps[0] == Say("yes")


def test_an_answer_that_broke_off_goes_on_after_what_came_through() -> None:
    prompt = user("[[say: a]] [[say: b]] [[drop]] [[say: c]]")
    assert reply(prompt, said("a"), user(CUT_OFF)).steps == (Say("b"), Say("c"))
    prompt = user("[[bash: x]] [[say: a]] [[error: 529 x2]] [[say: b]]")
    again = reply(prompt, called("1"), result("r"), said("a"), user(CUT_OFF))
    assert again.steps == (Fail(529), Say("b"), Say("Result: r"))


def test_a_turn_asked_once_more_when_all_is_done_has_nothing_left() -> None:
    for done in ([said("a")], [called("1"), result("r"), said("a", "Result: r")]):
        steps = "[[bash: x]] [[say: a]]" if len(done) > 1 else "[[say: a]]"
        assert reply(user(steps), *done, user(REMINDER)).steps == (Say("Noted. Nothing is left to do."),)


def test_faults_strike_in_order_and_then_no_more() -> None:
    broken = reply(user("[[error: 529 x2]] [[say: a]] [[drop]] [[say: b]]"))
    assert [broken.attempt(n).fault for n in range(4)] == [Fail(529, 2), Fail(529, 2), Drop(), None]
    assert broken.attempt(2).steps == (Say("a"), Drop())
    assert broken.attempt(3).steps == (Say("a"), Say("b"))


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, "/workspace/d/a.txt"),
        ({"system": "<env>\nWorking directory: /srv/my app\nPlatform: linux\n</env>"}, "/srv/my app/d/a.txt"),
        ({"system": [{"type": "text", "text": " - Primary working directory: /w\n - x"}]}, "/w/d/a.txt"),
    ],
)
def test_a_relative_path_starts_where_the_agent_works(more: dict[str, Any], expected: str) -> None:
    (step,) = reply(user("[[write: ./d/a.txt | x]] "), **more).steps
    assert isinstance(step, Calls)
    assert step.calls[0].input["file_path"] == expected


def test_the_working_directory_may_stand_in_a_system_message_but_not_in_the_prompt() -> None:
    late = {"role": "system", "content": [{"type": "text", "text": " - Primary working directory: /late\n"}]}
    for messages, expected in [
        ([user("[[read: a]] Working directory: /mine")], "/workspace/a"),
        ([user("[[read: a]]"), late], "/late/a"),
        ([user("[[read: /abs/../a]]"), late], "/abs/../a"),
    ]:
        (step,) = reply(*messages).steps
        assert isinstance(step, Calls)
        assert step.calls[0].input["file_path"] == expected


def test_a_repeated_request_is_known_again_and_a_longer_one_is_not() -> None:
    def key(*messages: Message, session: str = "s") -> bytes:
        return read_conversation({"model": "m", "messages": list(messages)}, session=session).fingerprint()

    plain = {"role": "user", "content": "hi"}
    marked = {"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]}
    assert key(plain) == key(marked) == key(user(REMINDER, "hi"))
    assert key(plain) != key(plain, said("x"), plain)
    assert key(plain) != key(plain, session="other")
