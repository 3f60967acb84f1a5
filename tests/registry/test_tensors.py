import json
import math
import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry import gguf, safetensors
from registry.tensor_file import METADATA_COUNT_MAX, NAME_SIZE_MAX, TENSOR_COUNT_MAX
from registry.tensors import Tensor, TensorsInvalid, format_of, read_tensors


class Source:
    """A file in memory; a read outside of it fails the test."""

    def __init__(self, content):
        self.content = content
        self.spans = []

    async def read(self, start, stop):
        assert 0 <= start < stop <= len(self.content)
        self.spans.append((start, stop))
        return self.content[start:stop]


def run(coroutine):
    """What it returns, and how often it gave way; no event loop is needed, as it waits for its reader only."""
    turns = 0
    while True:
        try:
            coroutine.send(None)
        except StopIteration as done:
            return done.value, turns
        turns += 1


def read(content, form):
    source = Source(content)
    file, _ = run(read_tensors(source.read, len(content), form))
    assert file.format == form
    check(file, len(content))
    return file


def check(file, size):
    """What holds for every file that is read."""
    assert 0 <= file.data_start <= size
    assert all(file.data_start <= tensor.start <= tensor.stop <= size for tensor in file.tensors)
    assert all(before.stop <= behind.start for before, behind in pairwise(file.tensors))
    assert len({tensor.name for tensor in file.tensors}) == len(file.tensors)
    assert all(tensor.dtype.isascii() and tensor.dtype.isidentifier() for tensor in file.tensors)
    names = [tensor.name for tensor in file.tensors]
    json.dumps([file.metadata, names], allow_nan=False, ensure_ascii=False).encode()


def refused(content, form, message):
    with pytest.raises(TensorsInvalid, match=message) as caught:
        read(content, form)
    text = str(caught.value)
    assert text.isascii()
    assert text.isprintable()
    assert len(text) < 1000


def rows(*pairs):
    """Content and message; numbered and named by the message, since contents are too long for a test's name."""
    return [pytest.param(*pair, id=f"{number}: {pair[1]}") for number, pair in enumerate(pairs)]


def read_or_refused(content, form):
    try:
        return read(content, form)
    except TensorsInvalid:
        return None


@pytest.mark.parametrize(
    ("path", "form"),
    [
        ("model.safetensors", "safetensors"),
        ("a/b/MODEL.SafeTensors", "safetensors"),
        ("llama.Q4_K_M.gguf", "gguf"),
        ("x.GGUF", "gguf"),
        ("model.safetensors.index.json", None),
        ("safetensors", None),
        ("gguf", None),
        ("model.bin", None),
        ("", None),
    ],
)
def test_the_ending_tells_the_format(path, form):
    assert format_of(path) == form


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"


@pytest.mark.parametrize("form", ["safetensors", "gguf"])
def test_a_pointer_to_a_file_is_named_as_the_likely_mistake(form):
    refused(POINTER, form, "Git LFS pointer")


NAMES = st.text(max_size=12)
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)

# ---- safetensors

DTYPE_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip


def framed(header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + data


def entry(dtype, shape, start, stop):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


def byte_count(dtype, shape):
    return math.prod(shape) * DTYPE_BITS[dtype] // 8


ONE = {"a": entry("U8", [3], 0, 3)}
TWO = {"b": entry("F32", [2, 1], 4, 12), "a": entry("I16", [2], 0, 4), "__metadata__": {"format": "pt"}}
TWO_FILE = framed(TWO, bytes(12))


def test_a_safetensors_file_is_read():
    file = read(TWO_FILE, "safetensors")

    start = file.data_start
    assert start == 8 + len(json.dumps(TWO))
    assert file.metadata == {"format": "pt"}
    assert file.tensors == (
        Tensor("a", "I16", (2,), start, start + 4),
        Tensor("b", "F32", (2, 1), start + 4, start + 12),
    )


@given(
    st.dictionaries(
        NAMES.filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from([dtype for dtype in DTYPE_BITS if DTYPE_BITS[dtype] >= 8]), SHAPES),
        max_size=5,
    ),
    st.none() | st.dictionaries(st.text(), st.text(), max_size=4),
    st.booleans(),
    st.sampled_from([None, 0, 2]),
    st.randoms(use_true_random=False),
)
def test_what_is_written_as_safetensors_is_read(tensors, metadata, ensure_ascii, indent, random):
    header, position, expected = {}, 0, []
    for name, (dtype, shape) in tensors.items():
        stop = position + byte_count(dtype, shape)
        header[name] = entry(dtype, shape, position, stop)
        expected.append((name, dtype, shape, position, stop))
        position = stop
    if metadata is not None:
        header["__metadata__"] = metadata
    members = list(header.items())
    random.shuffle(members)
    text = json.dumps(dict(members), ensure_ascii=ensure_ascii, indent=indent).encode() + b"  "

    file = read(framed(text, bytes(position)), "safetensors")

    start = file.data_start
    assert file.metadata == (metadata or {})
    assert sorted(
        (tensor.name, tensor.dtype, tensor.shape, tensor.start - start, tensor.stop - start)
        for tensor in file.tensors
    ) == sorted(expected)


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_the_size_of_every_dtype_is_known(dtype):
    size = byte_count(dtype, [2, 4])

    assert (
        read(framed({"a": entry(dtype, [2, 4], 0, size)}, bytes(size)), "safetensors").tensors[0].dtype
        == dtype
    )
    for wrong in (size - 1, size + 1):
        content = framed({"a": entry(dtype, [2, 4], 0, wrong)}, bytes(wrong))
        refused(
            content, "safetensors", f"'a' has {wrong} bytes, which is not what {dtype} makes of the shape"
        )


