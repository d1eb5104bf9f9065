"""A cap on processes is known by the kernel's own counter."""

from pathlib import Path

import pytest

from carrel.runner.own_caps import processes_met


@pytest.mark.parametrize(("told", "met"), [("max 0\n", False), ("max 3\n", True), ("", False), ("something\n", False)])
def test_the_counter_tells(tmp_path: Path, told: str, met: bool) -> None:
    counter = tmp_path / "pids.events"
    counter.write_text(told)
    assert processes_met([str(tmp_path / "missing"), str(counter)]) is met


def test_where_nobody_tells_it_was_not_met(tmp_path: Path) -> None:
    assert not processes_met([str(tmp_path / "missing")])
