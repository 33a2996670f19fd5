"""The Triton kernels of additive attention: a program takes ROWS positions of a row b, or a part of its features.

Scores have a kernel of their own, as every program that averages a part of the features needs all of them; so keys and
values are read once each, and what passes between the kernels is (B, N). An absent argument is None. Keys, values and
the mask are read through strides; everything else is contiguous. ALIGNED: rows of keys and values, and of their
gradients, begin at multiples of 16 numbers, so that a lane loads 16 bytes at once.
"""

# mypy: ignore-errors

from __future__ import annotations

from functools import partial

import triton
import triton.language as tl

from recattn_kernels.triton_launch import kernel
from recattn_kernels.triton_math import activate, derivative, times_derivative


@triton.jit
def positions(N, ROWS: tl.constexpr):
    """Which positions of which b this program takes: b, n (ROWS,), and which of them there are."""
    blocks = tl.cdiv(tl.maximum(N, 1), ROWS)
    pid = tl.program_id(0)
    b = (pid // blocks).to(tl.int64)
    n = (pid % blocks) * ROWS + tl.arange(0, ROWS)
    return b, n, n < N


@triton.jit
def unmasked(mask_ptr, b, n, mask_stride_b, mask_stride_n, there):
    if mask_ptr is not None:
        there = tl.load(mask_ptr + b * mask_stride_b + n.to(tl.int64) * mask_stride_n, mask=there, other=0) != 0
    return there


@triton.jit
def hint(value, ALIGNED: tl.constexpr):
    # tl.multiple_of says nothing of a kernel's argument.
    return value // 16 * 16 if ALIGNED else value


@triton.jit
def rows_of(ptr, b, n, stride_b, stride_n, ALIGNED: tl.constexpr):
    """Pointers to rows n of b, as a column."""
    offset = b * hint(stride_b, ALIGNED) + n.to(tl.int64) * hint(stride_n, ALIGNED)
    return ptr + offset[:, None]


@partial(kernel, aligned=("keys_ptr", "query_ptr", "weight_ptr"))
def scores_kernel(
    query_ptr, keys_ptr, weight_ptr, mask_ptr, scores_ptr, N, A,
    keys_stride_b, keys_stride_n, mask_stride_b, mask_stride_n,
    ACTIVATION: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # e[n] = weight . act(keys[n] + query)
    b, n, there = positions(N, ROWS)
    kept = unmasked(mask_ptr, b, n, mask_stride_b, mask_stride_n, there)
    keys = rows_of(keys_ptr, b, n, keys_stride_b, keys_stride_n, ALIGNED)
    A = hint(A, ALIGNED)
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, A, BLOCK):
        a = first + tl.arange(0, BLOCK)
        query = tl.load(query_ptr + b * A + a, mask=a < A, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + a, mask=a < A, other=0.0).to(tl.float32)
        k = tl.load(keys + a, mask=kept[:, None] & (a < A), other=0.0).to(tl.float32)
        sums += weight * activate(k + query, 0.0, ACTIVATION)
    tl.store(scores_ptr + b * N + n, tl.sum(sums, 1), mask=there)


@partial(kernel, aligned=("values_ptr", "context_ptr"))
def context_kernel(
    values_ptr, mask_ptr, scores_ptr, softmax_ptr, weights_ptr, context_ptr, N, D,
    values_stride_b, values_stride_n, mask_stride_b, mask_stride_n,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # a = softmax over n of e;  context = sum over n of a[n] values[n]
    # The softmax is taken as the values come: `most` is the largest score so far, and what was summed is scaled to it.
    parts = tl.cdiv(tl.maximum(D, 1), BLOCK)
    pid = tl.program_id(0)
    b, part = (pid // parts).to(tl.int64), pid % parts
    D = hint(D, ALIGNED)
    d = part * BLOCK + tl.arange(0, BLOCK)
    most = tl.full((), float("-inf"), tl.float32)
    scale = tl.zeros((), tl.float32)  # what the last block was scaled to
    total = tl.zeros((ROWS,), tl.float32)
    count = tl.zeros((ROWS,), tl.int32)
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, N, ROWS):
        n = first + tl.arange(0, ROWS)
        kept = unmasked(mask_ptr, b, n, mask_stride_b, mask_stride_n, n < N)
        e = tl.load(scores_ptr + b * N + n, mask=kept, other=float("-inf"))
        values = rows_of(values_ptr, b, n, values_stride_b, values_stride_n, ALIGNED)
        v = tl.load(values + d, mask=kept[:, None] & (d < D), other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.max(e, 0))
        # Infinity less infinity is NaN, which a block without a position must not bring in.
        centre = tl.where(most == float("-inf"), 0.0, most)
        p = tl.where(kept, tl.exp(e - centre), 0.0)
        shrink = tl.exp(scale - centre)
        shrink = tl.where(first == 0, 0.0, shrink)
        total = tl.where(first == 0, p, total * shrink + p)
        sums = tl.where(first == 0, p[:, None] * v, sums * shrink + p[:, None] * v)
        count += kept.to(tl.int32)
        scale = centre
    denominator = tl.sum(total, 0)
    empty = tl.sum(count, 0) == 0
    context = tl.where(empty, 0.0, tl.sum(sums, 0) / denominator)
    tl.store(context_ptr + b * D + d, context.to(context_ptr.dtype.element_ty), mask=d < D)
    if part == 0:
        for first in range(0, N, ROWS):
            n = first + tl.arange(0, ROWS)
            kept = unmasked(mask_ptr, b, n, mask_stride_b, mask_stride_n, n < N)
            e = tl.load(scores_ptr + b * N + n, mask=kept, other=float("-inf"))
            a = tl.where(kept, tl.exp(e - scale) / denominator, 0.0)
            tl.store(softmax_ptr + b * N + n, a, mask=n < N)
            if weights_ptr is not None:
                tl.store(weights_ptr + b * N + n, a.to(weights_ptr.dtype.element_ty), mask=n < N)


@partial(kernel, aligned=("values_ptr", "grad_context_ptr", "grad_values_ptr"))
def values_backward_kernel(
    values_ptr, mask_ptr, softmax_ptr, grad_context_ptr, grad_weights_ptr, grad_values_ptr, scores_ptr, N, D,
    values_stride_b, values_stride_n, mask_stride_b, mask_stride_n,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # da[n] = dcontext . values[n] + dweights[n];  dvalues[n] = a[n] dcontext
    b, n, there = positions(N, ROWS)
    kept = unmasked(mask_ptr, b, n, mask_stride_b, mask_stride_n, there)
    values = rows_of(values_ptr, b, n, values_stride_b, values_stride_n, ALIGNED)
    D = hint(D, ALIGNED)
    softmax = tl.load(softmax_ptr + b * N + n, mask=there, other=0.0)
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, D, BLOCK):
        d = first + tl.arange(0, BLOCK)
        flow = tl.load(grad_context_ptr + b * D + d, mask=d < D, other=0.0).to(tl.float32)
        v = tl.load(values + d, mask=kept[:, None] & (d < D), other=0.0).to(tl.float32)
        sums += tl.where(kept[:, None], v * flow, 0.0)
        if grad_values_ptr is not None:
            dv = tl.where(kept[:, None], softmax[:, None] * flow, 0.0)
            out = rows_of(grad_values_ptr, b, n, N.to(tl.int64) * D, D, ALIGNED)
            tl.store(out + d, dv.to(grad_values_ptr.dtype.element_ty), mask=there[:, None] & (d < D))
    da = tl.sum(sums, 1)
    if grad_weights_ptr is not None:
        da += tl.load(grad_weights_ptr + b * N + n, mask=kept, other=0.0).to(tl.float32)
    tl.store(scores_ptr + b * N + n, da, mask=there)


@kernel
def softmax_backward_kernel(
    mask_ptr, softmax_ptr, scores_ptr, N, mask_stride_b, mask_stride_n, BLOCK: tl.constexpr
):  # fmt: skip
    # de[n] = a[n] (da[n] - sum over m of a[m] da[m]), in the place of da
    b = tl.program_id(0).to(tl.int64)
    sums = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, N, BLOCK):
        n = first + tl.arange(0, BLOCK)
        kept = unmasked(mask_ptr, b, n, mask_stride_b, mask_stride_n, n < N)
        a = tl.load(softmax_ptr + b * N + n, mask=kept, other=0.0)
        sums += a * tl.load(scores_ptr + b * N + n, mask=kept, other=0.0)
    mean = tl.sum(sums, 0)
    for first in range(0, N, BLOCK):
        n = first + tl.arange(0, BLOCK)
        kept = unmasked(mask_ptr, b, n, mask_stride_b, mask_stride_n, n < N)
        a = tl.load(softmax_ptr + b * N + n, mask=kept, other=0.0)
        de = a * (tl.load(scores_ptr + b * N + n, mask=kept, other=0.0) - mean)
        tl.store(scores_ptr + b * N + n, tl.where(kept, de, 0.0), mask=n < N)


@partial(kernel, aligned=("keys_ptr", "query_ptr", "weight_ptr", "grad_keys_ptr", "sums_ptr"))
def keys_backward_kernel(
    query_ptr, keys_ptr, weight_ptr, mask_ptr, scores_ptr, grad_keys_ptr, sums_ptr, B, N, A,
    keys_stride_b, keys_stride_n, mask_stride_b, mask_stride_n,
    ACTIVATION: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # dkeys[n] = de[n] weight act'(keys[n] + query);  dquery = sum over n of dkeys[n]
    # dweight = sum over b and n of de[n] act(keys[n] + query)
    # sums (2, B, blocks of N, A): this program's share of dquery and of dweight.
    b, n, there = positions(N, ROWS)
    kept = unmasked(mask_ptr, b, n, mask_stride_b, mask_stride_n, there)
    keys = rows_of(keys_ptr, b, n, keys_stride_b, keys_stride_n, ALIGNED)
    A = hint(A, ALIGNED)
    de = tl.load(scores_ptr + b * N + n, mask=there, other=0.0)[:, None]
    share = tl.program_id(0).to(tl.int64) * A
    second = tl.num_programs(0).to(tl.int64) * A
    for first in range(0, A, BLOCK):
        a = first + tl.arange(0, BLOCK)
        query = tl.load(query_ptr + b * A + a, mask=a < A, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + a, mask=a < A, other=0.0).to(tl.float32)
        k = tl.load(keys + a, mask=kept[:, None] & (a < A), other=0.0).to(tl.float32)
        h = activate(k + query, 0.0, ACTIVATION)
        dk = times_derivative(de * weight, derivative(h, 0.0, ACTIVATION), ACTIVATION)
        dk = tl.where(kept[:, None], dk, 0.0)
        if grad_keys_ptr is not None:
            out = rows_of(grad_keys_ptr, b, n, N.to(tl.int64) * A, A, ALIGNED)
            tl.store(out + a, dk.to(grad_keys_ptr.dtype.element_ty), mask=there[:, None] & (a < A))
        tl.store(sums_ptr + share + a, tl.sum(dk, 0), mask=a < A)
        tl.store(sums_ptr + second + share + a, tl.sum(tl.where(kept[:, None], de * h, 0.0), 0), mask=a < A)


@kernel
def sum_rows_kernel(sums_ptr, out_ptr, R, A, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    # out (groups, A) = the sums over R rows each of sums (groups, R, A)
    parts = tl.cdiv(tl.maximum(A, 1), BLOCK)
    pid = tl.program_id(0)
    group = (pid // parts).to(tl.int64)
    a = (pid % parts) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, R, ROWS):
        r = first + tl.arange(0, ROWS)
        at = (group * R + r.to(tl.int64)) * A
        total += tl.load(sums_ptr + at[:, None] + a, mask=(r < R)[:, None] & (a < A), other=0.0)
    tl.store(out_ptr + group * A + a, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=a < A)