@pytest.mark.parametrize(("dtype", "count"), [("F4", 3), ("F6_E2M3", 2), ("F6_E3M2", 5)])
def test_elements_that_fill_no_whole_bytes_are_refused(dtype, count):
    for size in (count * DTYPE_BITS[dtype] // 8, count * DTYPE_BITS[dtype] // 8 + 1):
        refused(framed({"a": entry(dtype, [count], 0, size)}, bytes(size)), "safetensors", "is not what")


def test_a_dtype_that_is_newer_than_this_is_taken_at_its_offsets():
    file = read(framed({"a": entry("F2_E1M0", [3], 0, 7)}, bytes(7)), "safetensors")

    assert [(tensor.dtype, tensor.stop - tensor.start) for tensor in file.tensors] == [("F2_E1M0", 7)]


@pytest.mark.parametrize("dtype", ["", "f32", "F32 ", "F-32", "F32\r\nX-Evil: 1", "Ü8", "F" * 33, "8F"])
def test_what_cannot_be_a_dtype_is_refused(dtype):
    refused(framed({"a": entry(dtype, [3], 0, 3)}, bytes(3)), "safetensors", "which is none")


def test_scalars_and_empty_tensors_are_tensors():
    header = {
        "empty": entry("F32", [0, 7], 1, 1),
        "scalar": entry("U8", [], 0, 1),
        "first": entry("F64", [0], 0, 0),
    }

    file = read(framed(header, b"x"), "safetensors")

    assert [(tensor.name, tensor.shape) for tensor in file.tensors] == [
        ("first", (0,)),
        ("scalar", ()),
        ("empty", (0, 7)),
    ]


def test_a_file_may_hold_no_tensors():
    assert read(framed(b"{}      "), "safetensors").tensors == ()
    assert read(framed(b'{ "__metadata__" : { } }'), "safetensors").metadata == {}


def test_escapes_are_undone():
    text = rb'{"\u0061\"\\\/\n\ud83d\ude00":{"dtype":"\u0055\u0038","\u0073hape":[],"data_offsets":[0,1]}}'

    file = read(framed(text, b"x"), "safetensors")

    assert [(tensor.name, tensor.dtype) for tensor in file.tensors] == [('a"\\/\n😀', "U8")]


def test_brackets_and_commas_in_names_and_metadata_are_text():
    header = {
        '"},{[': entry("U8", [1], 0, 1),
        "__metadata__": {"ss_tags": json.dumps({"a": [1, {"b": "}"}]})},
    }

    file = read(framed(header, b"x"), "safetensors")

    assert [tensor.name for tensor in file.tensors] == ['"},{[']
    assert json.loads(file.metadata["ss_tags"]) == {"a": [1, {"b": "}"}]}


def many(count, dimension_count=1):
    return {f"model.layers.{i}.weight": entry("U8", [1] * dimension_count, i, i + 1) for i in range(count)}


def test_a_usual_header_takes_one_read_and_a_long_one_two():
    small, large = Source(framed(many(100), bytes(100))), Source(framed(many(2000), bytes(2000)))

    run(read_tensors(small.read, len(small.content), "safetensors"))
    run(read_tensors(large.read, len(large.content), "safetensors"))

    assert len(small.spans) == 1
    assert len(large.spans) == 2
    assert large.spans[0][1] == large.spans[1][0] < len(large.content) - 2000 == large.spans[1][1]


def test_a_mixture_of_experts_is_read_and_the_event_loop_gets_its_turns():
    source = Source(framed(many(20_000, dimension_count=4), bytes(20_000)))

    file, turns = run(read_tensors(source.read, len(source.content), "safetensors"))

    assert len(file.tensors) == 20_000
    assert turns >= 20


def with_entry(**members):
    return framed({"a": {**ONE["a"], **members}}, bytes(3))


@pytest.mark.parametrize(
    ("content", "message"),
    rows(
        (b"", "a file of 0 bytes"),
        (bytes(7), "a file of 7 bytes"),
        (bytes(8), "begins with b'', not"),
        (framed(b" {}"), "begins with b' '"),
        (framed(b"[]"), "begins with b'\\['"),
        (framed(b"\xef\xbb\xbf{}"), "begins with b'\\\\xef'"),
        (TWO_FILE[:50], "a header of .* in a file of 50; the file is cut off"),
        (TWO_FILE[:-1], "the file is cut off"),
        (TWO_FILE + b"x", "1 bytes behind the last tensor"),
        (framed(b"{}", b"junk"), "4 bytes behind"),
        (framed({"a": entry("U8", [3], 1, 4)}, bytes(4)), "a hole before it"),
        (framed({**ONE, "b": entry("U8", [1], 4, 5)}, bytes(5)), "'b' has a hole before it"),
        (framed({**ONE, "b": entry("U8", [1], 2, 3)}, bytes(3)), "'b' overlaps the one before"),
        (framed({**ONE, "b": entry("U8", [3], 0, 3)}, bytes(3)), "overlaps"),
        (with_entry(data_offsets=[3, 0]), "wanted \\[start, stop\\]"),
        (with_entry(data_offsets=[3]), "wanted \\[start, stop\\]"),
        (with_entry(data_offsets=[]), "wanted \\[start, stop\\]"),
        (with_entry(data_offsets=[0, 3, 3]), "a list of more than 2 integers"),
        (with_entry(data_offsets=[-1, 2]), "no list of non-negative integers"),
        (with_entry(data_offsets=[0, 10**19]), "an integer of at most 19 digits"),
        (with_entry(data_offsets=[0, 9 * 10**18]), "is not what U8 makes"),
        (with_entry(data_offsets=None), "no list of non-negative integers"),
        (with_entry(data_offsets={"0": 3}), "no list of non-negative integers"),
        (with_entry(shape=[1] * 65), "a list of more than 64 integers"),
        (with_entry(shape=[10**18] * 64), "is not what U8 makes"),
        (with_entry(shape=["3"]), "no list of non-negative integers"),
        (with_entry(shape=[3.0]), "no list of non-negative integers"),
        (with_entry(shape=[True]), "no list of non-negative integers"),
        (with_entry(shape=[[3]]), "no list of non-negative integers"),
        (with_entry(shape=3), "no list of non-negative integers"),
        (with_entry(dtype=3), "no string"),
        (with_entry(dtype=None), "no string"),
        (with_entry(stride=[1]), "an unknown member 'stride'"),
        (framed({"a": {"dtype": "U8", "shape": [3]}}, bytes(3)), "lacks its dtype, its shape or its data_offsets"),
        (framed({"a": {}}), "lacks its dtype"),
        (framed({"a": []}), "no '{'"),
        (framed({"a": None}), "no '{'"),
        (framed({"__metadata__": {"a": 1}}), "no string"),
        (framed({"__metadata__": {"a": {"b": "c"}}}), "no string"),
        (framed({"__metadata__": None}), "no '{'"),
        (framed({"__metadata__": "a"}), "no '{'"),
    ),
)  # fmt: skip
def test_a_safetensors_file_that_breaks_the_rules_is_refused(content, message):
    refused(content, "safetensors", message)


A = b'"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'


@pytest.mark.parametrize(
    ("text", "message"),
    rows(
        (b"{" + A + b"," + A + b"}", "'a' stands twice"),
        (b"{" + A + b',"\\u0061":{}}', "'a' stands twice"),
        (b'{"__metadata__":{},"__metadata__":{}}', "'__metadata__' stands twice"),
        (b'{"__metadata__":{"k":"","k":""}}', "'k' stands twice"),
        (b'{"a":{"dtype":"U8","dtype":"U8"}}', "'dtype' stands twice"),
        (b'{"\xff":{}}', "not UTF-8"),
        (b'{"\xed\xa0\x80":{}}', "not UTF-8"),
        (b'{"\\ud800":{}}', "not UTF-8, or with an escape that is none"),
        (b'{"\\x":{}}', "an escape that is none"),
        (b'{"\\u12":{}}', "an escape that is none"),
        (b'{"a\nb":{}}', "no key"),
        (b'{"a\0b":{}}', "no key"),
        (b"{'a':{}}", "no key"),
        (b"{a:{}}", "no key"),
        (b'{"a"}', "no key"),
        (b'{"a', "no key"),
        (b"{,}", "no key"),
        (b"{" + A + b",}", "no key"),
        (b"{" + A, "no ',' or '}'"),
        (b"{" + A + b";}", "no ',' or '}'"),
        (b"{" + A + b"{", "no ',' or '}'"),
        (b"{" + A + b"}}", "something follows"),
        (b"{" + A + b"}\0", "something follows"),
        (b"{} x", "something follows"),
        (b"{}{}", "something follows"),
        (A.join((b"{", b"}")).replace(b"[0]", b"[00]"), "an integer of at most 19 digits"),
        (A.join((b"{", b"}")).replace(b"[0]", b"[0,]"), "an integer of at most 19 digits"),
        (A.join((b"{", b"}")).replace(b"[0]", b"[,]"), "an integer of at most 19 digits"),
        (A.join((b"{", b"}")).replace(b"[0]", b"[0 0]"), "an integer of at most 19 digits"),
        (A.join((b"{", b"}")).replace(b"[0]", b"[-0]"), "no list of non-negative integers"),
        (A.join((b"{", b"}")).replace(b"[0]", b"[1e1]"), "no list of non-negative integers"),
        (A.join((b"{", b"}")).replace(b"[0]", b"[NaN]"), "no list of non-negative integers"),
        (A.join((b"{", b"}")).replace(b"[0]", "[٣]".encode()), "no list of non-negative integers"),
    ),
)  # fmt: skip
def test_a_header_that_is_no_json_of_that_form_is_refused(text, message):
    refused(framed(text), "safetensors", message)


@pytest.mark.parametrize(
    "text",
    [b'{"a":' + b"[" * 2**20, b'{"a":' * 2**17, b'{"a":{"shape":[' * 2**16, b"{" + b"\\" * 2**20],
    ids=["lists", "objects", "entries", "backslashes"],
)
def test_nesting_costs_nothing(text):
    refused(framed(text), "safetensors", "where one was wanted|unknown member")


def test_a_long_header_is_refused_before_it_is_read():
    source = Source((safetensors.HEADER_SIZE_MAX + 1).to_bytes(8, "little") + b"{" + bytes(100_000))

    with pytest.raises(TensorsInvalid, match="a header of 33554433 bytes, at most 33554432 are read"):
        run(read_tensors(source.read, 2**40, "safetensors"))
    assert sum(stop - start for start, stop in source.spans) <= 64 * 1024


@pytest.mark.parametrize("size", [2**63, 2**64 - 1])
def test_a_header_as_large_as_a_number_can_say_is_refused(size):
    refused(size.to_bytes(8, "little") + b"{}", "safetensors", "at most 33554432 are read")


def test_names_of_safetensors_have_a_limit():
    longest = "ü" * (NAME_SIZE_MAX // 2)

    assert read(framed({longest: ONE["a"]}, bytes(3)), "safetensors").tensors[0].name == longest
    refused(framed({longest + "x": ONE["a"]}, bytes(3)), "safetensors", "more than 1024 bytes")


def test_strings_of_metadata_have_a_limit(monkeypatch):
    monkeypatch.setattr(safetensors, "STRING_SIZE_MAX", 20)

    assert read(framed({"__metadata__": {"k": "x" * 20}}), "safetensors").metadata == {"k": "x" * 20}
    refused(framed({"__metadata__": {"k": "x" * 21}}), "safetensors", "a string of 21 bytes; at most 20")


def test_tensors_of_safetensors_are_counted(monkeypatch):
    monkeypatch.setattr(safetensors, "TENSOR_COUNT_MAX", 3)

    assert len(read(framed(many(3), bytes(3)), "safetensors").tensors) == 3
    refused(framed(many(4), bytes(4)), "safetensors", "more than 3 tensors")


def test_keys_of_safetensors_are_counted(monkeypatch):
    monkeypatch.setattr(safetensors, "METADATA_COUNT_MAX", 3)

    assert len(read(framed({"__metadata__": dict.fromkeys("abc", "")}), "safetensors").metadata) == 3
    refused(framed({"__metadata__": dict.fromkeys("abcd", "")}), "safetensors", "more than 3 keys")


# ---- GGUF

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
LAYOUTS = {
    U8: "<B", I8: "<b", U16: "<H", I16: "<h", U32: "<I", I32: "<i", F32: "<f", BOOL: "<?", U64: "<Q", I64: "<q", F64: "<d",
}  # fmt: skip


def text(content):
    content = content if isinstance(content, bytes) else content.encode()
    return struct.pack("<Q", len(content)) + content


def value(kind, content):
    return text(content) if kind == STRING else struct.pack(LAYOUTS[kind], content)


def array(kind, *elements):
    return struct.pack("<IQ", kind, len(elements)) + b"".join(elements)


def key(name, kind, content):
    return text(name) + struct.pack("<I", kind) + content


def described(name, dimensions, kind, offset):
    """A tensor, with its dimensions as GGUF lists them."""
    return text(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset)


def padded(content, alignment=32):
    return content + bytes(-len(content) % alignment)


def head(tensor_count, key_count, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensor_count, key_count)


def gguf_file(tensors=(), keys=(), data=b"", *, alignment=32, version=3):
    header = head(len(tensors), len(keys), version) + b"".join(keys) + b"".join(tensors)
    return padded(header, alignment) + data


LLAMA = key("general.architecture", STRING, text("llama"))
MATRIX = described("m", [4, 2], 0, 0)
SAMPLE = gguf_file(
    [described("b", [2, 3], 1, 64), MATRIX, described("q", [256, 2], 12, 96)],
    [
        LLAMA,
        key("llama.block_count", U32, value(U32, 7)),
        key("tags", ARRAY, array(STRING, text("a"), text("é"))),
    ],
    bytes(96 + 288),
)


def test_a_gguf_file_is_read_and_its_dimensions_are_turned():
    file = read(SAMPLE, "gguf")

    start = file.data_start
    assert start % 32 == 0
    assert start == len(SAMPLE) - 96 - 288
    assert file.metadata == {"general.architecture": "llama", "llama.block_count": 7, "tags": ["a", "é"]}
    assert file.tensors == (
        Tensor("m", "F32", (2, 4), start, start + 32),
        Tensor("b", "F16", (3, 2), start + 64, start + 76),
        Tensor("q", "Q4_K", (2, 256), start + 96, start + 384),
    )


GGML_TYPES = [
    (0, "F32", 1, 4), (1, "F16", 1, 2), (2, "Q4_0", 32, 18), (3, "Q4_1", 32, 20), (6, "Q5_0", 32, 22), (7, "Q5_1", 32, 24),
    (8, "Q8_0", 32, 34), (10, "Q2_K", 256, 84), (11, "Q3_K", 256, 110), (12, "Q4_K", 256, 144), (13, "Q5_K", 256, 176),
    (14, "Q6_K", 256, 210), (15, "Q8_K", 256, 292), (16, "IQ2_XXS", 256, 66), (17, "IQ2_XS", 256, 74),
    (18, "IQ3_XXS", 256, 98), (19, "IQ1_S", 256, 50), (20, "IQ4_NL", 32, 18), (21, "IQ3_S", 256, 110),
    (22, "IQ2_S", 256, 82), (23, "IQ4_XS", 256, 136), (24, "I8", 1, 1), (25, "I16", 1, 2), (26, "I32", 1, 4),
    (27, "I64", 1, 8), (28, "F64", 1, 8), (29, "IQ1_M", 256, 56), (30, "BF16", 1, 2), (31, "Q4_0_4_4", 32, 18),
    (32, "Q4_0_4_8", 32, 18), (33, "Q4_0_8_8", 32, 18), (34, "TQ1_0", 256, 54), (35, "TQ2_0", 256, 66),
    (39, "MXFP4", 32, 17), (40, "NVFP4", 64, 36), (41, "Q1_0", 128, 18),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name", "block_count", "block_size"), GGML_TYPES, ids=str)
def test_the_size_of_every_ggml_type_is_known(kind, name, block_count, block_size):
    content = gguf_file([described("t", [2 * block_count, 3], kind, 0)], data=bytes(6 * block_size))

    (tensor,) = read(content, "gguf").tensors

    assert (tensor.dtype, tensor.shape) == (name, (3, 2 * block_count))
    assert tensor.stop == len(content)
    refused(content[:-1], "gguf", "the file is cut off")
    if block_count > 1:
        odd = gguf_file([described("t", [block_count + 1, block_count], kind, 0)], data=bytes(2**16))
        refused(odd, "gguf", f"rows of {block_count + 1} elements; {name} wants multiples of {block_count}")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (4, "type_4"),
        (9, "Q8_1"),
        (36, "type_36"),
        (42, "Q2_0"),
        (43, "type_43"),
        (2**32 - 1, "type_4294967295"),
    ],
)
def test_a_type_of_unknown_size_goes_on_to_the_next_tensor_or_the_end(kind, name):
    content = gguf_file(
        [
            described("last", [7], kind, 96),
            described("first", [64], kind, 0),
            described("m", [4, 2], 0, 32),
        ],
        data=bytes(100),
    )

    file = read(content, "gguf")

    assert [(t.name, t.dtype, t.start - file.data_start, t.stop - file.data_start) for t in file.tensors] == [
        ("first", name, 0, 32),
        ("m", "F32", 32, 64),
        ("last", name, 96, 100),
    ]


def test_two_tensors_of_unknown_size_cannot_begin_together():
    refused(
        gguf_file([described("a", [7], 99, 0), described("b", [7], 99, 0)], data=bytes(32)),
        "gguf",
        "'a' and 'b' overlap",
    )


def test_a_tensor_of_unknown_size_has_at_least_a_byte_unless_it_is_empty():
    refused(gguf_file([described("a", [7], 99, 32)], data=bytes(32)), "gguf", "'a' ends at byte .*cut off")
    assert read(gguf_file([described("a", [0], 99, 32)], data=bytes(32)), "gguf").tensors[0].shape == (0,)


SCALARS = st.one_of(
    st.tuples(st.just(U8), st.integers(0, 2**8 - 1)),
    st.tuples(st.just(I8), st.integers(-(2**7), 2**7 - 1)),
    st.tuples(st.just(U16), st.integers(0, 2**16 - 1)),
    st.tuples(st.just(I16), st.integers(-(2**15), 2**15 - 1)),
    st.tuples(st.just(U32), st.integers(0, 2**32 - 1)),
    st.tuples(st.just(I32), st.integers(-(2**31), 2**31 - 1)),
    st.tuples(st.just(F32), st.floats(width=32, allow_nan=False, allow_infinity=False)),
    st.tuples(st.just(BOOL), st.booleans()),
    st.tuples(st.just(STRING), st.text(max_size=20)),
    st.tuples(st.just(U64), st.integers(0, 2**64 - 1)),
    st.tuples(st.just(I64), st.integers(-(2**63), 2**63 - 1)),
    st.tuples(st.just(F64), st.floats(allow_nan=False, allow_infinity=False)),
)
KEYS = st.text("abcz019._-", min_size=1, max_size=20).filter(lambda name: name != "general.alignment")
GGUF_TENSORS = st.dictionaries(
    NAMES,
    st.tuples(st.sampled_from([kind for kind, _, count, _ in GGML_TYPES if count == 1]), SHAPES),
    max_size=5,
)


@given(
    st.dictionaries(KEYS, SCALARS | st.lists(SCALARS, min_size=1, max_size=4), max_size=5),
    GGUF_TENSORS,
    st.sampled_from([None, 8, 32, 64, 4096]),
    st.sampled_from([2, 3]),
    st.integers(1, 64),
)
def test_what_is_written_as_gguf_is_read_by_pieces_of_any_size(
    metadata, tensors, alignment, version, piece_size
):
    keys, expected_metadata = [], {}
    if alignment is not None:
        keys.append(key("general.alignment", U32, value(U32, alignment)))
        expected_metadata["general.alignment"] = alignment
    for name, content in metadata.items():
        if isinstance(content, list):
            kind = content[0][0]
            alike = [element for other, element in content if other == kind]
            keys.append(key(name, ARRAY, array(kind, *(value(kind, element) for element in alike))))
            expected_metadata[name] = alike
        else:
            keys.append(key(name, content[0], value(*content)))
            expected_metadata[name] = content[1]
    sizes = {kind: size for kind, _, _, size in GGML_TYPES}
    descriptions, expected, position = [], [], 0
    for name, (kind, shape) in tensors.items():
        descriptions.append(described(name, shape[::-1], kind, position))
        stop = position + math.prod(shape) * sizes[kind]
        expected.append((name, shape, position, stop))
        position = stop + -stop % (alignment or 32)
    content = gguf_file(descriptions, keys, bytes(position), alignment=alignment or 32, version=version)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "PIECE_SIZE", piece_size)
        file = read(content, "gguf")

    start = file.data_start
    assert file.metadata == expected_metadata
    assert sorted(
        (tensor.name, tensor.shape, tensor.start - start, tensor.stop - start) for tensor in file.tensors
    ) == sorted(expected)


