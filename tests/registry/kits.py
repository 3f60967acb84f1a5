"""ModelKits as kit packs them, small, pushed over the wire: what the tests of views start from."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import zstandard

from kitspec.digest import Digest
from kitspec.layer_tar import TRAILER, format_member, format_padding
from kitspec.media_types import MODELKIT_CONFIG, OCI_MANIFEST
from tests.registry.wire import Wire, descriptor, encode

FILES: Mapping[str, bytes] = {
    "code/train.py": b"print('train')\n",
    "data/train.csv": b"a,b\n" + b"1,2\n" * 500,
    "data/valid.csv": b"a,b\n3,4\n",
    "docs/README.md": b"# A model\n",
    "model/config.json": b'{"hidden_size": 8}',
    "model/weights.bin": bytes(range(256)) * 40,
    "lora/adapter.bin": b"adapter",
    "prompts/system.md": b"Be brief.\n",
}
SECTIONS = {
    "model": ("model",),
    "modelpart": ("lora",),
    "code": ("code",),
    "dataset": ("data/train.csv", "data/valid.csv"),
    "docs": ("docs",),
    "prompt": ("prompts",),
}


def tar_of(files: Mapping[str, bytes], *, mode: int = 0o644) -> bytes:
    """A layer as kit writes it, parent folders first."""
    folders = sorted({path[:cut] for path in files for cut in _cuts(path)})
    members = sorted([*((folder, None) for folder in folders), *files.items()])
    return b"".join(_member(path, content, mode) for path, content in members) + TRAILER


def _cuts(path: str) -> list[int]:
    return [cut for cut, character in enumerate(path) if character == "/"]


def _member(path: str, content: bytes | None, mode: int) -> bytes:
    if content is None:
        return format_member(path, size=0, mode=0o755, is_directory=True)
    return format_member(path, size=len(content), mode=mode) + content + format_padding(len(content))


def compressed(layer: bytes, compression: str | None) -> bytes:
    if compression == "gzip":
        return gzip.compress(layer, mtime=0)
    if compression == "zstd":
        return zstandard.ZstdCompressor().compress(layer)
    return layer


@dataclass
class Kit:
    """A kit in bytes: layers in the manifest's order, each (kind, entry, layer's blob, media type)."""

    layers: list[tuple[str, dict[str, Any], bytes, str]] = field(default_factory=list)
    annotations: dict[str, str] = field(default_factory=lambda: {"ml.kitops.modelkit.cli-version": "1.17.0"})

    def add(
        self, kind: str, path: str, content: bytes, *, name: str = "", compression: str | None = None
    ) -> None:
        """A layer of these bytes, and its entry."""
        blob = compressed(content, compression)
        entry: dict[str, Any] = ({"name": name} if name else {}) | {"path": path}
        entry |= {"digest": str(Digest.of(blob)), "diffId": str(Digest.of(content))}
        word = "code" if kind == "prompt" else kind
        suffix = f"+{compression}" if compression else ""
        self.layers.append((kind, entry, blob, f"application/vnd.kitops.modelkit.{word}.v1.tar{suffix}"))

    @property
    def config(self) -> bytes:
        document: dict[str, Any] = {"manifestVersion": "1.0.0", "package": {"name": "kit"}}
        lists = {
            "code": "code",
            "dataset": "datasets",
            "docs": "docs",
            "prompt": "prompts",
            "mcpb": "mcpServers",
        }
        for kind, entry, _, _ in self.layers:
            if kind == "model":
                document["model"] = entry | {"parameters": {"lr": 1e-5}}
            elif kind == "modelpart":
                document["model"].setdefault("parts", []).append(entry)
            else:
                document.setdefault(lists[kind], []).append(entry)
        return encode(document)

    @property
    def manifest(self) -> dict[str, Any]:
        return {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "artifactType": "application/vnd.kitops.modelkit.manifest.v1+json",
            "config": descriptor(self.config, MODELKIT_CONFIG),
            "layers": [
                descriptor(blob, media_type)
                | (
                    {"annotations": {"ml.kitops.modelkit.layer-subtype": "prompt"}}
                    if kind == "prompt"
                    else {}
                )
                for kind, _, blob, media_type in self.layers
            ],
            "annotations": self.annotations,
        }

    async def push(self, wire: Wire, name: str = "team/kit", tag: str = "v1") -> Digest:
        await wire.push_blob(name, self.config)
        for _, _, blob, _ in self.layers:
            await wire.push_blob(name, blob)
        return await wire.push_manifest(name, tag, self.manifest)


def whole_kit(compression: str | None = None) -> Kit:
    """A kit with something in every section: two datasets, a model and a part."""
    kit = Kit()
    names = {"data/train.csv": "train set", "data/valid.csv": "valid", "model": "net", "lora": "lora"}
    for kind, paths in SECTIONS.items():
        for path in paths:
            files = {
                name: content
                for name, content in FILES.items()
                if name == path or name.startswith(f"{path}/")
            }
            kit.add(kind, path, tar_of(files), name=names.get(path, ""), compression=compression)
    order = ("model", "modelpart", "code", "dataset", "docs", "prompt")
    kit.layers.sort(key=lambda layer: order.index(layer[0]))
    return kit


def config_of(reply_body: bytes) -> Any:
    return json.loads(reply_body)
