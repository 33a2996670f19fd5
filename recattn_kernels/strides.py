"""How a backend that works on pointers is handed a tensor."""

from __future__ import annotations

from torch import Tensor


def contiguous_rows(x: Tensor) -> Tensor:
    """x itself where its last dimension is contiguous, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def strided(x: Tensor | None, time: int) -> tuple[int, int, int]:
    """Pointer, stride over time and stride over the batch of a sequence; zeros for an absent one."""
    return (0, 0, 0) if x is None else (x.data_ptr(), x.stride(time), x.stride(1 - time))