def vocabulary(count):
    return key("tokenizer.ggml.tokens", ARRAY, array(STRING, *(text(f"token{i}") for i in range(count))))


def test_a_vocabulary_is_described_and_not_kept():
    scores = struct.pack("<IQ", F32, 1_000_000) + bytes(4_000_000)
    keys = [vocabulary(32_000), key("tokenizer.ggml.scores", ARRAY, scores)]
    source = Source(gguf_file([MATRIX], [*keys, LLAMA], bytes(32)))

    file, turns = run(read_tensors(source.read, len(source.content), "gguf"))

    assert file.metadata == {
        "tokenizer.ggml.tokens": {"type": "string", "count": 32_000},
        "tokenizer.ggml.scores": {"type": "float32", "count": 1_000_000},
        "general.architecture": "llama",
    }
    assert len(file.tensors) == 1
    # The numbers are not even read, but for what lies in the piece with the end of the strings or with what follows.
    assert sum(stop - start for start, stop in source.spans) < len(keys[0]) + 3 * gguf.PIECE_SIZE
    assert turns >= len(keys[0]) // gguf.PIECE_SIZE


@pytest.mark.parametrize("kind", [*LAYOUTS, STRING])
def test_an_array_is_kept_up_to_its_limit(kind):
    element = value(kind, "" if kind == STRING else 1)
    whole = key("k", ARRAY, array(kind, *[element] * gguf.ARRAY_KEPT_MAX))
    longer = key("k", ARRAY, array(kind, *[element] * (gguf.ARRAY_KEPT_MAX + 1)))

    assert len(read(gguf_file(keys=[whole]), "gguf").metadata["k"]) == gguf.ARRAY_KEPT_MAX
    assert read(gguf_file(keys=[longer]), "gguf").metadata["k"]["count"] == gguf.ARRAY_KEPT_MAX + 1


