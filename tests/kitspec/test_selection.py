import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kitspec.descriptor import Descriptor
from kitspec.digest import Digest
from kitspec.errors import FilterInvalid, KitfileInvalid
from kitspec.kitfile import Code, Dataset, Docs, Kitfile, McpServer, Model, ModelPart, Prompt, Section
from kitspec.manifest import Manifest
from kitspec.media_types import MODELKIT_CONFIG, MODELPACK_CONFIG, OCI_MANIFEST, LayerType
from kitspec.selection import Filter, includes_kitfile, layer_annotations, parse_filter, select_layers

KITFILE = Kitfile(
    "1.0.0",
    model=Model("m", "./models/m.bin", parts=(ModelPart("lora", "lora.bin"),)),
    code=(Code("src"), Code("lib/")),
    datasets=(
        Dataset("train", "data/train"),
        Dataset("gone", "x", "s3://b/k", "h"),
        Dataset("test", "data/test"),
    ),
    docs=(Docs("docs"),),
    prompts=(Prompt("p", "p.md"),),
    mcp_servers=(McpServer("s", "s.mcpb"),),
)


def packed(kitfile, family="kitops", config=MODELKIT_CONFIG):
    """A manifest with a layer for each entry, and the Kitfile with their digests."""
    layers = []
    for position, (section, _, entry) in enumerate(kitfile.entries()):
        layer_type = LayerType(
            section.layer_kind, "raw" if section is Section.MCP_SERVERS else "tar", family=family
        )
        digest = Digest.of(str(position).encode())
        layers.append(Descriptor(str(layer_type), digest, position, layer_annotations(section, entry)))
    manifest = Manifest(OCI_MANIFEST, Descriptor(config, Digest.of(b""), 0), tuple(layers))
    return manifest, kitfile.with_digests([(layer.digest, layer.digest) for layer in layers])


def chosen(*filters, kitfile=KITFILE):
    manifest, with_digests = packed(kitfile)
    return [
        pair.entry.path
        for pair in select_layers(manifest, with_digests, [parse_filter(text) for text in filters])
    ]


ALL = ["./models/m.bin", "lora.bin", "src", "lib/", "data/train", "data/test", "docs", "p.md", "s.mcpb"]


@pytest.mark.parametrize(
    ("filters", "paths"),
    [
        ([], ALL),
        (["model"], ["./models/m.bin", "lora.bin"]),
        (["code"], ["src", "lib/"]),
        (["datasets"], ["data/train", "data/test"]),
        (["dataset:train"], ["data/train"]),
        (["prompts"], ["p.md"]),
        (["mcpservers"], ["s.mcpb"]),
        (["kitfile"], []),
        (["docs,code"], ["src", "lib/", "docs"]),
        (["datasets:test", "docs"], ["data/test", "docs"]),
        (["model:lora"], ["lora.bin"]),
        (["model:./models/m.bin"], ["./models/m.bin"]),
        (["model,datasets:m,train"], ["./models/m.bin", "data/train"]),
        (["datasets:m"], []),
        (["datasets:gone"], []),
        (["code:src,nothing"], ["src"]),
        (["model:models/m.bin"], ["./models/m.bin"]),
        (["code:lib", "code:./src"], ["src", "lib/"]),
        (["model:models"], []),
    ],
    ids=str,
)  # fmt: skip
def test_filters_choose_layers(filters, paths):
    assert chosen(*filters) == paths


def test_a_path_written_otherwise_does_not_hide_an_entry():
    kitfile = Kitfile(code=(Code("./a"), Code("a"), Code("b/"), Code("./b")))

    assert chosen("code:a", kitfile=kitfile) == ["a"]
    with pytest.raises(FilterInvalid, match=re.escape("'b' fits b/ and ./b")):
        chosen("code:b", kitfile=kitfile)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "invalid filter type  (must be one of 'kitfile', 'model'"),
        ("Model", "invalid filter type Model (must be one of"),
        ("model,", "invalid filter type  (must"),
        (":x", "invalid filter type  (must"),
        ("modelpart", "invalid filter type modelpart"),
        ("model:a:b", "invalid filter: should be in format <type1>,<type2>[:<filter1>,<filter2>]"),
        ("model:", "invalid filter: should be in format"),
        ("model:a,", "invalid filter: should be in format"),
    ],
)
def test_what_is_no_filter_is_refused_in_kits_words(text, message):
    with pytest.raises(FilterInvalid, match=re.escape(message)):
        parse_filter(text)


