import base64
import json

import pytest

from kitspec.descriptor import Descriptor
from kitspec.digest import Digest
from kitspec.errors import ManifestInvalid, ManifestTypeUnsupported
from kitspec.manifest import (
    DESCRIPTOR_COUNT_MAX,
    MANIFEST_SIZE_MAX,
    Index,
    Manifest,
    format_manifest,
    parse_manifest,
)
from kitspec.media_types import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    DOCKER_SCHEMA_1_TYPES,
    MODELKIT_ARTIFACT,
    MODELKIT_CONFIG,
    MODELPACK_ARTIFACT,
    MODELPACK_CONFIG,
    OCI_CONFIG,
    OCI_EMPTY,
    OCI_INDEX,
    OCI_LAYER,
    OCI_MANIFEST,
)

EMPTY = Digest.of(b"{}")
FOREIGN = "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"


def descriptor(media_type=OCI_LAYER, digest=EMPTY, size=2, **more):
    return {"mediaType": media_type, "digest": digest, "size": size, **more}


def document(**changes):
    whole = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": descriptor(OCI_CONFIG),
        "layers": [descriptor()],
        **changes,
    }
    return {key: value for key, value in whole.items() if value is not ...}


def index(**changes):
    whole = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [descriptor(OCI_MANIFEST)], **changes}
    return {key: value for key, value in whole.items() if value is not ...}


def parse(content, media_type=OCI_MANIFEST):
    return parse_manifest(json.dumps(content).encode(), media_type)


def refused(content, where, media_type=OCI_MANIFEST):
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    with pytest.raises(ManifestInvalid) as caught:
        parse_manifest(raw, media_type)
    assert where in caught.value.message
    assert len(caught.value.message) < 1000
    return caught.value


def test_a_manifest_is_viewed():
    manifest = parse(
        document(
            subject=descriptor(OCI_MANIFEST),
            annotations={"a": "b"},
            artifactType="application/x",
            layers=[descriptor(annotations={"c": "d"}, platform={"os": "linux"}, artifactType="a/b")],
        )
    )

    assert manifest == Manifest(
        OCI_MANIFEST,
        config=Descriptor(OCI_CONFIG, EMPTY, 2),
        layers=(
            Descriptor(
                OCI_LAYER, EMPTY, 2, annotations={"c": "d"}, platform={"os": "linux"}, artifact_type="a/b"
            ),
        ),
        subject=Descriptor(OCI_MANIFEST, EMPTY, 2),
        annotations={"a": "b"},
        artifact_type="application/x",
    )


def test_an_index_is_viewed():
    assert parse(index(), OCI_INDEX) == Index(OCI_INDEX, manifests=(Descriptor(OCI_MANIFEST, EMPTY, 2),))


def test_a_view_cannot_be_changed():
    manifest = parse(document(annotations={"a": "b"}))

    with pytest.raises(AttributeError):
        manifest.config = None
    with pytest.raises(TypeError):
        manifest.annotations["a"] = "c"


@pytest.mark.parametrize("media_type", [DOCKER_MANIFEST, DOCKER_LIST])
def test_B_105_docker_schema_2_is_read(media_type):
    made = index if media_type == DOCKER_LIST else document

    assert parse(made(mediaType=media_type), media_type).media_type == media_type


@pytest.mark.parametrize("media_type", DOCKER_SCHEMA_1_TYPES)
def test_B_105_docker_schema_1_is_refused_by_name(media_type):
    with pytest.raises(ManifestTypeUnsupported, match="schema 1"):
        parse({"schemaVersion": 1, "fsLayers": []}, media_type)


@pytest.mark.parametrize(
    "media_type", ["", "text/html", "application/json", OCI_CONFIG, OCI_MANIFEST + "; charset=x"]
)
def test_B_96_other_types_are_refused(media_type):
    with pytest.raises(ManifestTypeUnsupported, match="wanted one of"):
        parse(document(), media_type)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_B_83_other_encodings_are_refused(encoding):
    refused(json.dumps(document()).encode(encoding), "cannot be read")


def test_B_84_invalid_utf_8_is_refused():
    refused(json.dumps(document(annotations={"a": "X"})).encode().replace(b"X", b"\xc3("), "not UTF-8")


def test_B_85_layers_twice_are_refused():
    refused(
        json.dumps(document()).encode().replace(b'"config"', b'"layers": [], "config"'),
        "'layers' stands twice",
    )


@pytest.mark.parametrize("content", [b"[]", b'"x"', b"null", b"1", b"", b"{"])
def test_what_is_no_object_is_refused(content):
    refused(content, "manifest")


@pytest.mark.parametrize(
    "size",
    ["1.5", '"2"', "true", "null", str(2**63), "1e3", "1e400", "-0", "-1", "NaN", "9" * 5000, "[]", "2.0"],
)
def test_B_88_a_size_is_an_integer_of_63_bits(size):
    content = json.dumps(document(layers=[descriptor(), descriptor(size=987654)]))

    refused(
        content.replace("987654", size).encode(),
        "" if size in ("1e400", "NaN", "9" * 5000) else "layers[1].size",
    )


