"""The frames of each dialect, held byte for byte by golden files."""

from pathlib import Path

import pytest

from carrel.api.dialects import claude_agent_http, sdk_server, turns
from carrel.api.dialects.pieces import End, Piece, Text, Thinking, ToolUse
from carrel.model import Principal, Turn, TurnStatus, utc_now

GOLDEN = Path(__file__).parents[2] / "golden" / "dialects"

SENT = turns.Sent(
    Principal.of_user("alice"),
    Turn(id="t", session_id="s", number=1, status=TurnStatus.QUEUED, created_at=utc_now()),
    0,
    120,
)


def ending(status: str, stop_reason: str | None = "end_turn", code: str | None = None) -> End:
    error = None if code is None else {"code": code, "message": "It did not work."}
    facts = {"duration_ms": 1500, "num_turns": 2, "cost_usd": 0.0125}
    return End({"status": status, "stop_reason": stop_reason, "error": error, **facts})


PIECES: list[Piece] = [
    Text('Hé said "{}"\n\u2028\u2029\x85😀'),
    Thinking("hm"),
    ToolUse("toolu_1", "Bash", {"command": "echo 'ä' | tr -d \"}\"", "nested": {"a": [1, None, True]}}),
    ending("succeeded"),
    ending("succeeded", "max_turns"),
    ending("interrupted", "interrupted"),
    ending("cancelled", None),
    ending("failed", "timeout", "turn_timed_out"),
    ending("expired", None),
    ending("failed", "sandbox_lost", "sandbox_lost"),
    ending("failed", "error", "missing_credential"),
]


def agent_http() -> bytes:
    frames = [frame for piece in PIECES for frame in claude_agent_http._frame(piece, SENT)]
    return b"".join(turns.encode(frame) for frame in [*frames, *claude_agent_http._error("Session not found")])


def sdk() -> bytes:
    frames = [frame for piece in PIECES for frame in sdk_server._frame(piece, SENT, include_thinking=True)]
    return b"".join(turns.encode(frame) for frame in [*frames, *sdk_server._error("Session not found")])


@pytest.mark.parametrize(("name", "made"), [("claude-agent-http", agent_http()), ("sdk-server", sdk())])
def test_frames_are_what_they_were(name: str, made: bytes) -> None:
    assert made == (GOLDEN / f"{name}.sse").read_bytes()
    assert len(made.decode().splitlines()) == 2 * made.count(b"data: ")


def test_thinking_is_shown_where_it_is_asked_for() -> None:
    assert list(sdk_server._frame(Thinking("hm"), SENT, include_thinking=False)) == []
    assert list(claude_agent_http._frame(Thinking("hm"), SENT)) == []


@pytest.mark.parametrize(
    ("status", "reason", "code", "expected"),
    [
        ("succeeded", "end_turn", None, None),
        ("interrupted", "interrupted", None, None),
        ("cancelled", None, None, None),
        ("failed", "timeout", "turn_timed_out", 504),
        ("expired", None, None, 504),
        ("failed", "error", "agent_failed", 500),
        ("failed", "error", "missing_credential", 503),
        ("failed", "error", "no_such_code", 500),
    ],
)
def test_how_a_turn_ended_as_a_status_of_http(status: str, reason: str, code: str, expected: int) -> None:
    assert turns.problem_of(status, reason, code) == expected
