import contextlib
import json
import string
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kitspec.digest import Digest
from kitspec.errors import KitfileInvalid
from kitspec.kitfile import (
    CONFIG_SIZE_MAX,
    ENTRY_COUNT_MAX,
    KITFILE_SIZE_MAX,
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
    is_model_reference,
)

ONE, TWO = Digest.of(b"1"), Digest.of(b"2")
WHOLE = Kitfile(
    manifest_version="1.0.0",
    package=Package("p", "1.0", "about <it>", "MIT", ("A <a@x.org>", "B")),
    model=Model(
        "m",
        "m.bin",
        "MIT",
        "torch",
        "onnx",
        "2",
        "d",
        (ModelPart("l", "l.bin", "MIT", "lora"),),
        {"b": 1.0, "a": [None]},
    ),
    code=(Code("src", "c", "MIT"),),
    datasets=(
        Dataset("t", "t.csv", description="d", license="MIT", parameters=1.0),
        Dataset("r", "r", "s3://b/k", "etag"),
    ),
    docs=(Docs("docs/", "d"), Docs()),
    prompts=(Prompt("p", "p.md", "d"),),
    mcp_servers=(McpServer("s", "s.mcpb", "d"),),
)


def yaml(text):
    return Kitfile.from_yaml(text.encode())


def refused(text, *messages):
    with pytest.raises(KitfileInvalid) as caught:
        Kitfile.from_yaml(text if isinstance(text, bytes) else text.encode())
    for message in messages:
        assert message in str(caught.value)


def test_the_config_has_every_field_in_kits_order():
    assert json.loads(WHOLE.to_json()).keys() == {
        "manifestVersion", "package", "model", "code", "datasets", "docs", "prompts", "mcpServers",
    }  # fmt: skip
    assert WHOLE.with_digests([(ONE, TWO)] * 8).to_json().startswith(
        b'{"manifestVersion":"1.0.0","package":{"name":"p","version":"1.0","description":"about \\u003cit\\u003e",'
        b'"license":"MIT","authors":["A \\u003ca@x.org\\u003e","B"]},"model":{"name":"m","path":"m.bin","license":"MIT",'
        b'"framework":"torch","format":"onnx","version":"2","description":"d","parts":[{"name":"l","path":"l.bin",'
        b'"license":"MIT","type":"lora","digest":"' + ONE.encode() + b'","diffId":"' + TWO.encode() + b'"}],'
        b'"parameters":{"a":[null],"b":1},"digest":"'
    )  # fmt: skip


def test_yaml_leaves_out_what_is_empty_and_the_digests():
    assert WHOLE.with_digests([(ONE, TWO)] * 8).to_yaml().decode() == (
        "manifestVersion: 1.0.0\n"
        'package:\n  name: p\n  version: "1.0"\n  description: about <it>\n  license: MIT\n  authors: [A <a@x.org>, B]\n'
        'model:\n  name: m\n  path: m.bin\n  license: MIT\n  framework: torch\n  format: onnx\n  version: "2"\n'
        "  description: d\n  parts:\n    - name: l\n      path: l.bin\n      license: MIT\n      type: lora\n"
        "  parameters:\n    a:\n      - null\n    b: 1\n"
        "code:\n  - path: src\n    description: c\n    license: MIT\n"
        "datasets:\n  - name: t\n    path: t.csv\n    description: d\n    license: MIT\n    parameters: 1\n"
        "  - name: r\n    path: r\n    remotePath: s3://b/k\n    remoteHash: etag\n"
        'docs:\n  - path: docs/\n    description: d\n  - path: ""\n'
        "prompts:\n  - name: p\n    path: p.md\n    description: d\n"
        "mcpServers:\n  - name: s\n    path: s.mcpb\n    description: d\n"
    )  # fmt: skip


