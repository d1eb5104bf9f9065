"""The promises of a `Runtime`."""

from __future__ import annotations

import asyncio
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

from carrel import abc
from carrel.protocol.link import Hello
from carrel.testing.conformance.checks import PATIENCE_SECONDS, collect, eventually, must, must_equal

__all__ = ["CHECKS", "RuntimeHarness"]


class RuntimeHarness(ABC):
    """What the checks need to know of the place where a runtime's sandboxes live."""

    @abstractmethod
    def runtime(self) -> abc.Runtime:
        """A runtime over this place, not yet started. Several may be made: they keep no state of their own."""

    @abstractmethod
    def spec(self) -> abc.LaunchSpec:
        """What to launch: a new sandbox id each time, with folders that exist."""

    @abstractmethod
    async def hello(self, sandbox_id: str) -> Hello:
        """Wait for what the sandbox's runner says first. Its connection stays open, and no session is given to it."""

    @abstractmethod
    async def kill(self, sandbox_id: str) -> None:
        """Kill the sandbox's runner as `kill -9` does."""

    @abstractmethod
    def left(self, sandbox_id: str) -> list[str]:
        """What is left of the sandbox here: its processes and folders, in words."""


CHECKS: dict[str, Callable[[RuntimeHarness], Awaitable[None]]] = {}
"""What every runtime promises. Each check wants a new harness, and leaves it empty."""

_check = collect(CHECKS)


async def launch(runtime: abc.Runtime, spec: abc.LaunchSpec) -> list[dict[str, Any]]:
    """Launch to the end: every checkpoint."""
    return [dict(state) async for state in runtime.launch(spec)]


async def _alive(runtime: abc.Runtime, spec: abc.LaunchSpec, state: dict[str, Any]) -> bool:
    return (await runtime.probe({spec.sandbox_id: state}))[spec.sandbox_id]