def test_an_empty_array_is_a_list():
    assert read(gguf_file(keys=[key("k", ARRAY, array(STRING))]), "gguf").metadata == {"k": []}


def test_arrays_in_arrays_are_described():
    inner = array(ARRAY, array(U8, b"\1", b"\2"), array(STRING, text("x")))
    keys = [key("k", ARRAY, array(ARRAY, inner, array(ARRAY))), LLAMA]

    assert read(gguf_file(keys=keys), "gguf").metadata == {
        "k": {"type": "array", "count": 2},
        "general.architecture": "llama",
    }


def test_a_string_that_is_long_or_not_utf_8_is_described():
    longest, longer = "x" * gguf.STRING_KEPT_MAX, "x" * (gguf.STRING_KEPT_MAX + 1)
    keys = [
        key("longest", STRING, text(longest)),
        key("longer", STRING, text(longer)),
        key("latin", STRING, text("é".encode("latin-1"))),
        key("tokens", ARRAY, array(STRING, text("a"), text(b"\x80"), text(longer))),
        LLAMA,
    ]

    assert read(gguf_file(keys=keys), "gguf").metadata == {
        "longest": longest,
        "longer": {"type": "string", "size": 65_537},
        "latin": {"type": "string", "size": 1},
        "tokens": ["a", {"type": "string", "size": 1}, {"type": "string", "size": 65_537}],
        "general.architecture": "llama",
    }


