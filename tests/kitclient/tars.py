"""Layers as tests need them: right ones, and ones that no packer writes."""

from __future__ import annotations

from collections.abc import Iterable

from kitspec.layer_tar import TRAILER, format_member, format_padding


def layer_tar(members: Iterable[tuple[str, bytes | None]], *, mode: int = 0o644) -> bytes:
    """A layer as kit writes it; a folder has no content."""
    return b"".join(file_of(path, content, mode=mode) for path, content in members) + TRAILER


def file_of(path: str, content: bytes | None, *, mode: int = 0o644) -> bytes:
    if content is None:
        return format_member(path, size=0, mode=0o755, is_directory=True)
    return format_member(path, size=len(content), mode=mode) + content + format_padding(len(content))


def header(
    name: bytes,
    *,
    typeflag: bytes = b"0",
    size: bytes = b"00000000000\0",
    mode: bytes = b"0000644\0",
    link: bytes = b"",
    checksum: int | None = None,
) -> bytes:
    """Any header at all, with a right checksum unless another is given."""
    block = bytearray(
        name.ljust(100, b"\0")
        + mode
        + b"0001750\0"
        + b"0000000\0"
        + size
        + b"00000000000\0"
        + b"        "
        + typeflag
        + link.ljust(100, b"\0")
        + b"ustar\00000"
    )
    block += bytes(512 - len(block))
    block[148:156] = b"%06o\0 " % (sum(block) if checksum is None else checksum)
    return bytes(block)


def pax(records: bytes, *, typeflag: bytes = b"x") -> bytes:
    """An extended header."""
    return (
        header(b"PaxHeaders.0/x", typeflag=typeflag, size=b"%011o\0" % len(records))
        + records
        + format_padding(len(records))
    )


def record(key: str, value: bytes) -> bytes:
    rest = b" " + key.encode() + b"=" + value + b"\n"
    length = len(rest) + 1
    while len(str(length)) + len(rest) != length:
        length = len(str(length)) + len(rest)
    return str(length).encode() + rest
