"""What the documents say of the code is so."""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("kitspec", "storage_backends", "registry", "kitclient")
MODULES = sorted(
    module.name
    for package in PACKAGES
    for module in pkgutil.walk_packages([str(ROOT / package)], f"{package}.")
    if not module.name.endswith("__main__")
)
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
FILE_NAME = re.compile(
    r"\b(?:kitspec|storage_backends|registry|kitclient|tests|deploy|docs|conformance|bench)/[\w./-]+\.\w+"
)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_that_a_document_names_is_there(document: Path) -> None:
    text = document.read_text(encoding="utf-8")

    missing = {name for name in FILE_NAME.findall(text) if not (ROOT / name).exists()}
    missing |= {link for link in LINK.findall(text) if not (document.parent / link).exists()}

    assert not missing


def test_architecture_names_no_module_of_the_registry_that_is_gone() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    known = {path.name for package in PACKAGES for path in (ROOT / package).rglob("*.py")}

    assert not {name for name in re.findall(r"\b[a-z_]+\.py\b", text) if name not in known} - {
        "test_architecture.py",
        "registry_contract.py",
        "storage_contract.py",
    }


def test_every_module_imports_alone_without_a_warning() -> None:
    source = "import sys, subprocess\nfor name in sys.argv[1:]: __import__(name)"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", source, *MODULES],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_no_other_distribution_owns_our_import_names(package: str) -> None:
    assert set(packages_distributions().get(package, ())) <= {"modelkit-registry"}
    assert importlib.import_module(package).__file__ == str(ROOT / package / "__init__.py")


def test_only_the_edge_of_the_registry_knows_aiohttp() -> None:
    edge = {"app", "answer_memo", "body", "cli", "connection", "http_limits", "logs", "middleware", "routes"}

    knowing = {
        path.stem
        for path in (ROOT / "registry").glob("*.py")
        if re.search(r"^\s*(from|import) aiohttp", path.read_text(encoding="utf-8"), re.MULTILINE)
    }

    assert knowing <= edge


def test_only_who_must_opens_files() -> None:
    opening = re.compile(r"(?<![\w.])open\(|\.open\(|\.(read|write)_(text|bytes)\(")
    allowed = {"local", "local_folder", "local_listing", "local_upload", "config_sources", "metrics"}
    # What the operator names: certificates, users, secrets; the audit log.
    allowed |= {"tls", "watched_file", "event_sinks", "audit"}

    found = {
        path.stem
        for package in ("kitspec", "storage_backends", "registry")
        for path in (ROOT / package).rglob("*.py")
        if opening.search(path.read_text(encoding="utf-8"))
    }

    assert found <= allowed
