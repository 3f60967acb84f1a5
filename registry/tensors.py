"""The tensors in a model's file: which there are, and where; read from the file's header, without reading a tensor.

The readers take bytes through a function, and know nothing of where they are stored. Files are from strangers: any bytes give a
`TensorFile` or `TensorsInvalid`, at a bounded cost, and the event loop gets its turn in between.
"""

from __future__ import annotations

from registry.gguf import read_gguf
from registry.safetensors import read_safetensors
from registry.tensor_file import Read, Tensor, TensorFile, TensorFormat, TensorsInvalid

__all__ = [
    "Read",
    "Tensor",
    "TensorFile",
    "TensorFormat",
    "TensorsInvalid",
    "format_of",
    "read_tensors",
]


def format_of(path: str) -> TensorFormat | None:
    """The format that a file's ending promises; None when it promises no tensors."""
    if path.lower().endswith(".safetensors"):
        return "safetensors"
    return "gguf" if path.lower().endswith(".gguf") else None


async def read_tensors(read: Read, size: int, form: TensorFormat) -> TensorFile:
    """The header of a file.

    Args:
        read: reads the file; called a few times, one call at a time, for at most the header and a piece beyond it.
        size: of the file, in bytes.

    Raises:
        TensorsInvalid: it is not what `form` says, is cut off, or is beyond the limits of the format's module.
    """
    return await (read_gguf if form == "gguf" else read_safetensors)(read, size)
