from itertools import product

import pytest

from kitspec.media_types import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    MANIFEST_TYPES,
    OCI_INDEX,
    OCI_LAYER,
    OCI_MANIFEST,
    LayerType,
    is_foreign_layer_type,
    is_index_type,
    is_manifest_type,
    parse_layer_media_type,
)

KITOPS_KINDS = ("model", "modelpart", "dataset", "code", "docs", "mcpb")
ALL = [
    LayerType(kind, packaging, compression, family)
    for kind, packaging, compression, family in product(
        KITOPS_KINDS, ("tar", "raw"), (None, "gzip", "zstd"), ("kitops", "modelpack", "legacy-modelpack")
    )
    if family == "kitops" or kind != "mcpb"
]


@pytest.mark.parametrize("layer_type", ALL, ids=str)
def test_a_layer_type_parses_back_to_itself(layer_type):
    assert parse_layer_media_type(str(layer_type)) == layer_type


@pytest.mark.parametrize(
    ("text", "layer_type"),
    [
        ("application/vnd.kitops.modelkit.model.v1.tar", LayerType("model")),
        ("application/vnd.kitops.modelkit.dataset.v1.tar+gzip", LayerType("dataset", compression="gzip")),
        ("application/vnd.kitops.modelkit.mcpb.v1.raw", LayerType("mcpb", "raw")),
        ("application/vnd.cncf.model.weight.v1.tar+zstd", LayerType("model", "tar", "zstd", "modelpack")),
        ("application/vnd.cncf.model.weight.config.v1.raw", LayerType("modelpart", "raw", None, "modelpack")),
        ("application/vnd.cnai.model.doc.v1.tar", LayerType("docs", "tar", None, "legacy-modelpack")),
    ],
)
def test_the_words_of_each_format_are_known(text, layer_type):
    assert parse_layer_media_type(text) == layer_type
    assert str(layer_type) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        OCI_LAYER,
        "application/vnd.kitops.modelkit.model.v1.zip",
        "application/vnd.kitops.modelkit.model.v1.tar+lz4",
        "application/vnd.kitops.modelkit.weight.v1.tar",
        "application/vnd.kitops.modelkit.model.v2.tar",
        "application/vnd.kitops.modelkit.config.v1+json",
        "application/vnd.cncf.model.model.v1.tar",
        "application/vnd.cncf.model.mcpb.v1.raw",
        "application/vnd.kitops.modelkit.model.v1.tar\n",
        "Application/vnd.kitops.modelkit.model.v1.tar",
    ],
)
def test_other_types_are_no_layer_types(text):
    assert parse_layer_media_type(text) is None


def test_model_pack_has_no_word_for_mcp_bundles():
    with pytest.raises(ValueError, match="ModelPack has no mcpb layers"):
        str(LayerType("mcpb", "raw", family="modelpack"))


def test_manifests_and_indexes_are_told_apart():
    assert [media_type for media_type in MANIFEST_TYPES if is_index_type(media_type)] == [
        OCI_INDEX,
        DOCKER_LIST,
    ]
    assert [media_type for media_type in MANIFEST_TYPES if is_manifest_type(media_type)] == [
        OCI_MANIFEST,
        DOCKER_MANIFEST,
    ]


def test_foreign_layers_are_known():
    assert is_foreign_layer_type("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip")
    assert not is_foreign_layer_type(OCI_LAYER)
