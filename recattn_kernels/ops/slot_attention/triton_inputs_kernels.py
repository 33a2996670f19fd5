"""The Triton kernel of dk and dv of several calls of slot attention: a program takes one block of a sample's inputs.

The block is (BLOCK_N, ROWS), inputs by slots: A and dS, as the first product leaves them in the registers, are then
what the last products multiply, and the inputs fill the rows of a matrix unit that 16 slots would not.
"""

# mypy: ignore-errors

from __future__ import annotations

from functools import partial

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


@partial(kernel, aligned=("calls_ptr", "k_ptr", "v_ptr", "dk_ptr", "dv_ptr"))
def inputs_backward_kernel(
    calls_ptr, k_ptr, v_ptr, slot_mask_ptr, input_mask_ptr, dk_ptr, dv_ptr, scale, eps, T, B, H, K, N, D, E,
    k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
    DENOMINATOR: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SCORE_TYPE: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    # calls: (T, B, H, K, D + E + E + 2), of each of T calls and of each slot q, dupdates, updates, bias, den
    # A[n, k] = softmax over k of scale * q[k] . k[n] + bias[k];  g = dupdates / den
    # dA[n, k] = g[k] . v[n] - g[k] . updates[k];  dS = A * (dA - sum over j of A[n, j] dA[n, j])
    # dv[n] = sum over calls and k of (A + eps) g[k];  dk[n] = scale * sum over calls and k of dS q[k]
    program, blocks = tl.program_id(0), tl.cdiv(N, BLOCK_N)
    chunk, block, sample = program % CHUNKS, program // CHUNKS % blocks, program // CHUNKS // blocks
    b, h, first_row, _, _, valid = sample_rows(slot_mask_ptr, sample, H, K, 1, ROWS)
    D, E = hint(D, ALIGNED), hint(E, ALIGNED)
    k_stride_b, k_stride_h, k_stride_n = hint(k_stride_b, ALIGNED), hint(k_stride_h, ALIGNED), hint(k_stride_n, ALIGNED)
    v_stride_b, v_stride_h, v_stride_n = hint(v_stride_b, ALIGNED), hint(v_stride_h, ALIGNED), hint(v_stride_n, ALIGNED)
    stride = D + E + E + 2
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
        bias = tl.load(calls_ptr + row * stride + D + E + E, mask=valid, other=0.0)
        den = tl.load(calls_ptr + row * stride + D + E + E + 1, mask=valid, other=0.0)
        own_q = load_rows(calls_ptr, row, stride, valid, D, chunk, BLOCK_D)
        own_g = flow(calls_ptr + D, den, row, stride, valid, E, chunk, BLOCK_D, TYPE, PRECISION)
        scores, grad = tl.zeros((BLOCK_N, ROWS), tl.float32), tl.zeros((BLOCK_N, ROWS), tl.float32)
        delta = tl.zeros((ROWS,), tl.float32)
        for c in range(chunks_of(tl.maximum(D, E), CHUNKS, BLOCK_D)):
            keys_c, values_c, q_c, g_c = keys, values, own_q, own_g
            if CHUNKS > 1:
                keys_c = load_rows(k_ptr, n, k_stride_n, keep, D, c, BLOCK_D)
                q_c = load_rows(calls_ptr, row, stride, valid, D, c, BLOCK_D)
            scores = product(keys_c, tl.trans(q_c), scores, SCORE_TYPE, PRECISION)
            if dk_ptr is not None:
                if CHUNKS > 1:
                    values_c = keys_c
                    if v_ptr is not None:
                        values_c = load_rows(v_ptr, n, v_stride_n, keep, E, c, BLOCK_D)
                    g_c = flow(calls_ptr + D, den, row, stride, valid, E, c, BLOCK_D, TYPE, PRECISION)
                grad = product(values_c, tl.trans(g_c), grad, TYPE, PRECISION)
                updates = load_rows(calls_ptr + D + E, row, stride, valid, E, c, BLOCK_D)
                delta += tl.sum(g_c.to(tl.float32) * updates, 1)
        attn = competition(scores, scale, bias, valid, keep, 1)
        if dk_ptr is not None:
            grad -= delta[None, :]
            ds = attn * (grad - tl.sum(attn * grad, 1)[:, None])
            dk = product(ds * scale, own_q, dk, TYPE, PRECISION)
        if dv_ptr is not None or v_ptr is None:
            weights = attn
            if not DENOMINATOR:
                weights = tl.where(valid[None, :] & keep[:, None], attn + eps, 0.0)
            if v_ptr is None:
                dk = product(weights, own_g, dk, TYPE, PRECISION)
            else:
                dv = product(weights, own_g, dv, TYPE, PRECISION)
        row += rows
    out = n + (b * H + h) * N
    if dk_ptr is not None:
        store_rows(dk_ptr, out, D, n < N, D, chunk, dk, BLOCK_D)
    if dv_ptr is not None:
        store_rows(dv_ptr, out, E, n < N, E, chunk, dv, BLOCK_D)
