"""The arithmetic of the cells in Triton: csrc/cells.h once more. Everything takes and gives float32 tiles.

Comparisons are written with tl.where so that NaN passes through every one of them; tl.maximum would drop it.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_tiles(a, b):
    """Of two tuples of tiles, one by one."""
    sums = ()
    for i in tl.static_range(len(a)):
        sums += (a[i] + b[i],)
    return sums


@triton.jit
def sigmoid(v):
    # Rounded: `/` is off by 2 ulp on NVIDIA.
    return tl.div_rn(1.0, 1.0 + tl.exp(-v))


@triton.jit
def tanh(v):
    # 1 - 2 / (exp(2a) + 1) cancels near 0: below 0.7 an odd polynomial, fitted to 0.3 ulp, takes over. The threshold is
    # that high because the hardware's exp2 is off by up to 2 ulp, which shrinks as a grows.
    a = tl.abs(v)
    far = 1.0 - tl.div_rn(2.0, tl.exp2(a * 2.8853900817779268) + 1.0)
    s = v * v
    p = -0.00513866 * s + 0.02009197
    p = p * s - 0.05355886
    p = p * s + 0.13329111
    p = p * s - 0.3333319
    return tl.where(a < 0.7, v + v * s * p, tl.where(v < 0.0, -far, far))


@triton.jit
def activate(v, negative_slope, ACTIVATION: tl.constexpr):
    """h = act(v)"""
    if ACTIVATION == "relu":
        v = tl.where(v <= 0.0, 0.0, v)
    elif ACTIVATION == "tanh":
        v = tanh(v)
    elif ACTIVATION == "sigmoid":
        v = sigmoid(v)
    elif ACTIVATION == "leaky_relu":
        v = tl.where(v > 0.0, v, v * negative_slope)
    elif ACTIVATION == "relu6":
        v = tl.where(v <= 0.0, 0.0, v)
        v = tl.where(v >= 6.0, 6.0, v)
    elif ACTIVATION == "hardtanh":
        v = tl.where(v <= -1.0, -1.0, v)
        v = tl.where(v >= 1.0, 1.0, v)
    else:
        tl.static_assert(ACTIVATION == "identity")
    return v


@triton.jit
def derivative(h, negative_slope, ACTIVATION: tl.constexpr):
    """act'(v) from h = act(v) alone, so that the pre-activation need not be kept."""
    if ACTIVATION == "relu":
        d = tl.where(h <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "tanh":
        d = 1.0 - h * h
    elif ACTIVATION == "sigmoid":
        d = h * (1.0 - h)
    elif ACTIVATION == "leaky_relu":
        d = tl.where(h > 0.0, 1.0, negative_slope)
    elif ACTIVATION == "relu6":
        d = tl.where((h <= 0.0) | (h >= 6.0), 0.0, 1.0)
    elif ACTIVATION == "hardtanh":
        d = tl.where((h <= -1.0) | (h >= 1.0), 0.0, 1.0)
    else:
        tl.static_assert(ACTIVATION == "identity")
        d = tl.full(h.shape, 1.0, tl.float32)
    return d


@triton.jit
def times_derivative(g, d, ACTIVATION: tl.constexpr):
    """g * d with such a derivative d. What a mask takes out is 0, whatever it was: of an infinity the product would be
    NaN."""
    if ACTIVATION == "relu" or ACTIVATION == "relu6" or ACTIVATION == "hardtanh":
        return tl.where(d == 0.0, 0.0, g)
    else:
        return g * d


@triton.jit
def keep_inside(h, dtype: tl.constexpr, ACTIVATION: tl.constexpr):
    """What is stored for h in dtype. Rounding to 16 bits may not carry h onto a bound of the activation: the
    derivative, which is read off the stored value, would then be 0 where it is 1."""
    if dtype != tl.float32:
        BF16: tl.constexpr = dtype == tl.bfloat16
        if ACTIVATION == "relu" or ACTIVATION == "leaky_relu" or ACTIVATION == "relu6":
            SMALLEST: tl.constexpr = 1e-38 if BF16 else 5.9604644775390625e-8
            h = tl.where((h > 0.0) & (h < SMALLEST), SMALLEST, h)
        # The type's neighbours of the bounds, towards 0.
        if ACTIVATION == "relu6":
            BELOW_6: tl.constexpr = 5.96875 if BF16 else 5.99609375
            h = tl.where((h < 6.0) & (h > BELOW_6), BELOW_6, h)
        if ACTIVATION == "hardtanh":
            BELOW_1: tl.constexpr = 0.99609375 if BF16 else 0.99951171875
            h = tl.where((h < 1.0) & (h > BELOW_1), BELOW_1, h)
            h = tl.where((h > -1.0) & (h < -BELOW_1), -BELOW_1, h)
    return h


@triton.jit
def row_sum(tiles, units):
    """The sum of each row over tiles (rows, n), of the units (n,) that there are. (rows, 1)"""
    total = tiles[0]
    for g in tl.static_range(1, len(tiles)):
        total += tiles[g]
    return tl.sum(tl.where(units[None, :], total, 0.0), axis=1, keep_dims=True)


@triton.jit
def products_of(left, right):
    """The products of the tiles of two tuples."""
    products = ()
    for g in tl.static_range(len(left)):
        products += (left[g] * right[g],)
    return products


@triton.jit
def normalise(tiles, units, count):
    """Layer norm without scale and shift, of rows that are `count` units of the tiles: (v - mean) * rstd, and rstd."""
    mean = row_sum(tiles, units) / count
    centred = ()
    for g in tl.static_range(len(tiles)):
        centred += (tiles[g] - mean,)
    variance = row_sum(products_of(centred, centred), units) / count
    rstd = 1.0 / tl.sqrt(variance + 1e-5)
    normed = ()
    for g in tl.static_range(len(tiles)):
        normed += (centred[g] * rstd,)
    return normed, rstd


@triton.jit
def normalise_backward(d, normed, rstd, units, count):
    """dL/dv from d = dL/dnormed: rstd * (d - mean(d) - normed * mean(d * normed))"""
    mean = row_sum(d, units) / count
    along = row_sum(products_of(d, normed), units) / count
    dv = ()
    for g in tl.static_range(len(d)):
        dv += ((d[g] - mean - normed[g] * along) * rstd,)
    return dv


@triton.jit
def add_to_sum(total, lost, part):
    """A sum over many steps: total + part, and what rounding has lost of it so far."""
    after = total + part
    came = after - total
    return after, lost + ((total - (after - came)) + (part - came))


@triton.jit
def sum_value(total, lost):
    return tl.where(tl.abs(total) < float("inf"), total + lost, total)


@triton.jit
def clamp_symmetric(v, limit):
    """max(min(v, limit), -limit), NaN kept."""
    v = tl.where(v > limit, limit, v)
    return tl.where(v < -limit, -limit, v)
