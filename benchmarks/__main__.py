"""`python -m benchmarks [--only NAME …] [--quick]`: measure, write JSON and a table."""

from __future__ import annotations

import argparse
import asyncio
import sys
import traceback
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import create, deltas, fanout, first_token, memory, pool, report, snapshots, store, waiting
from benchmarks.figures import Figure
from benchmarks.harness import RESULTS, Bench, machine

MEASUREMENTS: dict[str, Callable[[Bench], Awaitable[list[Figure]]]] = {
    **first_token.MEASUREMENTS,
    **pool.MEASUREMENTS,
    **create.MEASUREMENTS,
    **memory.MEASUREMENTS,
    **deltas.MEASUREMENTS,
    **fanout.MEASUREMENTS,
    **store.MEASUREMENTS,
    **snapshots.MEASUREMENTS,
    **waiting.MEASUREMENTS,
}
ON_REQUEST = pool.CONTAINERS
"""What a machine may lack the parts for."""


def main() -> int:
    """Measure. A missed goal fails nothing; 1 where something could not be measured at all."""
    options = _parser().parse_args()
    names = options.only or list(MEASUREMENTS)
    facts = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "quick": options.quick, "machine": machine()}
    figures, failed = asyncio.run(_measure(names, quick=options.quick))
    whole = not options.quick and not options.only and not failed
    name = facts["at"][:10] if whole else "part"
    path = report.write(options.results, name, facts, figures, latest=whole)
    print(path.read_text())
    if failed:
        print(f"not measured: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


async def _measure(names: list[str], *, quick: bool) -> tuple[list[Figure], list[str]]:
    figures: list[Figure] = []
    failed = []
    async with Bench.open(quick=quick) as bench:
        for name in names:
            print(f"measuring: {name}", file=sys.stderr, flush=True)
            try:
                figures += await (MEASUREMENTS | ON_REQUEST)[name](bench)
            except Exception:
                traceback.print_exc()
                failed.append(name)
    return figures, failed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks", description="Measure Carrel beside the bare Agent SDK.")
    parser.add_argument(
        "--only", action="append", choices=[*MEASUREMENTS, *ON_REQUEST], help="this measurement (may be repeated)"
    )
    parser.add_argument("--quick", action="store_true", help="few samples: to see that everything works")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where to write")
    return parser


if __name__ == "__main__":
    sys.exit(main())
