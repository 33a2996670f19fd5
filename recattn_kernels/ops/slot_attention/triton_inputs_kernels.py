"""The Triton kernels of dk and dv of several calls of slot attention: a program takes one block of a sample's inputs.

It reads k and v once, unless they are wider than BLOCK_D, and writes dk and dv once. SLOTS is the dimension of A along
which its slots lie. 1: the inputs fill the rows of a matrix unit that 16 slots would not, and A and dS, as the first
products leave them in the registers, are what the last ones multiply. 0: Triton gives each warp columns of dk and dv
rather than rows, of which, where they are wide, no warp could hold sixteen.
"""

# mypy: ignore-errors

from __future__ import annotations

from functools import partial

import triton
import triton.language as tl

from recattn_kernels.ops.slot_attention.triton_kernels import (
    chunks_of,
    competition,
    flow,
    hint,
    load_rows,
    product,
    sample_rows,
    store_rows,
)
from recattn_kernels.triton_launch import kernel


@triton.jit
def pairs(inputs, slots, total, SLOTS: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """total + the products of each input with each slot, which lie along dimension SLOTS."""
    if SLOTS == 1:
        total = product(inputs, tl.trans(slots), total, TYPE, PRECISION)
    else:
        total = product(slots, tl.trans(inputs), total, TYPE, PRECISION)
    return total


@triton.jit
def over_slots(pairs, slots, total, SLOTS: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """total + for each input, the sum over slots of pairs times slots."""
    if SLOTS == 0:
        pairs = tl.trans(pairs)
    return product(pairs, slots, total, TYPE, PRECISION)


@kernel
def calls_kernel(
    calls_ptr, q_ptr, g_ptr, bias_ptr, delta_ptr, R, D, E, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
    TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # calls: (R, D + E + E + 2), of every slot of every call q, dupdates, updates, bias, den
    # g = dupdates / den;  delta = g . updates
    row, stride = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), D + E + E + 2
    valid = row < R
    last = calls_ptr + row * stride + D + E + E
    den = tl.load(last + 1, mask=valid, other=0.0)
    q = load_rows(calls_ptr, row, stride, valid, D, 0, BLOCK_D)
    g = flow(calls_ptr + D, den, row, stride, valid, E, 0, BLOCK_D, TYPE, PRECISION)
    updates = load_rows(calls_ptr + D + E, row, stride, valid, E, 0, BLOCK_D)
    store_rows(q_ptr, row, D, valid, D, 0, q, BLOCK_D)
    store_rows(g_ptr, row, E, valid, E, 0, g, BLOCK_D)
    tl.store(bias_ptr + row, tl.load(last, mask=valid, other=0.0), mask=valid)
    tl.store(delta_ptr + row, tl.sum(g.to(tl.float32) * updates, 1), mask=valid)


@partial(kernel, aligned=("q_ptr", "k_ptr", "v_ptr", "g_ptr", "dk_ptr", "dv_ptr"))
def inputs_backward_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, bias_ptr, delta_ptr, slot_mask_ptr, input_mask_ptr, dk_ptr, dv_ptr, scale, eps, T, B, H,
    K, N, D, E, k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
    DENOMINATOR: tl.constexpr, SLOTS: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, SCORE_TYPE: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    # A[n, k] = softmax over k of scale * q[k] . k[n] + bias[k], of each of T calls
    # dA[n, k] = g[k] . v[n] - delta[k];  dS = A * (dA - sum over j of A[n, j] dA[n, j])
    # dv[n] = sum over calls and k of (A + eps) g[k];  dk[n] = scale * sum over calls and k of dS q[k]
    program, blocks = tl.program_id(0), tl.cdiv(N, BLOCK_N)
    chunk, block, sample = program % CHUNKS, program // CHUNKS % blocks, program // CHUNKS // blocks
    b, h, first_row, _, _, valid = sample_rows(slot_mask_ptr, sample, H, K, 1, ROWS)
    D, E = hint(D, ALIGNED), hint(E, ALIGNED)
    k_stride_b, k_stride_h, k_stride_n = hint(k_stride_b, ALIGNED), hint(k_stride_h, ALIGNED), hint(k_stride_n, ALIGNED)
    v_stride_b, v_stride_h, v_stride_n = hint(v_stride_b, ALIGNED), hint(v_stride_h, ALIGNED), hint(v_stride_n, ALIGNED)
    k_ptr += b * k_stride_b + h.to(tl.int64) * k_stride_h
    if v_ptr is not None:
        v_ptr += b * v_stride_b + h.to(tl.int64) * v_stride_h
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    keep = n < N
    if input_mask_ptr is not None:
        keep &= tl.load(input_mask_ptr + b * N + n, mask=keep, other=0) != 0
    keys = load_rows(k_ptr, n, k_stride_n, keep, D, chunk, BLOCK_D)
    values = keys
    if v_ptr is not None:
        values = load_rows(v_ptr, n, v_stride_n, keep, E, chunk, BLOCK_D)
    row, rows = first_row + tl.arange(0, ROWS), B.to(tl.int64) * H * K
    dk, dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for _ in range(T):
        own_q = load_rows(q_ptr, row, D, valid, D, chunk, BLOCK_D)
        own_g = load_rows(g_ptr, row, E, valid, E, chunk, BLOCK_D)
        bias = tl.load(bias_ptr + row, mask=valid, other=0.0)
        zero = tl.zeros((BLOCK_N, ROWS) if SLOTS == 1 else (ROWS, BLOCK_N), tl.float32)
        scores, grad = zero, zero
        for c in range(chunks_of(tl.maximum(D, E), CHUNKS, BLOCK_D)):
            keys_c, values_c, q_c, g_c = keys, values, own_q, own_g
            if CHUNKS > 1:
                keys_c = load_rows(k_ptr, n, k_stride_n, keep, D, c, BLOCK_D)
                q_c = load_rows(q_ptr, row, D, valid, D, c, BLOCK_D)
            scores = pairs(keys_c, q_c, scores, SLOTS, SCORE_TYPE, PRECISION)
            if dk_ptr is not None:
                if CHUNKS > 1:
                    values_c = keys_c
                    if v_ptr is not None:
                        values_c = load_rows(v_ptr, n, v_stride_n, keep, E, c, BLOCK_D)
                    g_c = load_rows(g_ptr, row, E, valid, E, c, BLOCK_D)
                grad = pairs(values_c, g_c, grad, SLOTS, TYPE, PRECISION)
        attn = competition(scores, scale, bias, valid, keep, SLOTS)
        if dk_ptr is not None:
            grad -= tl.expand_dims(tl.load(delta_ptr + row, mask=valid, other=0.0), 1 - SLOTS)
            ds = attn * (grad - tl.expand_dims(tl.sum(attn * grad, SLOTS), SLOTS))
            dk = over_slots(ds * scale, own_q, dk, SLOTS, TYPE, PRECISION)
        if dv_ptr is not None or v_ptr is None:
            weights = attn
            if not DENOMINATOR:
                inside = tl.expand_dims(valid, 1 - SLOTS) & tl.expand_dims(keep, SLOTS)
                weights = tl.where(inside, attn + eps, 0.0)
            if v_ptr is None:
                dk = over_slots(weights, own_g, dk, SLOTS, TYPE, PRECISION)
            else:
                dv = over_slots(weights, own_g, dv, SLOTS, TYPE, PRECISION)
        row += rows
    out = n + (b * H + h) * N
    if dk_ptr is not None:
        store_rows(dk_ptr, out, D, n < N, D, chunk, dk, BLOCK_D)
    if dv_ptr is not None:
        store_rows(dv_ptr, out, E, n < N, E, chunk, dv, BLOCK_D)
