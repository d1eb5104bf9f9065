"""Usage, messages and search over HTTP, on turns of the real CLI."""

import csv
import io

import pytest

from carrel import abc
from carrel.model import Usage, new_id, utc_now

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap")]

MODEL = "claude-opus-5-5"
COUNTS = tuple(Usage.model_fields)


async def test_usage_is_the_sum_of_the_events_however_it_is_grouped(api):
    sessions = [await api.session(model=MODEL), await api.session(model="claude-haiku-5-5")]
    for session in sessions:
        await api.run(session, "[[bash: true]] [[say: done]]")
    await api.run(sessions[0], "again")
    recorded = [
        event for session in sessions for event in await api.events(session) if event["type"] == "usage.recorded"
    ]
    whole = await api.ask("GET", "/usage")
    assert whole["data"] == [whole["total"]]
    for group in ("user", "session", "turn", "model", "day", "user,day,model,session,turn"):
        report = await api.ask("GET", "/usage", params={"group_by": group})
        assert set(report["data"][0]) == {*group.split(","), "requests", "cost_usd", *COUNTS}
        assert report["total"] == whole["total"]
        for rows in (report["data"], [report["total"]]):
            assert sum(row["requests"] for row in rows) == len(recorded)
            for name in COUNTS:
                assert sum(row[name] for row in rows) == sum(event["data"]["usage"][name] for event in recorded)
            assert sum(row["cost_usd"] for row in rows) == pytest.approx(sum(e["data"]["cost_usd"] for e in recorded))
    one = await api.ask("GET", "/usage", params={"group_by": "session", "session_id": sessions[1]})
    assert [row["session"] for row in one["data"]] == [sessions[1]]
    told = await api.ask("GET", f"/sessions/{sessions[1]}")
    assert one["total"]["cost_usd"] == pytest.approx(told["cost_usd"])
    assert {name: one["total"][name] for name in COUNTS} == told["usage"]
    day = f"{utc_now():%Y-%m-%d}"
    assert (await api.ask("GET", "/usage", params={"since": day}))["total"] == whole["total"]
    assert (await api.ask("GET", "/usage", params={"until": day}))["total"]["requests"] == 0
    assert (await api.ask("GET", "/usage", params={"user": "nobody"}))["data"] == []
    pages = await api.ask("GET", "/usage", params={"group_by": "turn", "limit": 2})
    rest = await api.ask("GET", "/usage", params={"group_by": "turn", "limit": 2, "cursor": pages["next_cursor"]})
    assert (len(pages["data"]), len(rest["data"]), rest["next_cursor"]) == (2, 1, None)
    await api.ask("DELETE", f"/sessions/{sessions[0]}")
    assert (await api.ask("GET", "/usage"))["total"] == whole["total"], "what was spent stays spent"


async def test_usage_as_csv_is_quoted_and_harmless(api):
    store = api.server.services.store
    names = ["=1+1", "+cmd", "@x", "-2", 'plain, "quoted"\nname', "\ttab", "claude"]
    for name in names:
        record = abc.UsageRecord(
            id=new_id(),
            session_id="gone",
            user_id="alice",
            turn_id=None,
            model=name,
            usage=Usage(input_tokens=1),
            cost_usd=None if name == "claude" else 0.5,
            at=utc_now(),
        )
        await store.write(lambda tx, r=record: tx.usage.add(r))
    for options in ({"params": {"format": "csv"}}, {"headers": {"Accept": "text/csv"}}):
        params = {"group_by": "model,turn", **options.get("params", {})}
        answer = await api.http.get("/usage", params=params, headers=options.get("headers"))
        assert answer.headers["content-type"].startswith("text/csv")
        rows = list(csv.reader(io.StringIO(answer.text, newline="")))
        assert rows[0] == ["model", "turn", "requests", *COUNTS, "cost_usd"]
        found = {row[0]: row for row in rows[1:]}
        assert set(found) == {"'=1+1", "'+cmd", "'@x", "'-2", 'plain, "quoted"\nname', "'\ttab", "claude"}
        assert found["claude"] == ["claude", "", "1", "1", "0", "0", "0", ""]
        assert found["'@x"][-1] == "0.5"


