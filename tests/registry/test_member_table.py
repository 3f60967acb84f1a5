"""Tables of members: what is put in is found again, in order; what is damaged is noticed; what has two meanings is refused."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kitspec.digest import Digest
from kitspec.errors import LayerTarInvalid
from registry import member_table
from registry.member_table import MemberTable, Refusal, TableBuilder, TableDamaged, TableMember

Contents = Mapping[str, bytes | None]
"""What is at a path; None for a folder."""

PATHS = st.lists(st.text("ab/.é\U0001f600%", min_size=1, max_size=4), min_size=1, max_size=3).map("/".join)
CONTENTS: st.SearchStrategy[Contents] = st.dictionaries(PATHS, st.none() | st.binary(max_size=3), max_size=12)


def built(contents: Contents, *, is_hashed: bool = True, **more: Any) -> MemberTable:
    """A table of members that stand in this order, each with one block of headers."""
    builder = TableBuilder()
    position = 0
    for path, content in contents.items():
        add(builder, path, content, start=position, is_hashed=is_hashed)
        position += 512 + len(content or b"")
    return builder.build(inflated_size=position, **more)


def add(
    builder: TableBuilder, path: str, content: bytes | None, *, start: int = 0, is_hashed: bool = True
) -> None:
    builder.add(
        path,
        is_folder=content is None,
        mode=0o755 if content is None else 0o644,
        start=start,
        offset=start + 512,
        size=len(content or b""),
        sha256=hashlib.sha256(content).digest() if content is not None and is_hashed else b"",
    )


def rows_of(table: MemberTable) -> list[TableMember]:
    return [table.at(index) for index in range(len(table))]


@given(CONTENTS, PATHS)
def test_what_was_put_in_is_found_and_nothing_else(contents: Contents, other: str) -> None:
    table = built(contents)

    assert len(table) == len(contents)
    for path in {*contents, other, "", "a/"}:
        member = table.find(path)
        if path in contents:
            content = contents[path]
            assert member is not None
            assert (member.path, member.is_folder, member.size) == (
                path,
                content is None,
                len(content or b""),
            )
            assert member.digest == (None if content is None else Digest.of(content))
        else:
            assert member is None


@given(CONTENTS, st.text("ab/é", max_size=3), st.none() | PATHS | st.just(""))
def test_members_come_in_the_order_of_their_bytes_from_a_prefix_and_a_place_on(
    contents: Contents, prefix: str, after: str | None
) -> None:
    found = [member.path for member in built(contents).members(prefix=prefix, after=after)]

    assert found == sorted(
        (
            path
            for path in contents
            if path.startswith(prefix) and (after is None or path.encode() > after.encode())
        ),
        key=str.encode,
    )


@given(CONTENTS, st.booleans(), st.none() | st.just(Digest.of(b"inflated")), st.binary(max_size=9))
def test_a_table_is_read_back_as_it_was_written(
    contents: Contents, is_hashed: bool, diff_id: Digest | None, checkpoints: bytes
) -> None:
    table = built(contents, is_hashed=is_hashed, diff_id=diff_id, checkpoints=checkpoints)

    again = MemberTable.from_bytes(table.to_bytes())

    assert isinstance(again, MemberTable)
    assert rows_of(again) == rows_of(table)
    assert (again.inflated_size, again.diff_id, again.checkpoints) == (
        table.inflated_size,
        diff_id,
        checkpoints,
    )
    assert again.is_hashed == table.is_hashed
    assert again.unhashed() == table.unhashed()
    assert again.to_bytes() == table.to_bytes()


def test_a_refusal_is_read_back_as_it_was_written() -> None:
    refusal = Refusal("a symbolic link: 'é'\n\u2028")

    assert MemberTable.from_bytes(refusal.to_bytes()) == refusal


RECORDS = {
    "a table": built({"a": b"1", "b": None, "é": b""}, checkpoints=b"somewhere").to_bytes(),
    "an empty table": built({}).to_bytes(),
    "a refusal": Refusal("why").to_bytes(),
}


@given(st.sampled_from(sorted(RECORDS)), st.data())
def test_a_damaged_table_is_noticed_whichever_bit_it_is(which: str, data: st.DataObject) -> None:
    record = bytearray(RECORDS[which])
    record[data.draw(st.integers(0, len(record) - 1))] ^= 1 << data.draw(st.integers(0, 7))

    with pytest.raises(TableDamaged):
        MemberTable.from_bytes(bytes(record))


@given(st.sampled_from(sorted(RECORDS)), st.data())
def test_a_table_that_was_cut_off_is_noticed(which: str, data: st.DataObject) -> None:
    record = RECORDS[which]

    with pytest.raises(TableDamaged):
        MemberTable.from_bytes(record[: data.draw(st.integers(0, len(record) - 1))])


@given(st.binary(max_size=200))
def test_what_is_no_table_is_none(content: bytes) -> None:
    for record in (content, content + zlib.crc32(content).to_bytes(4, "little")):
        with pytest.raises(TableDamaged):
            MemberTable.from_bytes(record)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 0},
        {"format": 2},
        {"format": None},
        {"rows": 64},
        {"rows": "65"},
        {"rows": -65},
        {"paths": 3},
        {"checkpoints": 0},
        {"diffId": "sha256:nope"},
        {"diffId": 1},
        "format",
        "kind",
        "unhashed",
        "inflatedSize",
    ],
    ids=str,
)
def test_a_table_of_another_format_is_made_again(change: dict[str, Any] | str) -> None:
    head, _, body = RECORDS["a table"][:-4].partition(b"\n")
    document = json.loads(head)
    if isinstance(change, str):
        del document[change]
    else:
        document |= change
    content = json.dumps(document).encode() + b"\n" + body

    with pytest.raises(TableDamaged):
        MemberTable.from_bytes(content + zlib.crc32(content).to_bytes(4, "little"))


# ---- two members of one path


def test_a_folder_that_is_listed_again_is_one_folder() -> None:
    builder = TableBuilder()
    for start in (0, 512, 1024):
        add(builder, "a", None, start=start)

    table = builder.build(inflated_size=2048)

    assert [member.start for member in rows_of(table)] == [0]


@pytest.mark.parametrize(("first", "second"), [(b"1", b"2"), (b"1", b"1"), (b"1", None), (None, b"1")])
def test_two_members_of_one_path_are_refused_unless_both_are_folders(
    first: bytes | None, second: bytes | None
) -> None:
    builder = TableBuilder()
    add(builder, "é\n", first)
    add(builder, "b", b"")
    add(builder, "é\n", second)

    with pytest.raises(
        LayerTarInvalid, match=r"two members are called '\\xe9\\n', and they are not both folders"
    ):
        builder.build(inflated_size=0)


def test_paths_that_would_fill_the_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member_table, "_PATHS_SIZE_MAX", 1000)
    builder = TableBuilder()
    for number in range(10):
        add(builder, f"{number:0100}", b"")

    with pytest.raises(LayerTarInvalid, match="the paths of its members have more than 1000 bytes"):
        add(builder, "x", b"")


def test_the_largest_table_is_smaller_than_the_largest_record() -> None:
    from kitspec.layer_tar import MEMBER_COUNT_MAX
    from registry.inflate import CHECKPOINT_SPACING, InflateLimits
    from registry.member_index import _RECORD_SIZE_MAX

    checkpoints = InflateLimits().inflated_size_max // CHECKPOINT_SPACING * (32 * 1024 + 28)
    rows = MEMBER_COUNT_MAX * 65

    assert rows + member_table._PATHS_SIZE_MAX + checkpoints < _RECORD_SIZE_MAX


# ---- digests


@given(CONTENTS)
def test_a_file_is_found_by_its_digest_and_a_folder_by_none(contents: Contents) -> None:
    table = built(contents)

    files = {Digest.of(content) for content in contents.values() if content is not None}
    for digest in files:
        member = table.find_digest(digest)
        assert member is not None
        assert contents[member.path] is not None
        assert member.digest == digest
    assert table.find_digest(Digest.of(b"something else")) is None


def test_bytes_of_a_digest_that_stand_elsewhere_in_a_row_are_none() -> None:
    table = built({"a" * 40: b"1", "b": None, "c": None})
    raw = table.to_bytes().partition(b"\n")[2]

    for start in range(len(raw) - 36):
        wanted = Digest(f"sha256:{raw[start : start + 32].hex()}")
        member = table.find_digest(wanted)
        assert (member is not None) == (wanted == Digest.of(b"1"))


@pytest.mark.parametrize("digest", [f"sha256:{'0' * 64}", f"sha512:{'0' * 128}", Digest.of(b"1", "sha512")])
@pytest.mark.parametrize("is_hashed", [True, False])
def test_the_digest_that_stands_for_none_finds_nothing(digest: str, is_hashed: bool) -> None:
    table = built({"a": b"1", "b": None, "c": b""}, is_hashed=is_hashed)

    assert table.find_digest(Digest(digest)) is None


def test_a_table_is_hashed_when_every_file_has_its_digest() -> None:
    table = built({"b": b"22", "folder": None, "a": b"1"}, is_hashed=False)

    assert not table.is_hashed
    assert [member.path for member in table.unhashed()] == ["b", "a"]  # as they stand in the layer
    for _ in range(2):
        table.set_digest("b", hashlib.sha256(b"22").digest())
        assert not table.is_hashed
    table.set_digest("a", hashlib.sha256(b"1").digest())

    assert table.is_hashed
    assert table.unhashed() == []
    assert rows_of(table) == rows_of(built({"b": b"22", "folder": None, "a": b"1"}))


@pytest.mark.parametrize("contents", [{}, {"a": None}, {"a": None, "b": None}])
def test_a_table_without_files_is_hashed(contents: Contents) -> None:
    assert built(contents).is_hashed


def test_a_member_takes_65_bytes_and_its_path() -> None:
    one, many = (built({f"{number:04}": b"" for number in range(count)}) for count in (1, 1001))

    assert many.weight - one.weight == 1000 * (65 + 4)
