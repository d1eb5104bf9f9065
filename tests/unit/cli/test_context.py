"""The command line finds the server, and shows its key to nobody else."""

from pathlib import Path
from typing import Any

import pytest

from carrel.cli.context import Context
from carrel.errors import ServerUnreachable


def test_it_finds_the_server_of_the_data_folder(fake: Any, data: Path) -> None:
    assert Context().server() == (fake.url, "the-key")
    assert Context(url=f"{fake.url}/").server() == (f"{fake.url}/", "the-key")


def test_a_folder_that_is_named_wins_over_the_environment(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ServerUnreachable, match="other"):
        Context(data=tmp_path / "other").server()


def test_the_default_folder_is_beside_us(fake: Any, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CARREL_DATA")
    data.rename(data.parent / "carrel-data")
    assert Context().server() == (fake.url, "the-key")


def test_the_key_goes_to_its_own_server_alone(data: Path) -> None:
    assert Context(url="http://elsewhere.example").server() == ("http://elsewhere.example", None)


def test_a_key_that_is_given_goes_where_it_is_sent(fake: Any, data: Path) -> None:
    assert Context(key="mine").server() == (fake.url, "mine")
    (data / "server.json").unlink()
    assert Context(url="http://elsewhere.example", key="mine").server() == ("http://elsewhere.example", "mine")


def test_a_server_without_authentication_has_no_key(fake: Any, data: Path) -> None:
    (data / "admin.key").unlink()
    assert Context().server() == (fake.url, None)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"url": 3}'])
def test_an_address_that_cannot_be_read_is_none(data: Path, text: str) -> None:
    (data / "server.json").write_text(text)
    with pytest.raises(ServerUnreachable, match="carrel serve"):
        Context().server()
