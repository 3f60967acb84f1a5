"""What the command line says, and how it shows that something is under way.

Answers go to stdout; warnings, errors and progress to stderr. What came from a registry is made harmless first.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from enum import IntEnum
from typing import IO, Any, Literal

import click

from kitclient.progress import BlobProgress, Outcome, Progress, Silence
from kitclient.terminal import visible
from kitspec.descriptor import Descriptor
from kitspec.media_types import FILEPATH_ANNOTATION, parse_layer_media_type

ProgressStyle = Literal["none", "plain", "fancy"]

# A line of progress now and then tells that work goes on, without filling a log.
_PLAIN_INTERVAL_S = 10.0


class Level(IntEnum):
    TRACE = 0
    DEBUG = 1
    INFO = 2
    WARN = 3
    ERROR = 4


@dataclass
class Console:
    """The two streams, and how much is said on them."""

    level: Level = Level.INFO
    progress_style: ProgressStyle | None = None
    _warned: set[str] = field(default_factory=set)

    def info(self, message: str) -> None:
        """A sentence about what happens; on stdout, as kit does."""
        self._say(Level.INFO, message, sys.stdout)

    def debug(self, message: str) -> None:
        self._say(Level.DEBUG, message, sys.stderr)

    def warn(self, message: str) -> None:
        """Something that the user may not want; each text once."""
        if message not in self._warned:
            self._warned.add(message)
            self._say(Level.WARN, message, sys.stderr)

    def error(self, message: str) -> None:
        self._say(Level.ERROR, message, sys.stderr)

    def answer(self, text: str) -> None:
        """What was asked for: whole lines, printed at every level."""
        click.echo(visible(text, keep="\n"), nl=not text.endswith("\n"))

    def progress(self) -> Progress:
        """Bars on a terminal, lines elsewhere, unless the user chose."""
        style = self.progress_style
        if style is None:
            style = "fancy" if sys.stderr.isatty() else "plain"
        if style == "none" or self.level > Level.INFO:
            return Silence()
        if style == "fancy" and sys.stderr.isatty():
            return Bars()
        return Lines(sys.stderr)

    def _say(self, level: Level, message: str, stream: IO[str]) -> None:
        if level < self.level:
            return
        prefix = f"[{level.name:<5}] " if level is not Level.INFO or self.level < Level.INFO else ""
        text = visible(message, keep="\n")
        click.echo(prefix + text[:1].upper() + text[1:], file=stream)


class Lines:
    """For logs: a line when a blob is across, and now and then one before."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def begin(self, descriptor: Descriptor) -> BlobProgress:
        return _Line(self._stream, descriptor)


class _Line:
    def __init__(self, stream: IO[str], descriptor: Descriptor) -> None:
        self._stream = stream
        self._descriptor = descriptor
        self._count = 0
        self._began = self._said = time.monotonic()

    def advance(self, count: int) -> None:
        self._count += count
        now = time.monotonic()
        if now - self._said >= _PLAIN_INTERVAL_S:
            self._said = now
            self._print(f"{format_size(self._count)} of {format_size(self._descriptor.size)}")

    def end(self, outcome: Outcome) -> None:
        if outcome == "done":
            elapsed = max(time.monotonic() - self._began, 0.001)
            speed = format_size(int(self._count / elapsed))
            self._print(f"{format_size(self._count)} in {elapsed:.1f} s ({speed}/s)")
        else:
            self._print({"exists": "already there", "mounted": "mounted"}.get(outcome, outcome))

    def _print(self, text: str) -> None:
        click.echo(f"{label_of(self._descriptor)}: {text}", file=self._stream)


class Bars:
    """For terminals."""

    def begin(self, descriptor: Descriptor) -> BlobProgress:
        return _Bar(descriptor)


class _Bar:
    def __init__(self, descriptor: Descriptor) -> None:
        from tqdm import tqdm

        self._bar: tqdm[Any] = tqdm(
            total=descriptor.size or None,
            desc=label_of(descriptor),
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            file=sys.stderr,
            dynamic_ncols=True,
            leave=False,
        )

    def advance(self, count: int) -> None:
        self._bar.update(count)

    def end(self, outcome: Outcome) -> None:
        _ = outcome
        self._bar.close()


def label_of(descriptor: Descriptor) -> str:
    """A blob in a few words: its path where it says one, else its kind and enough of its digest."""
    path = descriptor.annotations.get(FILEPATH_ANNOTATION)
    layer_type = parse_layer_media_type(descriptor.media_type)
    kind = layer_type.kind if layer_type is not None else "config"
    return f"{kind} {visible(path) if path is not None else descriptor.digest.encoded[:12]}"


def format_size(count: int) -> str:
    """Bytes as kit prints them: 1024-based, one decimal, rounded down."""
    if count < 1024:
        return f"{count} B"
    tenths = count * 10
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):
        tenths //= 1024
        if tenths < 10240 or unit == "EiB":
            return f"{tenths // 10}.{tenths % 10} {unit}"
    raise AssertionError("unreachable")
