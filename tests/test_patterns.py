"""L-30: no regular expression of ours takes more than linear time, whatever it is given."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import time
from collections.abc import Iterator
from itertools import product
from types import ModuleType
from typing import Any

import pytest

import kitclient
import kitspec
import registry
import storage_backends
from kitspec.path_glob import PATTERN_LENGTH_MAX

# Of a pattern that passes over its text again for each character a short text shows it, before a long one takes minutes.
SHORT, LONG = 5_000, 100_000
# Hundreds of times what a linear one takes, a fifth or less of what a quadratic one does.
SECONDS_MAX = {SHORT: 0.02, LONG: 0.1}
# What these are given is shorter than that: a pattern of paths by its own limit, the configuration because its author is trusted.
SHORTER = {
    "kitspec.path_glob._TOKEN.finditer": PATTERN_LENGTH_MAX,
    "registry.config_sources._USER_OF_URL.sub": 1000,
    "registry.config_types._DURATION_PART.findall": 1000,
}
# What grammars of ours know: that is what a pattern repeats.
PIECES = (
    *"a0A_-./:,;=\"'\\ \t\r\n{}[]()<>@%+*?#~|&$^!é\0",
    *("__", "--", "a-", "a.", "a/", "a=", 'a="', "a,", "sha256:", "\r\n ", "a: b\r\n"),
)
ENDS = ("", "\0", "!")
_METHODS = "fullmatch|match|search|findall|finditer|split|sub"


def modules() -> Iterator[ModuleType]:
    for package in (kitspec, registry, storage_backends, kitclient):
        for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if not found.name.endswith("__main__"):
                yield importlib.import_module(found.name)


def uses() -> dict[str, tuple[re.Pattern[Any], str]]:
    """Each pattern of a module, with each method that it is used by."""
    found: dict[str, tuple[re.Pattern[Any], str]] = {}
    for module in modules():
        source = inspect.getsource(module)
        for name, value in vars(module).items():
            if isinstance(value, re.Pattern):
                for method in set(re.findall(rf"\b{name}\.({_METHODS})\b", source)):
                    found[f"{module.__name__}.{name}.{method}"] = (value, method)
    return found


USES = uses()


def hostile(pattern: re.Pattern[Any], size: int) -> Iterator[Any]:
    """Long repetitions that nearly match, after a beginning that does where that can be read off the pattern."""
    for begin, piece, end in product({"", _beginning(pattern)}, PIECES, ENDS):
        text = begin + piece * (size // len(piece)) + end
        yield text if isinstance(pattern.pattern, str) else text.encode()


def _beginning(pattern: re.Pattern[Any]) -> str:
    source = pattern.pattern if isinstance(pattern.pattern, str) else pattern.pattern.decode("latin-1")
    literal = re.match(r'(?:[A-Za-z0-9 =:/"_-](?![*+?{]))*', source)
    return literal[0] if literal is not None else ""


def seconds(pattern: re.Pattern[Any], method: str, text: Any) -> float:
    begun = time.process_time()
    if method == "sub":
        pattern.sub("", text)
    elif method == "finditer":
        for _ in pattern.finditer(text):
            pass
    else:
        getattr(pattern, method)(text)
    return time.process_time() - begun


@pytest.mark.parametrize("use", USES)
def test_L_30_a_pattern_takes_linear_time(use: str) -> None:
    pattern, method = USES[use]
    for size, allowed in SECONDS_MAX.items():
        for text in hostile(pattern, min(size, SHORTER.get(use, size))):
            # The machine may be doing something else once; not three times.
            assert any(seconds(pattern, method, text) < allowed for _ in range(3)), (text[:40], text[-10:])


def test_patterns_are_found() -> None:
    assert "kitspec.names._REPOSITORY.fullmatch" in USES
    assert len(USES) > 30
