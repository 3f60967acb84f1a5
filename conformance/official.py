"""The official conformance suite of the distribution specification, judged strictly.

Its own exit status says little: it is 0 on a bad configuration, on unwritable results and on skipped tests. So what it wrote is
read: a summary, complete results, no test that failed, was skipped or was switched off, and as many that passed as there are.
"""

from __future__ import annotations

import os
import re
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from conformance import toolbox
from conformance.server import Replicas, Runnable, guarded, ours

_TIMEOUT_S = 300
_SUMMARY_LINE = re.compile(r"^  (?P<word>[A-Za-z]+)\.+: +(?P<count>[0-9]+)$", re.MULTILINE)
_FAILURES_SHOWN = 10
# Tests of mounts without `from`, with what they are made of.
_OF_UNNAMED_MOUNTS = 12
_LINE_LENGTH_MAX = 300


@dataclass(frozen=True)
class Setting:
    """What the suite is told to run, and how many tests pass in a registry that lacks nothing."""

    name: str
    environment: dict[str, str]
    sparse: bool
    passing: int


DEV = Setting("dev", {"OCI_VERSION": "dev"}, sparse=False, passing=986)
DEV_SPARSE = Setting(
    "dev, sparse data", {"OCI_VERSION": "dev", "OCI_DATA_SPARSE": "true"}, sparse=True, passing=1032
)

# By the name of the folder that keeps what they write. S3 last: its store is the longest to build.
_SUBJECTS: dict[str, Callable[[bool], Runnable]] = {
    "local-1": lambda sparse: ours(storage="local", workers=1, sparse=sparse),
    "local-3": lambda sparse: ours(storage="local", workers=3, sparse=sparse),
    "basic-1": lambda sparse: guarded("Basic", sparse=sparse),
    "bearer-1": lambda sparse: guarded("Bearer", sparse=sparse),
    "memory-1": lambda sparse: ours(storage="memory", workers=1, sparse=sparse),
    "s3-1": lambda sparse: Replicas(1, sparse),
    "s3-3": lambda sparse: Replicas(3, sparse),
}


@dataclass(frozen=True)
class Verdict:
    """How one run ended; no `complaints` is a pass."""

    subject: str
    setting: str
    counts: dict[str, int]
    complaints: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.complaints

    def __str__(self) -> str:
        figures = " ".join(f"{word} {count}" for word, count in self.counts.items())
        return f"{'ok    ' if self.passed else 'FAILED'}  official suite, {self.setting}: {self.subject}: {figures}"


def run_all(scratch: Path) -> Iterator[Verdict]:
    """Every kind of server beside every setting, each on a fresh store."""
    for kind, subject in _SUBJECTS.items():
        for setting in (DEV, DEV_SPARSE):
            folder = scratch / f"official-{kind}-{'sparse' if setting.sparse else 'whole'}"
            yield run(subject(setting.sparse), setting, folder)


def run(subject: Runnable, setting: Setting, scratch: Path) -> Verdict:
    """One run of the suite against one server; what it wrote stays under `scratch`."""
    suite = toolbox.go_tool("conformance")
    with subject.running(scratch) as host:
        # An empty environment but for this: the suite reads old names too, and warns or obeys.
        environment = {
            "PATH": os.environ["PATH"],
            "OCI_REGISTRY": host,
            "OCI_TLS": "disabled",
            "OCI_REPO1": "conformance/one",
            "OCI_REPO2": "conformance/two",
            "OCI_RESULTS_DIR": str(scratch / "results"),
            **setting.environment,
        }
        if subject.login is not None:
            environment["OCI_USERNAME"], environment["OCI_PASSWORD"] = subject.login
        suite_run = subprocess.run(
            [suite],
            cwd=scratch,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    (scratch / "suite.log").write_text(suite_run.stdout)
    counts = read_summary(suite_run.stdout)
    complaints = judge(counts, setting, scratch / "results", finds_sources=subject.finds_sources)
    if complaints and not counts:
        complaints = [*complaints, suite_run.stdout[-2000:]]
    return Verdict(subject.name, setting.name, counts, tuple(complaints))


def read_summary(output: str) -> dict[str, int]:
    """The counts under "OCI Conformance Result", by word; empty when there is no such summary."""
    _, found, summary = output.partition("OCI Conformance Result:")
    if not found:
        return {}
    block = summary.partition("\n\n")[0]
    return {match["word"]: int(match["count"]) for match in _SUMMARY_LINE.finditer(block)}


def judge(
    counts: dict[str, int], setting: Setting, results: Path, *, finds_sources: bool = True
) -> list[str]:
    """What is wrong with a run; nothing when it is beyond doubt.

    Args:
        finds_sources: of a registry that does not, the suite skips the mounts without `from`, which registries need not support.
    """
    if not counts:
        return ["no summary: the suite did not run"]
    complaints = []
    skipped, passing = (0, setting.passing) if finds_sources else (4, setting.passing - _OF_UNNAMED_MOUNTS)
    expected = {
        "Disabled": 0,
        "Skip": skipped,
        "Pass": passing,
        "FAIL": 0,
        "Error": 0,
        "Total": passing + skipped,
    }
    for word, wanted in expected.items():
        if counts.get(word) != wanted:
            complaints.append(f"{word} is {counts.get(word)}, wanted {wanted}")
    may_be = {} if finds_sources else {"Blob anonymous mount": "Skip"}
    may_be |= {} if setting.sparse else {"Sparse Manifests": "Disabled"}
    complaints += _incomplete(results / "results.yaml", may_be)
    if complaints:
        complaints += _failing_tests(results / "junit.xml")
    return complaints


def _incomplete(path: Path, may_be: Mapping[str, str]) -> list[str]:
    try:
        results = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        return [f"results.yaml cannot be read: {error}"]
    complaints = []
    for part in ("apis", "data"):
        statuses = results.get(part) if isinstance(results, dict) else None
        if not statuses:
            complaints.append(f"results.yaml has no {part}")
            continue
        for name, status in statuses.items():
            wanted = may_be.get(name, "Pass")
            if status != wanted:
                complaints.append(f"{part}: {name}: {status}")
    return complaints


def _failing_tests(path: Path) -> list[str]:
    """Names and reasons of the leaves that did not pass, with the end of their HTTP exchange."""
    try:
        cases = list(ET.parse(path).iter("testcase"))  # noqa: S314  (the suite's own file)
    except (OSError, ET.ParseError) as error:
        return [f"junit.xml cannot be read: {error}"]
    names = [case.get("name", "") for case in cases]
    failing = [
        case
        for case in cases
        if case.get("status") != "passed"
        and not any(name.startswith(f"{case.get('name')}/") for name in names)
    ]
    shown = [_described(case) for case in failing[:_FAILURES_SHOWN]]
    if len(failing) > len(shown):
        shown.append(f"and {len(failing) - len(shown)} more, see {path.parent / 'report.html'}")
    return shown


def _described(case: ET.Element) -> str:
    reason = (case.findtext("system-out") or "").strip()
    exchange = (case.findtext("system-err") or "").splitlines()
    kept = [
        line.strip()[:_LINE_LENGTH_MAX]
        for line in exchange
        if re.match(r"(Method|URL|Status|Body|\{)", line.strip())
    ]
    return "\n      ".join([f"{case.get('name')}: {case.get('status')}: {reason}", *kept[-6:]])
