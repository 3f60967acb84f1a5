"""The tar dialect of ModelKit layers: headers out, members in; no files.

Writing gives the very bytes that kit (Go's archive/tar) writes: USTAR, with a PAX header where a name or a size does not fit.
Reading takes what kit, modctl and other tar writers make of regular files and directories, and refuses everything else:
links, devices, sparse files, names that lead elsewhere. Bytes come in chunks of any size; nothing is copied but headers.

Source: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Header Block"; GNU tar manual, "Basic Tar Format".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto

from kitspec.errors import LayerTarInvalid

BLOCK_SIZE = 512
TRAILER = bytes(2 * BLOCK_SIZE)
"""The end of every layer; an empty layer is nothing else."""

MEMBER_COUNT_MAX = 1_000_000
PATH_SIZE_MAX = 4096  # PATH_MAX of Linux
NAME_SIZE_MAX = 255  # NAME_MAX of Linux
DEPTH_MAX = 128
PAX_SIZE_MAX = 1024 * 1024
# GNU tar pads to a record, of at most 2,048 blocks in practice.
_PADDING_SIZE_MAX = 1024 * 1024

_SIZE_MAX = 2**63 - 1
_OCTAL_SIZE_MAX = 0o77777777777
_KIT_UID = 1000

_NAME_WIDTH, _PREFIX_WIDTH = 100, 155


# ---- writing


def format_member(path: str, *, size: int, mode: int, is_directory: bool = False) -> bytes:
    """What stands before the content of a member.

    Args:
        path: relative, cleaned, `/` between components, no slash at the end.
        size: of the content; 0 for a directory.
        mode: permission bits, with setuid, setgid and sticky if they are to be kept.
    """
    name = path.encode()
    header_name, prefix, records = name, b"", {}
    if len(name) > _NAME_WIDTH or not path.isascii():
        split = _ustar_split(name) if path.isascii() else None
        if split is not None:
            prefix, header_name = split
        else:
            records["path"] = path
            header_name = _ascii_only(name)[:_NAME_WIDTH]
    if size > _OCTAL_SIZE_MAX:
        records["size"] = str(size)
    header = _format_header(
        header_name,
        prefix=prefix,
        size=0 if "size" in records else size,
        mode=mode,
        uid=_KIT_UID,
        typeflag=b"5" if is_directory else b"0",
        device=b"0000000\0",
    )
    return _format_pax(path, records) + header if records else header


def format_padding(size: int) -> bytes:
    """What stands behind content of `size` bytes, so that the next header begins on a block."""
    return bytes(-size % BLOCK_SIZE)


def _ustar_split(name: bytes) -> tuple[bytes, bytes] | None:
    """Prefix and rest, cut at the last slash that leaves a prefix which fits; None when the rest does not fit."""
    cut = name.rfind(b"/", 0, _PREFIX_WIDTH + 1)
    rest = name[cut + 1 :]
    if cut <= 0 or not rest or len(rest) > _NAME_WIDTH:
        return None
    return name[:cut], rest


def _ascii_only(name: bytes) -> bytes:
    return bytes(byte for byte in name if byte < 0x80)


def _format_pax(path: str, records: dict[str, str]) -> bytes:
    directory, _, base = path.rpartition("/")
    name = f"{directory}/PaxHeaders.0/{base}" if directory else f"PaxHeaders.0/{base}"
    body = b"".join(_format_record(key, value) for key, value in sorted(records.items()))
    header = _format_header(
        _ascii_only(name.encode())[:_NAME_WIDTH],
        prefix=b"",
        size=len(body),
        mode=0,
        uid=0,
        typeflag=b"x",
        device=bytes(8),
    )
    return header + body + format_padding(len(body))


def _format_record(key: str, value: str) -> bytes:
    rest = f" {key}={value}\n".encode()
    length = len(rest) + 1
    while len(str(length)) + len(rest) != length:
        length = len(str(length)) + len(rest)
    return str(length).encode() + rest


def _format_header(
    name: bytes, *, prefix: bytes, size: int, mode: int, uid: int, typeflag: bytes, device: bytes
) -> bytes:
    before = b"".join(
        (name.ljust(_NAME_WIDTH, b"\0"), b"%07o\0%07o\0%07o\0%011o\0%011o\0" % (mode, uid, 0, size, 0))
    )
    after = b"".join(
        (
            typeflag,
            bytes(100),
            b"ustar\00000",
            bytes(64),
            device,
            device,
            prefix.ljust(_PREFIX_WIDTH, b"\0"),
            bytes(12),
        )
    )
    checksum = sum(before) + sum(after) + 8 * ord(" ")
    return before + b"%06o\0 " % checksum + after


# ---- reading


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file or a directory of a layer.

    Attributes:
        path: relative and cleaned: no `.`, no `..`, no slash at either end.
        mode: as written: permission bits, perhaps with setuid, setgid and sticky.
        size: of the content in bytes; 0 for a directory.
        offset: of the content from the beginning of the (uncompressed) layer.
        start: of the first of the headers that belong to the member.
    """

    path: str
    is_directory: bool
    mode: int
    size: int
    offset: int
    start: int

    @property
    def stop(self) -> int:
        """Where the next member may begin: the content is padded to whole blocks."""
        return self.offset + self.size + -self.size % BLOCK_SIZE


