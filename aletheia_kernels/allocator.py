"""The C library's allocator, set for training."""

from __future__ import annotations

from aletheia_kernels import cpu


def tune_allocator() -> bool:
    """Make the C library keep the memory that tensors free, so that the next step need not fault it in again.

    By default glibc returns a large block to the system when it is freed, and the system clears every page of the next
    one: about a third of a LoRA step on a CPU. After this call large blocks come from the heap, and the heap neither
    shrinks nor grows in small steps. The price: freed memory stays with the process until it ends. Call it before the
    first large tensor. A setting made by the environment (``MALLOC_MMAP_MAX_``, ``MALLOC_TRIM_THRESHOLD_``,
    ``MALLOC_TOP_PAD_``) stays as it is.

    Returns:
        Whether the settings hold; False where the C library is not glibc or the extension is missing.
    """
    return cpu.unavailable_reason() is None and bool(cpu.operators().tune_allocator())
