"""MCP servers that are named by what they are for, such as `{"preset": "sqlite", "path": "shop.db"}`.

A preset is written out where it is read, so that all behind it sees a server like any other. The programs of those that
run in the sandbox are in the sandbox image; with the runtime `local` they are the host's.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

__all__ = ["PRESETS", "written_out"]

_Text = Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=r"^[^\x00]*$")]


class _Preset(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Filesystem(_Preset):
    """Files beneath some folders of the sandbox; by default the workspace."""

    preset: Literal["filesystem"]
    paths: list[_Text] = Field(default=["."], min_length=1, max_length=100)

    def server(self) -> dict[str, Any]:
        return {"type": "stdio", "command": "mcp-server-filesystem", "args": self.paths}


class _Sqlite(_Preset):
    """A database in a file; it is made where there is none."""

    preset: Literal["sqlite"]
    path: _Text

    def server(self) -> dict[str, Any]:
        return {"type": "stdio", "command": "mcp-server-sqlite", "args": ["--db-path", self.path]}


class _Playwright(_Preset):
    """A browser, which the sandbox image has in its variant `-browser` alone."""

    preset: Literal["playwright"]

    def server(self) -> dict[str, Any]:
        return {"type": "stdio", "command": "playwright-mcp", "args": []}


class _Github(_Preset):
    """GitHub's own server. In an environment its token is `${secret:NAME}`: the gateway adds it, outside of sandboxes."""

    preset: Literal["github"]
    token: _Text

    def server(self) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self.token}"}
        return {"type": "http", "url": "https://api.githubcopilot.com/mcp/", "headers": headers}


_PRESET: TypeAdapter[_Filesystem | _Sqlite | _Playwright | _Github] = TypeAdapter(
    Annotated[_Filesystem | _Sqlite | _Playwright | _Github, Field(discriminator="preset")]
)
PRESETS: Final = ("filesystem", "github", "playwright", "sqlite")
"""Every preset's name."""


def written_out(server: dict[str, Any]) -> dict[str, Any]:
    """The server that a preset stands for; one that names none is given back as it is.

    Raises:
        ValueError: there is no such preset, or it is given other fields than it takes; no value is in the words.
    """
    if "preset" not in server:
        return server
    if server["preset"] not in PRESETS:
        raise ValueError(f"there is no such preset, but {', '.join(PRESETS)}")
    try:
        return _PRESET.validate_python(server).server()
    except ValidationError as error:
        wrong = error.errors()[0]
        field = ".".join(str(part) for part in wrong["loc"][1:])
        raise ValueError(f"preset {server['preset']}: {field}: {wrong['msg']}") from None
