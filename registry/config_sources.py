"""A `Config` from what the operator gave: defaults, then the file, then the environment, then flags; the last one wins.

The environment is Distribution's: `REGISTRY_` or our own `MODELREG_` and the path of the key in capitals, joined by `_`
(`REGISTRY_STORAGE_FILESYSTEM_ROOTDIRECTORY=/data`), lists by index, whole sub-trees as YAML (`REGISTRY_STORAGE=inmemory`).
`MODELREG_` wins over `REGISTRY_`. Every problem is found before any is reported; messages never show a secret.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import SecretStr, ValidationError
from pydantic_core import ErrorDetails

from registry.config import STORAGE_DRIVERS, Config
from registry.config_types import Section, expanded

Tree = dict[Any, Any]

OWN_PREFIX = "MODELREG_"
DISTRIBUTION_PREFIX = "REGISTRY_"
_USER_OF_URL = re.compile(r"//\S*@")

# Keys of Distribution's file that people bring along, and what to do about them here.
_DISTRIBUTION_ONLY = {
    "auth.none": "leave auth away: then nobody is asked who they are",
    "auth.silly": "it lets everybody in who says any password",
    "auth.token.autoredirect": "say http.host, or auth.token.realm: a client's word for where we are is not taken",
    "auth.token.autoredirectpath": "say auth.token.realm",
    "compatibility": "schema 1 is not served",
    "http.debug.addr": "metrics are served at http.addr; let a proxy keep /metrics to itself",
    "http.clientcas": "say http.tls.clientcas",
    "http.h2c": "HTTP/1.1 only; leave HTTP/2 to a proxy",
    "http.http2": "HTTP/1.1 only; leave HTTP/2 to a proxy",
    "http.net": "TCP only",
    "http.tls.letsencrypt": "give certificate and key, or leave TLS to a proxy",
    "log.hooks": "collect the log of the process instead",
    "loglevel": "say log.level",
    "middleware": "there is none to load",
    "policy": "there is none to set",
    "proxy": "pull-through caching is not part of this version",
    "redis": "none is needed: caches are built in",
    "reporting": "collect the log of the process instead",
    "storage.azure": "drivers are " + " and ".join(STORAGE_DRIVERS),
    "storage.cache": "none is needed: caches are built in",
    "storage.filesystem.maxthreads": "threads are counted by themselves",
    "storage.gcs": "drivers are " + " and ".join(STORAGE_DRIVERS),
    "storage.s3.accelerate": "name the accelerated endpoint in regionendpoint",
    "storage.s3.loglevel": "requests to the store are not logged",
    "storage.s3.multipartcopychunksize": "uploads are never copied",
    "storage.s3.multipartcopymaxconcurrency": "uploads are never copied",
    "storage.s3.multipartcopythresholdsize": "uploads are never copied",
    "storage.s3.objectacl": "objects belong to the bucket's owner: say it in the bucket's policy",
    "storage.s3.storageclass": "records are read all the time: leave it to a lifecycle rule for _store/data/",
    "storage.s3.usedualstack": "name the dual-stack endpoint in regionendpoint",
    "storage.s3.useragent": "it is botocore's",
    "storage.s3.v4auth": "signatures are always of version 4",
    "storage.tag": "tags are looked up without a scan",
    "validation": "manifests are always checked; see manifests.allowsparse",
}


class ConfigInvalid(Exception):
    """The configuration cannot be used.

    Attributes:
        problems: one line each, beginning with the path of the key or the name of the source.
        files: that the configuration names, as far as it was understood; with another content it may be good.
    """

    def __init__(self, problems: Iterable[str], *, files: Iterable[Path] = ()) -> None:
        self.problems = tuple(problems)
        self.files = tuple(files)
        super().__init__("\n".join(self.problems))


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    config: Config
    warnings: tuple[str, ...]


def load_config(
    path: Path | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, object] | None = None,
) -> LoadedConfig:
    """Read everything the operator gave.

    Args:
        environ: usually `os.environ`; nothing when it is left out.
        overrides: by dotted path (`"http.addr"`), from flags. `"storage"` replaces the driver and keeps its other keys.

    Raises:
        ConfigInvalid: with every problem, not just the first.
    """
    problems: list[str] = []
    warnings: list[str] = []
    tree = _read_yaml(path, problems) if path is not None else {}
    _apply_environment(tree, environ or {}, problems, warnings)
    for dotted, value in (overrides or {}).items():
        _apply_override(tree, dotted, value)
    files = _read_secret_files(tree, problems)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        problems += [_describe(details) for details in error.errors(include_url=False)]
    else:
        if not problems:
            return LoadedConfig(config, tuple(warnings))
    raise ConfigInvalid(dict.fromkeys(problems), files=files)


def json_schema() -> dict[str, Any]:
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "modelkit-registry configuration",
        **Config.model_json_schema(),
    }


class _Loader(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error: the second one would win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002 - PyYAML's signature
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str | int | float) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            if isinstance(key, str | int | float):
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _parse_yaml(text: str) -> object:
    return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader


def _read_yaml(path: Path, problems: list[str]) -> Tree:
    try:
        tree = _parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        problems.append(f"{path}: cannot be read: {error.strerror}")
    except UnicodeDecodeError:
        problems.append(f"{path}: should be UTF-8 text")
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problems.append(f"{path}: {_yaml_problem(error)}")
    else:
        if tree is None:
            return {}
        if isinstance(tree, dict):
            return tree
        problems.append(f"{path}: should hold keys and values at the top level")
    return {}


def _yaml_problem(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or "not YAML"
    return f"line {mark.line + 1}, column {mark.column + 1}: {what}" if mark else f"not YAML: {what}"


def _apply_environment(
    tree: Tree, environ: Mapping[str, str], problems: list[str], warnings: list[str]
) -> None:
    for prefix in (DISTRIBUTION_PREFIX, OWN_PREFIX):
        # Shorter names first: REGISTRY_STORAGE names the tree that REGISTRY_STORAGE_DELETE_ENABLED then changes.
        for name in sorted(environ):
            if not name.startswith(prefix):
                continue
            try:
                _set_variable(tree, name.removeprefix(prefix), environ[name])
            except LookupError as error:
                if prefix == OWN_PREFIX:
                    problems.append(f"{name}: {error.args[0]}")
                else:  # images of other registries set variables of their own
                    warnings.append(f"{name}: ignored: {error.args[0]}")
            except yaml.YAMLError as error:
                problems.append(f"{name}: {_yaml_problem(error)}")


def _set_variable(tree: Tree, name: str, text: str) -> None:
    """Put `text` where `name` points. Raises LookupError when it points nowhere."""
    annotation: object = Config
    keys: list[str | int] = []
    rest = name
    while rest:
        annotation = _without_none(annotation)
        key, rest = _next_key(annotation, rest)
        keys.append(key)
        annotation = _type_below(annotation, key)
    if not keys:
        raise LookupError("names no key")
    annotation = _without_none(annotation)
    value = text if _is_text(annotation) else _parse_yaml(text)
    if keys[0] == "storage" and len(keys) > 1 and keys[1] in STORAGE_DRIVERS:
        _choose_driver(tree, str(keys[1]))
    if keys == ["storage"] and isinstance(value, str):
        value = {value: {}}
    _put(tree, keys, value)


def _next_key(annotation: object, rest: str) -> tuple[str | int, str]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        lowered = rest.lower()
        known = [
            field
            for field in annotation.model_fields
            if lowered == field.lower() or lowered.startswith(f"{field.lower()}_")
        ]
        if not known:
            raise LookupError(_unknown_key(annotation, lowered.partition("_")[0]))
        key = max(known, key=len)
        return key, rest[len(key) + 1 :]
    segment, _, remainder = rest.partition("_")
    origin = typing.get_origin(annotation)
    if origin in {list, tuple} and segment.isascii() and segment.isdigit() and len(segment) < 4:
        return int(segment), remainder
    if origin is dict:
        if typing.get_args(annotation)[1] is str:  # nothing lies below: the key may have underscores
            return rest.lower(), ""
        return segment.lower(), remainder
    raise LookupError("names nothing that can be set")


def _type_below(annotation: object, key: str | int) -> object:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation.model_fields[str(key)].annotation
    return typing.get_args(annotation)[-1 if isinstance(key, str) else 0]


def _without_none(annotation: object) -> Any:  # noqa: ANN401 - an annotation can be anything
    if typing.get_origin(annotation) in {types.UnionType, typing.Union}:
        return next(part for part in typing.get_args(annotation) if part is not type(None))
    return annotation


def _is_text(annotation: object) -> bool:
    return annotation in {str, Path, SecretStr} or typing.get_origin(annotation) is Literal


def _put(tree: Tree, keys: list[str | int], value: object) -> None:
    place: Any = tree
    for key, following in zip(keys, [*keys[1:], None], strict=True):
        content = value if following is None else ([] if isinstance(following, int) else {})
        if isinstance(key, int):
            if key > len(place):
                raise LookupError(f"the list has {len(place)} entries: index {key} leaves a gap")
            if key == len(place):
                place.append(content)
            elif following is None:
                place[key] = content
        elif following is None or type(place.get(key)) is not type(content):
            place[key] = content
        place = place[key]


def _choose_driver(tree: Tree, driver: str) -> None:
    """Naming a driver's key outside the file takes the place of the file's driver, as the outer source always does."""
    storage = tree.get("storage")
    if isinstance(storage, str):
        tree["storage"] = {} if storage != driver else {storage: {}}
    elif isinstance(storage, dict):
        for other in STORAGE_DRIVERS:
            if other != driver:
                storage.pop(other, None)


def _apply_override(tree: Tree, dotted: str, value: object) -> None:
    keys: list[str | int] = list(dotted.split("."))
    if keys[0] == "storage" and len(keys) > 1 and keys[1] in STORAGE_DRIVERS:
        _choose_driver(tree, str(keys[1]))
    _put(tree, keys, value)


def _read_secret_files(
    tree: object, problems: list[str], section: type[Section] = Config, path: str = ""
) -> list[Path]:
    """Put the first line of the file that `<key>_file` names under `<key>`; answers which files those are."""
    files: list[Path] = []
    if not isinstance(tree, dict):
        return files
    for name, field in section.model_fields.items():
        annotation = _without_none(field.annotation)
        if isinstance(annotation, type) and issubclass(annotation, Section):
            files += _read_secret_files(tree.get(name), problems, annotation, f"{path}{name}.")
        elif annotation is SecretStr and isinstance(tree.get(f"{name}_file"), str | Path):
            if tree.get(name) is not None:
                problems.append(f"{path}{name}: stands beside {name}_file; one of them is enough")
                continue
            try:
                file = expanded(tree[f"{name}_file"])
            except ValueError:
                continue  # the key's own check says so
            files.append(file)
            try:
                secret = file.read_text(encoding="utf-8").rstrip("\r\n")
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
                problems.append(f"{path}{name}_file: cannot be read: {reason}")
                continue
            if not secret:
                problems.append(f"{path}{name}_file: should not be empty")
                continue
            tree[name] = secret
    return files


def _describe(details: ErrorDetails) -> str:
    path = ".".join(str(part) for part in details["loc"])
    if details["type"] == "extra_forbidden":
        return f"{path}: {_unknown_key(_section_at(details['loc'][:-1]), str(details['loc'][-1]), path)}"
    if details["type"] == "value_error":
        message = str(details["ctx"]["error"])
    else:
        message = details["msg"].replace("Input should", "should")
    value = details["input"]
    shown = isinstance(value, str | int | float | bool) and "secret" not in path
    # A password in a URL is not what was meant, and is one all the same.
    seen = _USER_OF_URL.sub("//…@", f", not {value!r}") if shown else ""
    return f"{path + ': ' if path else ''}{message}{seen}"


def _section_at(location: tuple[int | str, ...]) -> type[Section] | None:
    annotation: object = Config
    for key in location:
        if not (
            isinstance(annotation, type)
            and issubclass(annotation, Section)
            and key in annotation.model_fields
        ):
            return None
        annotation = _without_none(annotation.model_fields[str(key)].annotation)
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def _unknown_key(section: type[Section] | None, key: str, path: str | None = None) -> str:
    if hint := _DISTRIBUTION_ONLY.get(path or key):
        return f"a key of Distribution that this registry does not have: {hint}"
    close = difflib.get_close_matches(key, section.model_fields if section else (), n=1, cutoff=0.5)
    return (
        f"unknown key {key!r}"
        if path is None and not close
        else "unknown key" + (f"; did you mean {close[0]}?" if close else "")
    )
