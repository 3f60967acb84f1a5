"""Headers of safetensors files.

    8 bytes    size of the header, little-endian
    header     {"<name>": {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]}, …, "__metadata__": {"<key>": "<text>"}}
    tensors    one behind the other in any order, without holes, up to the end of the file; offsets count from here

The header is JSON of one fixed form. It is read by the grammar of that form, a member at a time, and never becomes a tree: nothing
can nest, and what is not kept costs no memory. (`kitspec.strict_json` stops at 200,000 values, which is 25,000 tensors.)

Source: safetensors, README.md, "Format"; its implementation, version 0.8, where the text is silent. Stricter than that: a tensor has
no other members than the three. More lenient: a dtype may be newer than this module, its size is then not checked.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Iterator
from typing import Final

from registry.tensor_file import (
    METADATA_COUNT_MAX,
    NAME_SIZE_MAX,
    TENSOR_COUNT_MAX,
    Read,
    Tensor,
    TensorFile,
    TensorsInvalid,
)

# The format allows 100,000,000 bytes; 200,000 tensors with long names need 32 MiB.
HEADER_SIZE_MAX: Final = 32 * 1024 * 1024
# Training tools put whole tables into a string of __metadata__; in memory a character may take four bytes.
STRING_SIZE_MAX: Final = 8 * 1024 * 1024
# Neither numpy nor PyTorch makes more.
DIMENSION_COUNT_MAX: Final = 64

_LENGTH_SIZE = 8
# Holds the headers of most files, so that one read is enough.
_FIRST_SIZE = 64 * 1024
# Tensors between two turns of the event loop; about 5 ms.
_TURN = 500

_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
# What a dtype that came later would be called.
_DTYPE = re.compile("[A-Z][A-Z0-9_]{0,31}")


async def read_safetensors(read: Read, size: int) -> TensorFile:
    """The header of a safetensors file of `size` bytes.

    Raises:
        TensorsInvalid: it is not one, or is beyond the limits above.
    """
    header = await _read_header(read, size)
    data_start = _LENGTH_SIZE + len(header)
    text = _HeaderText(header)
    metadata: dict[str, str] = {}
    tensors: list[Tensor] = []
    for name in text.members():
        if name == "__metadata__":
            metadata = _take_metadata(text)
            continue
        if len(tensors) == TENSOR_COUNT_MAX:
            raise TensorsInvalid(f"more than {TENSOR_COUNT_MAX} tensors")
        tensors.append(_take_tensor(text, name, data_start))
        if len(tensors) % _TURN == 0:
            await asyncio.sleep(0)
    text.finish()
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    _check_coverage(tensors, data_start, size)
    return TensorFile("safetensors", metadata, tuple(tensors), data_start)


async def _read_header(read: Read, size: int) -> bytes:
    """The JSON of the header, with the spaces that pad it."""
    if size < _LENGTH_SIZE:
        raise TensorsInvalid(
            f"a file of {size} bytes; a safetensors file begins with the {_LENGTH_SIZE} of its header's size"
        )
    first_stop = min(size, _FIRST_SIZE)
    first = await read(0, first_stop)
    assert len(first) == first_stop, "Read gives all that it is asked for"
    length = int.from_bytes(first[:_LENGTH_SIZE], "little")
    if length > HEADER_SIZE_MAX:
        raise TensorsInvalid(
            f"a header of {length} bytes, at most {HEADER_SIZE_MAX} are read; "
            "perhaps not a safetensors file, or the Git LFS pointer to one"
        )
    stop = _LENGTH_SIZE + length
    if stop > size:
        raise TensorsInvalid(f"a header of {length} bytes in a file of {size}; the file is cut off")
    header = first[_LENGTH_SIZE:stop]
    if stop > first_stop:
        header += await read(first_stop, stop)
        assert len(header) == length, "Read gives all that it is asked for"
    if not header.startswith(b"{"):
        raise TensorsInvalid(f"the header begins with {header[:1]!r}, not with '{{'")
    return header


def _take_metadata(text: _HeaderText) -> dict[str, str]:
    metadata: dict[str, str] = {}
    for key in text.members():
        if len(metadata) == METADATA_COUNT_MAX:
            raise TensorsInvalid(f"more than {METADATA_COUNT_MAX} keys in __metadata__")
        metadata[key] = text.string()
    return metadata


def _take_tensor(text: _HeaderText, name: str, data_start: int) -> Tensor:
    if len(name.encode()) > NAME_SIZE_MAX:
        raise TensorsInvalid(
            f"the tensor name that begins with {name[:80]!a} has more than {NAME_SIZE_MAX} bytes, the most that is read"
        )
    dtype, shape, offsets = None, None, None
    for key in text.members():
        match key:
            case "dtype":
                dtype = text.string()
            case "shape":
                shape = text.integers(DIMENSION_COUNT_MAX)
            case "data_offsets":
                offsets = text.integers(2)
            case _:
                raise TensorsInvalid(f"the tensor {name[:80]!a} has an unknown member {key[:80]!a}")
    if dtype is None or shape is None or offsets is None:
        raise TensorsInvalid(f"the tensor {name[:80]!a} lacks its dtype, its shape or its data_offsets")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise TensorsInvalid(
            f"the tensor {name[:80]!a} has the data_offsets {list(offsets)}; wanted [start, stop]"
        )
    start, stop = offsets
    _check_size(name, dtype, shape, stop - start)
    return Tensor(name, dtype, shape, data_start + start, data_start + stop)


def _check_size(name: str, dtype: str, shape: tuple[int, ...], size: int) -> None:
    bits = _BITS.get(dtype)
    if bits is None:
        if _DTYPE.fullmatch(dtype) is None:
            raise TensorsInvalid(f"the tensor {name[:80]!a} has the dtype {dtype[:80]!a}, which is none")
    elif math.prod(shape) * bits != size * 8:
        raise TensorsInvalid(
            f"the tensor {name[:80]!a} has {size} bytes, which is not what {dtype} makes of the shape {str(list(shape))[:200]}"
        )


def _check_coverage(tensors: list[Tensor], data_start: int, size: int) -> None:
    """Each tensor begins where the one before ends, the last ends with the file: the format allows no byte without an owner."""
    reached = data_start
    for tensor in tensors:
        if tensor.start != reached:
            wrong = "overlaps the one before" if tensor.start < reached else "has a hole before it"
            raise TensorsInvalid(
                f"the tensor {tensor.name[:80]!a} {wrong}: it begins at byte {tensor.start}, wanted {reached}"
            )
        reached = tensor.stop
    if reached > size:
        raise TensorsInvalid(f"the tensors end at byte {reached} of a file of {size}; the file is cut off")
    if reached < size:
        raise TensorsInvalid(f"{size - reached} bytes behind the last tensor; the format allows none")


_SPACE = rb"[ \t\n\r]*+"
_MARK = re.compile(_SPACE + rb"([{},])")
_EMPTY = re.compile(_SPACE + rb"\{" + _SPACE + rb"\}")
_STRING = re.compile(_SPACE + rb'"((?:[^"\\\x00-\x1f]++|\\[^\x00-\x1f])*+)"')
_KEY = re.compile(_STRING.pattern + _SPACE + rb":")
_INTEGERS = re.compile(_SPACE + rb"\[([0-9, \t\n\r]*+)\]")
# The largest is below 10^19; json would also take 1e3, -0 and true for a number.
_INTEGER = re.compile(rb"0|[1-9][0-9]{0,18}")
_END = re.compile(_SPACE)


class _HeaderText:
    """A header, read from left to right; each method takes what it names, or refuses the file."""

    def __init__(self, text: bytes) -> None:
        self._text = text
        self._position = 0

    def members(self) -> Iterator[str]:
        """The keys of the object that begins here; take the value of each before going on to the next."""
        empty = _EMPTY.match(self._text, self._position)
        if empty is not None:
            self._position = empty.end()
            return
        self._take_mark(b"{")
        seen = set()
        mark = b","
        while mark == b",":
            key = self._take_text(_KEY, "key")
            if key in seen:
                raise self._invalid(f"the key {key[:80]!a} stands twice in one object")
            seen.add(key)
            yield key
            mark = self._take_mark(b",", b"}")

    def string(self) -> str:
        return self._take_text(_STRING, "string")

    def integers(self, count_max: int) -> tuple[int, ...]:
        """A list of at most `count_max` integers from 0 on."""
        match = _INTEGERS.match(self._text, self._position)
        if match is None:
            raise self._invalid("no list of non-negative integers where one was wanted")
        items = [item.strip() for item in match[1].split(b",", count_max)]
        if items == [b""]:
            items = []
        if len(items) > count_max:
            raise self._invalid(f"a list of more than {count_max} integers")
        if not all(map(_INTEGER.fullmatch, items)):
            raise self._invalid("something else than an integer of at most 19 digits in a list of them")
        self._position = match.end()
        return tuple(map(int, items))

    def finish(self) -> None:
        """Only white space follows."""
        if _END.fullmatch(self._text, self._position) is None:
            raise self._invalid("something follows the object")

    def _take_text(self, pattern: re.Pattern[bytes], what: str) -> str:
        match = pattern.match(self._text, self._position)
        if match is None:
            raise self._invalid(f"no {what} where one was wanted")
        if len(match[1]) > STRING_SIZE_MAX:
            raise self._invalid(f"a {what} of {len(match[1])} bytes; at most {STRING_SIZE_MAX} are read")
        try:
            text = match[1].decode()
            if "\\" in text:
                text = str(json.loads(f'"{text}"'))
                text.encode()  # an escape can make half of a pair of surrogates
        except ValueError as error:
            raise self._invalid(f"a {what} that is not UTF-8, or with an escape that is none") from error
        self._position = match.end()
        return text

    def _take_mark(self, *wanted: bytes) -> bytes:
        match = _MARK.match(self._text, self._position)
        if match is None or match[1] not in wanted:
            raise self._invalid(
                f"no {' or '.join(repr(mark.decode()) for mark in wanted)} where one was wanted"
            )
        self._position = match.end()
        return match[1]

    def _invalid(self, message: str) -> TensorsInvalid:
        return TensorsInvalid(f"{message} (from byte {self._position} of the header on)")