class _State(Enum):
    HEADER = auto()
    CONTENT = auto()
    EXTENSION = auto()  # of a PAX header or a GNU long name
    PADDING = auto()
    ENDED = auto()


class LayerTarReader:
    """Bytes of a layer in, members and their content out.

    for event in reader.feed(chunk):
        match event:
            case Member(): ...      # its content follows, in pieces, `size` bytes in all
            case memoryview(): ...  # a piece of the content of the last member; a slice of `chunk`, not a copy
    ...
    reader.finish()
    """

    def __init__(self) -> None:
        self._state = _State.HEADER
        self._offset = 0
        self._member_start = 0
        self._remaining = 0  # of content, extension or padding
        self._padding = 0
        self._pending = bytearray()
        self._extension = b""  # typeflags of the extended headers seen for the next member
        self._extending = b""  # typeflag of the one that is being read
        self._path: bytes | None = None
        self._size: int | None = None
        self._zero_blocks = 0
        self._trailing = 0
        self._member_count = 0

    def feed(self, chunk: bytes | bytearray | memoryview) -> Iterator[Member | memoryview]:
        """The events of the next bytes; iterate to the end before feeding more.

        Raises:
            LayerTarInvalid: not a tar, or one that no layer may be. The reader is of no use afterwards.
        """
        view = memoryview(chunk)
        position, stop = 0, len(view)
        while position < stop:
            start = position
            match self._state:
                case _State.CONTENT:
                    position = min(stop, start + self._remaining)
                    self._advance(position - start)
                    yield view[start:position]
                case _State.PADDING:
                    position = min(stop, start + self._remaining)
                    self._advance(position - start)
                case _State.ENDED:
                    position = stop
                    self._check_trailing(view[start:])
                    self._offset += position - start
                case _State.HEADER:
                    position = min(stop, start + BLOCK_SIZE - len(self._pending))
                    self._pending += view[start:position]
                    self._offset += position - start
                    if len(self._pending) == BLOCK_SIZE:
                        block = bytes(self._pending)
                        self._pending.clear()
                        member = self._take_block(block)
                        if member is not None:
                            yield member
                case _State.EXTENSION:
                    position = min(stop, start + self._remaining)
                    self._pending += view[start:position]
                    self._advance(position - start)

    def skip(self) -> int:
        """Leave out the rest of the content that is being read, with its padding; how many bytes the caller passes over."""
        if self._state not in (_State.CONTENT, _State.PADDING):
            return 0
        count = self._remaining + (self._padding if self._state is _State.CONTENT else 0)
        self._offset += count
        self._state, self._remaining, self._padding = _State.HEADER, 0, 0
        return count

    def finish(self) -> None:
        """Say that there are no more bytes.

        Raises:
            LayerTarInvalid: there should be.
        """
        if self._state is _State.HEADER and not self._pending and self._zero_blocks:
            return  # one block of zeros where two belong: tolerated, as by everybody
        if self._state is not _State.ENDED:
            raise LayerTarInvalid(f"the layer is cut off after {self._offset} bytes")

    def _advance(self, count: int) -> None:
        self._offset += count
        self._remaining -= count
        if self._remaining:
            return
        if self._state is _State.EXTENSION:
            self._take_extension(bytes(self._pending))
            self._pending.clear()
        if self._state is not _State.PADDING and self._padding:
            self._state, self._remaining, self._padding = _State.PADDING, self._padding, 0
        else:
            self._state = _State.HEADER

    def _expect(self, state: _State, size: int) -> None:
        self._state, self._remaining, self._padding = state, size, -size % BLOCK_SIZE

    def _check_trailing(self, view: memoryview) -> None:
        self._trailing += len(view)
        if self._trailing > _PADDING_SIZE_MAX:
            raise LayerTarInvalid(f"more than {_PADDING_SIZE_MAX} bytes behind the end of the archive")
        if any(view):
            raise LayerTarInvalid(f"data behind the end of the archive, at byte {self._offset} or later")

    def _take_block(self, block: bytes) -> Member | None:
        if block.count(0) == BLOCK_SIZE:
            if self._extension:
                raise self._invalid("the archive ends where a member was announced")
            self._zero_blocks += 1
            if self._zero_blocks == 2:
                self._state = _State.ENDED
            return None
        if self._zero_blocks:
            raise self._invalid("data behind a block of zeros, which ends the archive")
        self._check_sum(block)
        return self._take_header(block)

    def _check_sum(self, block: bytes) -> None:
        written = self._octal(block[148:156], "checksum")
        blank = block[:148] + b"        " + block[156:]
        checksum = sum(blank)
        # Some old writers summed signed characters.
        if written != checksum and written != checksum - 256 * sum(byte > 0x7F for byte in blank):
            raise self._invalid("wrong checksum of a header; not a tar, or damaged")

    def _take_header(self, block: bytes) -> Member | None:
        typeflag = block[156:157]
        size = self._number(block[124:136], "size")
        if typeflag in (b"x", b"g", b"L"):
            self._expect_extension(typeflag, size)
            return None
        raw = self._path if self._path is not None else self._ustar_path(block)
        if self._size is not None:
            size = self._size
        self._extension, self._path, self._size = b"", None, None
        if typeflag not in (b"0", b"\0", b"5"):
            raise self._invalid(
                f"{_escaped(raw)} is {_kind(typeflag)}; a layer holds regular files and directories only"
            )
        is_directory = typeflag == b"5" or raw.endswith(b"/")
        if is_directory and size:
            raise self._invalid(f"the directory {_escaped(raw)} has content")
        mode = self._number(block[100:108], "mode") & 0o7777
        path = self._clean_path(raw)
        if size:
            self._expect(_State.CONTENT, size)
        if not path and not is_directory:
            raise self._invalid(f"{_escaped(raw)} names the root, and is a file")
        self._member_count += 1
        if self._member_count > MEMBER_COUNT_MAX:
            raise self._invalid(f"more than {MEMBER_COUNT_MAX} members")
        member = Member(path, is_directory, mode, size, self._offset, self._member_start)
        self._member_start = member.stop
        # The root itself: other writers list it, and it says nothing.
        return member if path else None

    def _expect_extension(self, typeflag: bytes, size: int) -> None:
        if typeflag != b"g" and typeflag in self._extension:
            raise self._invalid("two extended headers of one kind for one member")
        limit = PATH_SIZE_MAX + 1 if typeflag == b"L" else PAX_SIZE_MAX
        if not 0 < size <= limit:
            raise self._invalid(f"an extended header of {size} bytes; at most {limit} are allowed")
        self._extending = typeflag
        self._expect(_State.EXTENSION, size)

    def _take_extension(self, body: bytes) -> None:
        self._extension += self._extending
        if self._extending == b"L":
            self._set_path(body.removesuffix(b"\0"))
            return
        records = self._records(body)
        if any(key.startswith(b"GNU.sparse") for key in records):
            raise self._invalid("a sparse file; a layer holds regular files and directories only")
        if self._extending == b"g":
            self._extension = self._extension.replace(b"g", b"")
            if b"path" in records or b"size" in records:
                raise self._invalid("a global extended header that names a path or a size for every member")
            return
        if b"path" in records:
            self._set_path(records[b"path"])
        if b"size" in records:
            if not re.fullmatch(rb"[0-9]{1,19}", records[b"size"]) or int(records[b"size"]) > _SIZE_MAX:
                raise self._invalid(f"not a size: {_escaped(records[b'size'])}")
            self._size = int(records[b"size"])

    def _set_path(self, path: bytes) -> None:
        if self._path is not None:
            raise self._invalid(f"two long names for one member: {_escaped(self._path)} and {_escaped(path)}")
        self._path = path

    def _records(self, body: bytes) -> dict[bytes, bytes]:
        records: dict[bytes, bytes] = {}
        position = 0
        while position < len(body):
            match = _PAX_LENGTH.match(body, position)
            stop = position + int(match[1]) if match is not None else 0
            if match is None or not match.end() < stop <= len(body) or body[stop - 1 : stop] != b"\n":
                raise self._invalid("a broken record in an extended header")
            key, equals, value = body[match.end() : stop - 1].partition(b"=")
            if not equals or not key:
                raise self._invalid("a broken record in an extended header")
            if key in records and records[key] != value:
                raise self._invalid(f"an extended header gives {_escaped(key)} twice")
            records[key] = value
            position = stop
        return records

    def _ustar_path(self, block: bytes) -> bytes:
        name = self._text(block[:100], "name")
        # GNU's own format, `ustar  `, keeps times where the prefix is.
        prefix = self._text(block[345:500], "prefix") if block[257:263] == b"ustar\0" else b""
        return prefix + b"/" + name if prefix else name

    def _text(self, field: bytes, what: str) -> bytes:
        text, _, rest = field.partition(b"\0")
        if rest.strip(b"\0"):
            written = field.rstrip(b"\0")
            raise self._invalid(f"a NUL inside the {what} {_escaped(written)}")
        return text

    def _clean_path(self, raw: bytes) -> str:
        try:
            return clean_member_path(raw)
        except LayerTarInvalid as error:
            raise self._invalid(str(error)) from error

    def _number(self, field: bytes, what: str) -> int:
        if field[0] == 0x80:  # base 256; 0xff would be a negative one
            number = int.from_bytes(field[1:], "big")
            if number > _SIZE_MAX:
                raise self._invalid(f"a {what} beyond 2^63")
            return number
        return self._octal(field, what)

    def _octal(self, field: bytes, what: str) -> int:
        digits = field.strip(b" \0")
        if not digits:
            return 0
        if _OCTAL.fullmatch(digits) is None:
            raise self._invalid(f"not an octal {what}: {_escaped(field)}; not a tar, or damaged")
        return int(digits, 8)

    def _invalid(self, message: str) -> LayerTarInvalid:
        return LayerTarInvalid(f"{message} (before byte {self._offset} of the layer)")


