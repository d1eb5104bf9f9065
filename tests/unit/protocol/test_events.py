"""Every kind of event and delta has golden files: what was stored once loads for ever.

`tests/golden/events/<type>.json` is the first version of a kind's golden file, `<type>.2.json` the second, and so on.
The newest one must be, byte for byte, what is written today. Never change one: where a kind grows, make the next with

    CARREL_UPDATE_GOLDEN=1 .venv/bin/python -m pytest tests/unit/protocol/test_events.py

which writes what is missing and touches nothing that is there.
"""

import json
import os
import re
from datetime import UTC, datetime
from pathlib import Path

import pytest
from pydantic import ValidationError

from carrel.model import Failure, SessionStatus, StopReason, TurnOrigin, TurnStatus, Usage
from carrel.protocol import events
from carrel.protocol.events import EVENT_TYPES, Delta, DeltaKind, EventData, NewEvent, StoredEvent

GOLDEN = Path(__file__).parents[2] / "golden" / "events"
AT = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
UPDATE = os.environ.get("CARREL_UPDATE_GOLDEN") == "1"

USAGE = Usage(input_tokens=1, output_tokens=2, cache_creation_input_tokens=3, cache_read_input_tokens=4)
FAILURE = Failure(code="sandbox_lost", message="It is “gone”.")
TEXT = 'é "quoted" {braces} 𝄞\n\u2028\u0000\\'

SAMPLES: dict[str, EventData] = {
    "session.created": events.SessionCreated(title=TEXT, forked_from="s0", forked_at_turn="t0", parent_id="s1"),
    "session.updated": events.SessionUpdated(changed=["model", "tools"], at_next_launch=["tools"]),
    "session.status_changed": events.SessionStatusChanged(
        status=SessionStatus.FAILED, previous=SessionStatus.STARTING, stop_reason=StopReason.ERROR, error=FAILURE
    ),
    "session.rewound": events.SessionRewound(to_turn_id="t1", snapshot_id="n1"),
    "child.created": events.ChildCreated(child_session_id="s2", turn_id="t2", task_type=TEXT),
    "child.ended": events.ChildEnded(
        child_session_id="s2",
        turn_id="t2",
        status=TurnStatus.FAILED,
        stop_reason=StopReason.SANDBOX_LOST,
        error=FAILURE,
        cost_usd=0.125,
    ),
    "workspace.restored": events.WorkspaceRestored(snapshot_id="n1", reason="lost", taken_at=AT, seq=7),
    "workspace.lost": events.WorkspaceLost(message=TEXT),
    "workspace.snapshot_failed": events.WorkspaceSnapshotFailed(code="object_store_unavailable", message=TEXT),
    "workspace.quota_exceeded": events.WorkspaceQuotaExceeded(size_bytes=2**40, quota_mb=5),
    "workspace.cloned": events.WorkspaceCloned(
        repo="https://git.example.com/shop.git", ref="main", commit="0" * 40
    ),
    "workspace.unpacked": events.WorkspaceUnpacked(path="src", members=3, bytes=2**33),
    "session.deleted": events.SessionDeleted(),
    "turn.queued": events.TurnQueued(number=3, ahead=2, place=5),
    "turn.started": events.TurnStarted(origin=TurnOrigin.AGENT, attempt=2),
    "turn.completed": events.TurnCompleted(
        status=TurnStatus.FAILED,
        stop_reason=StopReason.SANDBOX_LOST,
        error=FAILURE,
        structured_output={"a": [1, None, 1.5]},
        usage=USAGE,
        cost_usd=0.125,
        num_turns=4,
        duration_ms=1234,
    ),
    "message.user": events.MessageUser(content=[{"type": "text", "text": TEXT}], parent_tool_use_id="toolu_0"),
    "message.assistant": events.MessageAssistant(
        message_id="msg_1", block=1, text=TEXT, model="m", parent_tool_use_id="toolu_0"
    ),
    "message.system": events.MessageSystem(subtype="api_retry", data={"attempt": 1}),
    "thinking": events.Thinking(message_id="msg_1", block=0, text=TEXT, parent_tool_use_id="toolu_0"),
    "tool.called": events.ToolCalled(
        id="toolu_1", tool="Bash", input={"command": TEXT}, message_id="msg_1", block=2, parent_tool_use_id="toolu_0"
    ),
    "tool.finished": events.ToolFinished(
        id="toolu_1", tool="Bash", result=[{"type": "text", "text": TEXT}], is_error=True, parent_tool_use_id="toolu_0"
    ),
    "agent.initialised": events.AgentInitialised(
        model="m",
        tools=["Bash"],
        mcp_servers=[{"name": "x", "status": "connected"}],
        permission_mode="plan",
        skills=["s"],
        agent_version="2.1.0",
    ),
    "interaction.requested": events.InteractionRequested(
        interaction_id="i1", kind="permission", tool="Bash", input={"command": "ls"}, title=TEXT, reason=TEXT,
        expires_at=AT,
    ),
    "interaction.reminded": events.InteractionReminded(interaction_id="i1", remind_at=AT),
    "interaction.resolved": events.InteractionResolved(
        interaction_id="i1", status="answered", answer={"behavior": "allow"}, answered_by="alice"
    ),
    "usage.recorded": events.UsageRecorded(request_id="r1", model="m", usage=USAGE, cost_usd=0.5),
    "error": events.ErrorReported(code="hook_failed", message=TEXT),
}  # fmt: skip

