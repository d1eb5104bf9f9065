"""The example file says the defaults, and the page in docs/ is the one that the code makes."""

from pathlib import Path

import yaml

from carrel.settings import Settings, pages
from carrel.settings.names import leaves
from carrel.settings.sources import read_file

ROOT = Path(__file__).resolve().parents[3]


def test_the_example_loads_and_is_the_defaults(load):
    assert load(pages.example()) == load("") == Settings()


def test_the_example_has_every_setting_with_a_comment_above_it(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(pages.example())
    said = {given.name for given in read_file(path)}
    expected = {leaf.name for leaf in leaves() if leaf.name.partition(".")[0] != "dialects"} - {"kill_at"}
    assert said == expected
    lines = pages.example().splitlines()
    for number, line in enumerate(lines):
        if line and not line.lstrip().startswith("#"):
            assert lines[number - 1].lstrip().startswith("#"), line


def test_what_its_comments_show_is_right_too(load, tmp_path, monkeypatch):
    shown = pages._SHOWN_AS | {"plugins": [{"type": "local", "path": str(tmp_path)}]}
    settings = load(yaml.safe_dump(shown))
    assert set(settings.dialects) == {"claude-agent-http", "claudecode-api", "sdk-server"}
    assert set(settings.mcp_servers) == {"files", "docs"}


def test_the_page_is_up_to_date():
    assert (ROOT / "docs" / "settings.md").read_text() == pages.documentation(), (
        "run: .venv/bin/carrel settings --docs > docs/settings.md"
    )
