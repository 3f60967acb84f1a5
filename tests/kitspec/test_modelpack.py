import json
from datetime import UTC, datetime

import pytest

from kitspec.descriptor import Descriptor
from kitspec.digest import Digest
from kitspec.errors import KitfileInvalid
from kitspec.kitfile import Code, Dataset, Docs, Kitfile, McpServer, Model, ModelPart, Package
from kitspec.manifest import Manifest
from kitspec.media_types import KITFILE_ANNOTATION, MODELPACK_CONFIG, OCI_LAYER, OCI_MANIFEST
from kitspec.modelpack import kitfile_of_modelpack, to_modelpack_config
from kitspec.selection import select_layers

MADE = datetime(2026, 1, 2, 3, 4, 5, 678, UTC)
DIGESTS = [Digest.of(str(number).encode()) for number in range(6)]


def pack(*kinds, prefix="cncf", annotations=None):
    layers = tuple(
        Descriptor(
            f"application/vnd.{prefix}.model.{kind}.v1.raw",
            digest,
            1,
            {f"org.{prefix}.model.filepath": f"f{position}"},
        )
        for position, (kind, digest) in enumerate(zip(kinds, DIGESTS, strict=False))
    )
    return Manifest(
        OCI_MANIFEST, Descriptor(MODELPACK_CONFIG, Digest.of(b""), 0), layers, annotations=annotations or {}
    )


def config(count, key="diffIds", **descriptor):
    document = {
        "descriptor": descriptor,
        "modelfs": {"type": "layers", key: DIGESTS[:count]},
        "config": {"format": "gguf"},
    }
    return json.dumps(document).encode()


def test_a_config_is_written_in_the_order_of_the_specification():
    kitfile = Kitfile(
        package=Package("p", "1", "d", "MIT", ("A",)),
        model=Model("m", "m.bin", "Apache-2.0", format="onnx"),
        code=(Code("src", license="MIT"),),
    ).with_digests([(DIGESTS[0], DIGESTS[1]), (DIGESTS[2], DIGESTS[3])])

    assert to_modelpack_config(kitfile, MADE).decode() == (
        '{"descriptor":{"createdAt":"2026-01-02T03:04:05Z","authors":["A"],"name":"p","version":"1",'
        '"licenses":["Apache-2.0","MIT"],"title":"p","description":"d"},'
        f'"modelfs":{{"type":"layers","diffIds":["{DIGESTS[1]}","{DIGESTS[3]}"]}},"config":{{"format":"onnx"}}}}'
    )


def test_an_empty_kit_has_an_empty_config():
    assert to_modelpack_config(Kitfile(), MADE) == (
        b'{"descriptor":{"createdAt":"2026-01-02T03:04:05Z"},"modelfs":{"type":"layers","diffIds":[]},"config":{}}'
    )


def test_mcp_servers_have_no_place_in_a_model_pack():
    with pytest.raises(KitfileInvalid, match="mcpServers are not supported"):
        to_modelpack_config(Kitfile(mcp_servers=(McpServer("s", "s.mcpb"),)), MADE)


@pytest.mark.parametrize(("prefix", "key"), [("cncf", "diffIds"), ("cnai", "diff_ids")])
def test_a_kitfile_is_made_of_annotations(prefix, key):
    manifest = pack("weight.config", "weight", "weight", "doc", "code", "dataset", prefix=prefix)

    kitfile = kitfile_of_modelpack(manifest, config(6, key, name="n", version="1", authors=["A", 1]))

    assert kitfile == Kitfile(
        "1.0.0",
        package=Package("n", "1", authors=("A",)),
        model=Model(
            "n", "f1", format="gguf", digest=DIGESTS[1], diff_id=DIGESTS[1],
            parts=(ModelPart(path="f0", digest=DIGESTS[0], diff_id=DIGESTS[0]), ModelPart(path="f2", digest=DIGESTS[2], diff_id=DIGESTS[2])),
        ),
        docs=(Docs("f3", digest=DIGESTS[3], diff_id=DIGESTS[3]),),
        code=(Code("f4", digest=DIGESTS[4], diff_id=DIGESTS[4]),),
        datasets=(Dataset(path="f5", digest=DIGESTS[5], diff_id=DIGESTS[5]),),
    )  # fmt: skip
    assert [pair.entry.path for pair in select_layers(manifest, kitfile)] == [
        f"f{number}" for number in range(6)
    ]


def test_the_kitfile_that_a_pack_carries_counts():
    manifest = pack(annotations={KITFILE_ANNOTATION: '{"manifestVersion":"1.0.0","package":{"name":"k"}}'})

    assert kitfile_of_modelpack(manifest, b"not looked at").package.name == "k"


def test_a_pack_of_parts_alone_has_a_model_without_a_path():
    kitfile = kitfile_of_modelpack(pack("weight.config"), b"{}")

    assert kitfile.model == Model(parts=(ModelPart(path="f0", digest=DIGESTS[0]),))
    assert kitfile_of_modelpack(pack("doc"), b'{"modelfs": []}').model is None


def test_other_layers_are_passed_over():
    other = Manifest(
        OCI_MANIFEST, Descriptor(MODELPACK_CONFIG, Digest.of(b""), 0), (Descriptor(OCI_LAYER, DIGESTS[0], 1),)
    )

    assert list(kitfile_of_modelpack(other, config(1)).entries()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"x", "cannot be read"),
        (b"[]", "not an object"),
        (config(2), "does not list a diffId for each"),
        (b'{"modelfs": {"diffIds": ["x"]}}', "modelfs of the config: not a digest"),
        (b" " * (16 * 1024 * 1024 + 1), "at most"),
    ],
    ids=range(5),
)
def test_what_is_no_config_is_refused(content, message):
    with pytest.raises(KitfileInvalid, match=message):
        kitfile_of_modelpack(pack("weight"), content)


def test_a_layer_without_a_path_is_refused():
    layer = Descriptor("application/vnd.cncf.model.weight.v1.tar", DIGESTS[0], 1)
    manifest = Manifest(OCI_MANIFEST, Descriptor(MODELPACK_CONFIG, Digest.of(b""), 0), (layer,))

    with pytest.raises(
        KitfileInvalid, match=r"unknown file path for layer: no org.cncf.model.filepath annotation"
    ):
        kitfile_of_modelpack(manifest, b"{}")
