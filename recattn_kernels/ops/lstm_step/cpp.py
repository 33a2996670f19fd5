"""lstm_step on the CPU: hands pointers and strides to csrc/cpu/step.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recattn_kernels.ops.sequence import compute_dtype
from recattn_kernels.strides import CPU_DTYPES, contiguous_rows, cpu, huge_pages, plain, pointer


def forward(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    dtype, gates, threads = compute_dtype(gates.dtype), contiguous_rows(gates), torch.get_num_threads()
    wide = plain(c, dtype)
    h, c_n = gates.new_empty(c.shape), gates.new_empty(c.shape, dtype=dtype)
    huge_pages(h, c_n)
    cpu().lstm_step(
        tuple(c.shape), CPU_DTYPES[gates.dtype], threads, (gates.data_ptr(), gates.stride(0)), pointer(wide),
        h.data_ptr(), c_n.data_ptr(), (0, 0, 0, 0),
    )  # fmt: skip
    return h, c_n if c.dtype == dtype else c_n.to(c.dtype)


def backward(
    grads: Sequence[Tensor | None], saved: Sequence[Tensor], inputs: Sequence[Tensor], options: Any, needs: Any
) -> tuple[Tensor, Tensor]:
    gates, c = inputs
    dtype, rows, threads = compute_dtype(gates.dtype), contiguous_rows(gates), torch.get_num_threads()
    wide, dh, dc_n = plain(c, dtype), plain(grads[0], gates.dtype), plain(grads[1], dtype)
    dgates, dc = gates.new_empty(gates.shape), gates.new_empty(c.shape, dtype=dtype)
    huge_pages(dgates, dc)
    cpu().lstm_step(
        tuple(c.shape), CPU_DTYPES[gates.dtype], threads, (rows.data_ptr(), rows.stride(0)), pointer(wide), 0, 0,
        (pointer(dh), pointer(dc_n), dgates.data_ptr(), dc.data_ptr()),
    )  # fmt: skip
    return dgates, dc if c.dtype == dtype else dc.to(c.dtype)
