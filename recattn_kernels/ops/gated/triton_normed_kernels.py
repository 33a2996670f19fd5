"""rnn, lstm and gru with layer normalisation in Triton, by two launches a step: the product, over a grid of blocks, and
all that needs whole rows, by programs that have them. BLOCK_H is the next power of two from H on. An absent argument is
None; what has no stride is contiguous, and time-major."""

# mypy: ignore-errors

from __future__ import annotations

from functools import partial

import triton.language as tl

from recattn_kernels.ops.gated.triton_cells import (
    add_bias,
    eights,
    length_of,
    load_keep,
    load_tiles,
    proceeds_at,
    rows_at,
    state_before,
    step_forward,
    store_tiles,
    tile_at,
    time_of,
    to_float,
    whole_rows,
)
from recattn_kernels.ops.gated.triton_normed_cells import (
    load_norm,
    norm_forward,
    norm_of_c,
    normed_backward,
    store_norm,
)
from recattn_kernels.ops.gated.triton_step_kernels import add_products, add_through
from recattn_kernels.triton_launch import kernel
from recattn_kernels.triton_math import add_tiles


@partial(kernel, aligned=("weight_hh_ptr", "h_ptr"))
def forward_product_kernel(
    weight_hh_ptr, h_ptr, products_ptr, reset_ptr, i, T, B, H, reset_stride_t, reset_stride_b,
    GATES: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # products (B, G*H) = W_hh h[t-1], of the i-th step taken
    H = eights(H, ALIGNED)
    t = time_of(i, T, REVERSE)
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    n = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    rows, units = b < B, n < GATES * H
    proceeds = proceeds_at(reset_ptr, t, reset_stride_t, b, reset_stride_b, rows)
    sums = (tl.zeros((BLOCK_B, BLOCK_H), tl.float32),)
    sums = add_products(sums, weight_hh_ptr, h_ptr, b, n, H, proceeds, units, 0, PRECISION, BLOCK_K)
    tl.store(rows_at(products_ptr, b, GATES * H, n), sums[0], mask=rows[:, None] & units[None, :])


@kernel
def forward_normed_kernel(
    x_ptr, products_ptr, bias_hh_ptr, ln_weight_ptr, ln_bias_ptr, ln_c_weight_ptr, ln_c_bias_ptr, h_ptr, c_ptr,
    reset_ptr, lengths_ptr, keep_h_ptr, keep_c_ptr, output_ptr, gates_ptr, cells_ptr, normed_ptr, rstd_ptr, i, T, B, H,
    x_stride_t, x_stride_b, reset_stride_t, reset_stride_b, keep_h_stride_t, keep_h_stride_b,
    keep_c_stride_t, keep_c_stride_b, output_stride_t, output_stride_b, zoneout_h, zoneout_c,
    CELL: tl.constexpr, GATES: tl.constexpr, KEPT: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    # q = LN(W_hh h[t-1]) + bias_hh;  h[t], c[t] = cell(x[t], q, h[t-1], c[t-1]), of the i-th step taken
    # h, c (B, H): the states, which this kernel brings up to date.
    t = time_of(i, T, REVERSE)
    b, n, rows, units, mask, column, size = whole_rows(B, H, BLOCK_B, BLOCK_H)
    proceeds = proceeds_at(reset_ptr, t, reset_stride_t, b, reset_stride_b, rows)
    valid = t < length_of(lengths_ptr, b, rows, T)
    products = load_tiles(rows_at(products_ptr, b, GATES * H, n), H, mask, GATES)
    x = to_float(load_tiles(tile_at(x_ptr, t, x_stride_t, b, x_stride_b, n), H, mask, GATES))
    h = tl.load(h_ptr + column, mask=mask, other=0.0)
    c = tl.zeros_like(h)
    if c_ptr is not None:
        c = tl.load(c_ptr + column, mask=mask, other=0.0)
    keep_h = load_keep(keep_h_ptr, t, keep_h_stride_t, b, keep_h_stride_b, n, mask)
    keep_c = load_keep(keep_c_ptr, t, keep_c_stride_t, b, keep_c_stride_b, n, mask)

    q, normed, rstd = norm_forward(products, ln_weight_ptr, ln_bias_ptr, n, H, units, GATES)
    q = add_bias(q, bias_hh_ptr, n, H, units, 0)
    norm_c = norm_of_c(ln_c_weight_ptr, ln_c_bias_ptr, n, H, units)
    y, h, c, kept = step_forward(x, q, h, c, proceeds, valid, keep_h, keep_c, zoneout_h, zoneout_c, CELL, norm_c)
    here = tile_at(output_ptr, t, output_stride_t, b, output_stride_b, n)
    tl.store(here, y.to(output_ptr.dtype.element_ty), mask=mask)
    tl.store(h_ptr + column, h, mask=mask)
    if c_ptr is not None:
        tl.store(c_ptr + column, c, mask=mask)
    if gates_ptr is not None:
        store_tiles(tile_at(gates_ptr, t, size * KEPT, b, H * KEPT, n), H, mask, kept)
    if cells_ptr is not None:
        tl.store(tile_at(cells_ptr, t, size, b, H, n), c, mask=mask)
    if normed_ptr is not None:
        store_norm(normed_ptr, rstd_ptr, t, b, n, B, H, mask, rows, normed, rstd)


@kernel
def backward_normed_kernel(
    grad_output_ptr, dh_ptr, dc_ptr, sums_ptr, output_ptr, ln_weight_ptr, ln_c_weight_ptr, ln_c_bias_ptr, h0_ptr,
    c0_ptr, reset_ptr, lengths_ptr, keep_h_ptr, keep_c_ptr, gates_ptr, cells_ptr, normed_ptr, rstd_ptr, dx_ptr, dq_ptr,
    i, T, B, H, grad_output_stride_t, grad_output_stride_b, output_stride_t, output_stride_b,
    reset_stride_t, reset_stride_b, keep_h_stride_t, keep_h_stride_b, keep_c_stride_t, keep_c_stride_b,
    gates_stride_t, gates_stride_b, dx_stride_t, dx_stride_b, dq_stride_t, dq_stride_b, zoneout_h, zoneout_c, grad_clip,
    CELL: tl.constexpr, GATES: tl.constexpr, KEPT: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    # dh[t] = clip(dy[t] + dh');  dx[t], dq[t] = backward of the cell and of LN;  dh' from h[t] past dq[t]
    # dh, dc (B, H): what reaches the states after a step, and then, but for the product, before it.
    # sums (B, ...): of each row, the gradients of LN's parameters, side by side. i counts from the last step.
    t = time_of(i, T, not REVERSE)
    b, n, rows, units, mask, column, size = whole_rows(B, H, BLOCK_B, BLOCK_H)
    length = length_of(lengths_ptr, b, rows, T)
    valid = t < length
    proceeds = proceeds_at(reset_ptr, t, reset_stride_t, b, reset_stride_b, rows)
    dh = tl.load(dh_ptr + column, mask=mask, other=0.0)
    dc = tl.zeros_like(dh)
    kept = to_float(load_tiles(tile_at(gates_ptr, t, gates_stride_t, b, gates_stride_b, n), H, mask, KEPT))
    dy = None
    if grad_output_ptr is not None:
        here = tile_at(grad_output_ptr, t, grad_output_stride_t, b, grad_output_stride_b, n)
        dy = tl.load(here, mask=mask, other=0.0).to(tl.float32)
    keep_h = load_keep(keep_h_ptr, t, keep_h_stride_t, b, keep_h_stride_b, n, mask)
    keep_c = load_keep(keep_c_ptr, t, keep_c_stride_t, b, keep_c_stride_b, n, mask)
    h, c = tl.zeros_like(dh), tl.zeros_like(dh)
    if CELL == "gru":
        h = state_before(output_ptr, h0_ptr, t, output_stride_t, b, output_stride_b, n, column, length, mask, REVERSE)
    if CELL == "lstm":
        dc = tl.load(dc_ptr + column, mask=mask, other=0.0)
        c = state_before(cells_ptr, c0_ptr, t, size, b, H, n, column, length, mask, REVERSE)
    normed, rstd = load_norm(normed_ptr, rstd_ptr, t, b, n, B, H, mask, rows, GATES)

    norm_c = norm_of_c(ln_c_weight_ptr, ln_c_bias_ptr, n, H, units)
    dx, dq, dh, dc, shares = normed_backward(
        dy, dh, dc, kept, h, c, proceeds, valid, keep_h, keep_c, zoneout_h, zoneout_c, grad_clip, normed, rstd,
        ln_weight_ptr, norm_c, n, H, units, CELL, GATES,
    )  # fmt: skip
    tl.store(dh_ptr + column, dh, mask=mask)
    if CELL == "lstm":
        tl.store(dc_ptr + column, dc, mask=mask)
    store_tiles(tile_at(dx_ptr, t, dx_stride_t, b, dx_stride_b, n), H, mask, dx)
    store_tiles(tile_at(dq_ptr, t, dq_stride_t, b, dq_stride_b, n), H, mask, dq)
    at = rows_at(sums_ptr, b, H * len(shares), n)
    store_tiles(at, H, mask, add_tiles(load_tiles(at, H, mask, len(shares)), shares))


@partial(kernel, aligned=("weight_hh_ptr", "dq_ptr"))
def backward_product_kernel(
    dh_ptr, weight_hh_ptr, reset_ptr, dq_ptr, i, T, B, H, reset_stride_t, reset_stride_b, dq_stride_t, dq_stride_b,
    GATES: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # dh += dq[t] W_hh, where h[t-1] was not reset: what backward_normed_kernel leaves of the i-th step from the last
    H = eights(H, ALIGNED)
    t = time_of(i, T, not REVERSE)
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    n = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    rows, units = b < B, n < H
    mask = rows[:, None] & units[None, :]
    proceeds = proceeds_at(reset_ptr, t, reset_stride_t, b, reset_stride_b, rows)
    dq_at = tile_at(dq_ptr, t, eights(dq_stride_t, ALIGNED), b, eights(dq_stride_b, ALIGNED), tl.arange(0, BLOCK_K))
    through_q = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    through_q = add_through(through_q, dq_at, weight_hh_ptr, n, GATES * H, H, proceeds, units, PRECISION, BLOCK_K)
    at = rows_at(dh_ptr, b, H, n)
    tl.store(at, tl.load(at, mask=mask, other=0.0) + through_q, mask=mask)
