"""What a process that computes sets for itself before it starts. No result depends on the memory setting."""
from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h


def set_up(threads: int) -> None:
    import torch
    import transformers

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS may add up in another order from run to run
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it fills every new buffer with NaN, for debugging
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    keep_freed_memory()


@contextmanager
def reproducible() -> Iterator[None]:
    """Inside, an operation that has no reproducible implementation raises instead of warning. PyTorch's attention on a GPU has one for its
    backward, and takes it only then (aten/native/transformers/cuda/attention_backward.cu); cuDNN's, which has none, is not taken."""
    import torch

    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def collect() -> None:
    """Free what only cycles hold, and give a GPU's memory back to whoever allocates next."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def keep_freed_memory() -> None:
    """Large tensors come and go several hundred times a step. glibc gives such memory back to the kernel at once and takes
    it again page by page: 100,000 page faults, 4 % of the CPU time of a step of a 5M model. Elsewhere: nothing to do."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        # glibc before 2.35 refuses more than 32 MB; unset, it would stay at 128 KB once the others are set.
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30) or libc.mallopt(M_MMAP_THRESHOLD, 1 << 25)
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
        libc.mallopt(M_TOP_PAD, 64 << 20)
