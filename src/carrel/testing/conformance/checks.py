"""What the suites are made of."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Awaitable[None]])

PATIENCE_SECONDS = 20.0
"""How long a check waits for something that has to happen."""


class NotConforming(AssertionError):
    """The implementation breaks its contract."""


def collect(checks: dict[str, Any]) -> Callable[[F], F]:
    """A decorator that puts a check into a suite under its own name."""

    def add(check: F) -> F:
        checks[check.__name__] = check
        return check

    return add


def must(condition: object, promise: str) -> None:
    """Raise NotConforming with the promise that was broken, unless the condition holds."""
    if not condition:
        raise NotConforming(promise)


def must_equal(found: object, wanted: object, promise: str) -> None:
    """Raise NotConforming unless both are equal."""
    if found != wanted:
        raise NotConforming(f"{promise}: {wanted!r} was to be found, and {found!r} was")


async def must_raise(error: type[BaseException], awaitable: Awaitable[object], promise: str) -> None:
    """Raise NotConforming unless the awaitable raises such an error."""
    try:
        await awaitable
    except error:
        return
    raise NotConforming(f"{promise}: {error.__name__} was to be raised")


async def eventually(condition: Callable[[], object], promise: str, seconds: float = PATIENCE_SECONDS) -> None:
    """Wait until the condition holds. Raises NotConforming when that takes too long."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise NotConforming(f"{promise}: not within {seconds:g} s")
        await asyncio.sleep(0.005)


async def failures(suite: Mapping[str, Callable[..., Awaitable[None]]], *arguments: Any) -> dict[str, BaseException]:
    """Run a whole suite: every check that fails, with its error. Empty where the implementation conforms."""
    found: dict[str, BaseException] = {}
    for name, check in suite.items():
        try:
            await check(*arguments)
        except Exception as error:
            found[name] = error
    return found