async def _until_dead(runtime: abc.Runtime, spec: abc.LaunchSpec, state: dict[str, Any]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while await _alive(runtime, spec, state):
        must(time.monotonic() < deadline, "probe says False once the runner is gone")
        await asyncio.sleep(0.005)


def _must_be_empty(harness: RuntimeHarness, spec: abc.LaunchSpec) -> None:
    must_equal(harness.left(spec.sandbox_id), [], "after terminate nothing of the sandbox is left")


@_check
async def a_launched_runner_says_hello(harness: RuntimeHarness) -> None:
    """With its own id, token and generation, bound to nothing yet; probe says that it is alive."""
    async with AsyncExitStack() as stack:
        runtime, spec = harness.runtime(), harness.spec()
        await runtime.start(stack)
        states = await launch(runtime, spec)
        must(states, "a launch yields at least one checkpoint")
        hello = await harness.hello(spec.sandbox_id)
        said = (hello.sandbox_id, hello.token, hello.generation, hello.bound)
        must_equal(said, (spec.sandbox_id, spec.link_token, spec.generation, False), "it says who it is")
        must(await _alive(runtime, spec, states[-1]), "probe says that it is alive")
        await runtime.terminate(states[-1])
        must(not await _alive(runtime, spec, states[-1]), "probe says that it is gone")
        _must_be_empty(harness, spec)


@_check
async def checkpoints_are_plain_and_hold_no_secret(harness: RuntimeHarness) -> None:
    """They survive JSON, and neither token is in any of them."""
    async with AsyncExitStack() as stack:
        runtime, spec = harness.runtime(), harness.spec()
        await runtime.start(stack)
        states = await launch(runtime, spec)
        written = [json.dumps(state) for state in states]
        for text in written:
            must(spec.link_token not in text, "the link token is in no checkpoint")
            must(spec.agent_token not in text, "the agent's token is in no checkpoint")
        last = json.loads(written[-1])
        must(await _alive(runtime, spec, last), "a checkpoint from disk is as good as a new one")
        await runtime.terminate(last)
        _must_be_empty(harness, spec)


@_check
async def terminate_may_be_called_again(harness: RuntimeHarness) -> None:
    """With any checkpoint, in any order, also after the end."""
    async with AsyncExitStack() as stack:
        runtime, spec = harness.runtime(), harness.spec()
        await runtime.start(stack)
        states = await launch(runtime, spec)
        await harness.hello(spec.sandbox_id)
        for state in [*states, *states]:
            await runtime.terminate(state)
            must(not await _alive(runtime, spec, state), "gone stays gone")
        _must_be_empty(harness, spec)


@_check
async def a_launch_cut_short_can_be_ended(harness: RuntimeHarness) -> None:
    """After every checkpoint: a gateway that died there finds the sandbox by the checkpoint, and by `owned`."""
    async with AsyncExitStack() as stack:
        runtime = harness.runtime()
        await runtime.start(stack)
        whole = harness.spec()
        steps = len(await launch(runtime, whole))
        await runtime.terminate((await runtime.owned())[whole.sandbox_id])
        _must_be_empty(harness, whole)
        for cut in range(1, steps + 1):
            for by_checkpoint in (True, False):
                spec = harness.spec()
                launching = runtime.launch(spec)
                state: dict[str, Any] = {}
                for _ in range(cut):
                    state = dict(await anext(launching))
                await launching.aclose()  # type: ignore[attr-defined]
                found = (await runtime.owned()).get(spec.sandbox_id)
                must(found is not None or not harness.left(spec.sandbox_id), "owned tells of all that is left")
                if by_checkpoint:
                    await runtime.terminate(state)
                elif found is not None:
                    await runtime.terminate(found)
                must(not await _alive(runtime, spec, state), "it is gone")
                _must_be_empty(harness, spec)


@_check
async def a_new_runtime_finds_what_an_old_one_made(harness: RuntimeHarness) -> None:
    """A gateway that starts again knows nothing but its rows: `probe`, `owned` and `terminate` go by those."""
    spec = harness.spec()
    async with AsyncExitStack() as stack:
        runtime = harness.runtime()
        await runtime.start(stack)
        states = await launch(runtime, spec)
        await harness.hello(spec.sandbox_id)
    async with AsyncExitStack() as stack:
        runtime = harness.runtime()
        await runtime.start(stack)
        must(await _alive(runtime, spec, states[-1]), "a runner outlives the gateway's own objects")
        must(spec.sandbox_id in await runtime.owned(), "owned tells of it")
        await runtime.terminate((await runtime.owned())[spec.sandbox_id])
        must(not await _alive(runtime, spec, states[-1]), "it is gone")
        must(spec.sandbox_id not in await runtime.owned(), "and no longer owned")
        _must_be_empty(harness, spec)


@_check
async def a_dead_runner_is_noticed(harness: RuntimeHarness) -> None:
    """`probe` says False, `owned` tells of what it left, `terminate` clears that away."""
    async with AsyncExitStack() as stack:
        runtime, spec = harness.runtime(), harness.spec()
        await runtime.start(stack)
        states = await launch(runtime, spec)
        await harness.hello(spec.sandbox_id)
        await harness.kill(spec.sandbox_id)
        await _until_dead(runtime, spec, states[-1])
        left = harness.left(spec.sandbox_id)
        must(not left or spec.sandbox_id in await runtime.owned(), f"owned tells of what it left: {left}")
        await runtime.terminate(states[-1])
        _must_be_empty(harness, spec)


@_check
async def sandboxes_do_not_touch_each_other(harness: RuntimeHarness) -> None:
    """One ends and the others go on; `probe` tells them apart, those it never saw too."""
    async with AsyncExitStack() as stack:
        runtime = harness.runtime()
        await runtime.start(stack)
        specs = [harness.spec() for _ in range(3)]
        states = {spec.sandbox_id: (await launch(runtime, spec))[-1] for spec in specs}
        for spec in specs:
            await harness.hello(spec.sandbox_id)
        await runtime.terminate(states[specs[0].sandbox_id])
        alive = await runtime.probe(states)
        must_equal([alive[spec.sandbox_id] for spec in specs], [False, True, True], "one ends, the others go on")
        must_equal(dict(await runtime.probe({})), {}, "a probe of nothing")
        for state in states.values():
            await runtime.terminate(state)
        for spec in specs:
            _must_be_empty(harness, spec)
        must_equal(dict(await runtime.owned()), {}, "nothing is owned in the end")


@_check
async def what_runs_is_measured_and_what_ended_is_not(harness: RuntimeHarness) -> None:
    """Each sandbox by itself, those it never saw left out; nobody who only waits has met a cap."""
    async with AsyncExitStack() as stack:
        runtime = harness.runtime()
        await runtime.start(stack)
        specs = [harness.spec() for _ in range(2)]
        states = {spec.sandbox_id: (await launch(runtime, spec))[-1] for spec in specs}
        for spec in specs:
            await harness.hello(spec.sandbox_id)
        found = await runtime.measure(states)
        must_equal(set(found), set(states), "every one that runs is measured")
        for usage in found.values():
            numbers = (usage.memory_bytes, usage.processes, usage.cpu_seconds)
            must(all(number >= 0 for number in numbers), f"what is taken is counted from nothing: {usage}")
            must(usage.excess is None, "no cap is met by waiting")
        first, second = (spec.sandbox_id for spec in specs)
        await runtime.terminate(states[first])
        must_equal(set(await runtime.measure(states)), {second}, "what has ended takes nothing")
        must_equal(dict(await runtime.measure({})), {}, "nothing takes nothing")
        await runtime.terminate(states[second])
        for spec in specs:
            _must_be_empty(harness, spec)


@_check
async def logs_are_lines(harness: RuntimeHarness) -> None:
    """What runner and agent wrote; none where there is nothing any more."""
    async with AsyncExitStack() as stack:
        runtime, spec = harness.runtime(), harness.spec()
        await runtime.start(stack)
        state = (await launch(runtime, spec))[-1]
        await harness.hello(spec.sandbox_id)
        lines: list[str] = []

        async def read() -> None:
            lines[:] = [line async for line in runtime.logs(state)]

        await read()
        must(all("\n" not in line for line in lines), "a line is one line")
        secrets = [line for line in lines if spec.link_token in line or spec.agent_token in line]
        must_equal(secrets, [], "no token is logged")
        await runtime.terminate(state)
        await read()
        must_equal(lines, [], "nothing is left to tell")
        await eventually(lambda: not harness.left(spec.sandbox_id), "nothing is left")
