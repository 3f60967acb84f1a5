"""The container's files: what is pinned, what is configured, what goes into the build."""

import importlib.metadata
import re
from collections.abc import Iterator
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from registry.config_sources import load_config
from registry.readiness import address_to_ask

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DISTRIBUTION = "modelkit-registry"


def pins() -> dict[str, str]:
    lines = (DEPLOY / "constraints.txt").read_text().splitlines()
    pinned = [line.partition("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): version for name, _, version in pinned}


def requirements(name: str, extra: str, seen: set[str]) -> Iterator[Requirement]:
    """What `name[extra]` needs here, and what that needs."""
    for text in importlib.metadata.requires(name) or ():
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        yield requirement
        if requirement.name not in seen:
            seen.add(requirement.name)
            yield from requirements(requirement.name, "".join(requirement.extras), seen)


def test_everything_in_the_image_is_pinned_to_a_version_that_we_allow() -> None:
    pinned = pins()

    needed = list(requirements(DISTRIBUTION, "s3", set()))

    assert {canonicalize_name(requirement.name) for requirement in needed} - pinned.keys() == set()
    for requirement in needed:
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement


def test_what_builds_the_wheel_is_pinned_too() -> None:
    assert {"hatchling", "packaging", "pathspec", "pluggy", "trove-classifiers"} <= pins().keys()


def test_the_configuration_of_the_image_is_sound_and_fits_the_dockerfile() -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text()

    config = load_config(DEPLOY / "container.yml").config

    assert config.storage.filesystem is not None
    assert f"VOLUME {config.storage.filesystem.rootdirectory}\n" in dockerfile
    assert f"EXPOSE {config.http.addr.rpartition(':')[2]}\n" in dockerfile
    assert address_to_ask(config.http.addr) == "127.0.0.1:5000"


def test_everything_that_the_dockerfile_copies_is_there_and_let_through() -> None:
    let_through = {
        line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"
    }
    copies = re.findall(r"^COPY (?!--from)(.+)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)

    copied = {name for line in copies for name in line.split()[:-1]}

    assert copied == let_through
    assert all((ROOT / name).exists() for name in copied)


def test_a_container_gets_longer_to_stop_than_it_takes_to_drain() -> None:
    drain_s = load_config(DEPLOY / "container.yml").config.http.draintimeout

    for name in ("folder.yml", "s3.yml"):
        service = yaml.safe_load((DEPLOY / "compose" / name).read_text())["services"]["registry"]
        assert int(service["stop_grace_period"].removesuffix("s")) > drain_s
    unit = (DEPLOY / "modelkit-registry.service").read_text()
    assert int(re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)[0]) > drain_s


def test_the_variables_of_the_compose_file_are_settings() -> None:
    service = yaml.safe_load((DEPLOY / "compose" / "s3.yml").read_text())["services"]["registry"]
    # As compose fills them in.
    environ = {
        name: re.sub(r"\$\{\w+(?::-([^}]*)|:\?[^}]*)\}", lambda match: match[1] or "models", text)
        for name, text in service["environment"].items()
        if text is not None
    }

    loaded = load_config(DEPLOY / "container.yml", environ=environ)

    assert loaded.config.storage.driver == "s3"
    assert loaded.config.limits.trustedproxies
    assert loaded.warnings == ()


def test_the_chart_runs_the_version_of_this_tree() -> None:
    chart = yaml.safe_load((DEPLOY / "helm" / DISTRIBUTION / "Chart.yaml").read_text())

    assert chart["appVersion"] == importlib.metadata.version(DISTRIBUTION)