def test_the_largest_size_is_taken():
    assert parse(document(layers=[descriptor(size=2**63 - 1)])).layers[0].size == 2**63 - 1


@pytest.mark.parametrize("version", [1, ..., "2", 2.0, True, None, 3])
def test_B_90_the_schema_version_is_the_integer_2(version):
    refused(document(schemaVersion=version), "schemaVersion")
    refused(index(schemaVersion=version), "schemaVersion", OCI_INDEX)


@pytest.mark.parametrize("config", [..., None])
def test_B_91_a_config_is_required(config):
    refused(document(config=config), "config is missing")


def test_B_91_layers_are_required_and_may_be_null():
    refused(document(layers=...), "layers is missing")
    assert parse(document(layers=None)).layers == ()
    assert parse(document(layers=[])).layers == ()


@pytest.mark.parametrize("layers", [{}, "x", 1, [1], [None], [[]]])
def test_layers_are_a_list_of_descriptors(layers):
    refused(document(layers=layers), "layers")


def test_B_95_the_declared_type_and_the_media_type_agree():
    refused(document(mediaType=DOCKER_MANIFEST), "mediaType is")
    refused(document(mediaType=1), "mediaType is 1")
    assert parse(document(mediaType=...)).media_type == OCI_MANIFEST


@pytest.mark.parametrize(
    ("content", "media_type", "where"),
    [
        (document(manifests=[]), OCI_MANIFEST, "manifests has no place"),
        (document(fsLayers=[]), OCI_MANIFEST, "fsLayers has no place"),
        (index(layers=[]), OCI_INDEX, "layers has no place"),
        (index(config=descriptor()), OCI_INDEX, "config has no place"),
    ],
    ids=["manifests", "fsLayers", "layers", "config"],
)
def test_B_97_a_document_that_reads_as_both_is_refused(content, media_type, where):
    refused(content, where, media_type)


def test_B_100_a_subject_may_be_unknown_but_not_malformed():
    subject = {**descriptor(OCI_CONFIG), "digest": str(Digest.of(b"nobody has it")), "size": 7}

    assert parse(document(subject=subject)).subject.size == 7
    refused(document(subject={**subject, "digest": "sha256:x"}), "subject.digest")
    refused(document(subject=[]), "subject is a list")
    assert parse(index(subject=subject), OCI_INDEX).subject.size == 7


@pytest.mark.parametrize("count", [0, 10_000, DESCRIPTOR_COUNT_MAX])
def test_B_101_an_index_may_be_empty_or_long(count):
    assert len(parse(index(manifests=[descriptor(OCI_MANIFEST)] * count), OCI_INDEX).manifests) == count


def test_L_10_an_index_has_at_most_20_000_descriptors():
    refused(
        index(manifests=[descriptor(OCI_MANIFEST)] * (DESCRIPTOR_COUNT_MAX + 1)), "at most 20000", OCI_INDEX
    )


@pytest.mark.parametrize("value", [1, None, True, [], {}, 1.5])
def test_B_103_an_annotation_is_a_string(value):
    refused(document(annotations={"key": value}), "annotations['key']")
    refused(document(layers=[descriptor(annotations={"key": value})]), "layers[0].annotations['key']")


@pytest.mark.parametrize(
    "annotations", [{"": "x"}, {"a": "\0"}, {"a": "x" * 1_000_000}, {str(n): "" for n in range(100_000)}]
)
def test_B_103_odd_annotations_are_stored(annotations):
    assert parse(document(annotations=annotations)).annotations == annotations


def test_annotations_are_an_object():
    refused(document(annotations=[]), "annotations is a list")
    refused(document(annotations="x"), "annotations is 'x'")
    assert parse(document(annotations=None)).annotations == {}


@pytest.mark.parametrize(
    "data",
    ["!!", "e30", "e3 0=", 1, base64.b64encode(b"{ }").decode(), base64.b64encode(b"[]").decode(), "é"],
)
def test_B_104_inline_data_is_what_the_descriptor_names(data):
    refused(document(config=descriptor(OCI_EMPTY, data=data)), "config.data")


def test_B_104_inline_data_that_fits_is_taken():
    assert parse(document(config=descriptor(OCI_EMPTY, data="e30="))).config.data == b"{}"


@pytest.mark.parametrize("digest", [1, None, "", "sha256:x", "md5:" + "a" * 32, EMPTY.upper()])
def test_a_digest_is_one(digest):
    refused(document(layers=[descriptor(digest=digest)]), "layers[0].digest")


@pytest.mark.parametrize("media_type", ["x", 1, "a/" + "b" * 300, "a/b\n", "ä/b", []])
def test_a_media_type_is_one(media_type):
    refused(document(layers=[descriptor(media_type)]), "layers[0].mediaType")
    refused(document(artifactType=media_type), "artifactType")


