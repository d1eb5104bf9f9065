"""Turns on the real CLI: what is said, what tools do, how a turn ends."""

import asyncio
import json
from typing import Any

import pytest

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap")]


def texts(frames: list[dict[str, Any]]) -> str:
    return "".join(f["data"]["text"] for f in frames if f["event"] == "delta" and f["data"]["kind"] == "text")


@pytest.mark.on_both_engines
async def test_a_streamed_turn_shows_tokens_before_their_block_ends(api):
    session = await api.session()
    seen = []
    async with api.stream("POST", f"/sessions/{session}/turns", json={"prompt": "[[count: 30 @60]]"}) as stream:
        seen.extend([frame async for frame in stream])
    kinds = [frame["event"] for frame in seen]
    deltas = [i for i, frame in enumerate(seen) if frame["event"] == "delta"]
    assert len(deltas) >= 25
    assert max(deltas) < kinds.index("message.assistant")
    assert kinds[-1] == "turn.completed"
    assert texts(seen) == " ".join(map(str, range(1, 31))) + " "
    assert all("id" not in seen[i] for i in deltas)
    assert seen[-1]["data"]["data"]["status"] == "succeeded"


@pytest.mark.on_both_engines
async def test_tools_run_in_the_workspace(api):
    session = await api.session()
    result = await api.run(
        session,
        "[[say: first]] [[write: note.txt | one\\ntwo]] [[read: note.txt]] [[bash: wc -l < note.txt; pwd]] [[say: last]]",
    )
    assert result["status"] == "succeeded"
    assert [call["tool"] for call in result["tool_calls"]] == ["Write", "Read", "Bash"]
    assert not any(call["is_error"] for call in result["tool_calls"])
    assert "/workspace" in result["tool_calls"][2]["result"]
    assert result["text"].startswith("first")
    assert "last" in result["text"]
    read = await api.http.get(f"/sessions/{session}/files/note.txt")
    assert read.content == b"one\ntwo"


async def test_parallel_calls_each_have_their_result(api):
    session = await api.session()
    result = await api.run(session, "[[parallel: echo left | echo right]]")
    assert [call["result"] for call in result["tool_calls"]] == ["left", "right"]


async def test_thinking_is_an_event_and_not_part_of_the_text(api):
    session = await api.session()
    result = await api.run(session, "[[think: deep thoughts]] [[say: done]]")
    assert result["text"] == "done"
    thinking = await api.until_event(session, "thinking")
    assert thinking["data"]["text"] == "deep thoughts"


async def test_a_later_turn_remembers_the_earlier_ones(api):
    session = await api.session()
    await api.run(session, "hello")
    result = await api.run(session, "and again")
    assert "turn 2" in result["text"]


@pytest.mark.on_both_engines
async def test_five_megabytes_of_text_and_of_a_tools_result(api):
    session = await api.session()
    text = await api.run(session, "[[repeat: 0123456789abcdef | 5000000]]")
    assert len(text["text"]) == 5_000_000
    big = await api.run(session, "[[bash: head -c 5000000 /dev/zero | tr '\\0' x > big.txt; cat big.txt]] [[say: ok]]")
    assert big["status"] == "succeeded"
    size = len((await api.http.get(f"/sessions/{session}/files/big.txt")).content)
    assert size == 5_000_000


@pytest.mark.parametrize(
    "text",
    [
        'braces {"a": [1, {}]} and "quotes" \\ back\\slashes',
        "ascii é ß Ж 漢字 ｆｕｌｌ 😀👩‍👩‍👧 𐍈 𠮷 \U000e0041 \U0010fffd",
        "line one\nline two\ttab",
    ],
)
async def test_odd_text_comes_through_whole(api, text):
    session = await api.session()
    result = await api.run(session, f"[[say: {text}]]")
    assert result["text"] == text
    seen = [frame async for frame in _frames(api, session, f"[[say: {text}]]")]
    assert texts(seen) == text


async def _frames(api, session, prompt):
    async with api.stream("POST", f"/sessions/{session}/turns", json={"prompt": prompt}) as stream:
        async for frame in stream:
            yield frame


