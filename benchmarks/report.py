"""The results as JSON and as a table."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import GOALS, Figure, Summary

_VERDICTS = {True: "pass", False: "**miss**", None: "—"}


def write(folder: Path, name: str, facts: dict[str, Any], figures: Sequence[Figure], *, latest: bool) -> Path:
    """Write `name.json` and `name.md` (and `latest.md`); answers the table's path."""
    folder.mkdir(parents=True, exist_ok=True)
    value = {**facts, "figures": [figure.as_json() for figure in figures]}
    _put(folder / f"{name}.json", json.dumps(value, indent=1) + "\n")
    text = table(facts, figures)
    _put(folder / f"{name}.md", text)
    if latest:
        _put(folder / "latest.md", text)
    return folder / f"{name}.md"


def _put(path: Path, text: str) -> None:
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def table(facts: dict[str, Any], figures: Sequence[Figure]) -> str:
    """All figures as Markdown."""
    told = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts["machine"].items())
    lines = [f"# Benchmarks of {facts['at'][:10]}", "", f"Machine: {told}.", ""]
    if facts["quick"]:
        lines += ["A quick run: few samples, so these numbers say only that everything works.", ""]
    lines += [
        "`docs/benchmarks.md` says what each figure means.",
        "",
        "| what | unit | Carrel: median | p95 | p99 | n | bare SDK: median | p95 | ratio | added | goal | | note |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_row(figure) for figure in figures]
    for figure in figures:
        if figure.parts:
            lines += ["", f"## {figure.what}: where the time goes", "", *_parts(figure)]
    return "\n".join(lines) + "\n"


def _row(figure: Figure) -> str:
    goal = GOALS.get(figure.key)
    carrel, bare = figure.carrel, figure.bare
    cells = [figure.what, figure.unit, *_cells(carrel, p99=True), str(carrel.n) if carrel else "", *_cells(bare)]
    cells += [_number(figure.ratio), _number(figure.added)]
    cells += [goal.says, _VERDICTS[goal.reached(figure)]] if goal else ["", ""]
    return "| " + " | ".join([*cells, figure.note]) + " |"


def _cells(found: Summary | None, *, p99: bool = False) -> list[str]:
    if found is None:
        return ["", "", ""] if p99 else ["", ""]
    spread = [_number(found.p95), *([_number(found.p99)] if p99 else [])]
    return [_number(found.median), *(spread if found.n > 1 else [""] * len(spread))]


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 0.1 or value == 0 else f"{value:.3f}"


def _parts(figure: Figure) -> list[str]:
    sides: dict[str, dict[str, float]] = {}
    for name, value in figure.parts.items():
        side, _, hop = name.partition(": ")
        sides.setdefault(hop, {})[side] = value
    total = sum(value for name, value in figure.parts.items() if name.startswith("Carrel"))
    lines = ["| hop (medians) | Carrel, ms | share | bare SDK, ms |", "|---|---|---|---|"]
    for hop, both in sides.items():
        own, bare = both.get("Carrel"), both.get("bare")
        share = f"{own / total:.0%}" if own is not None else ""
        lines.append(f"| {hop} | {_number(own)} | {share} | {_number(bare)} |")
    return lines
