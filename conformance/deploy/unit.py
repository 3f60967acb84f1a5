"""The systemd unit, read by systemd: every key known, every path there, and what its sandbox leaves open."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from conformance import toolbox
from conformance.clients.lab import Client, Lab, check, operation

_UNIT = toolbox.HERE.parent / "deploy" / "modelkit-registry.service"
_PROGRAM = "/opt/modelkit-registry/bin/modelkit-registry"
# systemd's word for up to 2 of 10; `systemd-analyze security` says what it counts.
_EXPOSURE_MAX = 2.0
_FAMILIES = {"AF_UNIX": 1, "AF_INET": 2, "AF_INET6": 10}
_PROT_WRITE, _PROT_EXEC = 2, 4


class Unit(Client):
    """Read only: systemd does not run here.

    Attributes:
        exposure: what `systemd-analyze security` gives it, 0 to 10; "" before it was asked.
    """

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.exposure = ""
        self.analyze = toolbox.debian_command("systemd-analyze")
        # Where the unit will look for the program there is none here.
        self.unit = lab.folder / _UNIT.name
        self.unit.write_text(_UNIT.read_text().replace(_PROGRAM, "/bin/true"))

    @operation("systemd-analyze verify")
    def verify(self) -> None:
        check(_PROGRAM in _UNIT.read_text(), f"it does not run {_PROGRAM}")
        said = self._ask("verify", "--man=no", self.unit)
        # A key that it does not know is a warning, and no failure.
        check(not said, said)

    @operation(f"systemd-analyze security: at most {_EXPOSURE_MAX}")
    def security(self) -> None:
        said = self._ask("security", "--offline=true", "--no-pager", self.unit)
        found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", said)
        check(found, said[-300:])
        assert found is not None
        self.exposure = found[1]
        check(float(self.exposure) <= _EXPOSURE_MAX, self.exposure)

    def _ask(self, *arguments: str | Path) -> str:
        """What it says, its warnings too."""
        return self.lab.run("sh", "-c", '"$0" "$@" 2>&1', self.analyze, *arguments)


def seccomp_profile() -> dict[str, Any]:
    """What the unit lets a process ask of the kernel, as a profile for Docker: system calls, families of sockets, W^X.

    systemd makes the same of SystemCallFilter=, RestrictAddressFamilies= and MemoryDenyWriteExecute=; the rest of its
    sandbox is mounts, namespaces and capabilities.
    """
    unit = _UNIT.read_text()
    allowed = _sets()["@default"].copy()
    for words in re.findall(r"^SystemCallFilter=(.+)$", unit, re.MULTILINE):
        for name in words.removeprefix("~").split():
            calls = _sets().get(name, {name})
            allowed = allowed - calls if words.startswith("~") else allowed | calls
    families = re.findall(r"^RestrictAddressFamilies=(.+)$", unit, re.MULTILINE)[0].split()
    assert "MemoryDenyWriteExecute=yes" in unit
    conditional = {
        "mmap": [_masked(2, _PROT_WRITE | _PROT_EXEC, bits) for bits in (0, _PROT_WRITE, _PROT_EXEC)],
        "mprotect": [_masked(2, _PROT_EXEC, 0)],
        "socket": [{"index": 0, "value": _FAMILIES[family], "op": "SCMP_CMP_EQ"} for family in families],
    }
    rules: list[dict[str, Any]] = [
        {"names": sorted(allowed - conditional.keys()), "action": "SCMP_ACT_ALLOW"}
    ]
    for name, conditions in conditional.items():
        rules += [{"names": [name], "action": "SCMP_ACT_ALLOW", "args": [each]} for each in conditions]
    return {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": rules}


def _masked(index: int, mask: int, value: int) -> dict[str, Any]:
    return {"index": index, "value": mask, "valueTwo": value, "op": "SCMP_CMP_MASKED_EQ"}


@cache
def _sets() -> dict[str, set[str]]:
    """systemd's names for sets of system calls, each with all that is in it."""
    analyze = toolbox.debian_command("systemd-analyze")
    run = subprocess.run(
        [analyze, "syscall-filter", "--no-pager"], capture_output=True, text=True, check=True
    )
    listed: dict[str, set[str]] = {}
    members: set[str] = set()
    for line in run.stdout.splitlines():
        if line.startswith("@"):
            members = listed.setdefault(line.strip(), set())
        elif line.startswith(" ") and not line.strip().startswith("#"):
            members.add(line.strip())

    def flat(name: str) -> set[str]:
        return set().union(*(flat(each) if each in listed else {each} for each in listed[name]))

    return {name: flat(name) for name in listed}
