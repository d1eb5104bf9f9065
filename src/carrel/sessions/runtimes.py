"""The runtimes of this gateway, side by side: who has a sandbox is asked by its row, who makes a new one by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any

import structlog

from carrel import abc
from carrel.errors import RuntimeUnavailable, SandboxLaunchFailed
from carrel.model import Sandbox

__all__ = ["Runtimes"]

log = structlog.get_logger(__name__)


class Runtimes:
    """Every runtime there is, by the word it is chosen by."""

    def __init__(self, runtimes: Sequence[abc.Runtime]) -> None:
        """Put runtimes side by side; the first is for sessions that wish for none."""
        self._by_name = {runtime.name: runtime for runtime in runtimes}
        self.default = runtimes[0]

    async def start(self, exit_stack: AsyncExitStack) -> None:
        """Make each ready to launch; closing is registered with `exit_stack`."""
        for runtime in self._by_name.values():
            await runtime.start(exit_stack)

    @property
    def names(self) -> Sequence[str]:
        """The words there are to choose from, the default's first."""
        return list(self._by_name)

    @property
    def isolated(self) -> bool:
        """Whether an agent is walled off well enough to act without asking, wherever it runs."""
        return all(runtime.isolated for runtime in self._by_name.values())

    def __iter__(self) -> Iterator[abc.Runtime]:
        return iter(self._by_name.values())

    def named(self, name: str | None) -> abc.Runtime:
        """The runtime of this name; None: the default.

        Raises:
            SandboxLaunchFailed: there is none of this name here.
        """
        if name is None:
            return self.default
        runtime = self._by_name.get(name)
        if runtime is None:
            there = ", ".join(self.names)
            raise SandboxLaunchFailed(operator_detail=f"there is no runtime {name!r} here, but {there}")
        return runtime

    async def alive(self, name: str, sandbox_id: str, state: Mapping[str, Any]) -> bool:
        """Whether a sandbox's runner is alive; False only when it is confirmed gone, or nothing was ever begun."""
        if not state:
            return False
        return (await self.named(name).probe({sandbox_id: state}))[sandbox_id]

    async def measure(self, sandboxes: Iterable[Sandbox]) -> dict[str, abc.SandboxUsage]:
        """What each of these takes now, by its id; those whose runtime does not answer are left out too."""
        states: dict[str, dict[str, Mapping[str, Any]]] = {}
        for sandbox in sandboxes:
            if sandbox.state:
                states.setdefault(sandbox.runtime, {})[sandbox.id] = sandbox.state
        found: dict[str, abc.SandboxUsage] = {}
        for name, of_one in states.items():
            try:
                found |= await self.named(name).measure(of_one)
            except RuntimeUnavailable as error:
                # Who has no news of a sandbox does not end it; the next look is in a second.
                log.warning("runtime.unavailable", runtime=name, detail=error.operator_detail)
        return found

    async def terminate(self, sandbox: Sandbox) -> None:
        """End a sandbox and all that is in it; see the contract."""
        if sandbox.state:
            await self.named(sandbox.runtime).terminate(sandbox.state)

    async def owned(self) -> list[tuple[abc.Runtime, str, dict[str, Any]]]:
        """All that is left of any sandbox of this installation: who has it, its id, a state to end it by."""
        return [
            (runtime, sandbox_id, state)
            for runtime in self._by_name.values()
            for sandbox_id, state in (await runtime.owned()).items()
        ]
