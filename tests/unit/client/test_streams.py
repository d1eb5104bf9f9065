"""What a stream gives, over connections that break; without any connection."""

from typing import Any

import httpx
import pytest

from carrel.client.streams import LONGEST_DELAY_SECONDS, FollowEvents, FollowTurn, Patience
from carrel.client.types import Delta, Event, Frame
from carrel.errors import CarrelError, Draining, ServerUnreachable, SessionNotFound, Unavailable

CUT = httpx.ReadError("cut")
REFUSED = httpx.ConnectError("refused")


def follow(after: int = 0, *, give_up_seconds: float = 60) -> FollowEvents:
    return FollowEvents("http://x", "s1", after=after, deltas=True, give_up_seconds=give_up_seconds)


def turn(**options: Any) -> FollowTurn:
    return FollowTurn("http://x", "s1", "Hello", options, deltas=True, idempotency_key="the-key", give_up_seconds=60)


def shown(frames: list[Frame]) -> list[Any]:
    return [frame.seq if isinstance(frame, Event) else (frame.kind, frame.offset, frame.text) for frame in frames]


def test_events_that_come_twice_are_given_once(wire: Any) -> None:
    stream = follow()
    stream.opened()
    one, two, three = (wire.event(seq, "usage.recorded") for seq in (1, 2, 3))
    assert shown(list(stream.feed(one + two))) == [1, 2]
    stream.lost(CUT)
    stream.opened()
    assert shown(list(stream.feed(one + two + three))) == [3]


def test_it_goes_on_after_the_last_event_it_gave(wire: Any) -> None:
    stream = follow(after=4)
    stream.opened()
    whole = wire.event(5, "usage.recorded")
    list(stream.feed(whole + wire.event(6, "usage.recorded")[:-1]))  # the second lacks its last byte
    stream.lost(CUT)
    call = stream.request()
    assert call.headers["Last-Event-ID"] == "5"
    assert call.params["after"] == 5
    stream.opened()
    assert shown(list(stream.feed(wire.event(6, "usage.recorded")))) == [6]


def test_the_text_so_far_is_not_given_twice(wire: Any) -> None:
    stream = follow()
    stream.opened()
    list(stream.feed(wire.delta("Grüße ")))
    stream.lost(CUT)
    stream.opened()
    frames = list(stream.feed(wire.delta("Grüße an") + wire.delta(" alle", 8) + wire.delta("alle", 9)))
    assert shown(frames) == [("text", 6, "an"), ("text", 8, " alle")]


def test_a_reset_takes_back_what_was_given(wire: Any) -> None:
    stream = follow()
    stream.opened()
    frames = list(stream.feed(wire.delta("Hel") + wire.delta("", kind="reset") + wire.delta("Hel")))
    assert shown(frames) == [("text", 0, "Hel"), ("reset", 0, ""), ("text", 0, "Hel")]


def test_a_message_begun_anew_while_nobody_listened_is_reset(wire: Any) -> None:
    stream = follow()
    stream.opened()
    list(stream.feed(wire.delta("Hel", message="lost")))
    stream.lost(CUT)
    stream.opened()
    frames = list(stream.feed(wire.delta("Hello", message="anew")))
    assert [(f.kind, f.message_id) for f in frames if isinstance(f, Delta)] == [("reset", "lost"), ("text", "anew")]


def test_a_message_that_goes_on_after_a_break_is_not_reset(wire: Any) -> None:
    stream = follow()
    stream.opened()
    list(stream.feed(wire.delta("Hel", message="m1")))
    stream.lost(CUT)
    stream.opened()
    frames = list(
        stream.feed(wire.delta("Hello", message="m1") + wire.said(1, "Hello") + wire.delta("X", message="m2"))
    )
    assert shown(frames) == [("text", 3, "lo"), 1, ("text", 0, "X")]


def test_a_message_finished_while_nobody_listened_is_not_reset(wire: Any) -> None:
    stream = follow()
    stream.opened()
    list(stream.feed(wire.delta("Hel")))
    stream.lost(CUT)
    stream.opened()
    assert shown(list(stream.feed(wire.said(1, "Hello") + wire.completed(2)))) == [1, 2]


def test_following_ends_with_the_session(wire: Any) -> None:
    stream = follow()
    stream.opened()
    frames = list(stream.feed(wire.completed(1) + wire.event(2, "session.deleted", None) + wire.event(3, "error")))
    assert shown(frames) == [1, 2]
    assert stream.over


def test_a_turn_gives_its_own_events_alone_and_ends(wire: Any) -> None:
    stream = turn()
    stream.opened()
    list(stream.feed(wire.event(7, "turn.queued", "t1", number=1, ahead=0)))
    stream.lost(CUT)
    stream.opened()
    rest = wire.completed(8, turn_id="t0") + wire.delta("other", turn_id="t2") + wire.completed(9)
    assert shown(list(stream.feed(rest))) == [9]
    assert stream.over


def test_a_prompt_is_sent_again_under_its_key_until_its_turn_is_known(wire: Any) -> None:
    stream = turn()
    first = stream.request()
    stream.lost(CUT)
    assert stream.request() == first
    assert first.headers["Idempotency-Key"] == "the-key"
    stream.opened()
    list(stream.feed(wire.event(7, "turn.queued", "t1", number=1, ahead=0)))
    stream.lost(CUT)
    assert (stream.request().method, stream.request().params["after"]) == ("GET", 7)


def test_a_turn_that_ends_with_its_connection_is_not_taken_up_again() -> None:
    stream = turn(on_disconnect="interrupt")
    stream.opened()
    with pytest.raises(ServerUnreachable):
        stream.lost(CUT)


@pytest.mark.parametrize("error", [REFUSED, SessionNotFound(), Draining()])
def test_a_refusal_at_the_start_is_final(error: httpx.TransportError | CarrelError) -> None:
    with pytest.raises(ServerUnreachable if error is REFUSED else type(error)):  # type: ignore[arg-type]
        follow().lost(error)


@pytest.mark.parametrize("error", [REFUSED, CUT, None, Draining(), Unavailable()])
def test_later_it_is_tried_again(error: httpx.TransportError | CarrelError | None) -> None:
    stream = follow()
    stream.opened()
    assert stream.lost(error) >= (5 if isinstance(error, Draining) else 0)


def test_what_no_repeat_can_mend_is_final_later_too() -> None:
    stream = follow()
    stream.opened()
    with pytest.raises(SessionNotFound):
        stream.lost(SessionNotFound())


def test_it_gives_up() -> None:
    stream = follow(give_up_seconds=0)
    stream.opened()
    with pytest.raises(ServerUnreachable):
        stream.lost(REFUSED)


def test_delays_grow_to_a_bound_and_end() -> None:
    now = 0.0
    patience = Patience(60, clock=lambda: now)
    delays: list[float] = []
    while (delay := patience.next_delay()) is not None:
        delays.append(delay)
        now += delay
    assert delays[0] <= 0.1
    assert max(delays) <= LONGEST_DELAY_SECONDS
    assert max(delays) > 2
    assert 60 <= sum(delays) <= 60 + LONGEST_DELAY_SECONDS
    patience.renew()
    assert (patience.next_delay() or 1) <= 0.1


def test_a_server_that_is_heard_of_renews_the_patience() -> None:
    stream = follow()
    for _ in range(6):
        stream.opened()
        assert list(stream.feed(b": still here\n\n")) == []
        assert stream.lost(CUT) <= 0.1
