import contextlib
import io
import tarfile
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kitspec.errors import LayerTarInvalid
from kitspec.layer_tar import (
    BLOCK_SIZE,
    DEPTH_MAX,
    PAX_SIZE_MAX,
    TRAILER,
    LayerTarReader,
    Member,
    format_member,
    format_padding,
)


def with_checksum(header):
    blank = header[:148] + b" " * 8 + header[156:]
    return blank[:148] + b"%06o\0 " % sum(blank) + blank[156:]


def header(
    name=b"f",
    *,
    typeflag=b"0",
    size=b"%011o\0" % 0,
    mode=b"0000644\0",
    prefix=b"",
    magic=b"ustar\00000",
    link=b"",
):
    block = b"".join(
        (
            name.ljust(100, b"\0"), mode, b"0001750\0", b"0000000\0", size, b"%011o\0" % 0, bytes(8), typeflag,
            link.ljust(100, b"\0"), magic, bytes(64), bytes(16), prefix.ljust(155, b"\0"), bytes(12),
        )
    )  # fmt: skip
    assert len(block) == BLOCK_SIZE
    return with_checksum(block)


def extension(typeflag, body, size=None):
    size = len(body) if size is None else size
    return header(b"ext", typeflag=typeflag, size=b"%011o\0" % size) + body + format_padding(len(body))


def record(key, value):
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest)
    while len(b"%d" % length) + len(rest) != length:
        length = len(b"%d" % length) + len(rest)
    return b"%d" % length + rest


def member(path, content=b"", mode=0o644):
    return format_member(path, size=len(content), mode=mode) + content + format_padding(len(content))


def read(*chunks):
    """Events, with the pieces of each content joined."""
    reader = LayerTarReader()
    events = []
    for chunk in chunks:
        for event in reader.feed(chunk):
            if isinstance(event, Member):
                events.append(event)
            elif isinstance(events[-1], bytes):
                events[-1] += bytes(event)
            else:
                events.append(bytes(event))
    reader.finish()
    return events


def members(*chunks):
    return [event for event in read(*chunks) if isinstance(event, Member)]


def refused(content, message, *, also_byte_by_byte=True):
    with pytest.raises(LayerTarInvalid, match=message) as caught:
        read(content)
    text = str(caught.value)
    assert text.isascii()
    assert text.isprintable()
    assert len(text) < 1000
    if also_byte_by_byte:
        with pytest.raises(LayerTarInvalid, match=message):
            read(*(content[at : at + 1] for at in range(len(content))))


# ---- writing and reading what was written

NAMES = st.text(
    st.sampled_from("abcz019 .-_~'\"\\$\u00e9\u4e2d\U0001f600\u0301"), min_size=1, max_size=60
).filter(lambda name: name not in (".", ".."))
PATHS = st.lists(NAMES, min_size=1, max_size=6).map("/".join)
FILES = st.lists(st.tuples(PATHS, st.binary(max_size=1500), st.integers(0, 0o7777)), max_size=5)


def tar_of(files):
    return b"".join(member(path, content, mode) for path, content, mode in files) + TRAILER


@given(FILES)
def test_what_is_written_is_read(files):
    events = read(tar_of(files))

    assert [event for event in events if isinstance(event, bytes)] == [
        content for _, content, _ in files if content
    ]
    assert [(event.path, event.size, event.mode) for event in events if isinstance(event, Member)] == [
        (path, len(content), mode) for path, content, mode in files
    ]


@given(FILES)
def test_the_offset_of_a_member_is_where_its_content_is(files):
    layer = tar_of(files)

    for entry, (_, content, _) in zip(members(layer), files, strict=True):
        assert layer[entry.offset : entry.offset + entry.size] == content


@given(FILES)
def test_members_begin_where_the_one_before_ends(files):
    found = members(tar_of(files))

    assert [entry.start for entry in found] == [0, *(entry.stop for entry in found)][:-1] if found else True
    for entry in found:
        (alone,) = members(tar_of(files)[entry.start : entry.stop] + TRAILER)
        assert (alone.path, alone.size, alone.offset) == (entry.path, entry.size, entry.offset - entry.start)