def clean_member_path(raw: bytes) -> str:
    """The path that a member's name means: relative, without `.` and empty components; "" for the root itself.

    Names as other tools read them are one thing; a name that tools read differently is refused.

    Raises:
        LayerTarInvalid: no member may be called that.
    """
    if len(raw) > PATH_SIZE_MAX:
        raise LayerTarInvalid(f"a path of {len(raw)} bytes; at most {PATH_SIZE_MAX} are allowed")
    try:
        path = raw.decode()
    except UnicodeDecodeError as error:
        raise LayerTarInvalid(f"the name {_escaped(raw)} is not UTF-8") from error
    if _UNFIT.search(path) is not None:
        raise LayerTarInvalid(f"a control character in the name {_escaped(raw)}")
    if path.startswith("/"):
        raise LayerTarInvalid(f"the absolute path {_escaped(raw)}")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise LayerTarInvalid(f"the path {_escaped(raw)}, which leads out of its place")
    if len(parts) > DEPTH_MAX:
        raise LayerTarInvalid(f"a path of {len(parts)} components; at most {DEPTH_MAX} are allowed")
    if any(len(part.encode()) > NAME_SIZE_MAX for part in parts):
        raise LayerTarInvalid(f"a component of more than {NAME_SIZE_MAX} bytes in {_escaped(raw)}")
    return "/".join(parts)


_PAX_LENGTH = re.compile(rb"([1-9][0-9]{0,7}) ")
_OCTAL = re.compile(rb"[0-7]+")
# Controls, and what turns the direction of text around: names that do not look like what they are.
_UNFIT = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")

_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a FIFO",
    b"7": "a contiguous file",
    b"K": "a link with a long target",
    b"M": "a part of a multi-volume file",
    b"S": "a sparse file",
}


def _kind(typeflag: bytes) -> str:
    return _KINDS.get(typeflag, f"of the unknown type {typeflag.decode('latin-1')!a}")


def _escaped(raw: bytes) -> str:
    """For a message: ASCII, without control characters, not too long."""
    text = ascii(raw.decode(errors="backslashreplace"))
    return text if len(text) <= 200 else f"{text[:200]}..."