async def test_an_overloaded_model_is_asked_again(api):
    session = await api.session()
    result = await api.run(session, "[[error: 529 x1]] [[say: got there]]")
    assert (result["status"], result["text"]) == ("succeeded", "got there")


async def test_a_broken_stream_resets_what_was_shown(api):
    session = await api.session()
    seen = [frame async for frame in _frames(api, session, "[[say: before]] [[drop]] [[say: after]]")]
    shown: dict[tuple[str, int], str] = {}
    for frame in seen:
        if frame["event"] != "delta":
            continue
        delta = frame["data"]
        if delta["kind"] == "reset":
            shown = {key: value for key, value in shown.items() if key[0] != delta["message_id"]}
        elif delta["kind"] == "text":
            shown[delta["message_id"], delta["block"]] = (
                shown.get((delta["message_id"], delta["block"]), "") + delta["text"]
            )
    stored = {
        (f["data"]["data"]["message_id"], f["data"]["data"]["block"]): f["data"]["data"]["text"]
        for f in seen
        if f["event"] == "message.assistant"
    }
    assert "after" in "".join(stored.values())
    # Whatever a viewer shows and the log does not have was taken back by a reset.
    assert all(stored.get(key) == value for key, value in shown.items()), (shown, stored)
    assert seen[-1]["data"]["data"]["status"] == "succeeded"


@pytest.mark.on_both_engines
async def test_interrupt_in_the_middle_of_a_count(api):
    session = await api.session()
    async with api.stream("POST", f"/sessions/{session}/turns", json={"prompt": "[[count: 1000 @20]]"}) as stream:
        async for frame in stream:
            if frame["event"] == "delta" and frame["data"]["text"].startswith("5"):
                await api.ask("POST", f"/sessions/{session}/interrupt", 202)
            last = frame
    assert last["event"] == "turn.completed"
    assert last["data"]["data"]["status"] == "interrupted"
    assert last["data"]["data"]["stop_reason"] == "interrupted"
    again = await api.run(session, "still there?")
    assert again["status"] == "succeeded"


async def test_interrupt_with_nothing_at_work_is_a_conflict(api):
    session = await api.session()
    problem = await api.ask("POST", f"/sessions/{session}/interrupt", 409)
    assert problem["code"] == "nothing_to_interrupt"


async def test_a_timeout_ends_the_turn_and_not_the_session(api):
    session = await api.session()
    result = await api.run(session, "[[count: 1000 @20]]", timeout_seconds=1)
    assert (result["status"], result["stop_reason"]) == ("failed", "timeout")
    assert result["error"]["code"] == "turn_timed_out"
    assert (await api.run(session, "next"))["status"] == "succeeded"


@pytest.mark.on_both_engines
async def test_queued_turns_run_in_order(api):
    session = await api.session()
    turns = [await api.send(session, f"[[bash: echo {i} >> order.txt]]") for i in range(4)]
    results = await asyncio.gather(*(api.until_event(session, "turn.completed", turn) for turn in turns))
    assert all(event["data"]["status"] == "succeeded" for event in results)
    order = await api.http.get(f"/sessions/{session}/files/order.txt")
    assert order.text.split() == ["0", "1", "2", "3"]


@pytest.mark.on_both_engines
async def test_a_queued_turn_can_be_cancelled_and_a_running_one_not(api):
    session = await api.session()
    first = await api.send(session, "[[count: 1000 @50]]")
    second = await api.send(session, "[[bash: touch never]]")
    await api.until_event(session, "turn.started", first)
    cancelled = await api.ask("POST", f"/sessions/{session}/turns/{second}/cancel")
    assert cancelled["status"] == "cancelled"
    problem = await api.ask("POST", f"/sessions/{session}/turns/{first}/cancel", 409)
    assert problem["code"] == "turn_not_cancellable"
    await api.ask("POST", f"/sessions/{session}/interrupt", 202)
    await api.until_event(session, "turn.completed", first)
    await api.run(session, "hello")
    assert (await api.http.get(f"/sessions/{session}/files/never")).status_code == 404


