"""What a file of tensors says of itself, whichever format it has: the nouns that the readers of the formats share.

`registry/tensors.py` is the way in.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from kitspec.errors import ContentInvalid

TensorFormat = Literal["safetensors", "gguf"]

Read = Callable[[int, int], Awaitable[bytes]]
"""(start, stop) -> all the bytes of the file from `start` up to but without `stop`; start < stop <= the file's size."""

# Mixtures of experts have the most: some 70,000 in the largest single file that huggingface.js knew of in 2026.
TENSOR_COUNT_MAX: Final = 200_000
# Neither format's users come near; names are sent in query strings.
NAME_SIZE_MAX: Final = 1024
# Files have dozens; huggingface.js counted 500 at most.
METADATA_COUNT_MAX: Final = 10_000


class TensorsInvalid(ContentInvalid):
    """A file of tensors breaks the rules of its format, or is beyond what is read here."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where a tensor is, and how its bytes are to be understood.

    Attributes:
        dtype: as the format spells it: "F32", "BF16", and in GGUF also "Q4_K", "IQ2_XXS"; "type_<number>" for a type of GGUF that
            is not known here. ASCII letters, digits and `_`.
        shape: row-major, the last dimension the one whose elements are neighbours, as safetensors, numpy and PyTorch say it.
            GGUF lists dimensions the other way round; they are turned. Empty for a scalar.
        start, stop: in the file. In GGUF, where the size of an element is not known, `stop` is where the next tensor begins, or
            the end of the file, so that padding is counted in.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class TensorFile:
    """The header of a file of tensors. It can be said in JSON: text has no lone surrogates, and numbers are finite.

    Attributes:
        metadata: safetensors: `__metadata__`, strings. GGUF: the key/value pairs; a long array, such as a vocabulary, is not
            kept but described, `{"type": "string", "count": 32000}`, and so is a string that is long or not UTF-8,
            `{"type": "string", "size": 70000}` in bytes. NaN and infinities are the strings "nan", "inf" and "-inf".
        tensors: in the order of their bytes; none overlaps another, and all lie inside the file.
        data_start: where the bytes of tensors may begin.
    """

    format: TensorFormat
    metadata: Mapping[str, Any]
    tensors: tuple[Tensor, ...]
    data_start: int