@pytest.mark.parametrize(
    ("path", "params", "code"),
    [
        ("/usage", {"group_by": "colour"}, "validation_failed"),
        ("/usage", {"since": "yesterday"}, "validation_failed"),
        ("/usage", {"user": "a\x00b"}, "validation_failed"),
        ("/usage", {"cursor": "x"}, "invalid_cursor"),
        ("/usage/budgets", {"session_id": "none"}, "session_not_found"),
        ("/sessions", {"q": "\x00"}, "validation_failed"),
        ("/sessions/none/messages", {}, "session_not_found"),
    ],
)
async def test_what_makes_no_sense_is_told(api, path, params, code):
    answer = await api.http.get(path, params=params)
    assert answer.json()["code"] == code


async def test_the_history_is_told_as_messages(api):
    session = await api.session(model=MODEL)
    await api.run(session, "[[think: hm]] [[say: first]] [[bash: echo out]] [[say: last]]")
    agent = (
        '[[tool: Agent | {"description": "d", "prompt": "[[say: from below]]", "subagent_type": "general-purpose"}]]'
    )
    second = await api.run(session, f"{agent} [[say: above]]")

    async def whole():
        # The sub-agent works in the background: when it is done, the agent begins a turn by itself.
        page = await api.ask("GET", f"/sessions/{session}/messages")
        below = any(message["parent_tool_use_id"] for message in page["data"])
        return page if below and all(message["complete"] for message in page["data"]) else None

    page = await api.until("the history is whole", whole)
    messages = page["data"]
    assert page["next_cursor"] is None
    first = [m for m in messages if m["seq"] < messages[4]["seq"]]
    assert [(m["role"], [b["type"] for b in m["content"]]) for m in first] == [
        ("user", ["text"]),
        ("assistant", ["text", "tool_use"]),
        ("user", ["tool_result"]),
        ("assistant", [*["text"] * len(first[3]["content"])]),
    ]
    assert first[1]["content"][0]["text"] == "first"
    assert first[1]["content"][1]["id"] == first[2]["content"][0]["tool_use_id"]
    assert first[2]["content"][0]["content"] == "out"
    assert first[1]["model"] == MODEL
    below = [m for m in messages if m["parent_tool_use_id"] is not None]
    assert any("from below" in str(m["content"]) for m in below)
    thinking = await api.ask("GET", f"/sessions/{session}/messages", params={"thinking": True})
    assert thinking["data"][1]["content"][0]["type"] == "thinking"
    found, after = [], 0
    while True:
        page = await api.ask("GET", f"/sessions/{session}/messages", params={"after": after, "limit": 2})
        found += page["data"]
        if page["next_cursor"] is None:
            break
        after = page["next_cursor"]
    assert found[: len(messages)] == messages, "the agent may have gone on by itself since"
    by_turn = await api.ask("GET", f"/sessions/{session}/messages", params={"turn_id": second["id"]})
    assert by_turn["data"] == [m for m in messages if m["turn_id"] == second["id"]]


async def test_search_over_titles_and_what_was_said(api):
    session = await api.session(title="Ärger mit 100%")
    await api.run(session, "[[say: the quick_brown FOX said é]]")
    other = await api.session(title="another")

    async def search(text):
        return [s["id"] for s in (await api.ask("GET", "/sessions", params={"q": text}))["data"]]

    for text in ("ärger", "ÄRGER", "100%", "quick_brown", "fox", "É"):
        assert await search(text) == [session], text
    for text in ("100_", "quickxbrown", "message_id", "'"):
        assert await search(text) == [], text
    assert await search("ANOTHER") == [other]
    messages = await api.ask("GET", f"/sessions/{session}/messages", params={"q": "FOX SAID"})
    assert {m["role"] for m in messages["data"]} == {"user", "assistant"}
