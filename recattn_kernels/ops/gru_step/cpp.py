"""gru_step on the CPU: hands pointers and strides to csrc/cpu/step.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recattn_kernels.ops.sequence import compute_dtype
from recattn_kernels.strides import CPU_DTYPES, contiguous_rows, cpu, huge_pages, plain, pointer


def forward(x_gates: Tensor, h_gates: Tensor, h: Tensor) -> tuple[Tensor]:
    dtype, rows, threads = compute_dtype(x_gates.dtype), contiguous_rows(x_gates), torch.get_num_threads()
    wide_gates, wide = plain(h_gates, dtype), plain(h, dtype)
    h_n = h.new_empty(h.shape, dtype=dtype)
    huge_pages(h_n)
    cpu().gru_step(
        tuple(h.shape), CPU_DTYPES[x_gates.dtype], threads, (rows.data_ptr(), rows.stride(0)), pointer(wide_gates),
        pointer(wide), h_n.data_ptr(), (0, 0, 0, 0),
    )  # fmt: skip
    return (h_n if h.dtype == dtype else h_n.to(h.dtype),)


def backward(
    grads: Sequence[Tensor | None], saved: Sequence[Tensor], inputs: Sequence[Tensor], options: Any, needs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    x_gates, h_gates, h = inputs
    dtype, rows, threads = compute_dtype(x_gates.dtype), contiguous_rows(x_gates), torch.get_num_threads()
    wide_gates, wide, dh_n = plain(h_gates, dtype), plain(h, dtype), plain(grads[0], dtype)
    dx = x_gates.new_empty(x_gates.shape)
    dq, dh = h.new_empty(h_gates.shape, dtype=dtype), h.new_empty(h.shape, dtype=dtype)
    huge_pages(dx, dq, dh)
    cpu().gru_step(
        tuple(h.shape), CPU_DTYPES[x_gates.dtype], threads, (rows.data_ptr(), rows.stride(0)), pointer(wide_gates),
        pointer(wide), 0, (pointer(dh_n), dx.data_ptr(), dq.data_ptr(), dh.data_ptr()),
    )  # fmt: skip
    return dx, dq if dq.dtype == h_gates.dtype else dq.to(h_gates.dtype), dh if dh.dtype == h.dtype else dh.to(h.dtype)
