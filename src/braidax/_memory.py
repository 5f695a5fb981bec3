"""What the allocator of the process does with memory that is freed."""

import ctypes
import platform

# Parameters of glibc's `mallopt`, and what this process asks for: -1 is never to trim.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_WANTED = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_ARENA_MAX, 1))


def keep_memory() -> bool:
    """Ask glibc to keep memory that is freed, so that calls on a CPU take no fresh pages.

    XLA takes fresh memory for every call. glibc hands large pieces back to the system, which clears
    each page again at its first use. With memory kept, the process stays as large as it ever was.

    Call the function before the first computation. Arrays on a GPU or TPU are not concerned.
    `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000 MALLOC_ARENA_MAX=1` in the environment
    does the same for a program that is not yours.

    **Returns:** whether glibc took the settings, `False` on a system without glibc.

    **Source:** the manual page of mallopt(3).

    **Example:**

        >>> import braidax as bx
        >>> kept = bx.keep_memory()
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(parameter, value) == 1 for parameter, value in _WANTED])
