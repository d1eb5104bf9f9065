"""Which snapshots are kept in the course of time."""

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from carrel.model import Snapshot, SnapshotReason
from carrel.workspaces.pruning import KeepRules, over_total, superfluous

NOW = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)


def snapshot(number: int, *, days: float = 0, stored: int = 1, key: str | None = None, session: str = "s") -> Snapshot:
    """One that is named after its place from the oldest."""
    return Snapshot(
        id=f"n{number}",
        session_id=session,
        number=number,
        reason=SnapshotReason.TURN,
        seq=number,
        key=key or f"k{number}",
        size_bytes=stored,
        stored_bytes=stored,
        files=1,
        created_at=NOW - timedelta(days=days),
    )


def test_without_rules_everything_is_kept() -> None:
    assert superfluous([snapshot(n, days=1000, stored=2**40) for n in range(9, 0, -1)], KeepRules(), now=NOW) == []


def test_so_many_of_the_newest() -> None:
    assert superfluous([snapshot(n) for n in (4, 3, 2, 1)], KeepRules(last=2), now=NOW) == ["n2", "n1"]
    assert superfluous([snapshot(1)], KeepRules(last=0), now=NOW) == []


def test_old_ones_go_and_the_newest_stays_however_old() -> None:
    kept = [snapshot(4, days=1), snapshot(3, days=6.9), snapshot(2, days=7.1), snapshot(1, days=30)]
    assert superfluous(kept, KeepRules(max_age=timedelta(days=7)), now=NOW) == ["n2", "n1"]
    assert superfluous(kept[2:], KeepRules(max_age=timedelta(days=7)), now=NOW) == ["n1"]


def test_what_they_take_in_all_is_bounded_and_what_they_share_counts_once() -> None:
    kept = [
        snapshot(4, stored=5, key="a"),
        snapshot(3, stored=5, key="a"),
        snapshot(2, stored=4),
        snapshot(1, stored=4),
    ]
    assert superfluous(kept, KeepRules(max_bytes=10), now=NOW) == ["n1"]
    assert superfluous(kept, KeepRules(max_bytes=1), now=NOW) == ["n2", "n1"]


def test_of_all_of_a_users_the_newest_of_each_workspace_stays() -> None:
    kept = [snapshot(4, session="a"), snapshot(3, session="a"), snapshot(2, session="b"), snapshot(1, session="b")]
    assert over_total(kept, 2) == ["n3", "n1"]
    assert over_total(kept, 3) == ["n1"]


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 9), st.sampled_from("abc")), min_size=1, max_size=30),
    st.none() | st.integers(0, 10),
    st.none() | st.integers(0, 60),
    st.none() | st.integers(0, 30),
)
def test_what_stays_keeps_to_every_rule(
    made: list[tuple[int, int, str]], last: int | None, days: int | None, most: int | None
) -> None:
    kept = [
        snapshot(len(made) - place, days=age, stored=stored, key=f"{key}{stored}")
        for place, (age, stored, key) in enumerate(sorted(made))
    ]
    rules = KeepRules(last=last, max_age=None if days is None else timedelta(days=days), max_bytes=most)
    gone = set(superfluous(kept, rules, now=NOW))
    stays = [each for each in kept if each.id not in gone]
    assert kept[0] in stays
    rest = stays[1:]
    assert last is None or len(stays) <= max(last, 1)
    assert all(days is None or each.created_at >= NOW - timedelta(days=days) for each in rest)
    total = sum({each.key: each.stored_bytes for each in stays}.values())
    assert most is None or total <= max(most, kept[0].stored_bytes)
    assert not (rules == KeepRules() and gone)