@pytest.mark.parametrize("kind", [F32, F64])
@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_numbers_that_json_cannot_say_are_strings(kind, number):
    keys = [key("k", kind, value(kind, float(number)))]

    assert read(gguf_file(keys=keys), "gguf").metadata == {"k": number}


def test_tensors_may_lie_in_any_order_with_space_between_and_the_last_needs_no_padding():
    content = gguf_file(
        [described("b", [3], 24, 320), described("e", [0, 5], 0, 64), described("a", [], 0, 64)],
        data=bytes(323),
    )

    assert [tensor.name for tensor in read(content, "gguf").tensors] == ["e", "a", "b"]


def test_a_file_of_keys_alone_needs_no_padding():
    content = head(0, 1) + LLAMA

    file = read(content, "gguf")

    assert len(content) % 32
    assert file.tensors == ()
    assert file.data_start == len(content)


@pytest.mark.parametrize(
    ("start", "message"),
    rows(
        (b"", "cut off in its header, which needs 4"),
        (b"GGU", "cut off"),
        (b"GGUF\3\0\0", "cut off"),
        (head(0, 0)[:-1], "cut off"),
        (b"GGML\3\0\0\0", "begins with b'GGML', not with b'GGUF'"),
        (b"gguf\3\0\0\0", "begins with b'gguf'"),
        (b"\n\x1b]0\3\0\0\0", "begins with b'"),
        (head(0, 0, version=0), "GGUF version 0; versions 2 and 3 are read"),
        (head(0, 0, version=1), "GGUF version 1; versions 2 and 3 are read: convert it to one of them"),
        (head(0, 0, version=4), "GGUF version 4"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "a big-endian GGUF file; only little-endian ones are read"),
        (b"FUGG" + struct.pack(">IQQ", 3, 0, 0), "a big-endian GGUF file"),
        (head(2**63, 0), "9223372036854775808 tensors; at most 200000 are read"),
        (head(TENSOR_COUNT_MAX + 1, 0), "200001 tensors"),
        (head(TENSOR_COUNT_MAX, 0), "cut off in its header, which needs 4800024"),
        (head(0, 2**64 - 1), "18446744073709551615 keys; at most 10000 are read"),
        (head(0, METADATA_COUNT_MAX + 1), "10001 keys"),
        (head(0, METADATA_COUNT_MAX), "cut off"),
    ),
)
def test_M_09_the_head_of_a_gguf_file_is_checked(start, message):
    refused(start, "gguf", message)


