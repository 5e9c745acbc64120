"""What a process that computes sets for itself before it starts. No result depends on the memory setting."""
from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h


def set_up(threads: int) -> None:
    import torch
    import transformers

    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it fills every new buffer with NaN, for debugging
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Large tensors come and go several hundred times a step. glibc gives such memory back to the kernel at once and takes
    it again page by page: 100,000 page faults, 4 % of the CPU time of a step of a 5M model. Elsewhere: nothing to do."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        # glibc before 2.35 refuses more than 32 MB; unset, it would stay at 128 KB once the others are set.
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30) or libc.mallopt(M_MMAP_THRESHOLD, 1 << 25)
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
        libc.mallopt(M_TOP_PAD, 64 << 20)
