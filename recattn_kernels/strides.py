"""How a backend that works on pointers is handed a tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recattn_kernels import backends

# From so many bytes on a new tensor is mostly new memory too.
LARGE = 4 << 20

# As csrc/cpu/isa.h's enum Dtype has them.
CPU_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def cpu() -> Any:
    """The kernels of csrc/cpu, where they are built."""
    return backends.extension("_cpu")


def huge_pages(*new: Tensor | None) -> None:
    """Has the system back large tensors on a CPU, before they are written for the first time, by pages of 2 MB.

    torch takes memory for a large tensor from the system and gives it back. Linux then brings in a page at each first
    touch, 4 KB unless it is asked for more, which for IndRNN takes four times as long as the kernel.
    """
    for x in new:
        if x is not None and x.nbytes >= LARGE:
            cpu().advise_huge_pages(x.data_ptr(), x.nbytes)


def plain(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """x contiguous and in dtype: mostly it is already, and then no operation of torch is called."""
    if x is None or (x.dtype == dtype and x.is_contiguous()):
        return x
    return x.to(dtype).contiguous()


def pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def present(x: Tensor) -> int:
    """The pointer of a tensor that is empty where it is absent."""
    return x.data_ptr() if x.numel() else 0


def contiguous_rows(x: Tensor) -> Tensor:
    """x itself where its last dimension is contiguous, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def sequence(x: Tensor | None, time: int) -> tuple[int, int, int]:
    """Pointer, stride over time and stride over the batch of a sequence; zeros for an absent one."""
    return (0, 0, 0) if x is None else (x.data_ptr(), x.stride(time), x.stride(1 - time))
