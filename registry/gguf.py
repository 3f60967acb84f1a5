"""Headers of GGUF files, versions 2 and 3, little-endian.

    magic, version, count of tensors, count of keys     4 + 4 + 8 + 8 bytes
    keys        key, type, value; a string is its size and its bytes, an array the type of its elements, their count, and they
    tensors     name, count of dimensions, dimensions, ggml type, offset from the beginning of the data
    padding     to a multiple of `general.alignment`
    data        each tensor at such a multiple

Sizes and counts are claims of the file: nothing is allocated for them, and each is held against the bytes that are left before it is
followed. Arrays of numbers that are not kept are not read either; those of strings are passed over, a size at a time.

Source: ggml, docs/gguf.md, "File Structure"; src/gguf.cpp where the text is silent. More lenient than that: order and distance of
tensors are free, and a type of tensor may be newer than this module.
"""

from __future__ import annotations

import asyncio
import math
import struct
from bisect import bisect_right
from itertools import pairwise
from typing import Any, Final, NamedTuple

from registry.tensor_file import (
    METADATA_COUNT_MAX,
    NAME_SIZE_MAX,
    TENSOR_COUNT_MAX,
    Read,
    Tensor,
    TensorFile,
    TensorsInvalid,
)

# Vocabularies of a quarter of a million tokens make 15 MiB.
HEADER_SIZE_MAX: Final = 64 * 1024 * 1024
PIECE_SIZE: Final = 256 * 1024
KEY_SIZE_MAX: Final = 65535
DIMENSION_COUNT_MAX: Final = 4
ALIGNMENT_MAX: Final = 1024 * 1024
# Chat templates have up to 30 KiB; whole tokenizers, in one string, are not metadata.
STRING_KEPT_MAX: Final = 64 * 1024
# One for each layer of a model, and all that people write themselves.
ARRAY_KEPT_MAX: Final = 256
# Of keys and of values that are not passed over. Files have less than 1 MiB.
METADATA_SIZE_MAX: Final = 4 * 1024 * 1024
ARRAY_DEPTH_MAX: Final = 4

_ALIGNMENT_DEFAULT = 32
# Tensors between two turns of the event loop.
_TURN = 1000
_INTEGER_MAX = 2**63 - 1
# A string's size; an array's type and count; a tensor's name, count of dimensions, type and offset.
_STRING_SIZE_MIN = 8
_ARRAY_SIZE_MIN = 4 + 8
_TENSOR_SIZE_MIN = _STRING_SIZE_MIN + 4 + 4 + 8

_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALARS = {
    number: (name, struct.Struct(layout))
    for number, name, layout in (
        (0, "uint8", "<B"),
        (1, "int8", "<b"),
        (2, "uint16", "<H"),
        (3, "int16", "<h"),
        (4, "uint32", "<I"),
        (5, "int32", "<i"),
        (6, "float32", "<f"),
        (_BOOL, "bool", "<B"),
        (10, "uint64", "<Q"),
        (11, "int64", "<q"),
        (12, "float64", "<d"),
    )
}

# Number of a ggml type: its name, elements in a block, bytes of a block (ggml-common.h, `block_…`, in August 2026).
_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    # Q4_0 in another order; gone from ggml since the end of 2024, not from the world.
    31: ("Q4_0_4_4", 32, 18),
    32: ("Q4_0_4_8", 32, 18),
    33: ("Q4_0_8_8", 32, 18),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}
# Of two layouts each, so that only the offsets tell the size. Q8_1: 36 bytes in ggml now, 40 once. Q2_0: 64 elements in 18 bytes in
# ggml, 128 in 34 where the type comes from.
_UNSIZED_TYPES = {9: "Q8_1", 42: "Q2_0"}


