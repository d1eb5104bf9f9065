"""Each setting of what a server shows, and of who may knock, reaches the part that it is about."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import structlog

from carrel import abc
from carrel.api.edges import Edges
from carrel.cli.seen import Seen, build_edges, configure_logs, known_secrets
from carrel.errors import InvalidSettings, UnsafeConfiguration
from carrel.model import new_id, utc_now
from carrel.settings import Settings, load_settings
from carrel.store import SqliteStore

Build = Callable[..., Awaitable[Edges]]


def settings_of(tmp_path: Path, **said: Any) -> Settings:
    return load_settings(overrides={"data": tmp_path} | said)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    async with AsyncExitStack() as stack:
        store = SqliteStore(tmp_path / "carrel.db")
        await store.start(stack)
        yield store


@pytest.fixture
async def build(tmp_path: Path, store: SqliteStore) -> AsyncIterator[Build]:
    async with AsyncExitStack() as stack:

        async def build_one(**said: Any) -> Edges:
            settings = settings_of(tmp_path, **said)
            return await build_edges(settings, store, await Seen.start(settings, stack), stack, links=lambda: 3)

        yield build_one


async def test_by_default_nothing_is_limited_and_nobody_else_may_call(build):
    edges = await build()
    assert (edges.per_key, edges.per_address, edges.tracing) == (None, None, None)
    assert not edges.origins
    assert edges.loopback
    assert edges.audit is not None
    assert not edges.audit.prompts


@pytest.mark.parametrize("which", ["per_key", "per_address"])
async def test_rate_limits(build, which):
    limiter = getattr(await build(rate_limits={which: "2/minute"}), which)
    verdicts = [(await limiter.count("x")).retry_after_seconds is None for _ in range(3)]
    assert verdicts == [True, True, False]
    with pytest.raises(InvalidSettings, match=rf"rate_limits\.{which}.*must be a rate such as 600/minute"):
        await build(rate_limits={which: "lots"})


async def test_origins_proxies_and_the_address_it_listens_on(build):
    edges = await build(cors_origins=["https://app.example.com"], trusted_proxies=["10.0.0.0/8"], host="0.0.0.0")
    assert edges.origins.has("https://app.example.com")
    scope = {"client": ("10.0.0.1", 1), "headers": [(b"x-forwarded-for", b"198.51.100.9")]}
    assert edges.proxies.address(scope) == "198.51.100.9"
    assert not edges.loopback
    with pytest.raises(InvalidSettings, match="cors_origins"):
        await build(cors_origins=["app.example.com"])
    with pytest.raises(InvalidSettings, match="trusted_proxies"):
        await build(trusted_proxies=["proxy.example.com"])
    with pytest.raises(UnsafeConfiguration):
        await build(cors_origins=["*"], auth="none")


async def test_the_audit_log_keeps_prompts_and_days_as_it_is_told(build, store):
    def made(days: int) -> abc.AuditRecord:
        return abc.AuditRecord(
            id=new_id(),
            at=utc_now() - timedelta(days=days),
            principal="p",
            user_id=None,
            action=f"day.{days}",
            object_type=None,
            object_id=None,
            address=None,
            request_id=None,
            outcome=200,
            details={},
        )

    await store.write(lambda tx: tx.audit.add([made(5), made(20)]))
    edges = await build(observability={"audit_days": 10, "audit_prompts": True})
    assert edges.audit is not None
    assert edges.audit.prompts
    async with asyncio.timeout(10):
        while [r.action for r in await listed(store)] != ["day.5"]:
            await asyncio.sleep(0.01)


async def listed(store):
    return (await store.read(lambda tx: tx.audit.page(abc.AuditFilter(), cursor=None, limit=10))).items


async def test_the_page_of_metrics_has_what_there_is(build):
    edges = await build()
    assert edges.page is not None
    page = (await edges.page()).decode()
    assert "carrel_links 3.0" in page
    assert "carrel_sessions 0.0" in page


def test_every_secret_among_the_settings_is_known_to_the_redactor(tmp_path):
    (tmp_path / "admin.key").write_text("carrel_admin_of_this_folder\n")
    settings = settings_of(
        tmp_path,
        static_token="static-token-of-16",
        jwt={"secret": "jwt-secret-of-at-least-32-bytes-xxx"},
        database={"url": "postgresql://u:p@h/d"},
        anthropic_api_key="the-key-of-the-model",
        mcp_servers={
            "x": {"command": "c", "env": {"A": "mcp-variable"}},
            "y": {"type": "http", "url": "http://127.0.0.1/", "headers": {"B": "mcp-header"}},
        },
    )
    assert set(known_secrets(settings)) == {
        "static-token-of-16",
        "jwt-secret-of-at-least-32-bytes-xxx",
        "postgresql://u:p@h/d",
        "the-key-of-the-model",
        "mcp-variable",
        "mcp-header",
        "carrel_admin_of_this_folder",
    }


@pytest.mark.parametrize(("form", "begins"), [("json", "{"), ("console", "2"), ("auto", "{")])
def test_the_form_of_the_log(tmp_path, capsys, form, begins):
    before, root = structlog.get_config(), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        said = {"log_level": "warning", "observability": {"log_format": form}, "static_token": "a-token-of-16-bytes"}
        configure_logs(settings_of(tmp_path, **said))
        log = structlog.get_logger("of this test")
        log.info("too quiet")
        log.warning("heard", secret_in="a-token-of-16-bytes")
    finally:
        structlog.configure(**before)
        root.handlers[:] = handlers
        root.setLevel(level)
    told = capsys.readouterr().err
    assert "heard" in told
    assert "too quiet" not in told
    assert "a-token-of" not in told
    assert told.startswith(begins)