def test_both_forms_read_back():
    packed = WHOLE.with_digests([(ONE, TWO)] * 8)

    assert Kitfile.from_yaml(WHOLE.to_yaml()) == WHOLE
    assert Kitfile.from_json(packed.to_json()) == packed


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("manifestVersion: 1.0", '{"manifestVersion":"1.0","package":{}}'),
        ("package: {name: x}", '{"manifestVersion":"","package":{"name":"x"}}'),
        ("model: {}", '{"manifestVersion":"","package":{},"model":{}}'),
        ("model:\ncode: null\npackage:\ndatasets: []", '{"manifestVersion":"","package":{}}'),
        ("docs:\n- {}", '{"manifestVersion":"","package":{},"docs":[{"path":""}]}'),
        ("docs:\n-", '{"manifestVersion":"","package":{},"docs":[{"path":""}]}'),
        ("model: {parameters: ''}", '{"manifestVersion":"","package":{},"model":{"parameters":""}}'),
        ("model: {parameters: ~}", '{"manifestVersion":"","package":{},"model":{}}'),
        ("model: {parameters: {}}", '{"manifestVersion":"","package":{},"model":{"parameters":{}}}'),
        ("package: {name: yes, version: ~, license: !!str ~}", '{"manifestVersion":"","package":{"name":"yes","license":"~"}}'),
        ("a: 1".replace("a: 1", "manifestVersion: 1\n---\nother: 1"), '{"manifestVersion":"1","package":{}}'),
        ("package: &p {name: x}\nmodel: {name: &n y, path: *n}", '{"manifestVersion":"","package":{"name":"x"},"model":{"name":"y","path":"y"}}'),
        ("package: {<<: {name: x, version: 1}, name: y}", '{"manifestVersion":"","package":{"name":"y","version":"1"}}'),
        ("package: {<<: [{name: x}, {name: z, version: 1}]}", '{"manifestVersion":"","package":{"name":"x","version":"1"}}'),
    ],
)  # fmt: skip
def test_yaml_is_read_as_kit_reads_it(text, config):
    assert yaml(text).to_json().decode() == config


@pytest.mark.parametrize(
    ("text", "json_text"),
    [
        ("0xFF", "255"), ("1.2e+3", "1200"), ("0o17", "15"), ("0777", "511"), ("0b11", "3"), ("1_000", "1000"), ("-3", "-3"),
        ("+5", "5"), (".5", "0.5"), ("1.0", "1"), ("1e-7", "1e-7"), ("0.00001", "0.00001"), ("1e21", "1e+21"), ("-0.0", "-0"),
        ("12345678901234567890", "12345678901234567890"), ("123456789012345678901234567890", "1.2345678901234568e+29"),
        ("yes", '"yes"'), ("True", "true"), ("false", "false"), ("null", "null"), ("~", "null"), ("=", '"="'), ("'1'", '"1"'),
        ("190:20:30", '"190:20:30"'), ("089", "89"), ("1e", '"1e"'), ("0x", '"0x"'), ("--1", '"--1"'), ("!!str 1", '"1"'),
        ("2020-01-01", '"2020-01-01T00:00:00Z"'), ("2020-1-2 3:4:5.670", '"2020-01-02T03:04:05.67Z"'),
        ("2020-01-01T10:00:00+02:00", '"2020-01-01T10:00:00+02:00"'), ("2020-01-01T10:00:00-00:30", '"2020-01-01T10:00:00-00:30"'),
        ("2020-13-01", '"2020-13-01"'), ("2020-01-01T10:00:00", '"2020-01-01T10:00:00"'), ("2020-01-01 10:00:00Z", '"2020-01-01 10:00:00Z"'),
        ("2020-01-01T10:00:00+99:00", '"2020-01-01T10:00:00+99:00"'),
        ("{b: 1, a10: 2, a9: 3, A: 4}", '{"A":4,"a10":2,"a9":3,"b":1}'), ("[1, [2], {a: é}]", '[1,[2],{"a":"é"}]'),
    ],
)  # fmt: skip
def test_parameters_are_resolved_as_kit_resolves_them(text, json_text):
    assert (
        yaml(f"model: {{parameters: [{text}]}}")
        .to_json()
        .decode()
        .endswith(f'"parameters":[{json_text}]}}}}')
    )


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("", ["empty"]),
        ("# nothing", ["empty"]),
        ("- a", ["line 1: the Kitfile is a list"]),
        ("text", ["line 1: the Kitfile is the text 'text'"]),
        ("x: 1\npackage:\n  y: 2\n  name: [z]\n", ["line 1: unknown key 'x'", "line 3: unknown key 'y' in package", "line 4: name of package is a list"]),
        ("code:\n- path: a\n- digest: b", ["line 3: unknown key 'digest' in code[1]"]),
        ("code: {path: a}", ["line 1: code of the Kitfile is a group of keys; wanted a list"]),
        ("code:\n- [a]", ["line 2: code[0] is a list"]),
        ("package: {authors: x}", ["authors of package is the text 'x'"]),
        ("package: {authors: [[x]]}", ["item 1, is a list"]),
        ("package: {name: a}\npackage: {}", ["line 2: mapping key 'package' already defined at line 1"]),
        ("model: {parameters: {a: 1, a: 2}}", ["already defined"]),
        ("model: {parameters: {1: a}}", ["a key that is not text"]),
        ("model: {parameters: {[a]: b}}", ["a key that is not text"]),
        ("model: {parameters: [.inf]}", ["JSON cannot express"]),
        ("model: {parameters: .nan}", ["JSON cannot express"]),
        ("model: !!python/object:os.system {}", ["the tag"]),
        ("package: {name: !!binary aGk=}", ["the tag"]),
        ("package: *x", ["stands for nothing"]),
        ("model: {parameters: &a [*a]}", ["what it is part of"]),
        ("package: {<<: x}", ["<< takes a mapping"]),
        ("a: b: c", ["line 1: not YAML"]),
        ("a: \x01", ["not YAML"]),
        ("a: [", ["not YAML"]),
        (b"a: \xff", ["not UTF-8: byte 3"]),
        ("model: {parameters: " + "[" * 65 + "]" * 65 + "}", ["nested deeper than 64"]),
        ("[" * 100_000, ["nested deeper than 64"]),
        ("{a: " * 100_000, ["nested deeper than 64"]),
    ],
    ids=range(28),
)  # fmt: skip
def test_what_is_no_kitfile_is_refused_with_its_lines(text, messages):
    refused(text, *messages)


