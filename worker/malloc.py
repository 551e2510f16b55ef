"""What glibc's malloc does with memory that is freed."""

import ctypes

# malloc.h; 32 MiB is the most that M_MMAP_THRESHOLD takes.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
LARGEST_KEPT_BYTES = 32 << 20
MOST_ARENAS = 2  # otherwise one for each thread, with what it has freed


def keep_freed_memory(most_bytes: int) -> None:
    """Let malloc keep up to `most_bytes` of what is freed in an arena, not give it back at once.

    Otherwise the kernel maps and zeroes every block of some MB anew for code that takes and frees
    such blocks all the time.
    Other C libraries have no such knobs and are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)
        mallopt(M_TRIM_THRESHOLD, most_bytes)
        mallopt(M_ARENA_MAX, MOST_ARENAS)
