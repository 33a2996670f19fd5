"""The Triton kernel of what joint heads share: for each input the sums over all heads' slots, a block of inputs a
program.

With them every head goes on by itself, however many slots there are together. See triton_kernels.py.
"""

# mypy: ignore-errors

from __future__ import annotations

from functools import partial

import triton.language as tl

from recattn_kernels.ops.slot_attention.triton_kernels import (
    delta_of,
    flow,
    gradient_of_attention,
    hint,
    load_rows,
    sample_rows,
    scores_of,
)
from recattn_kernels.triton_launch import kernel


@partial(kernel, aligned=("q_ptr", "k_ptr", "v_ptr", "updates_ptr", "du_ptr"))
def joint_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, slot_mask_ptr, input_mask_ptr, updates_ptr, den_ptr, du_ptr, dattn_ptr,
    most_ptr, total_ptr, average_ptr, scale, H, K, N, D, E, k_stride_b, k_stride_h, k_stride_n,
    v_stride_b, v_stride_h, v_stride_n, CHUNKS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, SCORE_TYPE: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    # S[j, n] = scale * q[j] . k[n] + bias[j], j over the slots of all heads
    # most[n] = max of S[j, n];  total[n] = sum of exp(S[j, n] - most[n]);  average[n] = sum of A[j, n] dA[j, n]
    program, blocks = tl.program_id(0), tl.cdiv(N, BLOCK_N)
    sample, n = program // blocks, program % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    D, E = hint(D, ALIGNED), hint(E, ALIGNED)
    k_stride_b, k_stride_h, k_stride_n = hint(k_stride_b, ALIGNED), hint(k_stride_h, ALIGNED), hint(k_stride_n, ALIGNED)
    v_stride_b, v_stride_h, v_stride_n = hint(v_stride_b, ALIGNED), hint(v_stride_h, ALIGNED), hint(v_stride_n, ALIGNED)
    b = sample.to(tl.int64)
    keep = n < N
    if input_mask_ptr is not None:
        keep &= tl.load(input_mask_ptr + b * N + n, mask=keep, other=0) != 0
    most = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    average = total
    keys_ptr, values_ptr = k_ptr + b * k_stride_b, v_ptr
    if v_ptr is not None:
        values_ptr = v_ptr + b * v_stride_b
    for h in range(H):
        _, _, first_row, head, _, valid = sample_rows(slot_mask_ptr, sample * H + h, H, K, 1, ROWS)
        row = first_row + tl.arange(0, ROWS)
        q = load_rows(q_ptr, row, D, valid, D, 0, BLOCK_D)
        scores, keys = scores_of(
            q, q_ptr, keys_ptr, row, head, valid, n, keep, k_stride_h, k_stride_n, D, 1, CHUNKS, BLOCK_N, BLOCK_D,
            SCORE_TYPE, PRECISION,
        )  # fmt: skip
        scores *= scale
        if bias_ptr is not None:
            scores += tl.load(bias_ptr + row, mask=valid, other=0.0).to(tl.float32)[:, None]
        scores = tl.where(valid[:, None], scores, -float("inf"))
        above = tl.maximum(most, tl.max(scores, 0))
        most_or_0 = tl.where(above == -float("inf"), 0.0, above)
        e, before = tl.exp(scores - most_or_0[None, :]), tl.exp(most - most_or_0)
        total = total * before + tl.sum(e, 0)
        if average_ptr is not None:
            g, den, delta = q, None, None
            if du_ptr is not None:
                den = tl.load(den_ptr + row, mask=valid, other=0.0)
                delta = delta_of(du_ptr, updates_ptr, den, row, valid, E, CHUNKS, BLOCK_D, TYPE, PRECISION)
                g = flow(du_ptr, den, row, E, valid, E, 0, BLOCK_D, TYPE, PRECISION)
            grad = gradient_of_attention(
                keys, g, du_ptr, dattn_ptr, values_ptr, keys_ptr, den, delta, row, head, valid, n, keep, v_stride_h,
                v_stride_n, k_stride_h, k_stride_n, N, E, 1, CHUNKS, BLOCK_N, BLOCK_D, TYPE, PRECISION,
            )  # fmt: skip
            average = average * before + tl.sum(tl.where(valid[:, None], e * grad, 0.0), 0)
        most = above
        keys_ptr += k_stride_h
        if v_ptr is not None:
            values_ptr += v_stride_h
    at = b * N + n
    tl.store(most_ptr + at, tl.where(most == -float("inf"), 0.0, most), mask=n < N)
    tl.store(total_ptr + at, total, mask=n < N)
    if average_ptr is not None:
        tl.store(average_ptr + at, average / tl.where(total == 0.0, 1.0, total), mask=n < N)