def test_B_110_a_yaml_bomb_is_refused():
    levels = string.ascii_lowercase[:9]
    lines = ["a: &a [x,x,x,x,x,x,x,x,x]"]
    lines += [f"{this}: &{this} [{','.join([f'*{last}'] * 9)}]" for last, this in pairwise(levels)]

    refused("\n".join(lines), "more than 200000 values")


def test_B_110_sizes_and_counts_have_limits():
    refused(b"#" * (KITFILE_SIZE_MAX + 1), "at most 4194304")
    with pytest.raises(KitfileInvalid, match="at most"):
        Kitfile.from_json(b" " * (CONFIG_SIZE_MAX + 1))
    with pytest.raises(KitfileInvalid, match="20001 entries"):
        Kitfile.from_json(json.dumps({"docs": [{}] * ENTRY_COUNT_MAX, "code": [{}]}).encode())
    assert (
        len(Kitfile.from_json(json.dumps({"docs": [{}] * ENTRY_COUNT_MAX}).encode()).docs) == ENTRY_COUNT_MAX
    )


def test_B_110_configs_of_newer_kits_are_read():
    kitfile = Kitfile.from_json(
        b'{"new":{"a":[1]},"manifestVersion":"2","code":null,"docs":[{"path":"d","x":1},null]}'
    )

    assert kitfile == Kitfile("2", docs=(Docs("d"), Docs()))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (b"x", "cannot be read"),
        (b"[]", "the config is not an object"),
        (b'{"model": []}', "model in the config is not an object"),
        (b'{"code": {}}', "code in the config is not a list"),
        (b'{"code": [1]}', "code.0. is not an object"),
        (b'{"manifestVersion": 1}', "manifestVersion in the config is not a string"),
        (b'{"package": {"authors": [1]}}', "authors.0. is not a string"),
        (b'{"model": {"digest": "sha256:x"}}', "digest in model in the config: not a digest"),
        (b'{"a": 1, "a": 2}', "stands twice"),
    ],
)
def test_B_110_what_is_no_config_is_refused(config, message):
    with pytest.raises(KitfileInvalid, match=message):
        Kitfile.from_json(config)


