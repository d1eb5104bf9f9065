"""`carrel usage`: what was spent, and what is left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from carrel.cli.context import context_of
from carrel.cli.output import budget_words, print_json, print_table
from carrel.client import BudgetState, UsageReport, UsageRow

__all__ = ["usage"]


def usage(
    context: typer.Context,
    by: Annotated[str, typer.Option(help="Any of user, session, turn, model, day, separated by commas.")] = "day",
    user: Annotated[str | None, typer.Option(help="Only of this user.")] = None,
    session: Annotated[str | None, typer.Option(help="Only of this session.")] = None,
    model: Annotated[str | None, typer.Option(help="Only of this model.")] = None,
    since: Annotated[str | None, typer.Option(help="From this day or time on, such as 2026-11-21.")] = None,
    until: Annotated[str | None, typer.Option(help="And before this one.")] = None,
    budgets: Annotated[bool, typer.Option("--budgets", help="Show what is left of each budget instead.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show what was spent, and with --budgets what is left."""
    groups = [name.strip() for name in by.split(",") if name.strip()]
    with context_of(context).connect() as carrel:
        if budgets:
            states = carrel.usage.budgets(user=user, session_id=session)
            print_json(states) if as_json else _show_budgets(states)
            return
        report = carrel.usage.get(
            groups, user=user, session_id=session, model=model, since=since, until=until, limit=10_000
        )
    print_json(report) if as_json else _show_usage(report, groups)


def _show_usage(report: UsageReport, groups: Sequence[str]) -> None:
    rows = [[*(str(getattr(row, name) or "") for name in groups), *_sums(row)] for row in report.data]
    if groups:
        rows.append(["total", *[""] * (len(groups) - 1), *_sums(report.total)])
    print_table([*groups, "requests", "input", "output", "cache write", "cache read", "cost"], rows)


def _sums(row: UsageRow) -> list[str]:
    tokens = (row.input_tokens, row.output_tokens, row.cache_creation_input_tokens, row.cache_read_input_tokens)
    cost = "unknown" if row.cost_usd is None else f"${row.cost_usd:.4f}"
    return [f"{row.requests:,}", *(f"{count:,}" for count in tokens), cost]


def _show_budgets(states: Sequence[BudgetState]) -> None:
    rows = [
        [
            state.kind,
            state.id,
            budget_words(state.budget),
            f"${state.spent_usd:.4f}",
            f"{state.spent_tokens:,}",
            "" if state.left_usd is None else f"${state.left_usd:.4f}",
            "" if state.left_tokens is None else f"{state.left_tokens:,}",
        ]
        for state in states
    ]
    print_table(["budget", "of", "size", "spent", "tokens spent", "left", "tokens left"], rows)
