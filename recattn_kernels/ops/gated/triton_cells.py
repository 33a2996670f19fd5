"""One step of rnn, lstm and gru in Triton, forward and backward, and how their kernels read and write a step's tiles.

The values of a step's G gates are a tuple of G float32 tiles (rows, units), in the order of weight_hh.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from recattn_kernels.triton_math import (
    activate,
    clamp_symmetric,
    derivative,
    normalise,
    sigmoid,
    tanh,
    times_derivative,
)


@triton.jit
def squash(c, norm_c):
    """tanh(c), or tanh(LN(c)) of whole rows, norm_c: weight, bias, units, count. And what it normalised, rstd."""
    normed, rstd = c, c  # without norm_c nobody reads them, but Triton 3.6 returns no None beside tiles
    if norm_c is not None:
        weight, bias, units, count = norm_c
        tiles, rstd = normalise((c,), units, count)
        normed = tiles[0]
        c = normed * weight + bias
    return tanh(c), normed, rstd


@triton.jit
def cell_forward(x, q, h, c, CELL: tl.constexpr, norm_c=None):
    """h', c' (c where the cell has none) and what the backward needs, from q = W_hh h + bias_hh. q: None where x has it
    in it already, which the gru's cannot. norm_c: squash()'s, the lstm's."""
    if CELL == "lstm":
        # c' = sigmoid(f) * c + sigmoid(i) * tanh(g);  h' = sigmoid(o) * tanh(c')
        i, f, g, o = x if q is None else (x[0] + q[0], x[1] + q[1], x[2] + q[2], x[3] + q[3])
        i, f, g, o = sigmoid(i), sigmoid(f), tanh(g), sigmoid(o)
        c = f * c + i * g
        y, _, _ = squash(c, norm_c)
        h = o * y
        kept = (i, f, g, o)
    elif CELL == "gru":
        # r = sigmoid(x_r + q_r);  z = sigmoid(x_z + q_z);  n = tanh(x_n + r * q_n);  h' = (1 - z) * n + z * h
        r, z = sigmoid(x[0] + q[0]), sigmoid(x[1] + q[1])
        n = tanh(x[2] + r * q[2])
        h = (1.0 - z) * n + z * h
        kept = (r, z, n, q[2])
    elif CELL == "gru_before":
        # The original form: q_n = W_hn (r * h) + bias_n, by reset_state();  n = tanh(x_n + q_n)
        r, z, n = sigmoid(x[0] + q[0]), sigmoid(x[1] + q[1]), tanh(x[2] + q[2])
        h = (1.0 - z) * n + z * h
        kept = (r, z, n)
    else:
        # h' = act(x + q)
        tl.static_assert(CELL == "rnn_tanh" or CELL == "rnn_relu")
        h = activate(x[0] + q[0], 0.0, "tanh" if CELL == "rnn_tanh" else "relu")
        kept = (h,)
    return h, c, kept


@triton.jit
def cell_backward(dh, dc, kept, h, c, CELL: tl.constexpr, squashed=None):
    """dx, dq, and what reaches h and c other than through q, from dL/dh' and dL/dc'. h: the gru's; c: the lstm's.
    squashed: with a layer norm of c', tanh of it and what reaches c' through it."""
    if CELL == "lstm":
        i, f, g, o = kept
        if squashed is None:
            y = tanh(f * c + i * g)
            dc += dh * o * (1.0 - y * y)
        else:
            y, through = squashed
            dc += through
        dx = (dc * g * i * (1.0 - i), dc * c * f * (1.0 - f), dc * i * (1.0 - g * g), dh * y * o * (1.0 - o))
        dq = dx
        dh = tl.zeros_like(dh)
        dc = dc * f
    elif CELL == "gru":
        r, z, n, q_n = kept
        dn = dh * (1.0 - z) * (1.0 - n * n)
        dr, dz = dn * q_n * r * (1.0 - r), dh * (h - n) * z * (1.0 - z)
        dx = (dr, dz, dn)
        dq = (dr, dz, dn * r)
        dh = dh * z
    elif CELL == "gru_before":
        # dr is reset_backward()'s, once dn has been multiplied.
        r, z, n = kept
        dx = (tl.zeros_like(dh), dh * (h - n) * z * (1.0 - z), dh * (1.0 - z) * (1.0 - n * n))
        dq = dx
        dh = dh * z
    else:
        ACTIVATION: tl.constexpr = "tanh" if CELL == "rnn_tanh" else "relu"
        dx = (times_derivative(dh, derivative(kept[0], 0.0, ACTIVATION), ACTIVATION),)
        dq = dx
        dh = tl.zeros_like(dh)
    return dx, dq, dh, dc


