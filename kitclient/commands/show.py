"""`kitclient inspect`, `info` and `diff`: what is in a kit, without its layers."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Sequence
from types import NoneType
from typing import TYPE_CHECKING, Any

import click

from kitclient.commands.application import (
    Application,
    asynchronous,
    global_options,
    network_options,
    pass_application,
)
from kitclient.errors import ClientError

if TYPE_CHECKING:
    from kitclient.modelkit import ModelKit
    from kitspec.descriptor import Descriptor
    from kitspec.kitfile import Kitfile
    from kitspec.manifest import Manifest

_FILTER = re.compile(r"\.?[a-zA-Z0-9_-]+(?:\.[a-zA-Z0-9_-]+)*", re.ASCII)
_RULE = "-" * 39
_NEVER_SHOWN = {"digest", "diffid"}
_EMPTY: dict[type, object] = {tuple: [], NoneType: None}


class NodeMissing(ClientError):
    """A Kitfile has no such node."""


@click.command()
@click.argument("reference", metavar="REFERENCE")
@click.option("-r", "--remote", is_flag=True, help="Ask the registry, not the local store.")
@network_options
@global_options
@pass_application
@asynchronous
async def inspect(app: Application, reference: str, *, remote: bool) -> None:
    """Print a ModelKit's manifest and Kitfile as JSON.

    \b
    kitclient inspect team/model:v1
    kitclient inspect -r registry.example.com/team/model:v1
    """
    from kitspec.media_types import CLI_VERSION_ANNOTATION

    kit = await _read(app, reference, remote=remote)
    document = {
        "digest": kit.digest,
        "cliVersion": kit.manifest.annotations.get(CLI_VERSION_ANNOTATION, "unknown"),
        "kitfile": json.loads(kit.kitfile.to_json()),
        "manifest": json.loads(kit.stored.content),
    }
    app.console.answer(_json(document))


@click.command()
@click.argument("reference", metavar="REFERENCE")
@click.option("-r", "--remote", is_flag=True, help="Ask the registry, not the local store.")
@click.option(
    "-f",
    "--filter",
    "path",
    metavar="PATH",
    help="Only this part, such as .package.authors or model.parameters.",
)
@network_options
@global_options
@pass_application
@asynchronous
async def info(app: Application, reference: str, path: str | None, *, remote: bool) -> None:
    """Print a ModelKit's Kitfile.

    \b
    kitclient info team/model:v1
    kitclient info team/model:v1 -f .datasets
    """
    if path is not None and _FILTER.fullmatch(path) is None:
        raise click.UsageError(f"invalid filter: {path}; wanted names joined by dots, such as .package.name")
    kit = await _read(app, reference, remote=remote)
    app.console.answer(kit.kitfile.to_yaml().decode() if path is None else _part(kit.kitfile, path))


@click.command()
@click.argument("first", metavar="MODELKIT1")
@click.argument("second", metavar="MODELKIT2")
@network_options
@global_options
@pass_application
@asynchronous
async def diff(app: Application, first: str, second: str) -> None:
    """Compare two ModelKits layer by layer.

    local:// and remote:// before a reference say where to look; without, the local store is asked first.

    \b
    kitclient diff local://registry.example.com/team/model:v1 remote://registry.example.com/team/model:v1
    """
    one, other = await _read_either(app, first), await _read_either(app, second)
    if one.digest == other.digest:
        app.console.answer("ModelKits are identical")
        return
    app.console.answer("\n".join(_comparison(first, second, one.manifest, other.manifest)))


async def _read(app: Application, text: str, *, remote: bool) -> ModelKit:
    from kitclient.modelkit import read_modelkit
    from kitclient.stores import ReferenceMissing, name_of, wanted
    from kitclient.transfer import Place
    from kitspec.errors import ManifestUnknown, NameUnknown
    from kitspec.names import Reference

    reference = Reference.parse(text)
    if reference.further_tags:
        raise click.UsageError("one tag or digest is wanted, not several")
    label = wanted(reference)
    stores = app.stores
    async with stores.remote(reference.registry) if remote else stores.local(reference.registry) as registry:
        try:
            return await read_modelkit(Place(registry, name_of(reference)), label)
        except (ManifestUnknown, NameUnknown) as error:
            where = f"in {reference.registry}" if remote else "in the local store; -r asks the registry"
            raise ReferenceMissing(f"model {reference.display} not found {where}") from error


async def _read_either(app: Application, text: str) -> ModelKit:
    from kitclient.modelkit import read_modelkit
    from kitspec.names import Reference

    for prefix, remote in (("local://", False), ("remote://", True)):
        if text.startswith(prefix):
            return await _read(app, text.removeprefix(prefix), remote=remote)
    async with app.stores.find(Reference.parse(text)) as (place, label):
        return await read_modelkit(place, label)


def _part(kitfile: Kitfile, path: str) -> str:
    """A node of the Kitfile as YAML. Names count in any case of letters: kit wants `dataSets`, and writes `datasets`."""
    document: Any = json.loads(kitfile.to_json())
    known: Any = kitfile
    for word in path.lstrip(".").lower().split("."):
        keys = {key.lower(): key for key in document} if isinstance(document, dict) else {}
        names = {name.replace("_", ""): name for name in getattr(known, "__dataclass_fields__", {})}
        if (word not in keys and word not in names) or word in _NEVER_SHOWN:
            raise NodeMissing("error filtering output: cannot find required node")
        known = getattr(known, names[word]) if word in names else None
        # What is empty is left out of the config, and is there all the same.
        document = document[keys[word]] if word in keys else _EMPTY.get(type(known), "")
    return _yaml(document)


def _yaml(node: object) -> str:
    from kitspec.go_yaml import to_go_yaml

    node = _without_digests(node)
    if isinstance(node, dict) and node:
        return to_go_yaml(node)
    # The writer writes groups of keys: what is behind a key that we make up is what is wanted.
    text = to_go_yaml({"x": node}).removeprefix("x:")
    return textwrap.dedent(text.lstrip("\n")) if text.startswith("\n") else text.removeprefix(" ")


def _without_digests(node: object) -> object:
    if isinstance(node, dict):
        return {key: _without_digests(item) for key, item in node.items() if key not in {"digest", "diffId"}}
    return [_without_digests(item) for item in node] if isinstance(node, list) else node


def _json(document: object) -> str:
    """As Go indents it, `<` and its like escaped."""
    text = json.dumps(document, indent=2, ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _comparison(first: str, second: str, one: Manifest, other: Manifest) -> list[str]:
    shared = {layer.digest for layer in one.layers} & {layer.digest for layer in other.layers}
    lines = ["Comparing:", f"  ModelKit1: {first}", f"  ModelKit2: {second}", "", "Configurations:", _RULE]
    if one.config.digest == other.config.digest:
        lines += [f"  Configs are identical (Digest: {one.config.digest[:17]})"]
    else:
        lines += ["Configs differ:", f"  ModelKit1 Config Digest: {one.config.digest[:17]}"]
        lines += [f"  ModelKit2 Config Digest: {other.config.digest[:17]}"]
    same = dict(one.annotations) == dict(other.annotations)
    lines += ["", "Annotations:", _RULE, f"  Annotations {'are identical' if same else 'do not match'}", ""]
    lines += _layer_table("Shared Layers", [layer for layer in one.layers if layer.digest in shared])
    lines += _layer_table(
        f"Unique Layers to ModelKit1 ({first})", [layer for layer in one.layers if layer.digest not in shared]
    )
    lines += _layer_table(
        f"Unique Layers to ModelKit2 ({second})",
        [layer for layer in other.layers if layer.digest not in shared],
    )
    return lines


def _layer_table(title: str, layers: Sequence[Descriptor]) -> list[str]:
    from kitclient.console import format_size
    from kitspec.media_types import parse_layer_media_type

    lines = [title, _RULE]
    if not layers:
        return [*lines, "<none>", ""]
    lines.append("Type    | Digest             | Size")
    for layer in sorted(layers, key=lambda layer: layer.media_type):
        layer_type = parse_layer_media_type(layer.media_type)
        kind = layer_type.kind if layer_type is not None else layer.media_type
        lines.append(f"{kind:<7} | {layer.digest[:17]:<18} | {format_size(layer.size)}")
    return [*lines, ""]
