"""Wires what a server shows of itself: logs, metrics, traces, the audit log, and who may knock at its door."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import Any

from pydantic import SecretStr

from carrel import abc
from carrel.api.addresses import Proxies
from carrel.api.audit import AuditLog
from carrel.api.edges import Edges
from carrel.api.limits import Limiter
from carrel.api.origins import LOOPBACK_NAMES, Origins
from carrel.observability import MeasuredStore, Metrics, Redactor, Tracing, configure_logging, start_tracing
from carrel.observability.metrics import States
from carrel.observability.model_requests import ModelRequests
from carrel.observability.observers import Observers
from carrel.settings import Settings, provider_environment

__all__ = ["Seen", "build_edges", "configure_logs"]

_SECRET_NAME = re.compile("KEY|TOKEN|SECRET|PASSWORD")


@dataclass(frozen=True)
class Seen:
    """What watches one server."""

    metrics: Metrics
    tracing: Tracing | None

    @classmethod
    async def start(cls, settings: Settings, stack: AsyncExitStack, span_exporter: Any = None) -> Seen:
        """Make it.

        Raises:
            OperatorError: traces are switched on, and OpenTelemetry is not installed.
        """
        tracing = await start_tracing(stack, exporter=span_exporter) if settings.observability.tracing else None
        return cls(Metrics(), tracing)

    @property
    def observer(self) -> abc.Observer:
        """Who is told of what happens."""
        return self.metrics if self.tracing is None else Observers(self.metrics, self.tracing)

    def measured(self, store: abc.Store) -> abc.Store:
        """The store, timed."""
        return MeasuredStore(store, self.metrics)

    async def follow(self, store: abc.Store, stack: AsyncExitStack) -> None:
        """Begin to make the spans of turns, now that the store is there."""
        if self.tracing is not None:
            await self.tracing.start(stack, store)

    def model_requests(self, app: Any) -> Any:
        """The model gateway's application, watched."""
        return ModelRequests(app, self.metrics, self.tracing)

    def trace(self) -> dict[str, str]:
        """What is stored with a turn that is accepted now."""
        return self.tracing.accept() if self.tracing is not None else {}


async def build_edges(
    settings: Settings,
    store: abc.Store,
    seen: Seen,
    stack: AsyncExitStack,
    *,
    links: Callable[[], int],
    memory: Callable[[], Mapping[str, int]] = dict,
) -> Edges:
    """Make what stands around the routes.

    Args:
        settings: what is wanted.
        store: where the audit log is kept.
        seen: what watches the server.
        stack: where closings are registered.
        links: how many runners are connected.
        memory: bytes of sandboxes as last measured, by `used`, `largest`, `limit`.

    Raises:
        InvalidSettings: a limit, an origin or a proxy is not one.
        UnsafeConfiguration: any origin may call, and no key is wanted.
    """
    limits, told = settings.rate_limits, settings.observability
    # What may be wrong comes first: nothing is running yet when it is refused.
    parts: dict[str, Any] = {
        "loopback": settings.host in LOOPBACK_NAMES,
        "origins": Origins(settings.cors_origins, key_wanted=settings.auth != "none"),
        "proxies": Proxies(settings.trusted_proxies),
        "per_key": Limiter("key", limits.per_key) if limits.per_key else None,
        "per_address": Limiter("address", limits.per_address) if limits.per_address else None,
    }
    audit = AuditLog(
        store,
        days=told.audit_days,
        prompts=told.audit_prompts,
        redactor=Redactor(known_secrets(settings)),
        metrics=seen.metrics,
    )
    await audit.start(stack)
    states = States(store, data=settings.data, links=links, memory=memory, run_blocking=asyncio.to_thread)
    return Edges(
        **parts, audit=audit, metrics=seen.metrics, page=lambda: seen.metrics.page(states), tracing=seen.tracing
    )


def configure_logs(settings: Settings) -> None:
    """Have this process write its log as the settings say."""
    configure_logging(
        settings.log_level, form=settings.observability.log_format, redactor=Redactor(known_secrets(settings))
    )


def known_secrets(settings: Settings) -> list[str]:
    """Every secret among the settings, wherever in them it stands, and the admin key."""
    found = _secrets(settings)
    for server in settings.mcp_servers.values():
        for name in ("env", "headers"):
            given = server.get(name)
            found += [str(value) for value in given.values()] if isinstance(given, dict) else []
    if settings.credentials == "direct":
        found += [value for name, value in provider_environment().items() if _SECRET_NAME.search(name)]
    with suppress(OSError):  # before the first start there is none; its form is known to the redactor
        found.append((settings.data / "admin.key").read_text().strip())
    return found


def _secrets(value: Any) -> list[str]:
    if isinstance(value, SecretStr):
        return [value.get_secret_value()]
    if isinstance(value, Mapping):
        return [secret for item in value.values() for secret in _secrets(item)]
    fields = getattr(type(value), "model_fields", {})
    return [secret for name in fields for secret in _secrets(getattr(value, name))]