@triton.jit
def reset_state(x_r, q_r, h):
    """What gru_before multiplies for n: r * h."""
    return sigmoid(x_r + q_r) * h


@triton.jit
def reset_backward(d, r, h, proceeds, valid):
    """gru_before's dr, and what reaches h, from d = W_hn^T dn, the gradient of r * h."""
    dr = d * tl.where(proceeds, h, 0.0) * r * (1.0 - r)
    return tl.where(valid, dr, 0.0), tl.where(valid & proceeds, d * r, 0.0)


@triton.jit
def zoneout(old, new, keep, rate):
    """What becomes of a state: the old one where keep, else rate * old + (1 - rate) * new. Either may be None."""
    if keep is not None:
        new = tl.where(keep != 0, old, new)
    if rate is not None:
        new = rate * old + (1.0 - rate) * new
    return new


@triton.jit
def zoneout_backward(d, keep, rate):
    """The gradients of old and new from that of what became of them."""
    old, new = tl.zeros_like(d), d
    if keep is not None:
        old, new = tl.where(keep != 0, d, 0.0), tl.where(keep != 0, 0.0, d)
    if rate is not None:
        old, new = rate * d, (1.0 - rate) * d
    return old, new


@triton.jit
def step_forward(
    x, q, h_state, c_state, proceeds, valid, keep_h, keep_c, rate_h, rate_c, CELL: tl.constexpr, norm_c=None
):
    """What is output, the states after the step and what is kept. proceeds: rows whose state was not reset (rows, 1);
    valid: rows that take the step."""
    h, c = tl.where(proceeds, h_state, 0.0), tl.where(proceeds, c_state, 0.0)
    h_new, c_new, kept = cell_forward(x, q, h, c, CELL, norm_c)
    h_new = zoneout(h, h_new, keep_h, rate_h)
    c_new = zoneout(c, c_new, keep_c, rate_c)
    h_state, c_state = tl.where(valid, h_new, h_state), tl.where(valid, c_new, c_state)
    return tl.where(valid, h_new, 0.0), h_state, c_state, kept


@triton.jit
def step_backward(
    dy, dh, dc, kept, h, c, proceeds, valid, keep_h, keep_c, rate_h, rate_c, grad_clip, CELL: tl.constexpr
):
    """dx, dq, and the gradients of the states before the step without that through q, from those of the ones after it.
    h, c: the states before the step; dy: may be None."""
    old, new = arrive(dy, dh, dc, keep_h, keep_c, rate_h, rate_c, grad_clip)
    return leave(dh, dc, old, new, kept, h, c, proceeds, valid, CELL)


@triton.jit
def arrive(dy, dh, dc, keep_h, keep_c, rate_h, rate_c, grad_clip):
    """Of step_backward, what reaches the old h and c by zoneout, and the new ones."""
    if dy is not None:
        dh += dy
    if grad_clip is not None:
        dh, dc = clamp_symmetric(dh, grad_clip), clamp_symmetric(dc, grad_clip)
    dh_old, dh_new = zoneout_backward(dh, keep_h, rate_h)
    dc_old, dc_new = zoneout_backward(dc, keep_c, rate_c)
    return (dh_old, dc_old), (dh_new, dc_new)


@triton.jit
def leave(dh, dc, old, new, kept, h, c, proceeds, valid, CELL: tl.constexpr, squashed=None):
    """Of step_backward, what follows arrive()."""
    dh_old, dc_old = old
    dh_new, dc_new = new
    h, c = tl.where(proceeds, h, 0.0), tl.where(proceeds, c, 0.0)
    dx, dq, dh_cell, dc_cell = cell_backward(dh_new, dc_new, kept, h, c, CELL, squashed)
    if CELL == "lstm":
        dc = tl.where(valid, tl.where(proceeds, dc_old + dc_cell, 0.0), dc)
    dh = tl.where(valid, tl.where(proceeds, dh_old + dh_cell, 0.0), dh)
    return where_all(valid, dx), where_all(valid, dq), dh, dc


@triton.jit
def product(left, weights, total, PRECISION: tl.constexpr):
    """total + left weights, in the weights' type, summed in float32."""
    left = left.to(weights.dtype)
    if PRECISION == "interpreted":  # Triton's interpreter multiplies the bits of bfloat16
        total = tl.dot(left.to(tl.float32), weights.to(tl.float32), total)
    else:
        total = tl.dot(left, weights, total, input_precision=PRECISION)
    return total


