"""From samples to verdicts: medians, ratios, targets and the table. No I/O."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

GIB = 1 << 30
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Target:
    """What is to be reached.

    Attributes:
        limit: a ratio to the peer, or a value in the measure's unit.
        sign: `>=`, `<=` or `<`.
        is_ratio: the limit is of ours divided by the peer's.
    """

    sign: str
    limit: float
    is_ratio: bool = True

    def __str__(self) -> str:
        return f"{self.sign} {self.limit:g}{' x' if self.is_ratio else ''}"

    def is_met(self, figure: float) -> bool:
        compare = {">=": operator.ge, "<=": operator.le, "<": operator.lt}[self.sign]
        return bool(compare(figure, self.limit))


@dataclass(frozen=True, slots=True)
class Measure:
    """One row of the table."""

    name: str
    unit: str
    more_is_better: bool
    target: Target | None = None

    def best(self, samples: Sequence[float]) -> float:
        return max(samples) if self.more_is_better else min(samples)


@dataclass(frozen=True, slots=True)
class Row:
    """A measure of ours and of one peer, judged. A figure is None where there are no samples."""

    measure: Measure
    ours: float | None
    ours_best: float | None
    peer: float | None
    peer_best: float | None

    @property
    def ratio(self) -> float | None:
        """Ours divided by the peer's, of the medians."""
        return _quotient(self.ours, self.peer)

    @property
    def best_ratio(self) -> float | None:
        return _quotient(self.ours_best, self.peer_best)

    @property
    def is_met(self) -> bool | None:
        """None when there is no target, or nothing to compare with."""
        target = self.measure.target
        if target is None:
            return None
        figure = self.ratio if target.is_ratio else self.ours
        return None if figure is None else target.is_met(figure)


Samples = Mapping[str, Mapping[str, Sequence[float]]]
"""Measure's name -> server's name -> one figure for each round."""


def judge(measures: Sequence[Measure], samples: Samples, ours: str, peer: str) -> list[Row]:
    """The rows that were measured, in the order of `measures`."""
    return [
        _row(measure, samples[measure.name].get(ours, ()), samples[measure.name].get(peer, ()))
        for measure in measures
        if measure.name in samples
    ]


HEADINGS = ("measure", "target", "{ours}", "{peer}", "ratio", "ratio of bests", "met")


def table(rows: Sequence[Row], ours: str, peer: str) -> list[tuple[str, ...]]:
    """Cells, headings first; a figure is `median (best)`."""
    headings = tuple(heading.format(ours=ours, peer=peer) for heading in HEADINGS)
    return [headings, *(_cells(row) for row in rows)]


def as_text(cells: Sequence[Sequence[str]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def as_markdown(cells: Sequence[Sequence[str]]) -> str:
    headings, *lines = cells
    rule = ["---"] * len(headings)
    return "\n".join(f"| {' | '.join(line)} |" for line in (headings, rule, *lines))


def _row(measure: Measure, ours: Sequence[float], peer: Sequence[float]) -> Row:
    return Row(
        measure,
        median(ours) if ours else None,
        measure.best(ours) if ours else None,
        median(peer) if peer else None,
        measure.best(peer) if peer else None,
    )


def _quotient(ours: float | None, peer: float | None) -> float | None:
    # A peer's zero is a clock too coarse for what was measured, not a speed.
    return ours / peer if ours is not None and peer else None


def _cells(row: Row) -> tuple[str, ...]:
    measure = row.measure
    return (
        f"{measure.name}, {measure.unit}",
        str(measure.target or ""),
        _figure(row.ours, row.ours_best),
        _figure(row.peer, row.peer_best),
        "" if row.ratio is None else f"{row.ratio:.2f}",
        "" if row.best_ratio is None else f"{row.best_ratio:.2f}",
        {True: "yes", False: "no", None: ""}[row.is_met],
    )


def _figure(middle: float | None, best: float | None) -> str:
    return "" if middle is None or best is None else f"{_rounded(middle)} ({_rounded(best)})"


def _rounded(figure: float) -> str:
    return f"{figure:.0f}" if figure >= 100 else f"{figure:.3g}"
