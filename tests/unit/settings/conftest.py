"""A machine where nobody has said anything yet."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from carrel.settings import SettingLine, Settings, describe, load_settings


@pytest.fixture(autouse=True)
def _nobody_has_said_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.startswith(("CARREL_", "CLAUDE_", "ANTHROPIC_")) or name in ("PORT", "API_PORT"):
            monkeypatch.delenv(name)


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Settings]:
    """`load("port: 1\\n")` reads this file, and whatever the environment says."""

    def load_one(text: str = "", **more) -> Settings:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return load_settings(path, **more)

    return load_one


@pytest.fixture
def told(tmp_path: Path) -> Callable[..., dict[str, SettingLine]]:
    """As `load`, and answers the lines that are shown, by name."""

    def describe_one(text: str = "", **more) -> dict[str, SettingLine]:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return {line.name: line for line in describe(path, **more)}

    return describe_one
