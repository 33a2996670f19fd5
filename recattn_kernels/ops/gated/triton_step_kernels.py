"""rnn, lstm and gru in Triton by one launch a step, over a grid of blocks of rows and of units: for weights that one
program cannot hold. gru_before, one of whose products is with what another gives, takes two. An absent argument is
None; what has no stride is contiguous, and time-major."""

# mypy: ignore-errors

from __future__ import annotations

from functools import partial

import triton
import triton.language as tl

from recattn_kernels.ops.gated.triton_cells import (
    add_bias,
    eights,
    length_of,
    load_keep,
    load_tiles,
    proceeds_at,
    product,
    reset_backward,
    reset_state,
    rows_at,
    state_before,
    step_backward,
    step_forward,
    store_tiles,
    tile_at,
    time_of,
    to_float,
)
from recattn_kernels.triton_launch import kernel


@triton.jit
def size_of(H):
    """The elements of one gate's weights."""
    return H.to(tl.int64) * H


@triton.jit
def add_products(
    sums, weight_hh_ptr, state_ptr, b, n, H, rows, units, FIRST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The products of a state (B, H), 0 but in `rows`, with the weights of as many gates as there are sums."""
    k = tl.arange(0, BLOCK_K)
    weight_at = weight_hh_ptr + FIRST * size_of(H) + (n.to(tl.int64) * H)[None, :] + k[:, None]  # (BLOCK_K, BLOCK_H)
    state_at = rows_at(state_ptr, b, H, k)  # (BLOCK_B, BLOCK_K)
    for first in range(0, H, BLOCK_K):
        inner = first + k < H
        state = tl.load(state_at + first, mask=rows & inner[None, :], other=0.0)
        added = ()
        for g in tl.static_range(len(sums)):
            at = weight_at + g * size_of(H) + first
            weight = tl.load(at, mask=inner[:, None] & units[None, :], other=0.0)
            added += (product(state, weight, sums[g], PRECISION),)
        sums = added
    return sums


@triton.jit
def add_through(total, dq_at, weight_ptr, n, end, H, rows, units, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr):
    """What reaches the state through the first `end` of dq, whose first BLOCK_K are at dq_at, 0 but in `rows`."""
    k = tl.arange(0, BLOCK_K)
    for first in range(0, end, BLOCK_K):
        row = first + k
        inner = row < end
        dq = tl.load(dq_at + first, mask=rows & inner[None, :], other=0.0)
        at = weight_ptr + (row.to(tl.int64) * H)[:, None] + n[None, :]  # (BLOCK_K, BLOCK_H)
        weight = tl.load(at, mask=inner[:, None] & units[None, :], other=0.0)
        total = product(dq, weight, total, PRECISION)
    return total


@partial(kernel, aligned=("weight_hh_ptr", "states_ptr"))
def forward_reset_kernel(
    x_ptr, weight_hh_ptr, bias_hh_ptr, states_ptr, reset_state_ptr, reset_ptr, i, T, B, H,
    x_stride_t, x_stride_b, reset_stride_t, reset_stride_b,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # q_r = W_hr h[t-1] + bias_r;  r * h[t-1], of the i-th step taken: what gru_before's forward_step_kernel multiplies
    # reset_state (2, B, H): both of them. states: as there.
    H = eights(H, ALIGNED)
    t = time_of(i, T, REVERSE)
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    n = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    rows, units = b < B, n < H
    mask = rows[:, None] & units[None, :]
    size = B.to(tl.int64) * H
    before_ptr = states_ptr + (i % 2) * size
    proceeds = proceeds_at(reset_ptr, t, reset_stride_t, b, reset_stride_b, rows)
    column = (b.to(tl.int64) * H)[:, None] + n[None, :]
    x = tl.load(tile_at(x_ptr, t, x_stride_t, b, x_stride_b, n), mask=mask, other=0.0).to(tl.float32)
    h = tl.load(before_ptr + column, mask=mask & proceeds, other=0.0)
    q = (tl.zeros_like(h),)
    q = add_products(q, weight_hh_ptr, before_ptr, b, n, H, proceeds, units, 0, PRECISION, BLOCK_K)
    q = add_bias(q, bias_hh_ptr, n, H, units, 0)
    tl.store(reset_state_ptr + column, q[0], mask=mask)
    tl.store(reset_state_ptr + size + column, reset_state(x, q[0], h), mask=mask)


@partial(kernel, aligned=("weight_hh_ptr", "states_ptr"))
def forward_step_kernel(
    x_ptr, weight_hh_ptr, bias_hh_ptr, states_ptr, reset_state_ptr, c_ptr, reset_ptr, lengths_ptr, keep_h_ptr,
    keep_c_ptr, output_ptr, gates_ptr, cells_ptr, i, T, B, H,
    x_stride_t, x_stride_b, reset_stride_t, reset_stride_b, keep_h_stride_t, keep_h_stride_b,
    keep_c_stride_t, keep_c_stride_b, output_stride_t, output_stride_b, zoneout_h, zoneout_c,
    CELL: tl.constexpr, GATES: tl.constexpr, KEPT: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # q = W_hh h[t-1] + bias_hh;  h[t], c[t] = cell(x[t], q, h[t-1], c[t-1]), of the i-th step taken
    # states (2, B, H): h[t-1] and h[t], which change places from step to step, as every program reads all of h[t-1].
    H = eights(H, ALIGNED)
    t = time_of(i, T, REVERSE)
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    n = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    rows, units = b < B, n < H
    mask = rows[:, None] & units[None, :]
    size = B.to(tl.int64) * H
    before_ptr, after_ptr = states_ptr + (i % 2) * size, states_ptr + ((i + 1) % 2) * size
    proceeds = proceeds_at(reset_ptr, t, reset_stride_t, b, reset_stride_b, rows)
    valid = t < length_of(lengths_ptr, b, rows, T)
    here = tile_at(x_ptr, t, x_stride_t, b, x_stride_b, n)
    x = to_float(load_tiles(here, H, mask, GATES))
    column = (b.to(tl.int64) * H)[:, None] + n[None, :]
    h = tl.load(before_ptr + column, mask=mask, other=0.0)
    c = tl.zeros_like(h)
    if c_ptr is not None:
        c = tl.load(c_ptr + column, mask=mask, other=0.0)
    keep_h = load_keep(keep_h_ptr, t, keep_h_stride_t, b, keep_h_stride_b, n, mask)
    keep_c = load_keep(keep_c_ptr, t, keep_c_stride_t, b, keep_c_stride_b, n, mask)

    zero = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    if CELL == "gru_before":
        q_r = tl.load(reset_state_ptr + column, mask=mask, other=0.0)
        q_z = add_products((zero,), weight_hh_ptr, before_ptr, b, n, H, proceeds, units, 1, PRECISION, BLOCK_K)
        q_n = add_products(
            (zero,), weight_hh_ptr, reset_state_ptr + size, b, n, H, rows[:, None], units, 2, PRECISION, BLOCK_K
        )
        q = (q_r,)
        q += add_bias(q_z + q_n, bias_hh_ptr, n, H, units, 1)
    else:
        q = ()
        for _ in tl.static_range(GATES):
            q += (zero,)
        q = add_products(q, weight_hh_ptr, before_ptr, b, n, H, proceeds, units, 0, PRECISION, BLOCK_K)
        q = add_bias(q, bias_hh_ptr, n, H, units, 0)

    y, h, c, kept = step_forward(x, q, h, c, proceeds, valid, keep_h, keep_c, zoneout_h, zoneout_c, CELL)
    here = tile_at(output_ptr, t, output_stride_t, b, output_stride_b, n)
    tl.store(here, y.to(output_ptr.dtype.element_ty), mask=mask)
    tl.store(after_ptr + column, h, mask=mask)
    if c_ptr is not None:
        tl.store(c_ptr + column, c, mask=mask)
    if gates_ptr is not None:
        store_tiles(tile_at(gates_ptr, t, size * KEPT, b, H * KEPT, n), H, mask, kept)
    if cells_ptr is not None:
        tl.store(tile_at(cells_ptr, t, size, b, H, n), c, mask=mask)


@partial(kernel, aligned=("weight_hh_ptr", "dq_ptr"))
def backward_step_kernel(
    grad_output_ptr, dh_ptr, dc_ptr, output_ptr, weight_hh_ptr, h0_ptr, c0_ptr, reset_ptr, lengths_ptr,
    keep_h_ptr, keep_c_ptr, gates_ptr, cells_ptr, dx_ptr, dq_ptr, i, T, B, H,
    grad_output_stride_t, grad_output_stride_b, output_stride_t, output_stride_b, reset_stride_t, reset_stride_b,
    keep_h_stride_t, keep_h_stride_b, keep_c_stride_t, keep_c_stride_b, gates_stride_t, gates_stride_b,
    dx_stride_t, dx_stride_b, dq_stride_t, dq_stride_b, zoneout_h, zoneout_c, grad_clip,
    CELL: tl.constexpr, GATES: tl.constexpr, KEPT: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # dh[t] = clip(dy[t] + dh' + dq[t+1] W_hh);  dx[t], dq[t] = cell's backward of it;  dh' from h[t] past dq[t]
    # dh, dc (B, H): what reaches the states before a step, dh without the part through dq. i counts from the last step.
    H = eights(H, ALIGNED)
    t = time_of(i, T, not REVERSE)
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    n = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    rows, units = b < B, n < H
    mask = rows[:, None] & units[None, :]
    length = length_of(lengths_ptr, b, rows, T)
    valid = t < length
    column = (b.to(tl.int64) * H)[:, None] + n[None, :]
    dh = tl.load(dh_ptr + column, mask=mask, other=0.0)
    dc = tl.zeros_like(dh)
    kept = load_tiles(tile_at(gates_ptr, t, gates_stride_t, b, gates_stride_b, n), H, mask, KEPT)
    dy = None
    if grad_output_ptr is not None:
        here = tile_at(grad_output_ptr, t, grad_output_stride_t, b, grad_output_stride_b, n)
        dy = tl.load(here, mask=mask, other=0.0).to(tl.float32)
    proceeds = proceeds_at(reset_ptr, t, reset_stride_t, b, reset_stride_b, rows)
    keep_h = load_keep(keep_h_ptr, t, keep_h_stride_t, b, keep_h_stride_b, n, mask)
    keep_c = load_keep(keep_c_ptr, t, keep_c_stride_t, b, keep_c_stride_b, n, mask)
    h, c = tl.zeros_like(dh), tl.zeros_like(dh)
    if CELL == "gru" or CELL == "gru_before":
        h = state_before(output_ptr, h0_ptr, t, output_stride_t, b, output_stride_b, n, column, length, mask, REVERSE)
    if CELL == "lstm":
        dc = tl.load(dc_ptr + column, mask=mask, other=0.0)
        c = state_before(cells_ptr, c0_ptr, t, B.to(tl.int64) * H, b, H, n, column, length, mask, REVERSE)

    later = t - 1 if REVERSE else t + 1
    # The last step taken has none after it: no products. gru_before's dn went through r, by backward_reset_kernel.
    inner_end = tl.where(i > 0, (2 if CELL == "gru_before" else GATES) * H, 0)
    continued = proceeds_at(reset_ptr, later, reset_stride_t, b, reset_stride_b, rows & (i > 0))
    dq_at = tile_at(
        dq_ptr, later, eights(dq_stride_t, ALIGNED), b, eights(dq_stride_b, ALIGNED), tl.arange(0, BLOCK_K)
    )  # (BLOCK_B, BLOCK_K)
    through_q = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    through_q = add_through(through_q, dq_at, weight_hh_ptr, n, inner_end, H, continued, units, PRECISION, BLOCK_K)

    dx, dq, dh, dc = step_backward(
        dy, dh + through_q, dc, to_float(kept), h, c, proceeds, valid, keep_h, keep_c, zoneout_h, zoneout_c, grad_clip,
        CELL,
    )  # fmt: skip
    tl.store(dh_ptr + column, dh, mask=mask)
    if CELL == "lstm":
        tl.store(dc_ptr + column, dc, mask=mask)
    store_tiles(tile_at(dq_ptr, t, dq_stride_t, b, dq_stride_b, n), H, mask, dq)
    if dx_ptr is not None:
        store_tiles(tile_at(dx_ptr, t, dx_stride_t, b, dx_stride_b, n), H, mask, dx)


@partial(kernel, aligned=("weight_hh_ptr", "dq_ptr"))
def backward_reset_kernel(
    dh_ptr, output_ptr, weight_hh_ptr, h0_ptr, reset_ptr, lengths_ptr, gates_ptr, dx_ptr, dq_ptr, i, T, B, H,
    output_stride_t, output_stride_b, reset_stride_t, reset_stride_b, gates_stride_t, gates_stride_b,
    dx_stride_t, dx_stride_b, dq_stride_t, dq_stride_b,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # d = W_hn^T dn[t];  dr[t] = d * h[t-1] * r * (1 - r);  dh' += d * r: what gru_before's backward_step_kernel leaves
    H = eights(H, ALIGNED)
    t = time_of(i, T, not REVERSE)
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    n = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    rows, units = b < B, n < H
    mask = rows[:, None] & units[None, :]
    length = length_of(lengths_ptr, b, rows, T)
    proceeds = proceeds_at(reset_ptr, t, reset_stride_t, b, reset_stride_b, rows)
    column = (b.to(tl.int64) * H)[:, None] + n[None, :]
    dh = tl.load(dh_ptr + column, mask=mask, other=0.0)
    r = tl.load(tile_at(gates_ptr, t, gates_stride_t, b, gates_stride_b, n), mask=mask, other=0.0)
    h = state_before(output_ptr, h0_ptr, t, output_stride_t, b, output_stride_b, n, column, length, mask, REVERSE)
    dn_at = tile_at(
        dq_ptr + 2 * H, t, eights(dq_stride_t, ALIGNED), b, eights(dq_stride_b, ALIGNED), tl.arange(0, BLOCK_K)
    )
    d = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    d = add_through(d, dn_at, weight_hh_ptr + 2 * size_of(H), n, H, H, rows[:, None], units, PRECISION, BLOCK_K)
    dr, through_reset = reset_backward(d, r, h, proceeds, t < length)
    tl.store(dh_ptr + column, dh + through_reset, mask=mask)
    at = tile_at(dq_ptr, t, dq_stride_t, b, dq_stride_b, n)
    tl.store(at, dr.to(dq_ptr.dtype.element_ty), mask=mask)
    if dx_ptr is not None:
        at = tile_at(dx_ptr, t, dx_stride_t, b, dx_stride_b, n)
        tl.store(at, dr.to(dx_ptr.dtype.element_ty), mask=mask)
