"""What kit 1.7.0 wrote for a small ModelKit, to the byte: made by the binary, umask 022."""

import pytest

from kitspec.descriptor import Descriptor
from kitspec.digest import Digest
from kitspec.kitfile import Kitfile
from kitspec.layer_tar import TRAILER, format_member, format_padding
from kitspec.manifest import format_manifest, parse_manifest
from kitspec.media_types import CLI_VERSION_ANNOTATION, MODELKIT_CONFIG, OCI_MANIFEST, LayerType
from kitspec.selection import select_layers

KITFILE = b"""
manifestVersion: "1.0.0"
package:
  name: golden
  version: 0.1.0
  authors: ["A <a@x.org>", B]
model:
  name: w
  path: ./models
  parameters: {z: 1, a: {k: "v&w"}}
datasets:
  - name: t
    path: data/t.csv
docs:
  - path: docs/
"""
LONG = "docs/" + "d" * 60
MEMBERS = {
    "model": [
        ("models", None, 0o755),
        ("models/sub", None, 0o755),
        ("models/sub/run.sh", b"#!/bin/sh\n", 0o755),
        ("models/w.bin", b"hello weights\n", 0o644),
    ],
    "dataset": [("data", None, 0o755), ("data/t.csv", b"a,b\n1,2\n", 0o644)],
    "docs": [
        ("docs", None, 0o755),
        (LONG, None, 0o755),
        (f"{LONG}/{'e' * 60}", None, 0o755),
        (f"{LONG}/{'e' * 60}/{'f' * 40}.txt", b"long", 0o644),
        ("docs/empty", b"", 0o644),
        (f"docs/{'g' * 120}.txt", b"pax", 0o644),
        ("docs/naïve.md", b"x", 0o644),
    ],
}
LAYERS = {
    "model": (4096, Digest("sha256:ae50621ff955a3c4944d028f8a06b980536e26b6361f551f12acbfbf34c102cc")),
    "dataset": (2560, Digest("sha256:0bd55136a31e0366ec65160de70eff3676eeb7b5295d1931772884ea8f09f948")),
    "docs": (8192, Digest("sha256:c59b4eb2d9e27d89b99f5d5db286fa3693bd1fa29e06894d30c17c0cb5dfbcfd")),
}
CONFIG = (764, Digest("sha256:4b97b46acbd6736357c793f43aceac950eafcdf4b0351beb883fa45fbadb9bc9"))
MANIFEST = (722, Digest("sha256:49925ce7a86946964692d440f0f75e8afa8999b7ffbc548219c2b894b209ee54"))
ANNOTATIONS = {CLI_VERSION_ANNOTATION: "1.7.0"}


def tar(members):
    parts = []
    for path, content, mode in members:
        if content is None:
            parts.append(format_member(path, size=0, mode=mode, is_directory=True))
        else:
            parts += [
                format_member(path, size=len(content), mode=mode),
                content,
                format_padding(len(content)),
            ]
    return b"".join([*parts, TRAILER])


def golden_manifest():
    layers = [Descriptor(str(LayerType(kind)), digest, size) for kind, (size, digest) in LAYERS.items()]
    size, digest = CONFIG
    return format_manifest(Descriptor(MODELKIT_CONFIG, digest, size), layers, ANNOTATIONS, style="1.7")


def golden_config():
    kitfile = Kitfile.from_yaml(KITFILE)
    return kitfile.with_digests([(digest, digest) for _, digest in LAYERS.values()]).to_json()


def seen(content):
    return len(content), Digest.of(content)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_tar_of_a_layer_is_kits(kind):
    assert seen(tar(MEMBERS[kind])) == LAYERS[kind]


def test_the_config_is_kits():
    assert seen(golden_config()) == CONFIG


def test_the_manifest_is_kits():
    assert seen(golden_manifest()) == MANIFEST


def test_an_empty_kit_is_kits():
    config = Kitfile.from_yaml(b'manifestVersion: "1.0.0"').to_json()
    assert seen(config) == (40, "sha256:140e17e620f62380c7801047d14343caddbbfc87d97a2788f77e9a210843826c")

    manifest = format_manifest(
        Descriptor(MODELKIT_CONFIG, Digest.of(config), 40), [], ANNOTATIONS, style="1.7"
    )

    assert b'"layers":null' in manifest
    assert Digest.of(manifest) == "sha256:553da412073cc6da11e1894b90890c1d692af6b3f4e56ed2bf9f23338bb21f21"


def test_an_empty_layer_is_kits():
    assert Digest.of(TRAILER) == "sha256:5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef"


def test_what_was_written_pairs_again():
    kitfile = Kitfile.from_json(golden_config())
    manifest = parse_manifest(golden_manifest(), OCI_MANIFEST)

    pairs = select_layers(manifest, kitfile)

    assert [(pair.layer_type.kind, pair.entry.path) for pair in pairs] == [
        ("model", "./models"),
        ("dataset", "data/t.csv"),
        ("docs", "docs/"),
    ]
