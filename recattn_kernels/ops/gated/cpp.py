"""The gated recurrences on the CPU: hands pointers and strides to csrc/cpu/gated_forward.cpp and gated_backward.cpp."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recattn_kernels.ops.gated.contract import CELLS, PARAMETERS, Call, Kept, empty_forward
from recattn_kernels.ops.sequence import compute_dtype
from recattn_kernels.strides import CPU_DTYPES, contiguous_rows, cpu, huge_pages, plain, pointer, present, sequence

# As csrc/cpu/kernels.h's enum Cell has them.
CELL_CODES = {name: code for code, name in enumerate(CELLS)}


def forward(call: Call, keep: bool) -> tuple[Tensor, Tensor, Tensor, Kept]:
    dtype = compute_dtype(call.x.dtype)
    x = contiguous_rows(call.x)
    output, h_n, c_n, kept = empty_forward(call, keep)
    huge_pages(output, *kept)
    h, c = (s if s.dtype == dtype else s.new_empty(s.shape, dtype=dtype) for s in (h_n, c_n))
    holds, common = _common(call, dtype)
    cpu().gated_forward(
        common, _place(x, call), _place(output, call), pointer(h), present(c), tuple(map(present, kept))
    )
    del holds
    return output, h_n if h is h_n else h_n.copy_(h), c_n if c is c_n else c_n.copy_(c), kept


def backward(grads: Sequence[Tensor | None], call: Call, kept: Kept, needs_weight: bool) -> tuple[Tensor, ...]:
    dtype, GH = compute_dtype(call.x.dtype), call.gates * call.sizes[2]
    output = contiguous_rows(call.x)
    dy = None if grads[0] is None else contiguous_rows(grads[0])
    dh_n, dc_n = (plain(g, dtype) for g in grads[1:])
    dx = output.new_empty((*output.shape[:-1], GH))
    # Of q = W_hh h: that of x itself where q is added to it and to nothing else.
    shared = call.cell in ("rnn_tanh", "rnn_relu", "lstm") and call.ln_weight is None and dx.dtype == dtype
    dq = None if shared else output.new_empty((*call.steps, GH), dtype=dtype)  # scratch
    huge_pages(dx, dq)
    parameters = {name: getattr(call, name) for name in PARAMETERS[1:]}
    if not needs_weight:
        parameters["weight_hh"] = None
    found = {name: None if p is None else output.new_empty(p.shape, dtype=dtype) for name, p in parameters.items()}
    holds, common = _common(call, dtype)
    cpu().gated_backward(
        common, math.inf if call.grad_clip is None else call.grad_clip,
        _place(dy, call), _place(output, call), pointer(dh_n), pointer(dc_n), tuple(map(present, kept)),
        _place(dx, call), pointer(dq), tuple(pointer(found[name]) for name in PARAMETERS[1:]),
    )  # fmt: skip
    del holds
    results = (
        dx.new_empty(0) if g is None or p is None else g if g.dtype == p.dtype else g.to(p.dtype)
        for g, p in zip(found.values(), parameters.values(), strict=True)
    )
    return dx, *results


def _place(x: Tensor | None, call: Call) -> tuple[int, int, int]:
    """Pointer, stride over time and stride over the batch; packed, the latter is the one between rows."""
    if x is None or call.batch_sizes is None:
        return sequence(x, call.time)
    return x.data_ptr(), 0, x.stride(0)


def _common(call: Call, dtype: torch.dtype) -> tuple[list[Tensor | None], tuple[Any, ...]]:
    """The arguments that both directions take, and the tensors that have to live as long as their pointers."""
    time = call.time
    names = ("weight_hh", "bias_hh", "ln_weight", "ln_bias", "ln_c_weight", "ln_c_bias", "h0", "c0")
    weight_hh, bias_hh, *norm, h0, c0 = holds = [plain(getattr(call, name), dtype) for name in names]
    lengths, sizes = plain(call.lengths, torch.int64), call.batch_sizes
    starts = None if sizes is None else sizes.cumsum(0) - sizes
    masks = [None if m is None else contiguous_rows(m) for m in (call.keep_h, call.keep_c)]
    return [*holds, lengths, starts, *masks], (
        call.sizes, CPU_DTYPES[call.x.dtype], CELL_CODES[call.cell], pointer(weight_hh), pointer(bias_hh),
        tuple(map(pointer, norm)), pointer(h0), pointer(c0), sequence(call.reset, time), pointer(lengths),
        pointer(starts), call.reverse, call.mixing, sequence(masks[0], time), sequence(masks[1], time),
        torch.get_num_threads(),
    )  # fmt: skip
