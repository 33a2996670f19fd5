"""IndRNN over time in parallel, in Triton. scan.py is the same in plain PyTorch, and says why it is exact.

A program has COLUMNS columns (b, h) and takes tiles of CHUNKS * STEPS steps of them, one after the other: lane
(k, column) holds chunk k of the tile, STEPS steps, in registers. Each lane composes its steps into one map

    f -> clamp((a + e) f + c, low, high)          e: what the product of the slopes lost in rounding

a scan over k composes the maps of a tile, which, applied to the state before the tile, give the state before every
chunk; then each lane takes its steps from there. Every value is read once and written once.
"""

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
from recattn_kernels.triton_steps import load_steps, stack, store_steps, unstack, walk

INFINITY = tl.constexpr(float("inf"))


@triton.jit
def times(a, e, slope):
    """(a + e) * slope, its rounding kept in e: alike in every tile, it would add up over a long sequence."""
    p = slope * a
    return p, tl.fma(slope, a, -p) + slope * e


@triton.jit
def end_of(slope, end):
    """slope * end, of an end that may be infinite: a slope of 0 forgets it."""
    return tl.where(slope == 0.0, 0.0, slope * end)


@triton.jit
def clamp(v, low, high):
    return tl.where(v < low, low, tl.where(v > high, high, v))


@triton.jit
def compose_lines(a1, e1, c1, a2, e2, c2):
    """The first line, then the second."""
    p = a2 * a1
    return p, tl.fma(a2, a1, -p) + (a2 * e1 + e2 * a1), a2 * c1 + (e2 * c1 + c2)


@triton.jit
def compose(a1, e1, c1, low1, high1, a2, e2, c2, low2, high2):
    """The first clamped line, then the second."""
    a, e, c = compose_lines(a1, e1, c1, a2, e2, c2)
    p = end_of(a2, low1) + c2
    q = end_of(a2, high1) + c2
    swap = p > q
    low = clamp(tl.where(swap, q, p), low2, high2)
    high = clamp(tl.where(swap, p, q), low2, high2)
    return a, e, c, low, high


@triton.jit
def shift(ends, first, COLUMNS: tl.constexpr):
    """What each chunk starts from: where the one before it ends; chunk 0 from `first`. And where the last one ends."""
    # Gathers of one dimension: one of two makes Triton bring the chunks of a column, and all else, into one warp.
    LANES: tl.constexpr = ends.shape[0]
    lane = tl.arange(0, LANES)
    before = tl.gather(ends, tl.maximum(lane - COLUMNS, 0), 0)
    last = tl.gather(ends, lane % COLUMNS + (LANES - COLUMNS), 0)
    return tl.where(lane < COLUMNS, first, before), last


@triton.jit
def starts_of(a, e, c, low, high, state, COLUMNS: tl.constexpr, CLAMPED: tl.constexpr):
    """What each chunk of the tile starts from, and whether any of that is not to be trusted."""
    CHUNKS: tl.constexpr = a.shape[0] // COLUMNS
    SHAPE: tl.constexpr = (CHUNKS, COLUMNS)
    a, e, c = tl.reshape(a, SHAPE), tl.reshape(e, SHAPE), tl.reshape(c, SHAPE)
    before = tl.reshape(state, SHAPE)
    if CLAMPED:
        # Of a negative slope's ends the one from -inf is above.
        low, high = tl.reshape(low, SHAPE), tl.reshape(high, SHAPE)
        swap = low > high
        maps = (a, e, c, tl.where(swap, high, low), tl.where(swap, low, high))
        a, e, c, low, high = tl.associative_scan(maps, 0, compose)
    else:
        a, e, c = tl.associative_scan((a, e, c), 0, compose_lines)
    ends = a * before + (e * before + c)
    untrusted = tl.where(tl.abs(ends) < INFINITY, 0, 1)
    if CLAMPED:
        untrusted = tl.where(low <= high, untrusted, 1)
        ends = clamp(ends, low, high)
    start, _ = shift(tl.reshape(ends, state.shape), state, COLUMNS)
    return start, tl.max(tl.max(untrusted, 0), 0)


@triton.jit
def lanes(B, H, CHUNKS: tl.constexpr, STEPS: tl.constexpr, COLUMNS: tl.constexpr):
    """columns() for each lane (k, column), and the step of the tile that its chunk begins at."""
    lane = tl.arange(0, CHUNKS * COLUMNS)
    first = tl.program_id(0).to(tl.int64) * COLUMNS
    h = (first % H).to(tl.int32) + lane % COLUMNS
    b = first // H + h // H
    left = tl.minimum(B.to(tl.int64) * H - first, COLUMNS).to(tl.int32)
    return b, h % H, first + lane % COLUMNS, lane % COLUMNS < left, lane // COLUMNS * STEPS