def test_the_kitfile_is_wanted_without_filters_or_when_asked_for():
    assert includes_kitfile([])
    assert includes_kitfile([parse_filter("model"), parse_filter("docs,kitfile:x")])
    assert not includes_kitfile([parse_filter("model")])


WORDS = st.lists(
    st.sampled_from(["kitfile", "model", "datasets", "code", "docs", "prompts", "mcpservers"]), min_size=1
)
VALUES = st.lists(st.text(st.characters(exclude_characters=":,"), min_size=1))


@given(WORDS, VALUES)
def test_a_filter_parses_back_to_itself(words, values):
    filter_ = parse_filter(":".join([",".join(words), *([",".join(values)] if values else [])]))

    assert parse_filter(str(filter_)) == filter_


@given(st.text())
def test_any_text_is_a_filter_or_refused(text):
    try:
        assert isinstance(parse_filter(text), Filter)
    except FilterInvalid as error:
        assert "invalid filter" in str(error)  # noqa: PT017


def test_layers_pair_by_digest_whatever_their_order():
    manifest, kitfile = packed(KITFILE)
    turned = Manifest(OCI_MANIFEST, manifest.config, manifest.layers[::-1])

    assert [pair.entry.path for pair in select_layers(turned, kitfile)] == ALL[::-1]


def test_kits_without_digests_pair_by_order_within_a_kind():
    manifest, _ = packed(KITFILE)

    assert [(pair.entry.path, pair.layer.size) for pair in select_layers(manifest, KITFILE)] == [
        (path, position) for position, path in enumerate(ALL)
    ]


def test_two_entries_may_have_the_same_content():
    layer = Descriptor(str(LayerType("code")), Digest.of(b"x"), 1)
    manifest = Manifest(OCI_MANIFEST, Descriptor(MODELKIT_CONFIG, Digest.of(b""), 0), (layer, layer))
    kitfile = Kitfile(code=(Code("a", digest=layer.digest), Code("b", digest=layer.digest)))

    assert [pair.entry.path for pair in select_layers(manifest, kitfile)] == ["a", "b"]


def test_layers_of_unknown_kinds_are_passed_over():
    manifest, kitfile = packed(KITFILE)
    odd = Descriptor("application/vnd.kitops.modelkit.video.v1.tar", Digest.of(b"odd"), 1)

    assert len(
        select_layers(Manifest(OCI_MANIFEST, manifest.config, (odd, *manifest.layers)), kitfile)
    ) == len(ALL)


@pytest.mark.parametrize(
    "change", ["a layer less", "a layer more", "no model", "another digest", "another digest, no digests"]
)
def test_C_17_a_config_and_a_manifest_that_disagree_are_refused(change):
    manifest, kitfile = packed(KITFILE)
    layers = list(manifest.layers)
    match change:
        case "a layer less":
            layers.pop()
        case "a layer more":
            layers.append(layers[2])
        case "no model":
            kitfile = Kitfile(code=kitfile.code)
        case "another digest":
            layers[0] = Descriptor(layers[0].media_type, Digest.of(b"another"), 1)
        case _:
            layers[3] = Descriptor(layers[3].media_type, Digest.of(b"another"), 1)
            kitfile = Kitfile(
                model=kitfile.model,
                code=(Code("src"), kitfile.code[1]),
                datasets=kitfile.datasets,
                docs=kitfile.docs,
                prompts=kitfile.prompts,
                mcp_servers=kitfile.mcp_servers,
            )

    with pytest.raises(
        KitfileInvalid,
        match=r"names \d+ layers of kind|digest in config and manifest do not match in (model|code)",
    ):
        select_layers(Manifest(OCI_MANIFEST, manifest.config, tuple(layers)), kitfile)


def test_model_pack_layers_pair_too():
    kitfile = Kitfile(
        KITFILE.manifest_version, model=KITFILE.model, code=KITFILE.code, prompts=KITFILE.prompts
    )
    manifest, with_digests = packed(kitfile, "modelpack", MODELPACK_CONFIG)

    for either in (kitfile, with_digests):
        assert [pair.section for pair in select_layers(manifest, either, [parse_filter("model,prompts")])] == [
            Section.MODEL, Section.MODEL_PART, Section.PROMPTS,
        ]  # fmt: skip
