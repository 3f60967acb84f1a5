"""A base for the image that is made here: Debian with Python, from the mirror that this machine uses.

The public base image is in no package registry. What this machine needs to reach package registries (its certificates, pip's
settings) goes into this base, which is thrown away with the rest of .cache, and so not into the Dockerfile.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from conformance import toolbox

_PACKAGES = ("python3", "python3-venv", "ca-certificates")
# Read by nobody in a container.
_LEFT_OUT = (
    *("dev", "usr/share/doc", "usr/share/locale", "usr/share/man"),
    *("var/cache/apt", "var/lib/apt/lists", "var/log"),
)
_OF_THIS_MACHINE = (Path("/etc/ssl/certs/ca-certificates.crt"), Path("/etc/pip.conf"))


def make_base() -> Path:
    """A tar for `docker import`; the one of an earlier run, if nothing of what it is made of has changed.

    Raises:
        ToolMissing: there is no debootstrap, or it failed.
    """
    mirror, suite = _mirror()
    file = toolbox.CACHE / f"base-{suite}-{_fingerprint(mirror)}.tar"
    if not file.exists():
        debootstrap = toolbox.debian_command("debootstrap")
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
            root = Path(scratch) / "root"
            include = f"--include={','.join(_PACKAGES)}"
            _run(str(debootstrap), "--variant=minbase", include, suite, str(root), mirror)
            for path in _OF_THIS_MACHINE:
                if path.exists():
                    shutil.copy(path, root / path.relative_to("/"))
            _pack(root, Path(scratch) / file.name)
            (Path(scratch) / file.name).rename(file)
    return file


def _pack(root: Path, file: Path) -> None:
    def kept(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if member.name.removeprefix("./").startswith(_LEFT_OUT) else member

    with tarfile.open(file, "w") as tar:
        tar.add(root, arcname=".", filter=kept)


def _mirror() -> tuple[str, str]:
    """Where apt gets Debian from here, and its name: of the first source, which is the distribution itself."""
    if shutil.which("apt-get") is None:
        raise toolbox.ToolMissing(
            "the base of the image is made of Debian's packages, and there is no apt-get here"
        )
    said = _run("apt-get", "indextargets", "--format", "$(REPO_URI) $(CODENAME)", "Created-By: Packages")
    mirror, _, suite = said.partition("\n")[0].partition(" ")
    if not suite:
        raise toolbox.ToolMissing("apt-get names no source of packages")
    return mirror, suite


def _fingerprint(mirror: str) -> str:
    digest = hashlib.sha256(" ".join([mirror, *_PACKAGES, *_LEFT_OUT]).encode())
    for path in _OF_THIS_MACHINE:
        digest.update(path.read_bytes() if path.exists() else b"")
    return digest.hexdigest()[:12]


def _run(*command: str) -> str:
    run = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise toolbox.ToolMissing(
            f"{' '.join(command)}: exit status {run.returncode}\n{run.stdout[-2000:]}{run.stderr[-500:]}"
        )
    return run.stdout
