"""IndRNN on the CPU: hands pointers and strides to csrc/cpu/indrnn.cpp."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from recattn_kernels.ops.indrnn.contract import ACTIVATIONS, Call, empty_forward
from recattn_kernels.ops.sequence import compute_dtype
from recattn_kernels.strides import CPU_DTYPES, contiguous_rows, cpu, huge_pages, plain, pointer, sequence

# As csrc/cells.h's enum Activation has them.
ACTIVATION_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}


def forward(call: Call) -> tuple[Tensor, Tensor]:
    dtype, time = compute_dtype(call.x.dtype), call.time
    x, weight_hh = contiguous_rows(call.x), plain(call.weight_hh, dtype)
    h0, bias, lengths = plain(call.h0, dtype), plain(call.bias, dtype), plain(call.lengths, torch.int64)
    output, h_n = empty_forward(call)
    huge_pages(output)
    state = h_n if h_n.dtype == dtype else h_n.new_empty(h_n.shape, dtype=dtype)
    common = _common(call, weight_hh, h0, lengths)
    cpu().indrnn_forward(common, pointer(bias), sequence(x, time), sequence(output, time), pointer(state))
    return output, h_n if state is h_n else h_n.copy_(state)


def backward(grad_output: Tensor | None, grad_h_n: Tensor | None, call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype, time = compute_dtype(call.x.dtype), call.time
    _, B, H = call.sizes
    output, weight_hh = contiguous_rows(call.x), plain(call.weight_hh, dtype)
    dy = None if grad_output is None else contiguous_rows(grad_output)
    h0, dh_n, lengths = plain(call.h0, dtype), plain(grad_h_n, dtype), plain(call.lengths, torch.int64)
    dx = output.new_empty(output.shape)
    columns = output.new_empty((6, B, H), dtype=dtype)  # scratch
    huge_pages(dx)
    dh0, du, db = (output.new_empty(shape, dtype=dtype) for shape in ((B, H), (H,), (H,)))
    cpu().indrnn_backward(
        _common(call, weight_hh, h0, lengths), math.inf if call.grad_clip is None else call.grad_clip,
        sequence(dy, time), sequence(output, time), pointer(dh_n), sequence(dx, time),
        pointer(dh0), pointer(columns), pointer(du), pointer(db),
    )  # fmt: skip
    return (
        dx,
        du if call.weight_hh.dtype == dtype else du.to(call.weight_hh.dtype),
        dx.new_empty(0) if call.h0 is None else dh0.to(call.h0.dtype),
        dx.new_empty(0) if call.bias is None else db.to(call.bias.dtype),
    )


def _common(call: Call, weight_hh: Tensor | None, h0: Tensor | None, lengths: Tensor | None) -> tuple[Any, ...]:
    """The arguments that both directions take."""
    return (
        call.sizes, CPU_DTYPES[call.x.dtype], ACTIVATION_CODES[call.activation], call.negative_slope,
        pointer(weight_hh), pointer(h0), sequence(call.reset, call.time), pointer(lengths), call.reverse,
        torch.get_num_threads(),
    )  # fmt: skip
