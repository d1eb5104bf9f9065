"""Tools: what each is called, takes and does, and who finds it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from carrel.errors import CarrelError, MissingScope, ValidationFailed
from carrel.model import Principal, Scope

__all__ = ["Arguments", "Call", "Tool", "Toolbox"]

Result = dict[str, Any]
"""What a tool answers, as JSON."""


class Arguments(BaseModel):
    """What a tool takes; its fields are the tool's input schema."""

    model_config = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a tool."""

    principal: Principal
    key: str | None = None
    """The same where a call is repeated because nobody heard the answer; None: it never is."""
    progress: Callable[[str], Awaitable[None]] | None = None
    """Says how far it is, where anybody listens."""

    async def say(self, text: str) -> None:
        """Say how far it is."""
        if self.progress is not None:
            await self.progress(text)


@dataclass(frozen=True, kw_only=True)
class Tool:
    """One tool."""

    name: str
    description: str
    arguments: type[Arguments]
    work: Callable[[Call, Any], Awaitable[Result]]
    scope: Scope = Scope.WRITE
    """What its caller needs."""

    @property
    def schema(self) -> dict[str, Any]:
        """Its input, as a JSON schema."""
        return self.arguments.model_json_schema()


class Toolbox:
    """The tools that one kind of caller finds."""

    def __init__(self, tools: list[Tool], admit: Callable[[Principal], Awaitable[None]] | None = None) -> None:
        """Put them together; `admit` raises a CarrelError for a caller that may use none of them."""
        self._admit = admit
        self.tools: Mapping[str, Tool] = {tool.name: tool for tool in tools}

    async def call(self, name: str, given: Mapping[str, Any], call: Call) -> Result:
        """Use a tool. What goes wrong is an ordinary answer: `{"error": true, "code": …, "message": …}`."""
        try:
            tool = self.tools.get(name)
            if tool is None:
                raise ValidationFailed(f"There is no tool {name!r} here.")
            if tool.scope not in call.principal.scopes:
                raise MissingScope(tool.scope)
            if self._admit is not None:
                await self._admit(call.principal)
            return await tool.work(call, tool.arguments.model_validate(dict(given)))
        except ValidationError as error:
            told = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()[:5])
            return {"error": True, "code": ValidationFailed.code, "message": told}
        except CarrelError as error:
            return {"error": True, "code": error.code, "message": error.message}
