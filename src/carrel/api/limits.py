"""How many requests a caller or an address may make in a while.

Windows move: at no instant do more than the permitted number lie within the last window. They are kept in memory.
"""

from __future__ import annotations

import ipaddress
import math
import time
from collections import OrderedDict, deque
from dataclasses import dataclass

from limits import RateLimitItem, parse_many
from limits.aio.storage import MovingWindowSupport, Storage
from limits.aio.strategies import MovingWindowRateLimiter
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from carrel.api import problems
from carrel.errors import InvalidSettings, RateLimited
from carrel.model import Principal

__all__ = ["AddressLimit", "KeyLimit", "Limiter", "Verdict"]

_MOST_CALLERS = 100_000
_UNLIMITED = frozenset({"/health", "/health/live", "/health/ready"})
"""Whoever restarts a server that does not answer must not be turned away because others ask too much."""


@dataclass(frozen=True)
class Verdict:
    """What a limiter says of one request."""

    retry_after_seconds: int | None
    """None: let it pass."""
    policy: str
    state: str

    def tell(self, headers: MutableHeaders) -> None:
        """Say it in the fields of draft-ietf-httpapi-ratelimit-headers; both are lists, so another limiter's stay."""
        headers.append("RateLimit-Policy", self.policy)
        headers.append("RateLimit", self.state)


class Limiter:
    """Counts the requests of each caller of one kind."""

    def __init__(self, name: str, limits: str) -> None:
        """Make it for `limits` such as `600/minute`, or several: `20/second; 600/minute`.

        Args:
            name: what the limit is called in headers: `key` or `address`.
            limits: how many there may be.

        Raises:
            InvalidSettings: this is not a limit.
        """
        try:
            self._items: list[RateLimitItem] = sorted(parse_many(limits))
        except ValueError as error:
            raise InvalidSettings(
                f"rate_limits.per_{name}: {limits!r} is not a limit; write one such as 600/minute or 20/second."
            ) from error
        if any(item.amount < 1 for item in self._items):
            raise InvalidSettings(f"rate_limits.per_{name}: {limits!r} would let nobody in; leave it out for no limit.")
        several = len(self._items) > 1
        self._names = [f"{name}-{item.get_expiry()}s" if several else name for item in self._items]
        self._strategy = MovingWindowRateLimiter(_Windows())
        self._policy = ", ".join(
            f'"{called}";q={item.amount};w={item.get_expiry()}'
            for called, item in zip(self._names, self._items, strict=True)
        )

    async def count(self, caller: str) -> Verdict:
        """Count one more request of the caller's, unless it is one too many: those do not count."""
        retry_after = None
        for item in self._items:
            if not await self._strategy.hit(item, caller):
                reset = (await self._strategy.get_window_stats(item, caller)).reset_time
                retry_after = max(1, math.ceil(reset - time.time()))
                break
        states = []
        for called, item in zip(self._names, self._items, strict=True):
            reset, remaining = await self._strategy.get_window_stats(item, caller)
            states.append(f'"{called}";r={max(0, remaining)};t={max(0, math.ceil(reset - time.time()))}')
        return Verdict(retry_after, self._policy, ", ".join(states))

    async def spend(self, principal: Principal) -> None:
        """Count what comes over a connection that is open already, a prompt over a WebSocket for instance.

        Raises:
            RateLimited: it is one too many.
        """
        verdict = await self.count(principal.name)
        if verdict.retry_after_seconds is not None:
            raise RateLimited(retry_after_seconds=verdict.retry_after_seconds)


class _Windows(Storage, MovingWindowSupport):
    """When each caller's last requests were.

    The library's own memory looks at every caller, in another thread for each, after every request; this one looks at
    the one who asks, and forgets whoever has not asked for the longest time.
    """

    STORAGE_SCHEME = None

    def __init__(self) -> None:
        super().__init__()
        self._callers: OrderedDict[str, deque[float]] = OrderedDict()

    @property
    def base_exceptions(self) -> type[Exception]:
        """What may go wrong here: nothing."""
        return ValueError

    async def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """Take a place in the caller's window, if there is one."""
        now = time.time()
        window = self._callers.setdefault(key, deque())
        self._callers.move_to_end(key)
        if len(self._callers) > _MOST_CALLERS:
            self._callers.popitem(last=False)
        while window and window[0] <= now - expiry:
            window.popleft()
        if len(window) + amount > limit:
            return False
        window.extend([now] * amount)
        return True

    async def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        """When the oldest request in the window was, and how many there are."""
        now = time.time()
        window = self._callers.get(key)
        while window and window[0] <= now - expiry:
            window.popleft()
        return (window[0], len(window)) if window else (now, 0)

    async def clear(self, key: str) -> None:
        """Forget a caller."""
        self._callers.pop(key, None)

    async def reset(self) -> int:
        """Forget all callers."""
        count = len(self._callers)
        self._callers.clear()
        return count

    async def check(self) -> bool:
        """Whether it works."""
        return True

    async def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        """Of other strategies."""
        raise NotImplementedError

    async def get(self, key: str) -> int:
        """Of other strategies."""
        raise NotImplementedError

    async def get_expiry(self, key: str) -> float:
        """Of other strategies."""
        raise NotImplementedError


class _Limited:
    """Turns away who asks too often, and tells everybody how much is left."""

    def __init__(self, app: ASGIApp, limiter: Limiter) -> None:
        self._app = app
        self._limiter = limiter

    def caller(self, scope: Scope) -> str | None:
        """Whom to count; None: nobody."""
        raise NotImplementedError

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = self.caller(scope) if scope["type"] in ("http", "websocket") else None
        if caller is None or scope["path"] in _UNLIMITED:
            await self._app(scope, receive, send)
            return
        verdict = await self._limiter.count(caller)

        async def told(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                verdict.tell(MutableHeaders(scope=message))
            await send(message)

        if verdict.retry_after_seconds is None:
            await self._app(scope, receive, told)
            return
        error = RateLimited(retry_after_seconds=verdict.retry_after_seconds)
        await problems.problem(error, scope["path"])(scope, receive, told)


class AddressLimit(_Limited):
    """Counts by address, before it is known who calls: failed attempts to guess a key are among them."""

    def caller(self, scope: Scope) -> str | None:
        """The address; of IPv6 the network, because each customer has one to himself."""
        address = scope.get("carrel.address")
        if address is None:
            return None
        if ":" in address:
            return str(ipaddress.ip_network(f"{address.partition('%')[0]}/64", strict=False))
        return str(address)


class KeyLimit(_Limited):
    """Counts by caller, once it is known who calls."""

    def caller(self, scope: Scope) -> str | None:
        """The principal's name."""
        found: Principal | None = scope.get("carrel.principal")
        return found.name if found is not None else None