DELTAS = {
    kind: Delta(
        session_id="s", turn_id="t1", kind=kind, message_id="msg_1", block=1, offset=7, text=TEXT,
        parent_tool_use_id="toolu_0" if kind is DeltaKind.TEXT else None,
    )
    for kind in DeltaKind
}  # fmt: skip


def stored(data: EventData) -> StoredEvent:
    """The event as the store would number it."""
    new = NewEvent.of(data, at=AT, turn_id="t1")
    raw = json.dumps(new.data, ensure_ascii=False, separators=(",", ":"))
    return StoredEvent(session_id="s", seq=7, turn_id="t1", type=new.type, at=new.at, raw_data=raw)


def today() -> dict[str, bytes]:
    """What is written today, by the name of its golden file."""
    found = {name: stored(data).json() for name, data in SAMPLES.items()}
    return found | {f"delta.{kind}": delta.json() for kind, delta in DELTAS.items()}


def versions(name: str) -> list[Path]:
    """The golden files of a kind, oldest first."""
    found = [p for p in GOLDEN.glob("*.json") if re.fullmatch(re.escape(name) + r"(\.\d+)?\.json", p.name)]
    return sorted(found, key=lambda path: int(match[1]) if (match := re.search(r"\.(\d+)\.json$", path.name)) else 1)


if UPDATE:
    for _name, _now in today().items():
        _known = versions(_name)
        if not _known or _known[-1].read_bytes() != _now + b"\n":
            _suffix = f".{len(_known) + 1}" if _known else ""
            (GOLDEN / f"{_name}{_suffix}.json").write_bytes(_now + b"\n")


def test_every_kind_has_a_golden_file_and_no_other_has() -> None:
    kinds = {re.sub(r"(\.\d+)?\.json$", "", path.name) for path in GOLDEN.iterdir()}
    assert kinds == set(EVENT_TYPES) | {f"delta.{kind}" for kind in DeltaKind}
    assert set(SAMPLES) == set(EVENT_TYPES)


@pytest.mark.parametrize("name", today())
def test_what_is_written_today_is_the_newest_golden_file(name: str) -> None:
    assert versions(name)[-1].read_bytes() == today()[name] + b"\n"


@pytest.mark.parametrize("path", sorted(GOLDEN.iterdir()), ids=lambda path: path.name)
def test_what_was_written_once_loads_for_ever(path: Path) -> None:
    value = json.loads(path.read_bytes())
    if value["type"] == "delta":
        assert set(value) >= {"kind", "turn_id", "message_id", "block", "offset", "text"}
        assert DeltaKind(value["kind"])
        return
    loaded = EVENT_TYPES[value["type"]].model_validate(value["data"])
    assert loaded.model_dump(mode="json", include=set(value["data"])) == value["data"]


def test_a_sample_leaves_no_field_at_its_default() -> None:
    for name, data in SAMPLES.items():
        for field, info in type(data).model_fields.items():
            assert info.is_required() or getattr(data, field) != info.get_default(call_default_factory=True), (
                f"{name}.{field}"
            )


@pytest.mark.parametrize("cls", EVENT_TYPES.values(), ids=EVENT_TYPES)
def test_events_are_documented_frozen_and_strict(cls: type[EventData]) -> None:
    assert cls.__doc__
    sample = SAMPLES[cls.type]
    if fields := list(cls.model_fields):
        with pytest.raises(ValidationError):
            setattr(sample, fields[0], None)
    with pytest.raises(ValidationError):
        cls.model_validate(sample.model_dump() | {"unheard_of": 1})


def test_types_are_in_the_past_tense_or_name_what_is_said() -> None:
    said = {"thinking", "error", "message.user", "message.assistant", "message.system"}
    assert all(re.fullmatch(r"[a-z]+\.[a-z_]*(ed|ound|lost)", name) for name in set(EVENT_TYPES) - said)


def test_an_event_is_serialised_once() -> None:
    event = stored(SAMPLES["error"])
    assert event.json() is event.json()
    assert event.sse() is event.sse()
    delta = DELTAS[DeltaKind.TEXT]
    assert delta.json() is delta.json()


@pytest.mark.parametrize("name", SAMPLES)
def test_an_event_on_the_wire_is_one_frame(name: str) -> None:
    event = stored(SAMPLES[name])
    frame = event.sse().decode()
    assert frame.startswith(f"id: 7\nevent: {name}\ndata: ")
    assert frame.endswith("\n\n")
    # A line feed, or any other line break of the format, in the data would break the frame in two.
    assert len(re.split(r"\r\n|\n|\r", frame)) == 5
    value = json.loads(frame.split("data: ", 1)[1])
    assert value == {"seq": 7, "type": name, "turn_id": "t1", "at": "2026-01-02T03:04:05.678901Z", "data": event.data}


def test_a_delta_on_the_wire_has_no_id() -> None:
    frame = DELTAS[DeltaKind.TEXT].sse()
    assert frame.startswith(b"event: delta\ndata: {")
    assert b"\nid:" not in frame
    assert json.loads(frame.split(b"data: ", 1)[1])["parent_tool_use_id"] == "toolu_0"
    assert "parent_tool_use_id" not in json.loads(DELTAS[DeltaKind.RESET].json())


def test_no_two_events_share_a_default() -> None:
    one, two = events.AgentInitialised(), events.AgentInitialised()
    assert one.tools == []
    assert one.tools is not two.tools