async def test_max_turns_of_a_turn_is_counted(api):
    session = await api.session()
    steps = " ".join("[[bash: echo x >> n.txt]]" for _ in range(6))
    result = await api.run(session, steps, max_turns=3)
    assert result["stop_reason"] == "max_turns"
    assert result["status"] == "succeeded"
    done = await api.http.get(f"/sessions/{session}/files/n.txt")
    assert 1 <= len(done.text.split()) <= 3


async def test_structured_output(api):
    schema = {"type": "object", "properties": {"answer": {"type": "integer"}}, "required": ["answer"]}
    session = await api.session(output_format={"type": "json_schema", "schema": schema})
    result = await api.run(session, '[[tool: StructuredOutput | {"answer": 42}]]')
    assert result["structured_output"] == {"answer": 42}


@pytest.mark.on_both_engines
async def test_usage_and_cost_are_metered(api):
    session = await api.session(model="claude-opus-5-5")
    result = await api.run(session, "hello")
    assert result["usage"]["output_tokens"] > 0
    assert result["cost_usd"] > 0
    recorded = [e for e in await api.events(session) if e["type"] == "usage.recorded"]
    assert sum(e["data"]["cost_usd"] for e in recorded) == pytest.approx(result["cost_usd"])
    whole = await api.ask("GET", f"/sessions/{session}")
    assert whole["cost_usd"] == pytest.approx(result["cost_usd"])


async def test_an_unknown_model_costs_null(api):
    session = await api.session(model="some-model-of-tomorrow")
    result = await api.run(session, "hello")
    assert result["status"] == "succeeded"
    assert result["cost_usd"] is None


async def test_the_model_of_a_turn_is_used_from_there_on(api):
    session = await api.session(model="claude-opus-5-5")
    await api.run(session, "hello")
    await api.run(session, "hello", model="claude-haiku-5-5")
    await api.run(session, "hello")
    models = [e["data"]["model"] for e in await api.events(session) if e["type"] == "message.assistant"]
    assert models == ["claude-opus-5-5", "claude-haiku-5-5", "claude-haiku-5-5"]


@pytest.mark.on_both_engines
async def test_fork_goes_on_from_an_earlier_turn(api):
    session = await api.session()
    first = await api.run(session, "[[write: a.txt | kept]]")
    await api.run(session, "second")
    fork = (await api.ask("POST", f"/sessions/{session}/fork", json={"turn_id": first["id"]}))["id"]
    forked = await api.run(fork, "after the fork")
    assert "turn 2" in forked["text"]
    original = await api.run(session, "third")
    assert "turn 3" in original["text"]
    assert (await api.http.get(f"/sessions/{fork}/files/a.txt")).text == "kept"
    await api.run(fork, "[[bash: echo changed > a.txt]]")
    assert (await api.http.get(f"/sessions/{session}/files/a.txt")).text == "kept"


@pytest.mark.on_both_engines
async def test_a_query_leaves_nothing(api):
    result = await api.ask("POST", "/query", json={"prompt": "[[say: once]]"})
    assert result["text"] == "once"
    seen = []
    async with api.stream("POST", "/query", json={"prompt": "[[say: twice]]"}) as stream:
        seen.extend([frame async for frame in stream])
    assert texts(seen) == "twice"

    async def none_left():
        return (await api.ask("GET", "/sessions"))["data"] == []

    await api.until("no session is left", none_left)

    async def no_files_left():
        return not list((api.server.data / "sessions").iterdir())

    await api.until("no files are left", no_files_left)


async def test_what_would_ask_a_person_is_denied_clearly(api):
    session = await api.session(permission_mode="default", ask_expires_seconds=0)
    result = await api.run(session, "[[bash: rm -rf /workspace/*]] [[say: well]]")
    assert result["status"] == "succeeded"
    assert result["tool_calls"][0]["is_error"]
    assert "nobody who can be asked" in json.dumps(result["tool_calls"][0]["result"])


async def test_images_and_text_in_one_prompt(api):
    session = await api.session()
    pixel = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
    content = [
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": pixel}},
        {"type": "text", "text": "[[say: I see]]"},
    ]
    result = await api.ask("POST", f"/sessions/{session}/turns", json={"content": content, "wait": True})
    assert result["text"] == "I see"
