"""What the C library does with memory that a step frees.

glibc gives freed memory back to the system above 128 kB at the top of its heap, or at once where it
was mapped by itself. Of a training on CPUs that is every large gradient and activation, whose pages
the system then clears again in the next step: 17 % of a step of the 17 layers of ElemNet.
"""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # <malloc.h>
_OWN_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, for its next step; False if nothing was changed.

    Nothing is, where the user has settings of the allocator of their own (mallopt(3)), or the C
    library is not glibc.
    """
    if any(name in os.environ for name in _OWN_SETTINGS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # older glibc takes no more than 32 MiB
    mapped_from = any(mallopt(_MMAP_THRESHOLD, size) for size in (1 << 30, 32 << 20))
    return bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1)) and mapped_from
