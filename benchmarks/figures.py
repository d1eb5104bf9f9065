"""What was measured: samples boiled down, set beside the bare SDK's, held against the goals."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Summary:
    """Samples of one thing."""

    n: int
    median: float
    p95: float
    p99: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Summary:
        """Boil samples down; there must be one at least."""
        ranked = sorted(samples)
        return cls(
            len(ranked), statistics.median(ranked), rank(ranked, 0.95), rank(ranked, 0.99), ranked[0], ranked[-1]
        )


def rank(ranked: Sequence[float], part: float) -> float:
    """The smallest of the sorted samples that `part` of them do not exceed."""
    return ranked[min(len(ranked) - 1, max(0, -(-int(part * 1000 * len(ranked)) // 1000) - 1))]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One line of the table."""

    key: str
    what: str
    unit: str
    carrel: Summary | None = None
    bare: Summary | None = None
    note: str = ""
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """Carrel's median over the bare SDK's."""
        if self.carrel is None or self.bare is None or not self.bare.median:
            return None
        return self.carrel.median / self.bare.median

    @property
    def added(self) -> float | None:
        """What Carrel's median has more than the bare SDK's."""
        return self.carrel.median - self.bare.median if self.carrel and self.bare else None

    def as_json(self) -> dict[str, Any]:
        """The figure with what follows from it."""
        goal = GOALS.get(self.key)
        verdict = {"goal": goal.says, "reached": goal.reached(self)} if goal else {}
        return {**asdict(self), "ratio": self.ratio, "added": self.added, **verdict}


@dataclass(frozen=True)
class Goal:
    """What the design wants a figure to be."""

    says: str
    _check: Callable[[Figure], bool | None]

    def reached(self, figure: Figure) -> bool | None:
        """Whether it is; None where something was not measured."""
        try:
            return self._check(figure)
        except (TypeError, AttributeError):
            return None


def _added(bound: float) -> Goal:
    return Goal(f"≤ {bound:g} ms added", lambda f: None if f.added is None else f.added <= bound)


def _ratio(bound: float) -> Goal:
    return Goal(f"≤ {bound:g} × bare", lambda f: None if f.ratio is None else f.ratio <= bound)


def _at_most(bound: float, unit: str) -> Goal:
    return Goal(f"≤ {bound:g} {unit}".rstrip(), lambda f: None if f.carrel is None else f.carrel.median <= bound)


def _at_least(bound: float, unit: str) -> Goal:
    return Goal(f"≥ {bound:,g} {unit}", lambda f: None if f.carrel is None else f.carrel.median >= bound)


def _p95_below(bound: float) -> Goal:
    return Goal(f"p95 < {bound:g} ms", lambda f: None if f.carrel is None else f.carrel.p95 < bound)


def _p99_below(bound: float) -> Goal:
    return Goal(f"p99 < {bound:g} ms", lambda f: None if f.carrel is None else f.carrel.p99 < bound)


GOALS: dict[str, Goal] = {
    "first_token.warm": _added(15),
    "first_token.cold": _ratio(1.15),
    "first_token.pool": _ratio(1.15),
    "first_token.waking": _ratio(1.15),
    "create.model_requests": _at_most(0, ""),
    "memory.live_over_cli": _at_most(15, "MB"),
    "memory.idle_processes": _at_most(0, ""),
    "memory.gateway_1000_idle": _at_most(120, "MB"),
    "memory.gateway_cpu": _at_most(1, "%"),
    "listing.10000": _p95_below(50),
    "waiting.page": _p95_below(50),
    "fanout.burst_100": _at_least(30_000, "/s"),
    "fanout.burst_1000": _at_least(30_000, "/s"),
    "fanout.third_100": _p99_below(50),
    "fanout.third_1000": _p99_below(50),
    "store.events_20x10": _at_least(5_000, "/s"),
}
"""The design's "Numbers to reach". A missed goal is shown and fails nothing."""
