"""The Triton kernels of IndRNN: one lane a column (b, h), the loads of the next block of steps in flight while one is
computed. An absent argument is None. Sequences are read through strides; everything else is contiguous."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from recattn_kernels.triton_launch import kernel
from recattn_kernels.triton_math import (
    activate,
    add_to_sum,
    clamp_symmetric,
    derivative,
    keep_inside,
    sum_value,
    times_derivative,
)
from recattn_kernels.triton_steps import columns, load_steps, stack, store_steps, unstack, walk


@kernel
def forward_kernel(
    x_ptr, weight_hh_ptr, bias_ptr, h0_ptr, reset_ptr, lengths_ptr, output_ptr, h_n_ptr, T, B, H,
    x_stride_t, x_stride_b, output_stride_t, output_stride_b, reset_stride_t, reset_stride_b, negative_slope,
    ACTIVATION: tl.constexpr, REVERSE: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # h[t] = act(x[t] + bias + weight_hh * h[t-1])
    b, h, column, mask = columns(B, H, BLOCK)
    u = tl.load(weight_hh_ptr + h, mask=mask).to(tl.float32)
    state = tl.zeros((BLOCK,), tl.float32)
    if h0_ptr is not None:
        state = tl.load(h0_ptr + column, mask=mask).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + h, mask=mask).to(tl.float32)
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + b, mask=mask)
        length = tl.minimum(tl.maximum(length, 0), T).to(tl.int32)
    x_at, x_next = walk(x_ptr + b * x_stride_b + h, T, x_stride_t, REVERSE)
    out_at, out_next = walk(output_ptr + b * output_stride_b + h, T, output_stride_t, REVERSE)
    x_tile = load_steps(x_at, x_next, 0, T, mask, STEPS)
    if reset_ptr is not None:
        reset_at, reset_next = walk(reset_ptr + b * reset_stride_b, T, reset_stride_t, REVERSE)
        reset_tile = load_steps(reset_at, reset_next, 0, T, mask, STEPS)

    h_n = state
    for first in range(0, T, STEPS):
        x = unstack(x_tile)
        x_at += STEPS * x_next
        x_tile = load_steps(x_at, x_next, first + STEPS, T, mask, STEPS)
        if reset_ptr is not None:
            reset = unstack(reset_tile)
            reset_at += STEPS * reset_next
            reset_tile = load_steps(reset_at, reset_next, first + STEPS, T, mask, STEPS)
        outputs = ()
        for i in tl.static_range(STEPS):
            before = state
            if reset_ptr is not None:
                before = tl.where(reset[i] != 0, 0.0, state)
            v = x[i].to(tl.float32)
            if bias_ptr is not None:
                v += bias
            state_i = activate(v + u * before, negative_slope, ACTIVATION)
            output = keep_inside(state_i, output_ptr.dtype.element_ty, ACTIVATION)
            if lengths_ptr is not None:
                t = T - 1 - first - i if REVERSE else first + i
                output = tl.where(t < length, output, 0.0)
                state_i = tl.where(t < length, state_i, state)
            outputs += (output.to(output_ptr.dtype.element_ty),)
            # The last block may run past T, on zeros and to no effect: h_n stops following, which, unlike stopping the
            # state, does not make every step wait for a comparison.
            state = state_i
            h_n = tl.where(first + i < T, state, h_n)
        store_steps(out_at, out_next, first, T, mask, stack(outputs))
        out_at += STEPS * out_next
    tl.store(h_n_ptr + column, h_n.to(h_n_ptr.dtype.element_ty), mask=mask)


@kernel
def backward_kernel(
    grad_output_ptr, grad_h_n_ptr, output_ptr, weight_hh_ptr, h0_ptr, reset_ptr, lengths_ptr,
    grad_x_ptr, grad_h0_ptr, rows_ptr, T, B, H,
    grad_output_stride_t, grad_output_stride_b, output_stride_t, output_stride_b, grad_x_stride_t, grad_x_stride_b,
    reset_stride_t, reset_stride_b, negative_slope, grad_clip,
    ACTIVATION: tl.constexpr, REVERSE: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # g[t] = clip(dy[t] + weight_hh * g[t+1]) * act'(h[t]);  dx = g;  dweight_hh = sum g[t] * h[t-1];  dbias = sum g
    # rows (2, B, H): each row's own share of dweight_hh and dbias.
    b, unit, column, mask = columns(B, H, BLOCK)
    u = tl.load(weight_hh_ptr + unit, mask=mask).to(tl.float32)
    start = tl.zeros((BLOCK,), tl.float32)
    flow = start  # dL/dh[t] from the steps taken later
    du_sum, du_lost, db_sum, db_lost = start, start, start, start
    if h0_ptr is not None:
        start = tl.load(h0_ptr + column, mask=mask).to(tl.float32)
    if grad_h_n_ptr is not None:
        flow = tl.load(grad_h_n_ptr + column, mask=mask).to(tl.float32)
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + b, mask=mask)
        length = tl.minimum(tl.maximum(length, 0), T).to(tl.int32)
    h_at, h_next = walk(output_ptr + b * output_stride_b + unit, T, output_stride_t, not REVERSE)
    dx_at, dx_next = walk(grad_x_ptr + b * grad_x_stride_b + unit, T, grad_x_stride_t, not REVERSE)
    h = tl.load(h_at, mask=mask & (T > 0)).to(tl.float32)
    # h[t-1] is read one step ahead of h[t], which it becomes: every value of output is loaded once.
    h_at += h_next
    h_tile = load_steps(h_at, h_next, 0, T - 1, mask, STEPS)
    if grad_output_ptr is not None:
        dy_base = grad_output_ptr + b * grad_output_stride_b + unit
        dy_at, dy_next = walk(dy_base, T, grad_output_stride_t, not REVERSE)
        dy_tile = load_steps(dy_at, dy_next, 0, T, mask, STEPS)
    if reset_ptr is not None:
        reset_at, reset_next = walk(reset_ptr + b * reset_stride_b, T, reset_stride_t, not REVERSE)
        reset_tile = load_steps(reset_at, reset_next, 0, T, mask, STEPS)

    dh0 = flow
    for first in range(0, T, STEPS):
        earlier = unstack(h_tile)
        h_at += STEPS * h_next
        h_tile = load_steps(h_at, h_next, first + STEPS, T - 1, mask, STEPS)
        if grad_output_ptr is not None:
            dy = unstack(dy_tile)
            dy_at += STEPS * dy_next
            dy_tile = load_steps(dy_at, dy_next, first + STEPS, T, mask, STEPS)
        if reset_ptr is not None:
            reset = unstack(reset_tile)
            reset_at += STEPS * reset_next
            reset_tile = load_steps(reset_at, reset_next, first + STEPS, T, mask, STEPS)
        grads = ()
        du = tl.zeros((BLOCK,), tl.float32)
        db = du
        for i in tl.static_range(STEPS):
            taken = first + i < T
            has_before = first + i + 1 < T
            if lengths_ptr is not None:
                taken = taken & ((first + i if REVERSE else T - 1 - first - i) < length)
                if REVERSE:
                    has_before = first + i + 1 < length
            h_before = earlier[i].to(tl.float32)
            before = tl.where(has_before, h_before, start)
            dh = flow
            if grad_output_ptr is not None:
                dh += dy[i].to(tl.float32)
            if grad_clip is not None:
                dh = clamp_symmetric(dh, grad_clip)
            g = times_derivative(dh, derivative(h, negative_slope, ACTIVATION), ACTIVATION)
            to_before = u * g
            if reset_ptr is not None:
                before = tl.where(reset[i] != 0, 0.0, before)
                to_before = tl.where(reset[i] != 0, 0.0, to_before)
            du = tl.where(taken, du + g * before, du)
            g = tl.where(taken, g, 0.0)
            db += g
            if lengths_ptr is not None:
                to_before = tl.where(taken, to_before, flow)
            grads += (g.to(grad_x_ptr.dtype.element_ty),)
            flow = to_before
            dh0 = tl.where(first + i < T, flow, dh0)
            h = h_before
        store_steps(dx_at, dx_next, first, T, mask, stack(grads))
        dx_at += STEPS * dx_next
        du_sum, du_lost = add_to_sum(du_sum, du_lost, du)
        db_sum, db_lost = add_to_sum(db_sum, db_lost, db)
    tl.store(rows_ptr + column, sum_value(du_sum, du_lost), mask=mask)
    tl.store(rows_ptr + B.to(tl.int64) * H + column, sum_value(db_sum, db_lost), mask=mask)
    if grad_h0_ptr is not None:
        tl.store(grad_h0_ptr + column, dh0.to(grad_h0_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sum_rows(rows_ptr, to_ptr, B, H, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    h = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i = tl.arange(0, ROWS)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, B, ROWS):
        b = first + i
        mask = (b < B)[:, None] & (h < H)[None, :]
        total += tl.load(rows_ptr + b.to(tl.int64)[:, None] * H + h[None, :], mask=mask, other=0.0)
    tl.store(to_ptr + h, tl.sum(total, 0).to(to_ptr.dtype.element_ty), mask=h < H)


@kernel
def sum_rows_kernel(rows_ptr, grad_weight_hh_ptr, grad_bias_ptr, B, H, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    # dweight_hh[h] = sum_b rows[0, b, h];  dbias[h] = sum_b rows[1, b, h]: in an order that depends on the sizes alone
    sum_rows(rows_ptr, grad_weight_hh_ptr, B, H, ROWS, BLOCK)
    if grad_bias_ptr is not None:
        sum_rows(rows_ptr + B.to(tl.int64) * H, grad_bias_ptr, B, H, ROWS, BLOCK)
