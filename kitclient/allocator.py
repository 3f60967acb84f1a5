"""The C allocator, told that buffers of a mebibyte come and go.

Left alone, glibc gives each of them back to the system and asks for it again, and the kernel clears every page anew: that
was measured at as much CPU as all the rest of a download. For a program of our own; a library does not do this to others.
"""

from __future__ import annotations

# malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT = 64 * 1024 * 1024


def keep_large_buffers() -> None:
    """Keep freed memory of up to 64 MiB for the next buffer; nothing where there is no glibc."""
    import ctypes

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(_M_MMAP_THRESHOLD, 32 * 1024 * 1024)
    mallopt(_M_TRIM_THRESHOLD, _KEPT)