@triton.jit
def valid_steps(lengths_ptr, b, mask, T, BACKWARDS: tl.constexpr):
    """The first of the steps taken that is within the row's length, and the first after it that is not."""
    begin, end = T * 0, T
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + b, mask=mask)
        length = tl.minimum(tl.maximum(length, 0), T).to(tl.int32)
        if BACKWARDS:
            begin = T - length
        else:
            end = length
    return begin, end


@triton.jit
def forward_chunk(v, resets, state, u, step, begin, end, negative_slope, ACTIVATION: tl.constexpr):
    """The recurrence over a lane's chunk, from `state` at `step`: the state of every step, and where it ends."""
    states = ()
    for i in tl.static_range(len(v)):
        before = state
        if resets is not None:
            before = tl.where(resets[i] != 0, 0.0, state)
        h = activate(v[i] + u * before, negative_slope, ACTIVATION)
        state = tl.where((step + i >= begin) & (step + i < end), h, state)
        states += (state,)
    return states, state


@kernel
def forward_scan_kernel(
    x_ptr, weight_hh_ptr, bias_ptr, h0_ptr, reset_ptr, lengths_ptr, output_ptr, h_n_ptr, T, B, H,
    x_stride_t, x_stride_b, output_stride_t, output_stride_b, reset_stride_t, reset_stride_b, negative_slope,
    ACTIVATION: tl.constexpr, REVERSE: tl.constexpr,
    CHUNKS: tl.constexpr, STEPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # h[t] = act(x[t] + bias + weight_hh * h[t-1]), act one of relu, relu6, hardtanh, identity
    CLAMPED: tl.constexpr = ACTIVATION != "identity"
    TILE: tl.constexpr = CHUNKS * STEPS
    b, h, column, mask, step = lanes(B, H, CHUNKS, STEPS, COLUMNS)
    u = tl.load(weight_hh_ptr + h, mask=mask, other=0.0).to(tl.float32)
    zeros = tl.zeros((CHUNKS * COLUMNS,), tl.float32)
    state = zeros  # before the tile: the same in all lanes of a column
    if h0_ptr is not None:
        state = tl.load(h0_ptr + column, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + h, mask=mask, other=0.0).to(tl.float32)
    begin, end = valid_steps(lengths_ptr, b, mask, T, REVERSE)
    x_at, x_next = walk(x_ptr + b * x_stride_b + h, T, x_stride_t, REVERSE)
    x_at += step * x_next
    out_at, out_next = walk(output_ptr + b * output_stride_b + h, T, output_stride_t, REVERSE)
    out_at += step * out_next
    x_tile = load_steps(x_at, x_next, step, T, mask, STEPS)
    if reset_ptr is not None:
        reset_at, reset_next = walk(reset_ptr + b * reset_stride_b, T, reset_stride_t, REVERSE)
        reset_at += step * reset_next
        reset_tile = load_steps(reset_at, reset_next, step, T, mask, STEPS)

    for _ in range(0, T, TILE):
        x = unstack(x_tile)
        x_at += TILE * x_next
        x_tile = load_steps(x_at, x_next, step + TILE, T, mask, STEPS)
        resets = None
        if reset_ptr is not None:
            resets = unstack(reset_tile)
            reset_at += TILE * reset_next
            reset_tile = load_steps(reset_at, reset_next, step + TILE, T, mask, STEPS)
        v = ()
        a, e, c, low, high = zeros + 1.0, zeros, zeros, zeros - INFINITY, zeros + INFINITY
        for i in tl.static_range(STEPS):
            taken = (step + i >= begin) & (step + i < end)
            v_i = x[i].to(tl.float32)
            if bias_ptr is not None:
                v_i += bias
            # What is past the end may be NaN, which the maximum over the program must not see.
            v_i = tl.where(taken & mask, v_i, 0.0)
            v += (v_i,)
            a_i, e_i = times(a, e, u)
            c_i = u * c
            if resets is not None:
                a_i, e_i = tl.where(resets[i] != 0, 0.0, a_i), tl.where(resets[i] != 0, 0.0, e_i)
                c_i = tl.where(resets[i] != 0, 0.0, c_i)
            a, e, c = tl.where(taken, a_i, a), tl.where(taken, e_i, e), tl.where(taken, v_i + c_i, c)
            if CLAMPED:
                low_i, high_i = end_of(u, low), end_of(u, high)
                if resets is not None:
                    low_i, high_i = tl.where(resets[i] != 0, 0.0, low_i), tl.where(resets[i] != 0, 0.0, high_i)
                low = tl.where(taken, activate(v_i + low_i, negative_slope, ACTIVATION), low)
                high = tl.where(taken, activate(v_i + high_i, negative_slope, ACTIVATION), high)
        start, untrusted = starts_of(a, e, c, low, high, state, COLUMNS, CLAMPED)
        # Chunk 0 starts right; each round makes one chunk more do so: a walk, with every lane along.
        for _ in range(0, CHUNKS * untrusted):
            _, ends = forward_chunk(v, resets, start, u, step, begin, end, negative_slope, ACTIVATION)
            start, _ = shift(ends, state, COLUMNS)
        states, ends = forward_chunk(v, resets, start, u, step, begin, end, negative_slope, ACTIVATION)
        _, state = shift(ends, state, COLUMNS)
        outputs = ()
        for i in tl.static_range(STEPS):
            output = keep_inside(states[i], output_ptr.dtype.element_ty, ACTIVATION)
            if lengths_ptr is not None:
                output = tl.where((step + i >= begin) & (step + i < end), output, 0.0)
            outputs += (output.to(output_ptr.dtype.element_ty),)
        store_steps(out_at, out_next, step, T, mask, stack(outputs))
        out_at += TILE * out_next
        step += TILE
    tl.store(
        h_n_ptr + column, state.to(h_n_ptr.dtype.element_ty), mask=mask & (tl.arange(0, CHUNKS * COLUMNS) < COLUMNS)
    )


@triton.jit
def backward_chunk(dy, slopes, resets, flow, u, step, begin, end, grad_clip, ACTIVATION: tl.constexpr):
    """The gradient over a lane's chunk, from `flow` at `step`: g of every step, and what flows on from it."""
    grads = ()
    for i in tl.static_range(len(slopes)):
        dh = flow
        if dy is not None:
            dh += dy[i]
        if grad_clip is not None:
            dh = clamp_symmetric(dh, grad_clip)
        g = times_derivative(dh, slopes[i], ACTIVATION)
        flow_i = u * g
        if resets is not None:
            flow_i = tl.where(resets[i] != 0, 0.0, flow_i)
        taken = (step + i >= begin) & (step + i < end)
        grads += (tl.where(taken, g, 0.0),)
        flow = tl.where(taken, flow_i, flow)
    return grads, flow


@kernel
def backward_scan_kernel(
    grad_output_ptr, grad_h_n_ptr, output_ptr, weight_hh_ptr, h0_ptr, reset_ptr, lengths_ptr,
    grad_x_ptr, grad_h0_ptr, rows_ptr, T, B, H,
    grad_output_stride_t, grad_output_stride_b, output_stride_t, output_stride_b, grad_x_stride_t, grad_x_stride_b,
    reset_stride_t, reset_stride_b, negative_slope, grad_clip,
    ACTIVATION: tl.constexpr, REVERSE: tl.constexpr,
    CHUNKS: tl.constexpr, STEPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # g[t] = clip(dy[t] + weight_hh * g[t+1]) * act'(h[t]);  dx = g;  dweight_hh = sum g[t] * h[t-1];  dbias = sum g
    # rows (2, B, H): each row's own share of dweight_hh and dbias.
    CLAMPED: tl.constexpr = grad_clip is not None
    TILE: tl.constexpr = CHUNKS * STEPS
    b, unit, column, mask, step = lanes(B, H, CHUNKS, STEPS, COLUMNS)
    u = tl.load(weight_hh_ptr + unit, mask=mask, other=0.0).to(tl.float32)
    zeros = tl.zeros((CHUNKS * COLUMNS,), tl.float32)
    start_h, flow = zeros, zeros  # flow: dL/dh before the tile, from the steps taken later
    du_sum, du_lost, db_sum, db_lost = zeros, zeros, zeros, zeros
    if h0_ptr is not None:
        start_h = tl.load(h0_ptr + column, mask=mask, other=0.0).to(tl.float32)
    if grad_h_n_ptr is not None:
        flow = tl.load(grad_h_n_ptr + column, mask=mask, other=0.0).to(tl.float32)
    begin, end = valid_steps(lengths_ptr, b, mask, T, not REVERSE)
    h_at, h_next = walk(output_ptr + b * output_stride_b + unit, T, output_stride_t, not REVERSE)
    h_at += step * h_next
    dx_at, dx_next = walk(grad_x_ptr + b * grad_x_stride_b + unit, T, grad_x_stride_t, not REVERSE)
    dx_at += step * dx_next
    h_tile = load_steps(h_at, h_next, step, T, mask, STEPS)
    # h[t-1] of a chunk's last step is the first of the next chunk, in another lane: it is read again.
    after = load_steps(h_at + STEPS * h_next, h_next, step + STEPS, T, mask, 1)
    if grad_output_ptr is not None:
        dy_base = grad_output_ptr + b * grad_output_stride_b + unit
        dy_at, dy_next = walk(dy_base, T, grad_output_stride_t, not REVERSE)
        dy_at += step * dy_next
        dy_tile = load_steps(dy_at, dy_next, step, T, mask, STEPS)
    if reset_ptr is not None:
        reset_at, reset_next = walk(reset_ptr + b * reset_stride_b, T, reset_stride_t, not REVERSE)
        reset_at += step * reset_next
        reset_tile = load_steps(reset_at, reset_next, step, T, mask, STEPS)

    for _ in range(0, T, TILE):
        h = unstack(h_tile)
        h_last = tl.reshape(after, zeros.shape).to(tl.float32)
        h_at += TILE * h_next
        h_tile = load_steps(h_at, h_next, step + TILE, T, mask, STEPS)
        after = load_steps(h_at + STEPS * h_next, h_next, step + TILE + STEPS, T, mask, 1)
        dy = None
        if grad_output_ptr is not None:
            dy_words = unstack(dy_tile)
            dy_at += TILE * dy_next
            dy_tile = load_steps(dy_at, dy_next, step + TILE, T, mask, STEPS)
            dy = ()
        resets = None
        if reset_ptr is not None:
            resets = unstack(reset_tile)
            reset_at += TILE * reset_next
            reset_tile = load_steps(reset_at, reset_next, step + TILE, T, mask, STEPS)
        slopes = ()
        a, e, c, low, high = zeros + 1.0, zeros, zeros, zeros - INFINITY, zeros + INFINITY
        for i in tl.static_range(STEPS):
            taken = (step + i >= begin) & (step + i < end) & mask
            d = tl.where(taken, derivative(h[i].to(tl.float32), negative_slope, ACTIVATION), 0.0)
            slopes += (d,)
            slope = u * d
            if resets is not None:
                slope = tl.where(resets[i] != 0, 0.0, slope)
            a_i, e_i = times(a, e, slope)
            c_i, low_i, high_i = c, low, high
            if grad_output_ptr is not None:
                dy_i = tl.where(taken, dy_words[i].to(tl.float32), 0.0)
                dy += (dy_i,)
                c_i, low_i, high_i = c + dy_i, low + dy_i, high + dy_i
            c_i = u * times_derivative(c_i, d, ACTIVATION)
            if resets is not None:
                a_i, e_i = tl.where(resets[i] != 0, 0.0, a_i), tl.where(resets[i] != 0, 0.0, e_i)
                c_i = tl.where(resets[i] != 0, 0.0, c_i)
            a, e, c = tl.where(taken, a_i, a), tl.where(taken, e_i, e), tl.where(taken, c_i, c)
            if CLAMPED:
                low = tl.where(taken, slope * clamp_symmetric(low_i, grad_clip), low)
                high = tl.where(taken, slope * clamp_symmetric(high_i, grad_clip), high)
        start, untrusted = starts_of(a, e, c, low, high, flow, COLUMNS, CLAMPED)
        # Chunk 0 starts right; each round makes one chunk more do so: a walk, with every lane along.
        for _ in range(0, CHUNKS * untrusted):
            _, ends = backward_chunk(dy, slopes, resets, start, u, step, begin, end, grad_clip, ACTIVATION)
            start, _ = shift(ends, flow, COLUMNS)
        grads, ends = backward_chunk(dy, slopes, resets, start, u, step, begin, end, grad_clip, ACTIVATION)
        _, flow = shift(ends, flow, COLUMNS)
        words = ()
        du, db = zeros, zeros
        for i in tl.static_range(STEPS):
            before = h_last
            if i + 1 < STEPS:
                before = h[i + 1].to(tl.float32)
            # The last step taken has h0 before it.
            before = tl.where(step + i + 1 < end, before, start_h)
            if resets is not None:
                before = tl.where(resets[i] != 0, 0.0, before)
            taken = (step + i >= begin) & (step + i < end)
            du = tl.where(taken, du + grads[i] * before, du)
            db += grads[i]
            words += (grads[i].to(grad_x_ptr.dtype.element_ty),)
        store_steps(dx_at, dx_next, step, T, mask, stack(words))
        dx_at += TILE * dx_next
        step += TILE
        du_sum, du_lost = add_to_sum(du_sum, du_lost, du)
        db_sum, db_lost = add_to_sum(db_sum, db_lost, db)
    du = tl.sum(tl.reshape(sum_value(du_sum, du_lost), (CHUNKS, COLUMNS)), 0)
    db = tl.sum(tl.reshape(sum_value(db_sum, db_lost), (CHUNKS, COLUMNS)), 0)
    first = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = first < B.to(tl.int64) * H
    tl.store(rows_ptr + first, du, mask=inside)
    tl.store(rows_ptr + B.to(tl.int64) * H + first, db, mask=inside)
    if grad_h0_ptr is not None:
        once = mask & (tl.arange(0, CHUNKS * COLUMNS) < COLUMNS)
        tl.store(grad_h0_ptr + column, flow.to(grad_h0_ptr.dtype.element_ty), mask=once)
