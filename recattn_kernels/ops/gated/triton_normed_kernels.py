"""rnn, lstm and gru with layer normalisation in Triton, by two launches a step: the product, over a grid of blocks, and
all that needs whole rows, by programs that have them. BLOCK_H is the next power of two from H on. An absent argument is
None; what has no stride is contiguous, and time-major."""

# mypy: ignore-errors

from __future__ import annotations

from functools import partial

import triton
import triton.language as tl

from recattn_kernels.ops.gated.triton_cells import (
    arrive,
    eights,
    leave,
    length_of,
    load_keep,
    load_tiles,
    proceeds_at,
    rows_at,
    squash,
    state_before,
    step_forward,
    store_tiles,
    tile_at,
    time_of,
    to_float,
    where_all,
)
from recattn_kernels.ops.gated.triton_step_kernels import add_bias, add_products, add_through
from recattn_kernels.triton_launch import kernel
from recattn_kernels.triton_math import normalise, normalise_backward, products_of


@triton.jit
def load_row(ptr, n, units):
    """A parameter's values for the units n. (1, units)"""
    return tl.load(ptr + n, mask=units, other=0.0).to(tl.float32)[None, :]


@triton.jit
def scaled(tiles, weight_ptr, n, H, units):
    """The tiles, each with its own part of a layer norm's weight."""
    products = ()
    for g in tl.static_range(len(tiles)):
        products += (tiles[g] * load_row(weight_ptr + g * H, n, units),)
    return products


@triton.jit
def load_norm_c(ln_c_weight_ptr, ln_c_bias_ptr, n, H, units):
    """squash()'s norm_c, None without one."""
    norm_c = None
    if ln_c_weight_ptr is not None:
        norm_c = (load_row(ln_c_weight_ptr, n, units), load_row(ln_c_bias_ptr, n, units), units, H)
    return norm_c


@triton.jit
def add_to(at, H, mask, tiles):
    """Adds the tiles to those that lie H apart in memory, which no other program touches."""
    for g in tl.static_range(len(tiles)):
        tl.store(at + g * H, tl.load(at + g * H, mask=mask, other=0.0) + tiles[g], mask=mask)


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
    # LN(v) = normed * weight + bias;  normed = (v - mean(v)) / sqrt(mean((v - mean(v))^2) + 1e-5) over all gates
    # h, c (B, H): the states, which this kernel brings up to date.
    t = time_of(i, T, REVERSE)
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    n = tl.arange(0, BLOCK_H)
    rows, units = b < B, n < H
    mask = rows[:, None] & units[None, :]
    size = B.to(tl.int64) * H
    column = (b.to(tl.int64) * H)[:, None] + n[None, :]
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

    normed, rstd = normalise(products, units, H * GATES)
    q = add_bias(scaled(normed, ln_weight_ptr, n, H, units), ln_bias_ptr, n, H, units, 0)
    q = add_bias(q, bias_hh_ptr, n, H, units, 0)
    norm_c = load_norm_c(ln_c_weight_ptr, ln_c_bias_ptr, n, H, units)
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
        store_tiles(tile_at(normed_ptr, t, size * GATES, b, H * GATES, n), H, mask, normed)
        tl.store(rstd_ptr + t * B.to(tl.int64) + b[:, None], rstd, mask=rows[:, None])


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
    # dh[t] = clip(dy[t] + dh');  dx[t], dq[t] = cell's backward of it;  d = dq[t] * weight
    # dL/d(W_hh h[t-1]) = rstd * (d - mean(d) - normed * mean(d * normed));  dweight += dq[t] * normed;  dbias += dq[t]
    # dh, dc (B, H): what reaches the states after a step, and then, but for the product, before it. dq_ptr: of W_hh h.
    # The lstm's c' goes through a layer norm likewise. sums (B, ...): dweight, dbias and those of c', of each row.
    # i counts from the last step.
    t = time_of(i, T, not REVERSE)
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    n = tl.arange(0, BLOCK_H)
    rows, units = b < B, n < H
    mask = rows[:, None] & units[None, :]
    size = B.to(tl.int64) * H
    column = (b.to(tl.int64) * H)[:, None] + n[None, :]
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

    old, new = arrive(dy, dh, dc, keep_h, keep_c, zoneout_h, zoneout_c, grad_clip)
    squashed = None
    sums = rows_at(sums_ptr, b, (2 * GATES + 2 if CELL == "lstm" else 2 * GATES) * H, n)
    if CELL == "lstm":
        input, forget, candidate, out = kept
        norm_c = load_norm_c(ln_c_weight_ptr, ln_c_bias_ptr, n, H, units)
        y, normed_c, rstd_c = squash(forget * tl.where(proceeds, c, 0.0) + input * candidate, norm_c)
        dln_c = new[0] * out * (1.0 - y * y)
        through = normalise_backward((dln_c * norm_c[0],), (normed_c,), rstd_c, units, H)
        squashed = (y, through[0])
        add_to(sums + 2 * GATES * H, H, mask, where_all(valid, (dln_c * normed_c, dln_c)))
    dx, dq, dh, dc = leave(dh, dc, old, new, kept, h, c, proceeds, valid, CELL, squashed)
    tl.store(dh_ptr + column, dh, mask=mask)
    if CELL == "lstm":
        tl.store(dc_ptr + column, dc, mask=mask)
    store_tiles(tile_at(dx_ptr, t, dx_stride_t, b, dx_stride_b, n), H, mask, dx)

    normed = load_tiles(tile_at(normed_ptr, t, size * GATES, b, H * GATES, n), H, mask, GATES)
    rstd = tl.load(rstd_ptr + t * B.to(tl.int64) + b[:, None], mask=rows[:, None], other=0.0)
    add_to(sums, H, mask, where_all(valid, products_of(dq, normed)))
    add_to(sums + GATES * H, H, mask, dq)
    through = normalise_backward(scaled(dq, ln_weight_ptr, n, H, units), normed, rstd, units, H * GATES)
    store_tiles(tile_at(dq_ptr, t, dq_stride_t, b, dq_stride_b, n), H, mask, where_all(valid, through))


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