class _Description(NamedTuple):
    """A tensor as the header describes it; `size` is None where its type does not tell it, `offset` counts from the data's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int | None
    offset: int


async def read_gguf(read: Read, size: int) -> TensorFile:
    """The header of a GGUF file of `size` bytes.

    Raises:
        TensorsInvalid: it is not one, or is beyond the limits above.
    """
    header = _Header(read, size)
    tensor_count, key_count = await _take_counts(header)
    metadata = await _take_metadata(header, key_count)
    alignment = _alignment(metadata)
    descriptions = await _take_descriptions(header, tensor_count, alignment)
    data_start = min(size, -(-header.position // alignment) * alignment)
    return TensorFile("gguf", metadata, await _place(descriptions, data_start, size), data_start)


async def _take_counts(header: _Header) -> tuple[int, int]:
    """Of tensors and of keys, from the head of the file."""
    magic = await header.take(4)
    version = await header.take(4)
    if magic == b"FUGG" or (magic == b"GGUF" and int.from_bytes(version, "big") in (2, 3)):
        raise TensorsInvalid("a big-endian GGUF file; only little-endian ones are read: convert it")
    if magic != b"GGUF":
        raise TensorsInvalid(
            f"begins with {magic!r}, not with b'GGUF'; perhaps not a GGUF file, or the Git LFS pointer to one"
        )
    number = int.from_bytes(version, "little")
    if number not in (2, 3):
        raise TensorsInvalid(f"GGUF version {number}; versions 2 and 3 are read: convert it to one of them")
    tensor_count = await header.unsigned(8)
    if tensor_count > TENSOR_COUNT_MAX:
        raise TensorsInvalid(f"{tensor_count} tensors; at most {TENSOR_COUNT_MAX} are read")
    key_count = await header.unsigned(8)
    if key_count > METADATA_COUNT_MAX:
        raise TensorsInvalid(f"{key_count} keys; at most {METADATA_COUNT_MAX} are read")
    return tensor_count, key_count


async def _take_metadata(header: _Header, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = await header.text("key", KEY_SIZE_MAX)
        if not key.isascii() or not key:
            raise header.invalid(f"the key {key[:80]!a}, which is not ASCII or is empty")
        if key in metadata:
            raise header.invalid(f"the key {key[:80]!a} twice")
        metadata[key] = await _take_value(header, await header.unsigned(4))
        _check_metadata_size(header)
    return metadata


def _check_metadata_size(header: _Header) -> None:
    if header.taken > METADATA_SIZE_MAX:
        raise header.invalid(f"more than {METADATA_SIZE_MAX} bytes of metadata, not counting long arrays")


async def _take_value(header: _Header, kind: int) -> Any:  # noqa: ANN401  (any JSON)
    """A value of the type number `kind`, or what describes it."""
    if kind == _STRING:
        return await _take_string(header)
    if kind == _ARRAY:
        return await _take_array(header, 1)
    if kind not in _SCALARS:
        raise header.invalid(f"a value of the unknown type {kind}")
    return (await _take_scalars(header, kind, 1))[0]


async def _take_string(header: _Header) -> str | dict[str, Any]:
    size = await header.unsigned(8)
    if size <= STRING_KEPT_MAX:
        try:
            return (await header.take(size)).decode()
        except UnicodeDecodeError:
            return {"type": "string", "size": size}
    header.skip(size)
    return {"type": "string", "size": size}


async def _take_scalars(header: _Header, kind: int, count: int) -> list[bool | int | float | str]:
    layout = _SCALARS[kind][1]
    numbers = [number for (number,) in layout.iter_unpack(await header.take(count * layout.size))]
    if kind == _BOOL:
        if max(numbers, default=0) > 1:
            raise header.invalid("a bool that is neither 0 nor 1")
        return [bool(number) for number in numbers]
    # JSON has no word for what is not finite.
    return [number if math.isfinite(number) else str(number) for number in numbers]


async def _take_array(header: _Header, depth: int) -> list[Any] | dict[str, Any]:
    kind, count = await header.unsigned(4), await header.unsigned(8)
    is_kept = count <= ARRAY_KEPT_MAX
    if kind in _SCALARS:
        name, layout = _SCALARS[kind]
        if is_kept:
            return await _take_scalars(header, kind, count)
        header.skip(count * layout.size)
    elif kind == _STRING:
        name = "string"
        header.expect(count * _STRING_SIZE_MIN)
        if is_kept:
            return [await _take_string(header) for _ in range(count)]
        await header.skip_strings(count)
    elif kind == _ARRAY:
        name = "array"
        if depth == ARRAY_DEPTH_MAX:
            raise header.invalid(f"arrays in arrays, more than {ARRAY_DEPTH_MAX} deep")
        header.expect(count * _ARRAY_SIZE_MIN)
        for _ in range(count):
            await _take_array(header, depth + 1)
            _check_metadata_size(header)
    else:
        raise header.invalid(f"an array of the unknown type {kind}")
    return {"type": name, "count": count}


def _alignment(metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", _ALIGNMENT_DEFAULT)
    # The text wants a multiple of 8, the implementation a power of two.
    if type(alignment) is not int or not 8 <= alignment <= ALIGNMENT_MAX or alignment.bit_count() != 1:
        raise TensorsInvalid(
            f"general.alignment is {str(alignment)[:80]!a}; wanted a power of two from 8 to {ALIGNMENT_MAX}"
        )
    return alignment


async def _take_descriptions(header: _Header, count: int, alignment: int) -> list[_Description]:
    header.expect(count * _TENSOR_SIZE_MIN)
    names = set()
    descriptions = []
    for _ in range(count):
        description = await _take_description(header)
        if description.name in names:
            raise header.invalid(f"the tensor {description.name[:80]!a} twice")
        if description.offset % alignment:
            raise header.invalid(
                f"the tensor {description.name[:80]!a} at offset {description.offset}, no multiple of {alignment}"
            )
        names.add(description.name)
        descriptions.append(description)
    return descriptions


async def _take_description(header: _Header) -> _Description:
    name = await header.text("tensor name", NAME_SIZE_MAX)
    dimension_count = await header.unsigned(4)
    if dimension_count > DIMENSION_COUNT_MAX:
        raise header.invalid(
            f"the tensor {name[:80]!a} has {dimension_count} dimensions; at most {DIMENSION_COUNT_MAX} are allowed"
        )
    shape = [await header.unsigned(8) for _ in range(dimension_count)]
    shape.reverse()
    if max(shape, default=0) > _INTEGER_MAX or math.prod(shape) > _INTEGER_MAX:
        raise header.invalid(
            f"the tensor {name[:80]!a} has the shape {shape}, which makes 2^63 elements or more"
        )
    kind, offset = await header.unsigned(4), await header.unsigned(8)
    dtype, size = _sized(header, name, kind, shape)
    return _Description(name, dtype, tuple(shape), size, offset)


def _sized(header: _Header, name: str, kind: int, shape: list[int]) -> tuple[str, int | None]:
    """The name of a type, and the bytes that it makes of a shape; None when the type does not tell."""
    if kind not in _TYPES:
        return _UNSIZED_TYPES.get(kind, f"type_{kind}"), None if math.prod(shape) else 0
    dtype, block_count, block_size = _TYPES[kind]
    row = shape[-1] if shape else 1
    if row % block_count:
        raise header.invalid(
            f"the tensor {name[:80]!a} has rows of {row} elements; {dtype} wants multiples of {block_count}"
        )
    return dtype, math.prod(shape) // block_count * block_size


async def _place(descriptions: list[_Description], data_start: int, size: int) -> tuple[Tensor, ...]:
    """The tensors in the order of their bytes, checked to lie apart and inside the file."""
    starts = sorted({data_start + description.offset for description in descriptions})
    tensors = []
    for description in descriptions:
        start = data_start + description.offset
        stop = start + (description.size or 0)
        if description.size is None:
            following = bisect_right(starts, start)
            stop = starts[following] if following < len(starts) else max(size, start + 1)
        if stop > size:
            raise TensorsInvalid(
                f"the tensor {description.name[:80]!a} ends at byte {stop} of a file of {size}; the file is cut off"
            )
        tensors.append(Tensor(description.name, description.dtype, description.shape, start, stop))
        if len(tensors) % _TURN == 0:
            await asyncio.sleep(0)
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    for before, behind in pairwise(tensors):
        if behind.start < before.stop:
            raise TensorsInvalid(f"the tensors {before.name[:80]!a} and {behind.name[:80]!a} overlap")
    return tuple(tensors)


class _Header:
    """The header, read from left to right by pieces; each method takes what it names, or refuses the file."""

    def __init__(self, read: Read, size: int) -> None:
        self._read = read
        self._size = size
        self._buffer = b""
        self._buffer_start = 0
        self.position = 0
        """In the file; may lie behind the buffer, after a skip."""
        self.taken = 0
        """Bytes that were not skipped."""

    async def take(self, size: int) -> bytes:
        start = self.position - self._buffer_start
        if start + size > len(self._buffer):
            await self._fill(size)
            start = 0
        self.position += size
        self.taken += size
        return self._buffer[start : start + size]

    async def unsigned(self, size: int) -> int:
        """An integer of `size` bytes."""
        return int.from_bytes(await self.take(size), "little")

    async def text(self, what: str, size_max: int) -> str:
        """A string that has to be UTF-8 and short."""
        size = await self.unsigned(8)
        if size > size_max:
            raise self.invalid(f"a {what} of {size} bytes; at most {size_max} are read")
        content = await self.take(size)
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise self.invalid(f"the {what} {content[:80]!r}, which is not UTF-8") from error

    def skip(self, size: int) -> None:
        self.expect(size)
        self.position += size

    async def skip_strings(self, count: int) -> None:
        """Skip so many strings; there may be a million, so that what is in the buffer is passed without a call for each."""
        while count:
            self.expect(_STRING_SIZE_MIN)
            await self._fill(_STRING_SIZE_MIN)
            buffer, at, last = self._buffer, 0, len(self._buffer) - _STRING_SIZE_MIN
            while count and at <= last:
                at += _STRING_SIZE_MIN + int.from_bytes(buffer[at : at + _STRING_SIZE_MIN], "little")
                count -= 1
            self.skip(at)

    def expect(self, size: int) -> None:
        """Refuse the file when it, or the longest header, ends before `size` bytes more."""
        stop = self.position + size
        if stop > self._size:
            raise self.invalid(f"a file of {self._size} bytes cut off in its header, which needs {stop}")
        if stop > HEADER_SIZE_MAX:
            raise self.invalid(f"a header of {stop} bytes or more; at most {HEADER_SIZE_MAX} are read")

    def invalid(self, message: str) -> TensorsInvalid:
        return TensorsInvalid(f"{message} (before byte {self.position})")

    async def _fill(self, size: int) -> None:
        """Let the buffer begin at the position and hold `size` bytes, and a piece more where one has to be read."""
        self.expect(size)
        kept = self._buffer[self.position - self._buffer_start :]
        start = self.position + len(kept)
        if len(kept) < size:
            stop = min(max(start + PIECE_SIZE, self.position + size), self._size)
            piece = await self._read(start, stop)
            assert len(piece) == stop - start, "Read gives all that it is asked for"
            kept += piece
            await asyncio.sleep(0)
        self._buffer, self._buffer_start = kept, self.position