def lying(kind, count, content=b""):
    return key("k", ARRAY, struct.pack("<IQ", kind, count) + content)


@pytest.mark.parametrize(
    ("pair", "message"),
    rows(
        (text("k" * 65_536), "a key of 65536 bytes; at most 65535 are read"),
        (struct.pack("<Q", 2**60), "a key of 1152921504606846976 bytes"),
        (key("", U8, b"\1"), "not ASCII or is empty"),
        (key("ü", U8, b"\1"), "the key '\\\\xfc', which is not ASCII"),
        (key(b"\xff", U8, b"\1"), "the key b'\\\\xff', which is not UTF-8"),
        (key("k", 13, b"\1"), "a value of the unknown type 13"),
        (key("k", 2**32 - 1, b"\1"), "a value of the unknown type"),
        (key("k", BOOL, b"\2"), "a bool that is neither 0 nor 1"),
        (lying(BOOL, 2, b"\1\xff"), "a bool that is neither"),
        (key("k", STRING, struct.pack("<Q", 2**60)), "cut off in its header, which needs"),
        (key("k", STRING, struct.pack("<Q", 2**64 - 1)), "cut off"),
        (lying(13, 0), "an array of the unknown type 13"),
        (lying(U8, 2**60), "cut off"),
        (lying(F64, 2**64 - 1), "cut off"),
        (lying(STRING, 2**60), "cut off"),
        (lying(STRING, 1000, bytes(7000)), "cut off"),
        (lying(STRING, 1000, struct.pack("<Q", 2**63) + bytes(8000)), "cut off"),
        (lying(ARRAY, 2**60), "cut off"),
        (
            key("general.alignment", U32, value(U32, 0)),
            "general.alignment is '0'; wanted a power of two from 8",
        ),
        (key("general.alignment", U32, value(U32, 3)), "general.alignment is '3'"),
        (key("general.alignment", U32, value(U32, 4)), "general.alignment is '4'"),
        (key("general.alignment", U32, value(U32, 2**31)), "general.alignment is '2147483648'"),
        (key("general.alignment", I32, value(I32, -32)), "general.alignment is '-32'"),
        (key("general.alignment", BOOL, b"\1"), "general.alignment is 'True'"),
        (key("general.alignment", F32, value(F32, 32.0)), "general.alignment is '32.0'"),
        (key("general.alignment", STRING, text("32")), "general.alignment is '32'"),
        (key("general.alignment", ARRAY, array(U32)), "general.alignment is"),
    ),
)
def test_M_09_keys_and_values_that_lie_are_refused(pair, message):
    refused(head(0, 1) + pair + bytes(64), "gguf", message)