@pytest.mark.parametrize("media_type", [None, ""])
def test_a_descriptor_has_a_media_type(media_type):
    refused(document(config=descriptor(media_type)), "config.mediaType is missing")
    assert parse(document(artifactType=media_type)).artifact_type is None


@pytest.mark.parametrize(
    ("field", "value"), [("urls", "x"), ("urls", [1]), ("platform", "linux"), ("platform", [])]
)
def test_other_fields_have_their_types(field, value):
    refused(document(layers=[descriptor(**{field: value})]), f"layers[0].{field}")


def test_unknown_fields_are_passed_over():
    layer = {**descriptor(), "org.example": {"deep": [1, {}]}}

    assert parse(document(layers=[layer], extra="field")).layers == (Descriptor(OCI_LAYER, EMPTY, 2),)
    assert parse(
        index(manifests=[{**descriptor(OCI_MANIFEST), "modelMetadata": {"q": 4}}]), OCI_INDEX
    ).manifests


def test_B_94_foreign_layers_need_not_be_here():
    foreign = descriptor(FOREIGN, urls=["https://example.com/x"])
    manifest = parse(
        document(layers=[descriptor(), foreign, descriptor(FOREIGN), descriptor(urls=["https://x"])])
    )

    assert [where for where, _ in manifest.references()] == ["config", "layers[0]", "layers[2]", "layers[3]"]


def test_an_index_needs_its_manifests_and_not_its_subject():
    listed = parse(index(subject=descriptor(), manifests=[descriptor(OCI_MANIFEST)] * 2), OCI_INDEX)

    assert [where for where, _ in listed.references()] == ["manifests[0]", "manifests[1]"]


def test_the_artifact_type_of_a_referrer():
    assert parse(document(artifactType="a/b")).referrer_artifact_type == "a/b"
    assert parse(document()).referrer_artifact_type == OCI_CONFIG
    assert parse(index(artifactType="a/b"), OCI_INDEX).referrer_artifact_type == "a/b"
    assert parse(index(), OCI_INDEX).referrer_artifact_type is None


@pytest.mark.parametrize(
    ("artifact_type", "config", "family"),
    [
        (None, MODELKIT_CONFIG, "kitops"),
        (MODELKIT_ARTIFACT, OCI_EMPTY, "kitops"),
        (MODELPACK_ARTIFACT, MODELPACK_CONFIG, "modelpack"),
        (None, "application/vnd.cnai.model.config.v1+json", "legacy-modelpack"),
        (None, OCI_CONFIG, None),
    ],
)
def test_a_model_kit_is_known_by_either_type(artifact_type, config, family):
    assert parse(document(artifactType=artifact_type, config=descriptor(config))).family == family


def test_L_10_a_manifest_of_the_largest_size_is_read():
    filler = "x" * (MANIFEST_SIZE_MAX - len(json.dumps(document(annotations={f"{n}": "" for n in range(5)}))))
    pieces = {f"{n}": filler[n::5] for n in range(5)}
    content = json.dumps(document(annotations=pieces)).encode()

    assert len(content) == MANIFEST_SIZE_MAX
    assert parse_manifest(content, OCI_MANIFEST).annotations == pieces


@pytest.mark.parametrize(
    ("config", "artifact_type"),
    [(MODELKIT_CONFIG, MODELKIT_ARTIFACT), (MODELPACK_CONFIG, MODELPACK_ARTIFACT), (OCI_CONFIG, None)],
)
def test_a_written_manifest_reads_back(config, artifact_type):
    configured = Descriptor(config, EMPTY, 2)
    layers = (Descriptor(OCI_LAYER, EMPTY, 2, annotations={"b": "<&>", "a": "\u2028é"}),)

    content = format_manifest(configured, layers, {"z": "1", "a": "2"})

    assert content.startswith(b'{"schemaVersion":2,"mediaType":"' + OCI_MANIFEST.encode())
    assert rb'"annotations":{"a":"\u2028' + "é".encode() + rb'","b":"\u003c\u0026\u003e"}' in content
    assert content.endswith(b'"annotations":{"a":"2","z":"1"}}')
    assert parse_manifest(content, OCI_MANIFEST) == Manifest(
        OCI_MANIFEST, configured, layers, annotations={"a": "2", "z": "1"}, artifact_type=artifact_type
    )


def test_an_empty_list_of_layers_is_written_as_each_version_writes_it():
    config = Descriptor(MODELKIT_CONFIG, EMPTY, 2)

    assert b'"layers":[]' in format_manifest(config, [])
    assert b'"layers":null' in format_manifest(config, [], style="1.7")


def test_a_descriptor_is_written_in_the_order_of_the_specification():
    whole = Descriptor(OCI_EMPTY, EMPTY, 2, {"a": "b"}, "a/b", ("https://x",), b"{}", {"os": "linux"})

    assert list(whole.to_json()) == [
        "mediaType",
        "digest",
        "size",
        "urls",
        "annotations",
        "data",
        "platform",
        "artifactType",
    ]
    assert parse(document(config=whole.to_json())).config == whole
