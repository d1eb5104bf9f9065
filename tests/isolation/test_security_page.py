"""`docs/security.md` names the tests that stand behind what it says, and leaves none of them out."""

import re
from pathlib import Path

HERE = Path(__file__).parent


def test_the_page_names_every_file_of_tests():
    page = (HERE.parents[1] / "docs/security.md").read_text()
    named = set(re.findall(r"`(?:tests/isolation/)?(test_\w+\.py)`", page))
    assert {path.name for path in HERE.glob("test_*.py")} - named == {Path(__file__).name}


def test_the_page_and_the_tests_name_each_other():
    page = (HERE.parents[1] / "docs/security.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", page))
    there = {
        name
        for path in HERE.glob("test_*.py")
        for name in re.findall(r"^(?:async )?def (test_\w+)", path.read_text(), re.M)
    }
    assert named <= there
    plain = {"test_what_was_written_is_found", "test_subpaths_stay_beneath", "test_files_belong_to_the_agent"}
    assert there - named == plain | {
        "test_the_page_and_the_tests_name_each_other",
        "test_the_page_names_every_file_of_tests",
    }