@triton.jit
def where_all(mask, tiles):
    """The tiles where mask, else 0."""
    masked = ()
    for g in tl.static_range(len(tiles)):
        masked += (tl.where(mask, tiles[g], 0.0),)
    return masked


@triton.jit
def time_of(i, T, REVERSE: tl.constexpr):
    """The place in the sequence of the i-th step taken."""
    t = i
    if REVERSE:
        t = T - 1 - i
    return t


@triton.jit
def whole_rows(B, H, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):
    """Of a program that has all units of BLOCK_B rows: the rows, the units, which of them are there, one by one and
    together, their places in (B, H), and B * H."""
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    n = tl.arange(0, BLOCK_H)
    rows, units = b < B, n < H
    return b, n, rows, units, rows[:, None] & units[None, :], rows_at(0, b, H, n), B.to(tl.int64) * H


@triton.jit
def tile_at(ptr, t, stride_t, b, stride_b, n):
    """Pointers to the units n of the rows b at the place t of a sequence. (rows, units)"""
    return rows_at(ptr + t * stride_t.to(tl.int64), b, stride_b, n)


@triton.jit
def rows_at(ptr, b, stride_b, n):
    """Pointers to the units n of the rows b. (rows, units)"""
    return ptr + (b.to(tl.int64) * stride_b)[:, None] + n[None, :]


@triton.jit
def eights(number, ALIGNED: tl.constexpr):
    """The number, said to be a multiple of 8: then 8 elements are loaded at once."""
    if ALIGNED:
        number = number // 8 * 8
    return number


@triton.jit
def load_tiles(at, H, mask, COUNT: tl.constexpr):
    """COUNT tiles that lie H apart, in the type that they are stored in."""
    tiles = ()
    for g in tl.static_range(COUNT):
        tiles += (tl.load(at + g * H, mask=mask, other=0.0),)
    return tiles


@triton.jit
def store_tiles(at, H, mask, tiles):
    for g in tl.static_range(len(tiles)):
        tl.store(at + g * H, tiles[g].to(at.dtype.element_ty), mask=mask)


@triton.jit
def to_float(tiles):
    converted = ()
    for g in tl.static_range(len(tiles)):
        converted += (tiles[g].to(tl.float32),)
    return converted


@triton.jit
def add_bias(q, bias_hh_ptr, n, H, units, FIRST: tl.constexpr):
    """The products of the gates from FIRST on with their biases."""
    if bias_hh_ptr is not None:
        biased = ()
        for g in tl.static_range(len(q)):
            bias = tl.load(bias_hh_ptr + (FIRST + g) * H + n, mask=units, other=0.0)
            biased += (q[g] + bias.to(tl.float32)[None, :],)
        q = biased
    return q


@triton.jit
def length_of(lengths_ptr, b, inside, T):
    """The number of steps that each row takes. (rows, 1)"""
    length = tl.zeros_like(b) + T
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + b, mask=inside, other=0)
        length = tl.minimum(tl.maximum(length, 0), T).to(tl.int32)
    return length[:, None]


@triton.jit
def proceeds_at(reset_ptr, t, stride_t, b, stride_b, inside):
    """Whether each row's state is not reset before the step at t. (rows, 1)"""
    proceeds = inside
    if reset_ptr is not None:
        reset = tl.load(reset_ptr + t * stride_t.to(tl.int64) + b.to(tl.int64) * stride_b, mask=inside, other=0)
        proceeds = inside & (reset == 0)
    return proceeds[:, None]


@triton.jit
def load_keep(ptr, t, stride_t, b, stride_b, n, mask):
    """A tile of zoneout's mask, None without one."""
    keep = None
    if ptr is not None:
        keep = tl.load(tile_at(ptr, t, stride_t, b, stride_b, n), mask=mask, other=0)
    return keep


@triton.jit
def state_before(ptr, initial_ptr, t, stride_t, b, stride_b, n, column, length, mask, REVERSE: tl.constexpr):
    """The state before the step at t, in float32: that of the step taken before it, else the initial one."""
    earlier = t + 1 if REVERSE else t - 1
    has_before = (earlier >= 0) & (earlier < length)
    at = tile_at(ptr, earlier, stride_t, b, stride_b, n)
    state = tl.load(at, mask=mask & has_before, other=0.0).to(tl.float32)
    if initial_ptr is not None:
        # Loaded where it is wanted, once in a row, rather than held in registers from step to step.
        initial = tl.load(initial_ptr + column, mask=mask & (has_before == 0), other=0.0)
        state = tl.where(has_before, state, initial.to(tl.float32))
    return state