@given(FILES, st.integers(1, 2000))
def test_content_can_be_left_out(files, size):
    layer = tar_of(files)
    reader = LayerTarReader()
    found = []
    position = read_size = 0
    while position < len(layer):
        chunk = layer[position : position + size]
        found += [event for event in reader.feed(chunk) if isinstance(event, Member)]
        read_size += len(chunk)
        position += len(chunk) + reader.skip()
    reader.finish()

    assert found == members(layer)
    assert read_size <= len(layer)


@given(FILES)
def test_the_standard_library_reads_what_is_written(files):
    with tarfile.open(fileobj=io.BytesIO(tar_of(files))) as archive:
        seen = [(info.name, archive.extractfile(info).read(), info.mode) for info in archive]

    assert seen == files


@given(FILES, st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
def test_what_the_standard_library_writes_is_read(files, form):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        for path, content, mode in files:
            info = tarfile.TarInfo(path)
            info.size, info.mode, info.uid, info.uname = len(content), mode, 2**31, "someone"
            archive.addfile(info, io.BytesIO(content))

    assert [(entry.path, entry.size) for entry in members(stream.getvalue())] == [
        (path, len(content)) for path, content, _ in files
    ]


@given(FILES, st.lists(st.integers(0, 20_000)))
def test_any_cutting_into_chunks_gives_the_same_events(files, cuts):
    layer = tar_of(files)
    edges = [0, *sorted(min(cut, len(layer)) for cut in cuts), len(layer)]

    assert read(*(layer[start:stop] for start, stop in pairwise(edges))) == read(layer)


def test_byte_by_byte_gives_the_same_events():
    layer = tar_of([("a", b"hello", 0o644), ("ü" * 60, b"x" * 512, 0o755), ("d/e", b"", 0o600)])

    assert read(*(layer[at : at + 1] for at in range(len(layer)))) == read(layer)


def test_content_is_a_slice_of_the_chunk_and_not_a_copy():
    reader = LayerTarReader()
    list(reader.feed(format_member("f", size=4096, mode=0o644)))
    chunk = bytes(1000)

    (piece,) = reader.feed(chunk)

    assert piece.obj is chunk


@given(st.binary(max_size=2000))
def test_any_bytes_are_a_layer_or_refused(content):
    try:
        read(content)
    except LayerTarInvalid:
        with pytest.raises(LayerTarInvalid):
            read(*(content[at : at + 1] for at in range(len(content))))


@given(FILES.filter(bool), st.data())
def test_a_flipped_bit_never_crashes(files, data):
    layer = bytearray(tar_of(files))
    layer[data.draw(st.integers(0, len(layer) - 1))] ^= 1 << data.draw(st.integers(0, 7))

    with contextlib.suppress(LayerTarInvalid):
        read(bytes(layer))


# ---- headers as Go writes them


def test_the_longest_plain_size_is_just_below_8_gib():
    plain = format_member("f", size=8 * 1024**3 - 1, mode=0o644)
    extended = format_member("f", size=8 * 1024**3, mode=0o644)

    assert len(plain) == BLOCK_SIZE
    assert plain[124:136] == b"77777777777\0"
    assert len(extended) == 3 * BLOCK_SIZE
    assert extended[BLOCK_SIZE:].startswith(b"19 size=8589934592\n")
    assert extended[2 * BLOCK_SIZE + 124 :].startswith(b"00000000000\0")
    assert next(LayerTarReader().feed(extended)).size == 8 * 1024**3


@pytest.mark.parametrize(
    ("path", "prefix", "name"),
    [
        ("a" * 100, b"", b"a" * 100),
        ("a" * 155 + "/" + "b" * 100, b"a" * 155, b"b" * 100),
        ("d/" + "a" * 99, b"d", b"a" * 99),
        ("a/b/" + "c" * 100, b"a/b", b"c" * 100),
    ],
)
def test_a_long_name_is_cut_at_the_last_slash_that_fits(path, prefix, name):
    block = format_member(path, size=0, mode=0o644)

    assert len(block) == BLOCK_SIZE
    assert block[:100].rstrip(b"\0") == name
    assert block[345:500].rstrip(b"\0") == prefix


@pytest.mark.parametrize("path", ["a" * 101, "a" * 156 + "/b", "d/" + "a" * 101, "naïve", "/" + "a" * 100])
def test_a_name_that_cannot_be_cut_gets_a_pax_header(path):
    blocks = format_member(path, size=0, mode=0o644)

    assert blocks[156:157] == b"x"
    assert blocks[329:345] == bytes(16)
    assert f"path={path}\n".encode() in blocks


def test_a_header_says_nothing_of_the_machine_that_made_it():
    block = format_member("f", size=1, mode=0o4755)

    assert block[100:124] == b"0004755\x000001750\x000000000\0"
    assert block[136:148] == b"00000000000\0"
    assert block[257:265] == b"ustar\00000"
    assert block[265:345] == bytes(64) + b"0000000\x000000000\0"


# ---- what is tolerated


def test_directories_with_a_slash_are_directories():
    layer = (
        header(b"d/", typeflag=b"5") + header(b"e", typeflag=b"5") + header(b"old/", typeflag=b"\0") + TRAILER
    )

    assert [(entry.path, entry.is_directory) for entry in members(layer)] == [
        ("d", True),
        ("e", True),
        ("old", True),
    ]


def test_a_dot_in_front_is_not_part_of_a_name_and_the_root_is_no_member():
    layer = header(b"./", typeflag=b"5") + header(b".", typeflag=b"5") + header(b"./a//b/./c") + TRAILER

    assert [entry.path for entry in members(layer)] == ["a/b/c"]


@pytest.mark.parametrize("ending", [TRAILER, TRAILER[:BLOCK_SIZE], bytes(10240), bytes(1024 * 1024)])
def test_T_20_one_block_of_zeros_or_a_padded_record_ends_a_layer(ending):
    assert members(header() + ending) == [
        Member("f", is_directory=False, mode=0o644, size=0, offset=512, start=0)
    ]


def test_owner_time_and_device_may_be_anything():
    block = bytearray(header())
    block[108:124] = b"\xff" * 16
    block[136:148] = b"garbage here"
    block[265:345] = b"x" * 80

    assert members(with_checksum(bytes(block)) + TRAILER)


def test_gnu_headers_have_no_prefix():
    layer = header(b"f", magic=b"ustar  \0", prefix=b"12345670123") + TRAILER

    assert [entry.path for entry in members(layer)] == ["f"]


def test_a_checksum_of_signed_bytes_is_taken():
    block = header("ü".encode())
    signed = sum(byte - 256 if byte > 127 else byte for byte in block[:148] + b" " * 8 + block[156:])

    assert members(block[:148] + b"%06o\0 " % signed + block[156:] + TRAILER)


def test_gnu_long_names_are_read():
    layer = extension(b"L", b"d/" + b"n" * 200 + b"\0") + header(b"cut") + TRAILER

    assert [entry.path for entry in members(layer)] == ["d/" + "n" * 200]


def test_base_256_sizes_are_read():
    layer = header(size=b"\x80" + (5).to_bytes(11, "big")) + b"hello" + format_padding(5) + TRAILER

    assert read(layer)[1] == b"hello"


def test_T_10_modes_are_told_as_they_are_written():
    layer = (
        header(mode=b"0006777\0") + header(b"g", mode=b"\0" * 8) + header(b"h", mode=b"0107777\0") + TRAILER
    )

    assert [entry.mode for entry in members(layer)] == [0o6777, 0, 0o7777]


# ---- what is refused


@pytest.mark.parametrize("target", [b"/etc/passwd", b"../x", b"inside"])
def test_T_03_T_04_T_05_symbolic_links_are_refused(target):
    refused(header(b"l", typeflag=b"2", link=target) + TRAILER, "'l' is a symbolic link")


@pytest.mark.parametrize(
    ("typeflag", "word"),
    [
        (b"1", "a hard link"), (b"3", "a character device"), (b"4", "a block device"), (b"6", "a FIFO"),
        (b"7", "a contiguous file"), (b"S", "a sparse file"), (b"M", "multi-volume"), (b"K", "a link"),
        (b"V", "unknown type 'V'"), (b"Z", "unknown type"), (b"\xff", "unknown type"), (b"D", "unknown type"), (b"\n", "unknown type"),
    ],
)  # fmt: skip
def test_T_09_other_members_than_files_and_directories_are_refused(typeflag, word):
    refused(header(typeflag=typeflag) + TRAILER, word)


def test_T_09_sparse_files_of_pax_are_refused():
    refused(extension(b"x", record(b"GNU.sparse.major", b"1")) + header() + TRAILER, "sparse")
    refused(extension(b"g", record(b"GNU.sparse.name", b"x")) + header() + TRAILER, "sparse")


@pytest.mark.parametrize(
    "name",
    [
        b"a\x01b",
        b"a\nb",
        b"\x1b[31mred",
        "a\u202eb".encode(),
        "a\u2066b".encode(),
        b"\xff\xfe",
        b"a\x7f",
        "a\x85".encode(),
        b"caf\xe9",
    ],
)
def test_T_12_names_that_do_not_look_like_what_they_are_are_refused(name):
    refused(header(name) + TRAILER, "control character|not UTF-8")
    refused(
        extension(b"x", record(b"path", name)) + header() + TRAILER,
        "control character|not UTF-8",
        also_byte_by_byte=False,
    )


def test_T_12_a_nul_does_not_end_a_name_that_goes_on():
    refused(header(b"safe\0/../evil") + TRAILER, "a NUL inside the name")
    refused(extension(b"x", record(b"path", b"safe\0evil")) + header() + TRAILER, "control character")
    refused(extension(b"L", b"safe\0evil\0") + header() + TRAILER, "control character")


def test_T_12_components_paths_and_depth_have_limits():
    def with_path(path):
        return extension(b"x", record(b"path", path)) + header() + TRAILER

    longest = b"/".join([b"a" * 255] * 16)
    assert len(members(with_path(longest + b"/"))[0].path) == 4095
    refused(with_path(longest + b"/b"), "4097 bytes", also_byte_by_byte=False)
    refused(with_path(b"a" * 256), "component", also_byte_by_byte=False)
    assert members(with_path(b"/".join([b"a"] * DEPTH_MAX)))
    refused(with_path(b"/".join([b"a"] * (DEPTH_MAX + 1))), "129 components", also_byte_by_byte=False)


@pytest.mark.parametrize("name", [b"/etc/passwd", b"//x", b"..", b"../x", b"a/../../x", b"a/..", b"./.."])
def test_names_that_lead_elsewhere_are_refused(name):
    refused(header(name) + TRAILER, "absolute path|leads out")


@pytest.mark.parametrize("name", [b".", b"", b"./."])
def test_a_file_is_not_the_root(name):
    refused(header(name) + TRAILER, "names the root")


def test_T_20_a_wrong_checksum_is_refused():
    block = bytearray(header())
    block[0] ^= 1

    refused(bytes(block) + TRAILER, "checksum")
    refused(b"x" * BLOCK_SIZE, "not an octal checksum")


@pytest.mark.parametrize(
    "size",
    [
        b"-0000000001\0",
        b"garbage1234\0",
        b"00000000008\0",
        b"\xff" * 12,
        b"\x80" + b"\x7f" * 11,
        b"1 2 3 4 5 6\0",
    ],
)
def test_T_20_sizes_that_are_none_are_refused(size):
    refused(header(size=size) + TRAILER, "size")


@pytest.mark.parametrize("length", [0, 1, 511, 512, 513, 1023, 1024, 1536, 1900])
def test_T_20_a_layer_that_is_cut_off_is_refused(length):
    layer = member("f", b"x" * 600) + TRAILER

    refused(layer[:length], "cut off")


def test_T_20_data_behind_the_end_is_refused():
    refused(header() + TRAILER + b"x", "data behind the end")
    refused(header() + TRAILER + header() + TRAILER, "data behind the end")
    refused(header() + bytes(BLOCK_SIZE) + header() + TRAILER, "data behind a block of zeros")


def test_T_20_endless_padding_is_refused():
    refused(header() + TRAILER + bytes(1024 * 1024 + 1), "more than 1048576 bytes", also_byte_by_byte=False)


def test_T_21_pax_path_and_size_count_and_the_rest_does_not():
    records = (
        record(b"path", "é".encode()) + record(b"size", b"5") + record(b"mtime", b"1e9") + record(b"linkpath", b"/etc")
        + record(b"hdrcharset", b"BINARY") + record(b"size", b"5")
    )  # fmt: skip
    layer = (
        extension(b"x", records) + header(b"cut") + b"hello" + format_padding(5) + header(b"next") + TRAILER
    )

    events = read(layer)

    assert [events[0].path, events[1], events[2].path] == ["é", b"hello", "next"]


def test_T_21_global_pax_records_do_not_count():
    layer = extension(b"g", record(b"comment", b"abc")) * 2 + header() + TRAILER

    assert [entry.path for entry in members(layer)] == ["f"]
    for key in (b"path", b"size"):
        refused(extension(b"g", record(key, b"1")) + header() + TRAILER, "global extended header")


@pytest.mark.parametrize(
    "body",
    [
        b"x", b"4 a=\n", b"99 path=a\n", b"10 path=a", b"0 a=b\n", b"-6 a=b\n", b"6 =ab\n", b"7 pathx\n", b"6 a=b\n junk",
        b"999999999 a=b\n", b"\n", b"06 a=b\n", b"6  a=b",
    ],
)  # fmt: skip
def test_T_21_broken_pax_records_are_refused(body):
    refused(extension(b"x", body) + header() + TRAILER, "broken record")


@pytest.mark.parametrize(
    "size", [b"-1", b"1.5", b"", b"0x10", b"9" * 30, b"9223372036854775808", "٣".encode()]
)
def test_T_21_pax_sizes_that_are_none_are_refused(size):
    refused(extension(b"x", record(b"size", size)) + header() + TRAILER, "not a size")


def test_T_21_what_conflicts_is_refused():
    twice = record(b"path", b"a") + record(b"path", b"b")
    one = extension(b"x", record(b"path", b"a"))
    gnu = extension(b"L", b"b\0")

    refused(extension(b"x", twice) + header() + TRAILER, "gives 'path' twice")
    refused(one + one + header() + TRAILER, "two extended headers")
    refused(gnu + gnu + header() + TRAILER, "two extended headers")
    refused(one + gnu + header() + TRAILER, "two long names")
    refused(one + TRAILER, "where a member was announced")
    refused(gnu + TRAILER, "where a member was announced")


def test_T_33_large_extended_headers_are_refused_before_they_are_read():
    for typeflag, size in ((b"x", PAX_SIZE_MAX + 1), (b"g", 256 * 1024 * 1024), (b"L", 4098), (b"x", 0)):
        reader = LayerTarReader()
        with pytest.raises(LayerTarInvalid, match="an extended header of"):
            list(reader.feed(header(typeflag=typeflag, size=b"%011o\0" % size)))


def test_T_21_a_pax_header_of_a_mebibyte_is_read():
    body = record(b"comment", b"x" * (PAX_SIZE_MAX - 17))

    assert len(body) == PAX_SIZE_MAX
    assert members(extension(b"x", body) + header() + TRAILER)


def test_a_directory_has_no_content():
    refused(
        header(typeflag=b"5", size=b"%011o\0" % 5) + b"hello" + format_padding(5) + TRAILER,
        "directory 'f' has content",
    )


def test_L_21_members_are_counted(monkeypatch):
    monkeypatch.setattr("kitspec.layer_tar.MEMBER_COUNT_MAX", 2)

    assert len(members(header() * 2 + TRAILER)) == 2
    refused(header() * 3 + TRAILER, "more than 2 members")
