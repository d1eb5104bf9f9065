"""What is kept of a session's snapshots."""

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from carrel.workspaces.pruning import KeepRules, SnapshotAge, superfluous

NOW = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)
NOTHING = KeepRules(last=1, turns=0, hourly=0, daily=0)


def made(*ages: timedelta, **more) -> list[SnapshotAge]:
    return [SnapshotAge(str(number), NOW - age, **more) for number, age in enumerate(ages)]


def test_the_newest_is_always_kept() -> None:
    ages = made(timedelta(days=900), timedelta(days=400), timedelta(days=500))
    assert superfluous(ages, KeepRules(last=0, turns=0, hourly=0, daily=0), now=NOW) == ["0", "2"]


def test_so_many_of_the_last() -> None:
    ages = made(*(timedelta(hours=hours) for hours in range(1, 6)))
    assert superfluous(ages, KeepRules(last=3, turns=0, hourly=0, daily=0), now=NOW) == ["4", "3"]


def test_one_for_each_turns_end() -> None:
    ages = [
        SnapshotAge(f"{turn}-{n}", NOW - timedelta(hours=10 - turn, minutes=-n), f"t{turn}")
        for turn in range(4)
        for n in range(3)
    ]
    gone = superfluous(ages, KeepRules(last=1, turns=3, hourly=0, daily=0), now=NOW)
    assert {each.id for each in ages} - set(gone) == {"1-2", "2-2", "3-2"}


def test_hours_and_days_are_thinned() -> None:
    ages = made(*(timedelta(minutes=20 * number) for number in range(3 * 24 * 5)))
    gone = superfluous(ages, KeepRules(last=1, turns=0, hourly=4, daily=3), now=NOW)
    kept = sorted(each.created_at for each in ages if each.id not in gone)
    assert [at.strftime("%d %H:%M") for at in kept] == [
        "27 23:50", "28 23:50", "01 09:50", "01 10:50", "01 11:50", "01 12:30",
    ]  # fmt: skip


def test_what_is_needed_stays() -> None:
    ages = [*made(timedelta(days=1)), SnapshotAge("old", NOW - timedelta(days=800), referenced=True)]
    assert superfluous(ages, NOTHING, now=NOW) == []


def test_what_is_brand_new_stays() -> None:
    ages = made(timedelta(0), timedelta(seconds=10), timedelta(seconds=70))
    assert superfluous(ages, NOTHING, now=NOW) == ["2"]


@given(
    st.lists(st.tuples(st.integers(0, 10**7), st.sampled_from(["a", "b", None]), st.booleans()), max_size=40),
    st.tuples(*[st.integers(0, 5)] * 4),
)
def test_nothing_is_lost_by_pruning_twice(found, rules) -> None:
    ages = [SnapshotAge(str(n), NOW - timedelta(seconds=s), turn, needed) for n, (s, turn, needed) in enumerate(found)]
    keep = KeepRules(last=rules[0], turns=rules[1], hourly=rules[2], daily=rules[3])
    gone = set(superfluous(ages, keep, now=NOW))
    kept = [each for each in ages if each.id not in gone]
    assert superfluous(kept, keep, now=NOW) == []
    assert not any(each.referenced for each in ages if each.id in gone)
    assert bool(kept) == bool(ages)