def test_numbers_of_a_config_are_shown_as_kit_shows_them_but_never_changed():
    kitfile = Kitfile.from_json(
        b'{"model":{"parameters":{"a":1000000,"b":0.00001,"c":3,"d":9007199254740993,"e":-0,"f":100000000000000000000}}}'
    )

    assert kitfile.to_yaml().decode().splitlines()[3:] == [
        "    a: 1e+06", "    b: 1e-05", "    c: 3", "    d: 9007199254740993", "    e: -0", "    f: 1e+20",
    ]  # fmt: skip


def test_entries_come_in_the_order_of_layers():
    assert [(section, index, entry.path) for section, index, entry in WHOLE.entries()] == [
        (Section.MODEL, 0, "m.bin"),
        (Section.MODEL_PART, 0, "l.bin"),
        (Section.CODE, 0, "src"),
        (Section.DATASETS, 0, "t.csv"),
        (Section.DOCS, 0, "docs/"),
        (Section.DOCS, 1, ""),
        (Section.PROMPTS, 0, "p.md"),
        (Section.MCP_SERVERS, 0, "s.mcpb"),
    ]
    assert [section.layer_kind for section, _, _ in WHOLE.entries()] == [
        "model", "modelpart", "code", "dataset", "docs", "docs", "code", "mcpb",
    ]  # fmt: skip


def test_a_model_without_a_layer_has_its_parts():
    for path in ("", "org/base:v1"):
        kitfile = Kitfile(model=Model(path=path, parts=(ModelPart(path="l"),)))

        assert [section for section, _, _ in kitfile.entries()] == [Section.MODEL_PART]
        packed = kitfile.with_digests([(ONE, TWO)])
        assert (packed.model.digest, packed.model.parts[0].digest, packed.model.parts[0].diff_id) == (
            None,
            ONE,
            TWO,
        )


def test_digests_are_given_for_each_entry():
    with pytest.raises(ValueError, match="zip"):
        WHOLE.with_digests([(ONE, TWO)] * 7)


@pytest.mark.parametrize(
    ("path", "is_reference"),
    [
        ("org/base:v1", True), ("base:v1", True), ("reg.io/base:v1", True), (f"base@{ONE}", True), (str(ONE), True),
        ("reg.io:5000/base:v1", True), ("m.bin", False), ("./models", False), ("./a:b", False), ("C:\\x", False),
        ("reg.io:5000/base", False), ("http://x.y/z", False), ("s3://b/k", False), ("a@b", False), ("", False),
    ],
)  # fmt: skip
def test_a_path_is_a_reference_if_it_has_a_tag_or_a_digest(path, is_reference):
    assert is_model_reference(path) is is_reference


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
PARAMETERS = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
KITFILES = st.builds(
    Kitfile,
    st.text(),
    st.builds(Package, st.text(), st.text(), authors=st.lists(st.text(), max_size=3).map(tuple)),
    st.none() | st.builds(Model, st.text(), st.text(), parameters=PARAMETERS),
    code=st.lists(st.builds(Code, st.text()), max_size=2).map(tuple),
    docs=st.lists(st.builds(Docs, st.text(), st.text()), max_size=2).map(tuple),
)


@given(KITFILES)
def test_a_kitfile_reads_back_from_its_yaml(kitfile):
    assert Kitfile.from_yaml(kitfile.to_yaml()) == kitfile


@given(KITFILES)
def test_a_kitfile_reads_back_from_its_config(kitfile):
    config = kitfile.to_json()

    assert Kitfile.from_json(config) == kitfile
    assert Kitfile.from_json(config).to_json() == config


@given(st.binary() | st.text(alphabet="a:-[]{}&*!|>'\"%@`,#? \n\t<~").map(str.encode))
def test_any_bytes_are_a_kitfile_or_refused(content):
    with contextlib.suppress(KitfileInvalid):
        Kitfile.from_yaml(content)
    with contextlib.suppress(KitfileInvalid):
        Kitfile.from_json(content)
