"""Log lines: JSON for programs, or readable ones for a terminal, every one of them without secrets."""

from __future__ import annotations

import logging
import sys
from typing import Any, Literal, TextIO

import structlog

from carrel.observability.redaction import Redactor

__all__ = ["configure_logging"]


def configure_logging(
    level: str,
    *,
    form: Literal["auto", "json", "console"] = "auto",
    redactor: Redactor | None = None,
    stream: TextIO | None = None,
) -> None:
    """Have this process write its log lines, those of libraries too. Called once, before the first line.

    Args:
        level: the least that is written: `debug`, `info`, `warning` or `error`.
        form: `json`, `console`, or `auto`: readable lines to a terminal, JSON otherwise.
        redactor: what hides secrets.
        stream: where to; default: standard error.
    """
    out = stream or sys.stderr
    readable = form == "console" or (form == "auto" and out.isatty())
    renderer: Any = (
        structlog.dev.ConsoleRenderer(colors=out.isatty(), exception_formatter=structlog.dev.plain_traceback)
        if readable
        else structlog.processors.JSONRenderer()
    )
    number = logging.getLevelNamesMapping()[level.upper()]
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        redactor or Redactor(),
    ]
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(out),
        cache_logger_on_first_use=True,
    )
    # What libraries say goes the same way: a web server's error may hold an address with a ticket in it.
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, shared[-1], renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(number, logging.WARNING))
