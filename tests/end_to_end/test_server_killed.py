"""kill -9 of the server at any moment of a push loses nothing acknowledged and needs no cleaning by hand (X-03)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def sweep(folder: Path, stride: int, first: int) -> int:
    done = subprocess.run(
        [sys.executable, "-m", "tests.end_to_end.server_break_off", str(folder), str(stride), str(first)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_X_03_a_server_killed_in_a_push_loses_nothing_acknowledged(tmp_path: Path) -> None:
    assert sweep(tmp_path, stride=41, first=7) > 5


@pytest.mark.slow
@pytest.mark.timeout(660)
def test_X_03_whichever_call_the_server_is_killed_at(tmp_path: Path) -> None:
    assert sweep(tmp_path, stride=3, first=1) > 100
