"""What is derived from a kit: which entries a selector means, and the bytes that slices, images and ModelPacks are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kitspec import views
from kitspec.descriptor import Descriptor
from kitspec.digest import Digest
from kitspec.errors import FilterInvalid, KitfileInvalid
from kitspec.kitfile import (
    Code,
    Dataset,
    Docs,
    Kitfile,
    McpServer,
    Model,
    ModelPart,
    Package,
    Prompt,
    Section,
)
from kitspec.manifest import format_manifest, parse_manifest
from kitspec.media_types import (
    CREATED_ANNOTATION,
    DOCKER_MANIFEST,
    FILE_METADATA_ANNOTATION,
    FILEPATH_ANNOTATION,
    KITFILE_ANNOTATION,
    LEGACY_FILE_METADATA_ANNOTATION,
    LEGACY_FILEPATH_ANNOTATION,
    MODELKIT_CONFIG,
    MODELPACK_ARTIFACT,
    MODELPACK_CONFIG,
    OCI_INDEX,
    OCI_LAYER,
    OCI_MANIFEST,
    TITLE_ANNOTATION,
    LayerType,
    parse_layer_media_type,
)
from kitspec.modelpack import kitfile_of_modelpack
from kitspec.names import Tag, view_of
from kitspec.selection import EntryLayer, LayerPlace, layer_annotations, parse_filter, place_of, select_layers
from kitspec.views import (
    FORMS,
    VIEW_ANNOTATION,
    VIEW_OF_ANNOTATION,
    ImageLayer,
    Kit,
    PackFile,
    choose_by_filter,
    choose_by_name,
    form_of,
    image_of,
    kept_entries,
    layers_of,
    modelpack_of,
    places_of,
    selector_of,
    slice_of,
)

KITFILE = Kitfile(
    "1.0.0",
    package=Package("p", "1.0"),
    model=Model("m", "./models/m.bin", parts=(ModelPart("lora", "lora.bin"),), parameters={"lr": 1e-5}),
    code=(Code("src"), Code("./lib/")),
    datasets=(
        Dataset("train set", "data/train"),
        Dataset("gone", "x", "s3://b/k", "h"),
        Dataset("test", "data/test"),
    ),
    docs=(Docs("docs/a.md"),),
    prompts=(Prompt("p", "p.md"),),
    mcp_servers=(McpServer("s", "s.mcpb"),),
)
ALL = frozenset(place for place, _ in places_of(KITFILE))


def stored(kitfile=KITFILE, *, annotations=None):
    """A kit as it would be stored, with a layer for each entry."""
    layers = []
    for position, (section, _, entry) in enumerate(kitfile.entries()):
        layer_type = LayerType(section.layer_kind, "raw" if section is Section.MCP_SERVERS else "tar")
        digest = Digest.of(str(position).encode())
        layers.append(Descriptor(str(layer_type), digest, position, layer_annotations(section, entry)))
    config = kitfile.with_digests([(layer.digest, layer.digest) for layer in layers]).to_json()
    descriptor = Descriptor(MODELKIT_CONFIG, Digest.of(config), len(config))
    return read(format_manifest(descriptor, layers, annotations), config)


def read(content, config, media_type=OCI_MANIFEST):
    manifest = parse_manifest(content, media_type)
    kitfile = (
        Kitfile.from_json(config) if manifest.family == "kitops" else kitfile_of_modelpack(manifest, config)
    )
    return Kit(Digest.of(content), content, manifest, config, kitfile)


def chosen_paths(kitfile, chosen):
    return [entry.path for place, entry in places_of(kitfile) if place in chosen]


# ---- what is chosen


@pytest.mark.parametrize(
    ("selectors", "paths"),
    [
        ([], [entry.path for _, entry in places_of(KITFILE)]),
        (["model"], ["./models/m.bin", "lora.bin"]),
        (["model_m"], ["./models/m.bin"]),
        (["model_lora"], ["lora.bin"]),
        (["code"], ["src", "./lib/"]),
        (["code_src"], ["src"]),
        (["code_lib"], ["./lib/"]),
        (["datasets"], ["data/train", "x", "data/test"]),
        (["datasets_train-set"], ["data/train"]),
        (["datasets_gone"], ["x"]),
        (["docs_docs-a-md"], ["docs/a.md"]),
        (["prompts"], ["p.md"]),
        (["mcpservers_s"], ["s.mcpb"]),
        (["kitfile"], []),
        (["kitfile", "docs"], ["docs/a.md"]),
        (["docs", "model_lora", "docs"], ["lora.bin", "docs/a.md"]),
    ],
)
def test_selectors_choose_sections_and_entries(selectors, paths):
    assert chosen_paths(KITFILE, choose_by_name(KITFILE, selectors)) == paths


@pytest.mark.parametrize(
    ("selector", "said"),
    [
        ("weights", "wanted one of kitfile, model, datasets"),
        ("Model", "'Model' is none"),
        ("dataset", "'dataset' is none"),
        ("", "'' is none"),
        ("_", "'_' is none"),
        ("model_", "'model_' is none"),
        (
            "model_nope",
            "chooses nothing; the kit has model_m, model_lora, code_src, code_lib, datasets_train-set",
        ),
        ("datasets_train set", "chooses nothing"),
        ("datasets_train_set", "chooses nothing"),
        ("model_M", "chooses nothing"),
        ("kitfile_x", "chooses nothing"),
        ("code_.", "chooses nothing"),
    ],
)
def test_a_selector_that_means_nothing_is_refused_and_told_what_there_is(selector, said):
    with pytest.raises(FilterInvalid) as caught:
        choose_by_name(KITFILE, [selector])

    assert said in str(caught.value)
    assert str(caught.value).isascii()


def test_a_section_that_is_empty_cannot_be_chosen():
    with pytest.raises(FilterInvalid, match="chooses nothing; the kit has no entries"):
        choose_by_name(Kitfile(), ["model"])


def test_two_entries_that_are_written_alike_are_an_error_that_names_both():
    kitfile = Kitfile(
        datasets=(Dataset("a b", "1"), Dataset("a.b", "2"), Dataset("", "a/b")), docs=(Docs("a b"),)
    )

    with pytest.raises(
        FilterInvalid, match=r"means 'a b' and 'a\.b'; choose datasets as a whole, or use \?filter="
    ):
        choose_by_name(kitfile, ["datasets_a-b"])

    assert chosen_paths(kitfile, choose_by_name(kitfile, ["docs_a-b"])) == ["a b"]
    assert chosen_paths(kitfile, choose_by_name(kitfile, ["datasets"])) == ["1", "2", "a/b"]


def test_what_is_offered_is_bounded():
    kitfile = Kitfile(datasets=tuple(Dataset("n" * 1000, f"{number}") for number in range(500)))

    with pytest.raises(FilterInvalid, match="and 480 more") as caught:
        choose_by_name(kitfile, ["datasets_nope"])

    assert len(str(caught.value)) < 4000


NAMES = st.text("ab -_./é", max_size=6)
KITFILES = st.builds(
    Kitfile,
    model=st.none()
    | st.builds(
        Model, NAMES, NAMES, parts=st.lists(st.builds(ModelPart, NAMES, NAMES), max_size=2).map(tuple)
    ),
    code=st.lists(st.builds(Code, NAMES), max_size=2).map(tuple),
    datasets=st.lists(st.builds(Dataset, NAMES, NAMES), max_size=3).map(tuple),
)


@given(KITFILES)
def test_the_selector_of_an_entry_can_be_a_part_of_a_tag_and_means_that_entry_or_says_that_it_means_two(
    kitfile,
):
    for (section, index), entry in places_of(kitfile):
        selector = selector_of(section, entry)
        view = view_of(Tag(f"v1.only.{selector}"[:128]))
        assert view is not None
        try:
            assert choose_by_name(kitfile, [selector]) == {(section, index)}
        except FilterInvalid as error:
            assert f"{entry.name or entry.path!a}" in str(error) or " means " in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    "filters",
    [
        ["model"],
        ["model,docs"],
        ["model:m"],
        ["model:models/m.bin"],
        ["datasets:train set"],
        ["dataset:data/test", "code:src,lib"],
        ["prompts:p", "kitfile"],
        ["code,docs,prompts,mcpservers"],
    ],
)
def test_a_filter_chooses_the_layers_that_kit_would_unpack(filters):
    kit = stored()
    parsed = [parse_filter(text) for text in filters]

    chosen = layers_of(kit, choose_by_filter(kit.kitfile, parsed))

    assert chosen == select_layers(kit.manifest, kit.kitfile, parsed)
    assert chosen


@pytest.mark.parametrize(
    ("filters", "said"),
    [
        (["docs:nope"], "the filter 'docs:nope' chooses nothing; the kit has model_m"),
        (["model", "code:nope"], "'code:nope'"),
        (["datasets:gone"], "'datasets:gone'"),
    ],
)
def test_a_filter_that_chooses_nothing_is_refused(filters, said):
    with pytest.raises(FilterInvalid) as caught:
        choose_by_filter(KITFILE, [parse_filter(text) for text in filters])

    assert said in str(caught.value)


def test_the_kitfile_alone_may_be_filtered_for():
    assert choose_by_filter(KITFILE, [parse_filter("kitfile")]) == frozenset()
    assert choose_by_filter(Kitfile(), [parse_filter("kitfile,model")]) == frozenset()


def test_without_filters_everything_is_chosen():
    assert choose_by_filter(KITFILE, []) == ALL == choose_by_name(KITFILE, [])


@pytest.mark.parametrize("form", FORMS)
def test_the_forms_are_known(form):
    view = view_of(Tag(f"v1.as.{form}"))

    assert view is not None
    assert form_of(view) == form


def test_a_form_that_nobody_knows_is_refused_and_a_slice_has_none():
    oven, part = view_of(Tag("v1.as.oven")), view_of(Tag("v1.only.model"))

    assert oven is not None
    assert part is not None
    assert form_of(part) is None
    with pytest.raises(
        FilterInvalid, match=r"'oven' is none; wanted \.as\.image or \.as\.readable or \.as\.modelpack"
    ):
        form_of(oven)


# ---- slices


@given(st.sets(st.sampled_from(sorted(ALL))))
def test_a_slice_is_a_kit_whose_documents_agree_and_hold_what_was_chosen(places):
    kit = stored()
    chosen = frozenset(places)

    view = slice_of(kit, chosen)

    (config,) = view.parts
    slice_ = read(view.root.content, config.content)
    assert slice_.manifest.config == config.descriptor
    assert slice_.kitfile == kept_entries(kit.kitfile, chosen)
    assert slice_.manifest.layers == tuple(pair.layer for pair in layers_of(kit, chosen))
    assert [
        pair.entry for pair in layers_of(slice_, frozenset(place for place, _ in places_of(slice_.kitfile)))
    ] == [
        pair.entry if pair.section is not Section.MODEL else slice_.kitfile.model
        for pair in layers_of(kit, chosen)
    ]


@given(st.sets(st.sampled_from(sorted(ALL))), st.sets(st.sampled_from(sorted(ALL))))
def test_a_slice_of_a_slice_is_the_slice_of_its_source(first, second):
    kit = stored()
    outer, inner = frozenset(first), frozenset(first & second)
    middle = slice_of(kit, outer)
    slice_ = read(middle.root.content, middle.parts[0].content)
    # The places of the slice by those of the kit: what is left of a section moves up.
    moved = {
        (section, index): (section, sum((section, before) in outer for before in range(index)))
        for section, index in outer
    }

    again = slice_of(slice_, frozenset(moved[place] for place in inner), source=kit.digest)

    assert again == slice_of(kit, inner)


# What other writers leave where kit leaves nothing: null for a list, for an entry, for text.
ODD_ENTRIES = st.none() | st.fixed_dictionaries(
    {},
    optional={
        "path": st.sampled_from(["", "a", "./a/"]) | st.none(),
        "name": st.none() | st.just("n"),
        "new": st.none(),
    },
)
ODD_LISTS = st.none() | st.lists(ODD_ENTRIES, max_size=3)
ODD_CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "manifestVersion": st.none() | st.just("1.0.0"),
        "package": st.none() | st.just({"authors": None}),
        "model": st.none()
        | st.fixed_dictionaries(
            {}, optional={"path": st.sampled_from(["", "m"]), "parts": ODD_LISTS, "parameters": st.none()}
        ),
        **dict.fromkeys(("code", "datasets", "docs", "prompts", "mcpServers"), ODD_LISTS),
        "new": st.just([None]),
    },
)


@given(ODD_CONFIGS, st.data())
def test_whatever_config_is_read_as_a_kitfile_can_be_sliced(document, data):
    config = json.dumps(document).encode()
    layers = [
        Descriptor(str(LayerType(section.layer_kind)), Digest.of(b""), 0, layer_annotations(section, entry))
        for section, _, entry in Kitfile.from_json(config).entries()
    ]
    kit = read(format_manifest(Descriptor(MODELKIT_CONFIG, Digest.of(config), len(config)), layers), config)
    places = sorted(place for place, _ in places_of(kit.kitfile))
    chosen = frozenset(data.draw(st.sets(st.sampled_from(places)) if places else st.just(set())))

    view = slice_of(kit, chosen)

    slice_ = read(view.root.content, view.parts[0].content)
    assert slice_.kitfile == kept_entries(kit.kitfile, chosen)
    assert len(layers_of(slice_, choose_by_name(slice_.kitfile, ()))) == len(layers_of(kit, chosen))


def test_a_slice_of_everything_has_the_config_of_its_source():
    kit = stored()

    view = slice_of(kit, ALL)

    assert view.parts[0].content == kit.config
    assert json.loads(view.root.content) == json.loads(kit.content) | {
        "annotations": {VIEW_ANNOTATION: "v1", VIEW_OF_ANNOTATION: kit.digest}
    }


def test_a_slice_keeps_the_text_of_what_nobody_here_knows_and_refers_to_nothing():
    kit = stored()
    config = kit.config.replace(
        b'"parameters":{"lr":0.00001}', b'"parameters":{"lr":1.50E-5,"z":[-0.0,1e2]},"new":"<&"'
    )
    assert config != kit.config
    document = json.loads(kit.content)
    document["config"] |= {
        "digest": Digest.of(config),
        "size": len(config),
        "annotations": {"of": "the config"},
    }
    document["subject"] = dict(document["config"])
    document["layers"][0] |= {"urls": ["http://example.com/m"], "new": 1.0}
    document["annotations"] = {"z": "1", "a": "2", VIEW_OF_ANNOTATION: "a lie"}
    document["new"] = [1.0, {}]
    kit = read(json.dumps(document).encode(), config)

    view = slice_of(kit, choose_by_name(kit.kitfile, ["model_m"]))

    manifest = json.loads(view.root.content)
    assert b'"parameters":{"lr":1.50E-5,"z":[-0.0,1e2]},"new":"\\u003c\\u0026"' in view.parts[0].content
    assert manifest["layers"] == [document["layers"][0]]
    assert b'"new":1.0' in view.root.content
    assert b'"new":[1.0,{}]' in view.root.content
    assert "subject" not in manifest
    assert manifest["config"] == view.parts[0].descriptor.to_json()
    assert list(manifest["annotations"].items()) == [
        ("a", "2"), (VIEW_ANNOTATION, "v1"), (VIEW_OF_ANNOTATION, kit.digest), ("z", "1"),
    ]  # fmt: skip


def test_a_model_that_was_not_chosen_stays_as_the_group_of_its_parts():
    kit = stored()

    parts_only = slice_of(kit, choose_by_name(KITFILE, ["model_lora"]))
    nothing = slice_of(kit, frozenset())

    model = json.loads(parts_only.parts[0].content)["model"]
    assert model["name"] == "m"
    assert [part["name"] for part in model["parts"]] == ["lora"]
    assert not {"path", "digest", "diffId"} & set(model)
    assert json.loads(nothing.parts[0].content) == {
        "manifestVersion": "1.0.0",
        "package": {"name": "p", "version": "1.0"},
    }
    assert json.loads(nothing.root.content)["layers"] == []


def test_a_kit_of_docker_s_manifest_type_stays_one():
    kit = stored()
    content = kit.content.replace(OCI_MANIFEST.encode(), DOCKER_MANIFEST.encode())

    view = slice_of(read(content, kit.config, DOCKER_MANIFEST), choose_by_name(KITFILE, ["docs"]))

    assert view.root.media_type == json.loads(view.root.content)["mediaType"] == DOCKER_MANIFEST


def pack_kit(config, *, key=None, annotations=None):
    """A ModelPack of a weight and a document, both raw."""
    words = {"weight": "w.bin", "doc": "README.md"}
    layers = [
        {"mediaType": f"application/vnd.cncf.model.{word}.v1.raw", "digest": Digest.of(word.encode()), "size": 1,
         "annotations": {FILEPATH_ANNOTATION: path}}
        for word, path in words.items()
    ]  # fmt: skip
    if key is not None:
        config = json.dumps(
            {"modelfs": {"type": "layers", key: [layer["digest"] for layer in layers]}}
        ).encode()
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": MODELPACK_ARTIFACT,
        "config": {"mediaType": MODELPACK_CONFIG, "digest": Digest.of(config), "size": len(config)},
        "layers": layers,
        "annotations": annotations or {},
    }
    return read(json.dumps(manifest).encode(), config)


@pytest.mark.parametrize("key", ["diffIds", "diff_ids"])
def test_a_slice_of_a_modelpack_lists_the_diff_ids_of_its_layers(key):
    kit = pack_kit(b"", key=key)

    view = slice_of(kit, choose_by_name(kit.kitfile, ["docs"]))

    assert json.loads(view.parts[0].content)["modelfs"][key] == [Digest.of(b"doc")]
    assert [layer.digest for layer in parse_manifest(view.root.content, OCI_MANIFEST).layers] == [
        Digest.of(b"doc")
    ]


def carried(kitfile):
    return {KITFILE_ANNOTATION: kitfile.to_json().decode()}


def test_a_slice_of_a_modelpack_carries_the_kitfile_of_what_is_kept():
    kitfile = Kitfile("1.0.0", model=Model("m", "w.bin"), docs=(Docs("README.md"),))
    kit = pack_kit(b"{}", annotations=carried(kitfile))

    view = slice_of(kit, choose_by_name(kit.kitfile, ["docs"]))

    manifest = parse_manifest(view.root.content, OCI_MANIFEST)
    assert (
        manifest.annotations[KITFILE_ANNOTATION]
        == Kitfile("1.0.0", docs=(Docs("README.md"),)).to_json().decode()
    )


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (b"[]", "not an object"),
        (b"\xff", "not UTF-8"),
        (b'{"modelfs": {"diffIds": []}}', "lists 0 diffIds, and the manifest 2 layers"),
        (b'{"modelfs": {"diff_ids": [1, 2, 3]}}', "lists 3 diff_ids"),
    ],
)
def test_the_config_of_a_modelpack_that_carries_a_kitfile_is_looked_at_when_it_is_sliced(config, said):
    kit = pack_kit(config, annotations=carried(Kitfile(model=Model("m", "w.bin"), docs=(Docs("README.md"),))))

    with pytest.raises(ValueError, match=said) as caught:
        slice_of(kit, choose_by_name(kit.kitfile, ["docs"]))

    assert type(caught.value) is not ValueError  # one that the registry answers with a 400


@pytest.mark.parametrize("config", [b"{}", b'{"modelfs": 1}', b'{"modelfs": {"diffIds": null}}'])
def test_a_modelpack_without_diff_ids_is_sliced_all_the_same(config):
    kit = pack_kit(config)

    view = slice_of(kit, choose_by_name(kit.kitfile, ["docs"]))

    assert json.loads(view.parts[0].content) == json.loads(config)


# ---- images

LAYER = ImageLayer(Descriptor(OCI_LAYER, Digest.of(b"1"), 1), Digest.of(b"2"), "a note")


def test_an_image_has_a_manifest_and_a_config_for_each_platform():
    kit = stored(annotations={CREATED_ANNOTATION: "2026-01-02T04:04:05.678901234+01:00"})

    view = image_of(kit, [LAYER, LAYER])

    index = parse_manifest(view.root.content, OCI_INDEX)
    documents = {document.descriptor.digest: document.content for document in view.parts}
    assert len(documents) == 4
    assert [listed.platform for listed in index.manifests] == [
        {"architecture": "amd64", "os": "linux"}, {"architecture": "arm64", "os": "linux"},
    ]  # fmt: skip
    for listed in index.manifests:
        manifest = parse_manifest(documents[listed.digest], OCI_MANIFEST)
        config = json.loads(documents[manifest.config.digest])
        assert manifest.layers == (LAYER.blob, LAYER.blob)
        assert manifest.annotations == {VIEW_ANNOTATION: "v1", VIEW_OF_ANNOTATION: kit.digest}
        assert {key: config[key] for key in ("architecture", "os")} == listed.platform
        assert config["rootfs"] == {"type": "layers", "diff_ids": [Digest.of(b"2")] * 2}
        assert config["created"] == "2026-01-02T03:04:05Z"
        assert config["config"]["Cmd"]
        assert config["history"] == [{"created_by": "a note"}] * 2


def test_an_image_without_layers_is_refused():
    with pytest.raises(KitfileInvalid, match="an image needs one at least"):
        image_of(stored(), [])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("2026-01-02T03:04:05Z", "2026-01-02T03:04:05Z"),
        ("2026-01-02T03:04:05.999999999Z", "2026-01-02T03:04:05Z"),
        ("2026-01-01T22:04:05-05:00", "2026-01-02T03:04:05Z"),
        ("9999-12-31T23:59:59Z", "9999-12-31T23:59:59Z"),
        ("", None),
        ("yesterday", None),
        ("2026-01-02", None),
        ("2026-01-02T03:04:05", None),
        ("2026-01-02 03:04:05Z", None),
        ("2026-W01-5T03:04:05Z", None),
        ("20260102T030405Z", None),
        ("2026-01-02T03:04:05+0100", None),
        ("2026-01-02T24:00:00Z", None),
        ("2026-02-30T00:00:00Z", None),
        ("2026-01-02T03:04:60Z", None),
        ("\u0662\u0660\u0662\u0666-01-02T03:04:05Z", None),
        ("2026-01-02T03:04:05Z\n", None),
        ("0001-01-01T00:00:00Z", None),
        ("0999-12-31T23:59:59Z", None),
        ("1000-01-01T00:00:00+23:59", None),
        ("0001-01-01T00:00:00+23:59", None),
        ("9999-12-31T23:59:59-23:59", None),
    ],
)
def test_a_view_was_created_when_the_kit_says_so_in_full(text, said):
    kit = stored(annotations={CREATED_ANNOTATION: text})

    config = json.loads(image_of(kit, [LAYER]).parts[0].content)
    pack = modelpack_of(kit, [FILE])

    assert config.get("created") == said
    assert json.loads(pack.parts[0].content)["descriptor"].get("createdAt") == said
    assert json.loads(pack.root.content)["annotations"].get(CREATED_ANNOTATION) == said


# ---- ModelPacks

FILE = PackFile("models/é.bin", Section.MODEL, Digest.of(b"f"), 5, 0o755)


def test_a_modelpack_has_a_raw_layer_for_each_file_that_old_and_new_tools_can_place():
    view = modelpack_of(stored(), [FILE])

    (layer,) = parse_manifest(view.root.content, OCI_MANIFEST).layers
    assert (layer.media_type, layer.digest, layer.size) == (
        "application/vnd.cncf.model.weight.v1.raw", FILE.digest, FILE.size,
    )  # fmt: skip
    assert {
        layer.annotations[key] for key in (FILEPATH_ANNOTATION, LEGACY_FILEPATH_ANNOTATION, TITLE_ANNOTATION)
    } == {FILE.path}
    for key in (FILE_METADATA_ANNOTATION, LEGACY_FILE_METADATA_ANNOTATION):
        metadata = json.loads(layer.annotations[key])
        assert (metadata["name"], metadata["mode"], metadata["size"]) == ("é.bin", 0o755, 5)
    assert json.loads(view.parts[0].content)["modelfs"]["diffIds"] == [FILE.digest]


@pytest.mark.parametrize("section", Section)
def test_a_file_of_every_section_has_a_word_in_modelpack(section):
    view = modelpack_of(stored(), [PackFile("f", section, Digest.of(b""), 0, 0o644)])

    (layer,) = parse_manifest(view.root.content, OCI_MANIFEST).layers
    assert layer.media_type == {
        Section.MODEL: "application/vnd.cncf.model.weight.v1.raw",
        Section.MODEL_PART: "application/vnd.cncf.model.weight.config.v1.raw",
        Section.DATASETS: "application/vnd.cncf.model.dataset.v1.raw",
        Section.DOCS: "application/vnd.cncf.model.doc.v1.raw",
    }.get(section, "application/vnd.cncf.model.code.v1.raw")


def test_a_modelpack_that_is_pushed_can_be_read_again():
    kit = stored()
    files = [
        PackFile("w.bin", Section.MODEL, Digest.of(b"1"), 1, 0o644),
        PackFile("c.json", Section.MODEL_PART, Digest.of(b"2"), 1, 0o644),
        PackFile("d/x.csv", Section.DATASETS, Digest.of(b"3"), 1, 0o644),
    ]

    view = modelpack_of(kit, files)

    pack = read(view.root.content, view.parts[0].content)
    pairs = layers_of(pack, choose_by_name(pack.kitfile, ()))
    assert [(place_of(pair).path, pair.section, pair.layer.digest) for pair in pairs] == [
        (file.path, file.section, file.digest) for file in files
    ]


def many_files(count, path="f"):
    return (PackFile(f"{path}{number}", Section.CODE, Digest.of(b""), 0, 0o644) for number in range(count))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (lambda: many_files(0), "nothing that was chosen holds a file"),
        (lambda: many_files(10**9), "more than 20000 files"),
        (lambda: many_files(10_000), r"a document of \d+ bytes; at most 4194304 are allowed: choose a part"),
    ],
    ids=["none", "too many", "too long"],
)
def test_files_that_no_manifest_can_list_are_refused(files, said):
    with pytest.raises(KitfileInvalid, match=said):
        modelpack_of(stored(), files())


# ---- the same for ever


def all_views():
    kit = stored(annotations={CREATED_ANNOTATION: "2026-01-02T03:04:05Z", "b": "1", "a": "2"})
    return {
        "slice": slice_of(kit, choose_by_name(kit.kitfile, ["docs", "model_lora", "datasets_train-set"])),
        "image": image_of(kit, [LAYER]),
        "modelpack": modelpack_of(kit, [FILE]),
    }


GOLDEN = {
    "slice": "sha256:1381f20ccaf0d3f49a870e4cbac31e08d531a1eff75c8426e4b2170b44f8e4cb",
    "image": "sha256:dbc0c6698cc18e3e114c4fd120979abad507ed7028e32a9b8bda178429dea591",
    "modelpack": "sha256:f21f284a7393cc0d50f8b20b78a7846e55b47cce9029f74a0ce5266fd00ef0e6",
}
"""Digests of the roots; each names the digests of its parts."""


def test_the_rules_of_version_1_give_these_digests():
    """Whoever has to change them makes a version 2: clients and registries elsewhere have these digests."""
    assert {name: view.root.descriptor.digest for name, view in all_views().items()} == GOLDEN


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONHASHSEED": "1", "TZ": "Asia/Kathmandu", "LC_ALL": "C"},
        {"PYTHONHASHSEED": "2", "TZ": "America/St_Johns", "LC_ALL": "C.UTF-8", "PYTHONUTF8": "0"},
    ],
)
def test_digests_depend_on_no_hash_seed_time_zone_or_locale(environment):
    program = (
        "import json\nfrom tests.kitspec.test_views import all_views\n"
        "print(json.dumps({name: view.root.descriptor.digest for name, view in all_views().items()}))"
    )

    printed = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        cwd=Path(views.__file__).parents[1],
        capture_output=True,
        check=True,
    ).stdout

    assert json.loads(printed) == GOLDEN


@given(st.permutations(["docs", "model", "datasets_train-set", "model_m", "kitfile"]))
def test_a_slice_does_not_depend_on_how_the_choice_was_spelled(selectors):
    kit = stored()
    filters = [
        parse_filter("docs,model"),
        parse_filter("dataset:data/train,data/train"),
        parse_filter("model:m"),
    ]

    assert slice_of(kit, choose_by_name(kit.kitfile, selectors)) == slice_of(
        kit, choose_by_filter(kit.kitfile, filters)
    )


# ---- where a layer goes

DIGEST = Digest.of(b"a layer")


def pair_of(path, media_type, *, annotations=None, is_old=False):
    layer_type = parse_layer_media_type(media_type)
    assert layer_type is not None
    entry = Dataset("d", path, digest=None if is_old else DIGEST)
    return EntryLayer(
        Descriptor(media_type, DIGEST, 1, annotations or {}), layer_type, Section.DATASETS, 0, entry
    )


TAR = "application/vnd.kitops.modelkit.dataset.v1.tar"
RAW = "application/vnd.cncf.model.dataset.v1.raw"


@pytest.mark.parametrize(
    ("pair", "place"),
    [
        (pair_of("./data/x.csv", TAR), LayerPlace()),
        (pair_of("data/x.csv", TAR, is_old=True), LayerPlace("data")),
        (pair_of("./data/sub/", TAR + "+gzip", is_old=True), LayerPlace("data")),
        (pair_of("x.csv", TAR, is_old=True), LayerPlace()),
        (pair_of("./data/x.csv", RAW), LayerPlace("data/x.csv")),
        (pair_of("x", RAW, annotations={FILEPATH_ANNOTATION: "a b/é"}), LayerPlace("a b/é")),
        (pair_of("x", RAW, annotations={LEGACY_FILEPATH_ANNOTATION: "old"}), LayerPlace("old")),
        (pair_of("x", RAW, annotations={FILEPATH_ANNOTATION: "new", LEGACY_FILEPATH_ANNOTATION: "old"}), LayerPlace("new")),
        (pair_of("x", RAW, annotations={FILE_METADATA_ANNOTATION: '{"mode": 493}'}), LayerPlace("x", 0o755)),
        (pair_of("x", RAW, annotations={LEGACY_FILE_METADATA_ANNOTATION: '{"mode": 384}'}), LayerPlace("x", 0o600)),
        (pair_of("x", RAW, annotations={FILE_METADATA_ANNOTATION: '{"mode": 33261}'}), LayerPlace("x", 0o755)),
        (pair_of("x", RAW, annotations={FILE_METADATA_ANNOTATION: "nope"}), LayerPlace("x")),
        (pair_of("x", RAW, annotations={FILE_METADATA_ANNOTATION: "[" * 100_000}), LayerPlace("x")),
        (pair_of("x", RAW, annotations={FILE_METADATA_ANNOTATION: "[1]"}), LayerPlace("x")),
        (pair_of("x", RAW, annotations={FILE_METADATA_ANNOTATION: '{"mode": true}'}), LayerPlace("x")),
        (pair_of("x", RAW, annotations={FILE_METADATA_ANNOTATION: '{"mode": ' + "9" * 5000 + "}"}), LayerPlace("x")),
    ],
)  # fmt: skip
def test_a_layer_goes_where_its_entry_or_its_annotations_say(pair, place):
    assert place_of(pair) == place


@pytest.mark.parametrize(
    "path",
    [
        "",
        ".",
        "/",
        "/etc/passwd",
        "..",
        "../x",
        "a/../../x",
        "a/./b",
        "a//b",
        "a/",
        "a\nb",
        "a\u202eb",
        "x" * 256,
        "a/" * 200 + "b",
    ],
)
def test_T_12_a_raw_layer_goes_to_no_path_that_leads_out_or_is_none(path):
    with pytest.raises(KitfileInvalid, match="a layer is to be unpacked to"):
        place_of(pair_of("x", RAW, annotations={FILEPATH_ANNOTATION: path}))


@pytest.mark.parametrize("path", ["/x", "/etc/passwd", "../x", "../../a/x"])
def test_T_12_an_old_layer_goes_to_no_folder_that_leads_out(path):
    with pytest.raises(KitfileInvalid, match="a layer is to be unpacked to"):
        place_of(pair_of(path, TAR, is_old=True))
