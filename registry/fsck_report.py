"""What a run of `fsck` tells: a line for each finding, a bar on a terminal meanwhile, a summary at the end."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from typing import Any, Self

import click

from registry.fsck import Checked
from registry.fsck_findings import Finding, Kind, Severity

# Their number says enough: collection removes them, or the configuration allows them.
_SUMMARIZED = frozenset({Severity.GARBAGE, Severity.NOTE})


class Report:
    """A context manager: a bar that is left behind spoils the terminal.

    Args:
        is_json: a JSON object for each finding, whatever its severity, and one for the summary.
    """

    def __init__(self, *, is_json: bool) -> None:
        from tqdm import tqdm

        self._is_json = is_json
        self._kinds: Counter[Kind] = Counter()
        self._garbage_size = 0
        self._bar: tqdm[Any] = tqdm(
            desc="content",
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            file=sys.stderr,
            dynamic_ncols=True,
            leave=False,
            disable=not sys.stderr.isatty(),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    @property
    def has_errors(self) -> bool:
        return self._count(Severity.ERROR) > 0

    def progress(self, checked: Checked) -> None:
        self._bar.total = checked.size
        self._bar.update(checked.hashed - self._bar.n)

    def tell(self, finding: Finding) -> None:
        self._kinds[finding.kind] += 1
        self._garbage_size += finding.size
        if self._is_json:
            self._print(json.dumps(finding.to_json()))
        elif finding.severity not in _SUMMARIZED:
            self._print(finding.to_line())

    def end(self, checked: Checked) -> None:
        """Call it when all is looked at: what was looked at, and what was found."""
        if self._is_json:
            self._print(json.dumps({"summary": self._summary(checked)}))
            return
        for severity in (Severity.GARBAGE, Severity.NOTE):
            if self._count(severity):
                sizes = f", {self._garbage_size} bytes" if severity is Severity.GARBAGE else ""
                self._print(f"{severity}: {self._words(severity)}{sizes}")
        self._print(
            f"{self._count(Severity.ERROR)} errors, {self._count(Severity.WARNING)} warnings in "
            f"{checked.repositories} repositories, {checked.manifests} manifests, {checked.tags} tags, "
            f"{checked.blobs} blobs of {checked.size} bytes; {checked.hashed} bytes were read"
        )

    def _summary(self, checked: Checked) -> dict[str, Any]:
        return {
            **{str(severity): self._count(severity) for severity in Severity},
            "kinds": {kind.word: count for kind, count in self._kinds.items()},
            "garbageBytes": self._garbage_size,
            **dataclasses.asdict(checked),
        }

    def _words(self, severity: Severity) -> str:
        counts = (f"{count} {kind.word}" for kind, count in self._kinds.items() if kind.severity is severity)
        return ", ".join(counts)

    def _count(self, severity: Severity) -> int:
        return sum(count for kind, count in self._kinds.items() if kind.severity is severity)

    def _print(self, line: str) -> None:
        self._bar.clear()
        click.echo(line)
