"""ARCHITECTURE.md draws what the code does."""

import re
from pathlib import Path

from carrel.model import SESSION_TRANSITIONS

TEXT = Path(__file__).parents[2] / "ARCHITECTURE.md"


def section(name: str) -> str:
    """The text under a heading of the second level."""
    parts = re.split(r"^## (.+)$", TEXT.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))[name]


def test_the_table_of_a_sessions_status_is_the_one_in_the_code() -> None:
    rows = re.findall(r"^\| ([A-Z]) \| (\w+) \| (\w+) \| (.+) \|$", section("A session's status"), re.MULTILINE)
    assert rows == [(letter, str(b), str(a), why) for letter, (b, a, why) in SESSION_TRANSITIONS.items()]
