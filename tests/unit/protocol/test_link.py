"""The frames between a runner and its gateway."""

import re
from datetime import UTC, datetime
from typing import Any, get_args

import pytest
from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json, to_json

from carrel.model import Failure, Frozen, InteractionKind, StopReason, TurnStatus
from carrel.protocol import events, link
from carrel.protocol.link import GATEWAY_FRAME, RUNNER_FRAME
from carrel.protocol.permissions import PermissionRules
from carrel.protocol.spec import SessionSpec

AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

FROM_RUNNER: list[Any] = [
    link.Hello(
        sandbox_id="b", token="t", generation=2, last_acked=7, bound=True, last_turn="t1", running_turn="t1",
        background_tasks=1, pending_asks=["i"],
    ),
    link.EventFrame(n=1, event=events.NewEvent.of(events.ErrorReported(code="c", message="é𝄞"), at=AT, turn_id="t1")),
    link.TranscriptFrame(n=2, agent_session_id="a", subpath="subagents/x", turn_id="t1", lines=['{"uuid":"u"}']),
    link.AgentReady(n=3, resumed_turn="t1"),
    link.AgentFailed(n=4, failure=Failure(code="c", message="m"), operator_detail="d"),
    link.AgentSession(n=5, agent_session_id="a"),
    link.TurnBegun(n=6, turn_id="t2", at=AT),
    link.TurnEnded(
        n=7, turn_id="t2", at=AT, status=TurnStatus.SUCCEEDED, stop_reason=StopReason.END_TURN,
        structured_output={"a": 1}, num_turns=2,
    ),
    link.Activity(n=8, background_tasks=1),
    link.Ended(n=9),
    link.Ask(
        n=10, interaction_id="i", turn_id="t1", at=AT, about=InteractionKind.PERMISSION, tool="Bash", tool_use_id="u",
        input={"command": "ls"}, reason="r", lone=True, expires_seconds=1.5, remind_seconds=2.5,
    ),
    link.Parked(n=11, interaction_id="i"),
    link.Deferred(n=12, turn_id="t1", interaction_id="i"),
    link.Taken(n=13, interaction_id="i"),
    link.DeltaFrame(delta="text", turn_id="t1", message_id="m", block=1, offset=3, text="x", parent_tool_use_id="p"),
    link.OpenBlocks(blocks=[link.OpenBlock(turn_id="t1", kind="text", message_id="m", block=0, text="so far")]),
    link.WantTranscript(),
]  # fmt: skip

FROM_GATEWAY: list[Any] = [
    link.Bind(
        id="1", session_id="s", spec=SessionSpec(model="m", tools=[]), permission_mode="plan", agent_session_id="a",
        reconcile=True, resume_turn="t1", defer_after_seconds=0.5, live_hold_seconds=2,
        asked=[link.Asked(interaction_id="i", tool_use_id="u", input_digest="0" * 64)],
    ),
    link.StartTurn(id="2", turn_id="t1", content=[{"type": "text", "text": "hi"}], max_turns=3, model="m"),
    link.Interrupt(id="3", turn_id="t1", reason=StopReason.TIMEOUT),
    link.SetModel(id="4", model=None),
    link.Answer(id="7", interaction_id="i", allow=True, input={"command": "ls"}, message="m"),
    link.SetPermissionMode(id="5", mode="plan"),
    link.SetPermissionRules(id="8", rules=PermissionRules(deny=("Bash",))),
    link.Transcript(subpath="x", lines=["{}"], last=True),
    link.Ack(n=9),
    link.Shutdown(id="6", reason="r"),
    link.Refused(reason="r"),
]  # fmt: skip


def kinds(union: Any) -> set[type]:
    return {cls for part in get_args(union) for cls in (kinds(part) if get_args(part) else {part})}


def test_every_frame_is_tried_below() -> None:
    assert {type(frame) for frame in FROM_RUNNER} == kinds(link.RunnerFrame)
    assert {type(frame) for frame in FROM_GATEWAY} == kinds(link.GatewayFrame)


@pytest.mark.parametrize(
    ("frame", "adapter"),
    [(f, RUNNER_FRAME) for f in FROM_RUNNER] + [(f, GATEWAY_FRAME) for f in FROM_GATEWAY],
    ids=lambda value: value.kind if isinstance(value, Frozen) else "",
)
def test_a_frame_comes_back_as_it_went(frame: Frozen, adapter: TypeAdapter[Any]) -> None:
    data = to_json(frame)
    assert b"\n" not in data, "frames are separated by line feeds"
    again = adapter.validate_json(data)
    assert again == frame
    assert type(again) is type(frame)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{}", b"[]", b"null", b"not json", b'{"kind":"unheard_of"}', b'{"kind":"ack"}', b'{"kind":"event","n":1}',
        b'{"kind":"ended","n":1,"more":2}', b'{"kind":"ended","n":"one"}', b'{"kind":"ended","n":1}}', b"\xff",
    ],
)  # fmt: skip
def test_what_is_no_frame_is_refused(data: bytes) -> None:
    with pytest.raises(ValidationError):
        RUNNER_FRAME.validate_json(data)
    with pytest.raises(ValidationError):
        GATEWAY_FRAME.validate_json(data)


def test_neither_side_takes_the_others_frames() -> None:
    for frame in FROM_GATEWAY:
        if frame.kind != "transcript":
            with pytest.raises(ValidationError):
                RUNNER_FRAME.validate_json(to_json(frame))
    for frame in FROM_RUNNER:
        if frame.kind != "transcript":
            with pytest.raises(ValidationError):
                GATEWAY_FRAME.validate_json(to_json(frame))


def test_exactly_the_kept_frames_are_numbered() -> None:
    numbered = {cls for cls in kinds(link.RunnerFrame) if "n" in cls.model_fields}
    assert numbered == kinds(link.NumberedFrame)
    assert kinds(link.RunnerFrame) - numbered == {link.Hello, link.DeltaFrame, link.OpenBlocks, link.WantTranscript}


def test_every_command_has_an_id() -> None:
    assert all("id" in cls.model_fields for cls in kinds(link.Command))
    assert all(cls.__doc__ for cls in kinds(link.RunnerFrame) | kinds(link.GatewayFrame))


def test_every_kind_of_delta_fits() -> None:
    for kind in events.DeltaKind:
        frame = RUNNER_FRAME.validate_json(to_json(link.DeltaFrame(delta=kind, message_id="m")))
        assert from_json(to_json(frame))["delta"] == kind


def test_a_call_has_one_digest_however_its_input_is_ordered() -> None:
    one = link.digest_of("Bash", {"command": "ls", "more": {"a": [{"x": 1, "y": 2}], "b": None}})
    assert one == link.digest_of("Bash", {"more": {"b": None, "a": [{"y": 2, "x": 1}]}, "command": "ls"})
    assert re.fullmatch("[0-9a-f]{64}", one)
    others = [("Read", {}), ("Bash", {"command": "ls"}), ("Bash", {"command": "ls", "more": {"a": [], "b": None}})]
    assert one not in {link.digest_of(tool, given) for tool, given in others}