def test_M_09_a_key_twice_is_refused():
    refused(gguf_file(keys=[LLAMA, LLAMA]), "gguf", "the key 'general.architecture' twice")


@pytest.mark.parametrize("depth", [gguf.ARRAY_DEPTH_MAX, 1000])
def test_M_09_deep_arrays_are_refused(depth):
    content = array(ARRAY)
    for _ in range(depth):
        content = array(ARRAY, content)

    refused(gguf_file(keys=[key("k", ARRAY, content)]), "gguf", "more than 4 deep")


@pytest.mark.parametrize(
    ("tensor", "message"),
    rows(
        (
            described("t" * (NAME_SIZE_MAX + 1), [1], 24, 0),
            "a tensor name of 1025 bytes; at most 1024 are read",
        ),
        (described(b"\xff", [1], 24, 0), "the tensor name b'\\\\xff', which is not UTF-8"),
        (described("t", [1] * 5, 24, 0), "'t' has 5 dimensions; at most 4 are allowed"),
        (text("t") + struct.pack("<I", 2**32 - 1), "has 4294967295 dimensions"),
        (described("t", [2**63], 24, 0), "makes 2\\^63 elements or more"),
        (described("t", [2**63, 0], 24, 0), "makes 2\\^63 elements or more"),
        (described("t", [2**32, 2**31], 24, 0), "makes 2\\^63 elements or more"),
        (described("t", [2**31, 2**31, 2**31, 2**31], 99, 0), "makes 2\\^63 elements or more"),
        (described("t", [2**32, 2**30], 28, 0), "the file is cut off"),
        (described("t", [33], 24, 0), "'t' ends at byte .*; the file is cut off"),
        (described("t", [1], 24, 32), "the file is cut off"),
        (described("t", [0], 24, 64), "the file is cut off"),
        (described("t", [1], 99, 64), "the file is cut off"),
        (described("t", [1], 24, 2**64 - 32), "the file is cut off"),
        (described("t", [1], 24, 1), "at offset 1, no multiple of 32"),
        (described("t", [], 12, 0), "rows of 1 elements; Q4_K wants multiples of 256"),
    ),
)
def test_M_09_tensors_that_lie_are_refused(tensor, message):
    refused(gguf_file([tensor], data=bytes(32)), "gguf", message)


