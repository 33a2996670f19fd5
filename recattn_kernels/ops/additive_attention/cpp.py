"""additive_attention on the CPU: hands pointers and strides to csrc/cpu/additive_*.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recattn_kernels.ops.additive_attention.contract import ACTIVATIONS
from recattn_kernels.ops.sequence import compute_dtype
from recattn_kernels.strides import CPU_DTYPES, contiguous_rows, cpu, huge_pages, plain, pointer

# As csrc/cells.h's enum Activation has them.
CODES = {"relu": 0, "tanh": 1}
assert set(CODES) == set(ACTIVATIONS)


def forward(
    query: Tensor, keys: Tensor, weight: Tensor, values: Tensor, mask: Tensor | None, activation: str, weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    (B, N, _), D, dtype = keys.shape, values.shape[2], compute_dtype(query.dtype)
    softmax, context = query.new_empty((B, N), dtype=dtype), query.new_empty((B, D), dtype=dtype)
    held, arguments = _arguments(query, keys, weight, values, mask, activation)
    cpu().additive_forward(arguments, softmax.data_ptr(), context.data_ptr())
    del held
    a = query.new_empty(0) if not weights else softmax.to(query.dtype, copy=True)
    return context.to(query.dtype), a, softmax


def backward(
    grads: Sequence[Tensor | None],
    saved: Sequence[Tensor],
    inputs: Sequence[Tensor | None],
    options: Sequence[Any],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    query, keys, weight, values, mask = inputs
    assert query is not None and keys is not None and weight is not None and values is not None
    dtype, (B, N, A) = compute_dtype(query.dtype), keys.shape
    (softmax,) = saved
    grad_context, grad_weights = (plain(g, dtype) for g in grads)
    # dquery and dweight are sums of many numbers: they come in the type of the arithmetic.
    kinds = (dtype, keys.dtype, dtype, values.dtype)
    four = (query, keys, weight, values)
    results = [
        t.new_empty(t.shape, dtype=kind) if need else None for t, kind, need in zip(four, kinds, needs[:4], strict=True)
    ]
    huge_pages(*results)
    blocks = -(-N // cpu().ADDITIVE_ROWS)
    scores, sums = query.new_empty((B, N), dtype=dtype), query.new_empty((2, B, blocks, A), dtype=dtype)
    held, arguments = _arguments(query, keys, weight, values, mask, options[0])
    cpu().additive_backward(
        arguments, softmax.data_ptr(), pointer(grad_context), pointer(grad_weights), scores.data_ptr(), sums.data_ptr(),
        tuple(map(pointer, results)),
    )  # fmt: skip
    del held
    return [None if g is None else g.to(t.dtype) for g, t in zip(results, four, strict=True)] + [None]


def _arguments(
    query: Tensor, keys: Tensor, weight: Tensor, values: Tensor, mask: Tensor | None, activation: str
) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
    """The tensors that the pointers are of, to be kept until the kernel is done, and what both directions take."""
    dtype, (B, N, A), D = compute_dtype(query.dtype), keys.shape, values.shape[2]
    q, w, keys, values = plain(query, dtype), plain(weight, dtype), contiguous_rows(keys), contiguous_rows(values)
    positions = [(t.data_ptr(), t.stride(0), t.stride(1), CPU_DTYPES[t.dtype]) for t in (keys, values)]
    masked = (0, 0, 0) if mask is None else (mask.data_ptr(), mask.stride(0), mask.stride(1))
    return (q, w, keys, values), (
        (B, N, A, D), dtype == torch.float64, CODES[activation], pointer(q), positions[0], pointer(w), positions[1],
        masked, torch.get_num_threads(),
    )  # fmt: skip
