"""What every command is given: the console, the folders, the registries; and the options that all or many of them take."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import click

from kitclient.console import Console, Level
from kitclient.locations import Locations, locations

_P = ParamSpec("_P")
_R = TypeVar("_R")


@dataclass(frozen=True, slots=True)
class Network:
    """How registries are spoken to; the options of the same names."""

    plain_http: bool = False
    tls_verify: bool = True
    tls_cert: tuple[str, ...] = ()
    cert: str | None = None
    key: str | None = None
    concurrency: int = 5
    proxy: str | None = None


@dataclass
class Application:
    """One call of the command line."""

    console: Console = field(default_factory=Console)
    root: str | None = None

    @property
    def locations(self) -> Locations:
        return locations(self.root)

    def run(self, work: Coroutine[Any, Any, _R]) -> _R:
        return asyncio.run(work)
