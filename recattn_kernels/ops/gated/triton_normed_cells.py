"""One step of rnn, lstm and gru with layer normalisation in Triton, of tiles that have whole rows of all gates:

LN(v) = normed * weight + bias;  normed = (v - mean(v)) * rstd;  rstd = 1 / sqrt(mean((v - mean(v))^2) + 1e-5)
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from recattn_kernels.ops.gated.triton_cells import (
    arrive,
    leave,
    load_tiles,
    squash,
    store_tiles,
    tile_at,
    where_all,
)
from recattn_kernels.triton_math import normalise, normalise_backward, products_of


@triton.jit
def load_row(ptr, n, units):
    """A parameter's values for the units n. (1, units)"""
    return tl.load(ptr + n, mask=units, other=0.0).to(tl.float32)[None, :]


@triton.jit
def norm_of_c(weight_ptr, bias_ptr, n, H, units):
    """squash()'s norm_c, None without one."""
    norm_c = None
    if weight_ptr is not None:
        norm_c = (load_row(weight_ptr, n, units), load_row(bias_ptr, n, units), units, H)
    return norm_c


@triton.jit
def norm_forward(products, weight_ptr, bias_ptr, n, H, units, GATES: tl.constexpr):
    """LN of the products of all gates; and what it kept, normed and rstd."""
    normed, rstd = normalise(products, units, H * GATES)
    q = ()
    for g in tl.static_range(GATES):
        q += (normed[g] * load_row(weight_ptr + g * H, n, units) + load_row(bias_ptr + g * H, n, units),)
    return q, normed, rstd


@triton.jit
def store_norm(normed_ptr, rstd_ptr, t, b, n, B, H, mask, rows, normed, rstd):
    width = H * len(normed)
    store_tiles(tile_at(normed_ptr, t, B.to(tl.int64) * width, b, width, n), H, mask, normed)
    tl.store(rstd_ptr + t * B.to(tl.int64) + b[:, None], rstd, mask=rows[:, None])


@triton.jit
def load_norm(normed_ptr, rstd_ptr, t, b, n, B, H, mask, rows, GATES: tl.constexpr):
    width = H * GATES
    normed = load_tiles(tile_at(normed_ptr, t, B.to(tl.int64) * width, b, width, n), H, mask, GATES)
    return normed, tl.load(rstd_ptr + t * B.to(tl.int64) + b[:, None], mask=rows[:, None], other=0.0)


@triton.jit
def normed_backward(
    dy, dh, dc, kept, h, c, proceeds, valid, keep_h, keep_c, rate_h, rate_c, grad_clip, normed, rstd, weight_ptr,
    norm_c, n, H, units, CELL: tl.constexpr, GATES: tl.constexpr,
):  # fmt: skip
    """step_backward() whose dq is of the products before LN, and the step's share of the gradients of LN's weight and
    bias, and for the lstm those of c's: a tuple of tiles."""
    # d = dq * weight;  dproduct = rstd * (d - mean(d) - normed * mean(d * normed));  dweight = dq * normed;  dbias = dq
    old, new = arrive(dy, dh, dc, keep_h, keep_c, rate_h, rate_c, grad_clip)
    squashed = None
    of_c = ()
    if CELL == "lstm":
        # The same of c' = f * c + i * g, from dL/dLN(c').
        input, forget, candidate, out = kept
        y, normed_c, rstd_c = squash(forget * tl.where(proceeds, c, 0.0) + input * candidate, norm_c)
        d = new[0] * out * (1.0 - y * y)
        through_c = normalise_backward((d * norm_c[0],), (normed_c,), rstd_c, units, H)
        squashed = (y, through_c[0])
        of_c = where_all(valid, (d * normed_c, d))
    dx, dq, dh, dc = leave(dh, dc, old, new, kept, h, c, proceeds, valid, CELL, squashed)
    scaled = ()
    for g in tl.static_range(GATES):
        scaled += (dq[g] * load_row(weight_ptr + g * H, n, units),)
    dproduct = normalise_backward(scaled, normed, rstd, units, H * GATES)
    shares = where_all(valid, products_of(dq, normed)) + dq + of_c
    return dx, where_all(valid, dproduct), dh, dc, shares