def test_M_09_tensors_that_overlap_are_refused():
    long = described("long", [33], 24, 0)

    refused(gguf_file([described("b", [1], 24, 32), long], data=bytes(64)), "gguf", "'long' and 'b' overlap")
    refused(gguf_file([described("b", [1], 24, 0), long], data=bytes(64)), "gguf", "overlap")


def test_a_tensor_twice_is_refused():
    refused(gguf_file([MATRIX, described("m", [1], 24, 32)], data=bytes(64)), "gguf", "the tensor 'm' twice")


def test_the_length_of_a_gguf_header_has_a_limit(monkeypatch):
    monkeypatch.setattr(gguf, "HEADER_SIZE_MAX", 200_000)

    assert read(gguf_file(keys=[lying(U8, 190_000, bytes(190_000))]), "gguf")
    refused(gguf_file(keys=[lying(U8, 200_000, bytes(200_000))]), "gguf", "at most 200000 are read")
    refused(gguf_file(keys=[vocabulary(20_000)]), "gguf", "at most 200000 are read")


@pytest.mark.parametrize(
    "pairs",
    [
        [key(f"k{i}", STRING, text("x" * 60_000)) for i in range(80)],
        [key(f"k{i}", ARRAY, array(F64, *[bytes(8)] * 256)) for i in range(2500)],
        [key("k", ARRAY, array(ARRAY, *[array(U8)] * 400_000))],
    ],
    ids=["strings", "arrays", "arrays in an array"],
)
def test_metadata_that_is_kept_has_a_limit(pairs):
    refused(gguf_file(keys=pairs), "gguf", "more than 4194304 bytes of metadata")


def test_many_tensors_of_gguf_are_read_and_the_event_loop_gets_its_turns():
    source = Source(
        gguf_file([described(f"t{i}", [1], 24, 32 * i) for i in range(10_000)], data=bytes(320_000))
    )

    file, turns = run(read_tensors(source.read, len(source.content), "gguf"))

    assert len(file.tensors) == 10_000
    assert turns >= 10


# ---- any bytes


@pytest.mark.parametrize(
    ("content", "form"), [(TWO_FILE, "safetensors"), (SAMPLE, "gguf")], ids=["st", "gguf"]
)
def test_a_file_cut_off_anywhere_is_refused(content, form):
    for size in range(len(content)):
        refused(content[:size], form, "cut off|a file of")


@given(st.binary(max_size=200), st.sampled_from(["safetensors", "gguf"]))
def test_any_bytes_are_a_file_of_tensors_or_refused(content, form):
    read_or_refused(content, form)


@given(st.binary(max_size=200), st.integers(0, 3), st.integers(0, 3))
def test_any_bytes_behind_a_head_of_gguf_are_read_or_refused(content, tensor_count, key_count):
    read_or_refused(head(tensor_count, key_count) + content, "gguf")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(list(DTYPE_BITS)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=3) | st.sampled_from(["__metadata__", "dtype", "shape", "data_offsets"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(
    st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), JSON, max_size=3), st.binary(max_size=20)
)
def test_any_json_is_a_header_or_refused(header, data):
    read_or_refused(framed(header, data), "safetensors")


@given(
    st.sampled_from([(TWO_FILE, "safetensors"), (SAMPLE, "gguf")]),
    st.lists(
        st.tuples(st.integers(0, 400), st.integers(0, 1), st.binary(max_size=9)), min_size=1, max_size=4
    ),
)
def test_a_damaged_file_is_read_or_refused(file, damages):
    content, form = file
    for at, dropped, inserted in damages:
        content = content[:at] + inserted + content[at + dropped * len(inserted) :]

    read_or_refused(content, form)


@given(
    st.integers(0, len(SAMPLE) - 8), st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1])
)
def test_M_09_any_number_of_a_gguf_file_may_be_a_lie(at, number):
    read_or_refused(SAMPLE[:at] + struct.pack("<Q", number) + SAMPLE[at + 8 :], "gguf")
