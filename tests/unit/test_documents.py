"""The documents lead where they say, and every guide is found from their table of contents."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[tuple[Path, str]]:
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            path, _, anchor = target.partition("#")
            found.append(((page.parent / path).resolve() if path else page, anchor))
    return found


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    for path, anchor in links(page):
        assert path.exists(), f"{page.name} leads to {path}"
        assert not anchor or anchor in anchors(path), f"{page.name} leads to #{anchor} of {path.name}"


def test_every_guide_is_in_the_table_of_contents() -> None:
    docs = ROOT / "docs"
    listed = {path for path, _ in links(docs / "README.md")}
    guides = {page for page in docs.rglob("*.md") if "adr" not in page.parts} - {docs / "README.md"}
    assert guides - listed == set()


def test_every_failure_names_a_test_that_is_there() -> None:
    rows = [line for line in (ROOT / "docs/failures.md").read_text().splitlines() if line.startswith("|")]
    named = [re.search(r"`([\w/]+\.py)::(\w+)` \|$", row) for row in rows if "---" not in row and "| test |" not in row]
    assert len(named) > 15
    for found in named:
        assert found is not None, "a row without its test"
        file = ROOT / "tests" / found[1]
        assert re.search(rf"^(async )?def {found[2]}\(", file.read_text(), re.MULTILINE), found[0]
