"""rnn, lstm and gru in Triton by one program for all steps of BLOCK_B rows, which holds weight_hh on chip.

BLOCK_H is the next power of two from H on: the units past H are kept at 0, so that no infinity of a real one becomes
NaN there (0 * inf) and comes back. The next step's tiles are loaded while one is computed. An absent argument is None;
what has no stride is contiguous, and time-major.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton.language as tl

from recattn_kernels.ops.gated.triton_cells import (
    add_bias,
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
    where_all,
    whole_rows,
)
from recattn_kernels.ops.gated.triton_normed_cells import (
    load_norm,
    norm_forward,
    norm_of_c,
    normed_backward,
    store_norm,
)
from recattn_kernels.triton_launch import kernel
from recattn_kernels.triton_math import add_tiles


@kernel
def forward_sequence_kernel(
    x_ptr, weight_hh_ptr, bias_hh_ptr, ln_weight_ptr, ln_bias_ptr, ln_c_weight_ptr, ln_c_bias_ptr, h0_ptr, c0_ptr,
    reset_ptr, lengths_ptr, keep_h_ptr, keep_c_ptr, output_ptr, h_n_ptr, c_n_ptr, gates_ptr, cells_ptr, normed_ptr,
    rstd_ptr, T, B, H,
    x_stride_t, x_stride_b, reset_stride_t, reset_stride_b, keep_h_stride_t, keep_h_stride_b,
    keep_c_stride_t, keep_c_stride_b, output_stride_t, output_stride_b, zoneout_h, zoneout_c,
    CELL: tl.constexpr, GATES: tl.constexpr, KEPT: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
    EXACT: tl.constexpr, AHEAD: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    # q = LN(W_hh h[t-1]) + bias_hh, without LN if it has no weight;  h[t], c[t] = cell(x[t], q, h[t-1], c[t-1])
    H = BLOCK_H if EXACT else H
    b, n, rows, units, mask, column, size = whole_rows(B, H, BLOCK_B, BLOCK_H)
    weights = load_tiles(
        weight_hh_ptr + n[None, :] * H + n[:, None], H * H, units[None, :] & units[:, None], GATES
    )  # (BLOCK_H, BLOCK_H) each, transposed
    h = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    c = h
    if h0_ptr is not None:
        h = tl.load(h0_ptr + column, mask=mask, other=0.0).to(tl.float32)
    if c0_ptr is not None:
        c = tl.load(c0_ptr + column, mask=mask, other=0.0).to(tl.float32)
    length = length_of(lengths_ptr, b, rows, T)

    if AHEAD:
        t = time_of(0, T, REVERSE)
        x_next = load_tiles(tile_at(x_ptr, t, x_stride_t, b, x_stride_b, n), H, mask & (T > 0), GATES)
    for i in range(0, T):
        t = time_of(i, T, REVERSE)
        if AHEAD:
            x = to_float(x_next)
            coming = time_of(i + 1, T, REVERSE)
            x_next = load_tiles(tile_at(x_ptr, coming, x_stride_t, b, x_stride_b, n), H, mask & (i + 1 < T), GATES)
        else:
            x = to_float(load_tiles(tile_at(x_ptr, t, x_stride_t, b, x_stride_b, n), H, mask, GATES))
        proceeds = proceeds_at(reset_ptr, t, reset_stride_t, b, reset_stride_b, rows)
        keep_h = load_keep(keep_h_ptr, t, keep_h_stride_t, b, keep_h_stride_b, n, mask)
        keep_c = load_keep(keep_c_ptr, t, keep_c_stride_t, b, keep_c_stride_b, n, mask)
        operand = tl.where(proceeds, h, 0.0)
        q = ()
        for g in tl.static_range(GATES):
            if CELL == "gru_before" and g == 2:
                operand = tl.where(units[None, :], reset_state(x[0], q[0], operand), 0.0)
            q_g = product(operand, weights[g], tl.zeros_like(h), PRECISION)
            if bias_hh_ptr is not None and ln_weight_ptr is None:
                q_g += tl.load(bias_hh_ptr + g * H + n, mask=units, other=0.0).to(tl.float32)[None, :]
            q += (q_g,)
        if ln_weight_ptr is not None:
            q, normed, rstd = norm_forward(q, ln_weight_ptr, ln_bias_ptr, n, H, units, GATES)
            q = add_bias(q, bias_hh_ptr, n, H, units, 0)
            if normed_ptr is not None:
                store_norm(normed_ptr, rstd_ptr, t, b, n, B, H, mask, rows, normed, rstd)
        norm_c = norm_of_c(ln_c_weight_ptr, ln_c_bias_ptr, n, H, units)
        y, h, c, kept = step_forward(
            x, q, h, c, proceeds, t < length, keep_h, keep_c, zoneout_h, zoneout_c, CELL, norm_c
        )
        h = tl.where(units[None, :], h, 0.0)
        tl.store(
            tile_at(output_ptr, t, output_stride_t, b, output_stride_b, n), y.to(output_ptr.dtype.element_ty), mask=mask
        )
        if gates_ptr is not None:
            store_tiles(tile_at(gates_ptr, t, size * KEPT, b, H * KEPT, n), H, mask, kept)
        if cells_ptr is not None:
            tl.store(tile_at(cells_ptr, t, size, b, H, n), c, mask=mask)
    tl.store(h_n_ptr + column, h.to(h_n_ptr.dtype.element_ty), mask=mask)
    if c_n_ptr is not None:
        tl.store(c_n_ptr + column, c.to(c_n_ptr.dtype.element_ty), mask=mask)


@kernel
def backward_sequence_kernel(
    grad_output_ptr, grad_h_n_ptr, grad_c_n_ptr, output_ptr, weight_hh_ptr, ln_weight_ptr, ln_c_weight_ptr,
    ln_c_bias_ptr, h0_ptr, c0_ptr, reset_ptr, lengths_ptr, keep_h_ptr, keep_c_ptr, gates_ptr, cells_ptr, normed_ptr,
    rstd_ptr, dx_ptr, dq_ptr, sums_ptr, grad_h0_ptr, grad_c0_ptr, T, B, H,
    grad_output_stride_t, grad_output_stride_b, output_stride_t, output_stride_b, reset_stride_t, reset_stride_b,
    keep_h_stride_t, keep_h_stride_b, keep_c_stride_t, keep_c_stride_b, gates_stride_t, gates_stride_b,
    dx_stride_t, dx_stride_b, dq_stride_t, dq_stride_b, zoneout_h, zoneout_c, grad_clip,
    CELL: tl.constexpr, GATES: tl.constexpr, KEPT: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
    EXACT: tl.constexpr, AHEAD: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    # dh[t] = clip(dy[t] + dh');  dx[t], dq[t] = cell's backward of it;  dh' = dq[t] W_hh + what is past dq[t]
    # With LN, dq[t] has come through it too. sums (B, ...): of each row, the gradients of its parameters, side by side.
    H = BLOCK_H if EXACT else H
    b, n, rows, units, mask, column, size = whole_rows(B, H, BLOCK_B, BLOCK_H)
    weights = load_tiles(
        weight_hh_ptr + n[:, None] * H + n[None, :], H * H, units[None, :] & units[:, None], GATES
    )  # (BLOCK_H, BLOCK_H) each
    dh = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    dc = dh
    if grad_h_n_ptr is not None:
        dh = tl.load(grad_h_n_ptr + column, mask=mask, other=0.0).to(tl.float32)
    if grad_c_n_ptr is not None:
        dc = tl.load(grad_c_n_ptr + column, mask=mask, other=0.0).to(tl.float32)
    length = length_of(lengths_ptr, b, rows, T)

    sums = ()
    if ln_weight_ptr is not None:
        for _ in tl.static_range(2 * GATES + 2 if CELL == "lstm" else 2 * GATES):
            sums += (tl.zeros((BLOCK_B, BLOCK_H), tl.float32),)

    if AHEAD:
        t = time_of(0, T, not REVERSE)
        kept_next = load_tiles(tile_at(gates_ptr, t, gates_stride_t, b, gates_stride_b, n), H, mask & (T > 0), KEPT)
    for i in range(0, T):
        t = time_of(i, T, not REVERSE)
        if AHEAD:
            kept = to_float(kept_next)
            coming = time_of(i + 1, T, not REVERSE)
            inside = mask & (i + 1 < T)
            kept_next = load_tiles(tile_at(gates_ptr, coming, gates_stride_t, b, gates_stride_b, n), H, inside, KEPT)
        else:
            kept = to_float(load_tiles(tile_at(gates_ptr, t, gates_stride_t, b, gates_stride_b, n), H, mask, KEPT))
        dy = None
        if grad_output_ptr is not None:
            here = tile_at(grad_output_ptr, t, grad_output_stride_t, b, grad_output_stride_b, n)
            dy = tl.load(here, mask=mask, other=0.0).to(tl.float32)
        proceeds = proceeds_at(reset_ptr, t, reset_stride_t, b, reset_stride_b, rows)
        keep_h = load_keep(keep_h_ptr, t, keep_h_stride_t, b, keep_h_stride_b, n, mask)
        keep_c = load_keep(keep_c_ptr, t, keep_c_stride_t, b, keep_c_stride_b, n, mask)
        h, c = tl.zeros_like(dh), tl.zeros_like(dh)
        if CELL == "gru" or CELL == "gru_before":
            h = state_before(
                output_ptr, h0_ptr, t, output_stride_t, b, output_stride_b, n, column, length, mask, REVERSE
            )
        if CELL == "lstm":
            c = state_before(cells_ptr, c0_ptr, t, size, b, H, n, column, length, mask, REVERSE)
        if ln_weight_ptr is None:
            dx, dq, dh, dc = step_backward(
                dy, dh, dc, kept, h, c, proceeds, t < length, keep_h, keep_c, zoneout_h, zoneout_c, grad_clip, CELL
            )
        else:
            normed, rstd = load_norm(normed_ptr, rstd_ptr, t, b, n, B, H, mask, rows, GATES)
            norm_c = norm_of_c(ln_c_weight_ptr, ln_c_bias_ptr, n, H, units)
            dx, dq, dh, dc, shares = normed_backward(
                dy, dh, dc, kept, h, c, proceeds, t < length, keep_h, keep_c, zoneout_h, zoneout_c, grad_clip,
                normed, rstd, ln_weight_ptr, norm_c, n, H, units, CELL, GATES,
            )  # fmt: skip
            sums = add_tiles(sums, shares)
        if CELL == "gru_before":
            d = product(tl.where(units[None, :], dq[2], 0.0), weights[2], tl.zeros_like(dh), PRECISION)
            dr, through_reset = reset_backward(d, kept[0], h, proceeds, t < length)
            dx = (dr, dx[1], dx[2])
            dq = dx
            dh += through_reset
        store_tiles(tile_at(dq_ptr, t, dq_stride_t, b, dq_stride_b, n), H, mask, dq)
        if dx_ptr is not None:
            store_tiles(tile_at(dx_ptr, t, dx_stride_t, b, dx_stride_b, n), H, mask, dx)
        dq = where_all(units[None, :], dq)
        through_q = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
        for g in tl.static_range(2 if CELL == "gru_before" else GATES):
            through_q = product(dq[g], weights[g], through_q, PRECISION)
        dh += tl.where(proceeds, through_q, 0.0)
    if ln_weight_ptr is not None:
        store_tiles(rows_at(sums_ptr, b, H * len(sums), n), H, mask, sums)
    if grad_h0_ptr is not None:
        tl.store(grad_h0_ptr + column, dh.to(grad_h0_ptr.dtype.element_ty), mask=mask)
    if grad_c0_ptr is not None:
        tl.store(grad_c0_ptr + column, dc.to(grad_c0_ptr.dtype.element_ty), mask=mask)
