"""Where a glimpse's windows and cells lie, in Triton, and what each cell makes of the pixels in it.

Positions are in float64, values in float32; nothing is fused that decides on a pixel. k and f are the bits of two
float64 numbers, the size of a cell of the first scale and the factor between scales: Triton would pass them as float32.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place(loc_ptr, zoom_ptr, b, g, s, loc_stride_b, loc_stride_g, loc_stride_x, zoom_stride_b, zoom_stride_g, k, f):
    """x and y in loc's units, pixels a cell, and whether the glimpse is one."""
    at = loc_ptr + b * loc_stride_b + g * loc_stride_g
    x, y = tl.load(at), tl.load(at + loc_stride_x)
    valid = (tl.abs(x) < float("inf")) & (tl.abs(y) < float("inf"))
    size = tl.cast(k, tl.float64, bitcast=True)
    for _ in range(s):
        size = size * tl.cast(f, tl.float64, bitcast=True)
    if zoom_ptr is not None:
        zoom = tl.load(zoom_ptr + b * zoom_stride_b + g * zoom_stride_g)
        valid = valid & (zoom > 0) & (zoom < float("inf"))
        size = tl.where(valid, zoom.to(tl.float64) * size, 1.0)
    valid = valid & (size < float("inf"))
    return tl.where(valid, x, 0.0), tl.where(valid, y, 0.0), tl.where(valid, size, 1.0), valid


@triton.jit
def centre_of(at, pixels, PADDING: tl.constexpr):
    """In pixels, where a window around it is near the image."""
    centre = (at.to(tl.float64) + 1.0) * 0.5 * pixels
    if PADDING == "reflect":
        for _ in tl.static_range(3):  # what rounding has left of a far one
            centre = centre - tl.floor(centre / (2.0 * pixels)) * (2.0 * pixels)
        return tl.minimum(tl.maximum(centre, 0.0), 2.0 * pixels)
    return tl.minimum(tl.maximum(centre, -1073741824.0), 1073741824.0)


@triton.jit
def ends(j, cells, centre, size, MODE: tl.constexpr):
    """Where cells j begin and end; a tap of bilinear mode is a cell of one pixel."""
    m = j.to(tl.float64) - cells * 0.5
    if MODE == "area":
        return centre + m * size, centre + (m + 1.0) * size
    a = centre + (m + 0.5) * size - 0.5
    return a, a + 1.0


@triton.jit
def taps(j, cells, pixels, centre, size, MODE: tl.constexpr, PADDING: tl.constexpr):
    """The first pixel that cells j see, which may lie outside, the last of their boxes, and the last that is seen; the
    weights of the first, of the box's last, of those between, of all left and right of the image, and of every pixel
    besides."""
    a, b = ends(j, cells, centre, size, MODE)
    first = tl.floor(a)
    after = tl.floor(b) if MODE == "area" else first + 1.0
    fa, fb = a - first, b - after
    if MODE == "area":
        head, tail, inner = (1.0 - fa) / size, fb / size, 1.0 / size
        head = tl.where(first == after, 1.0, head)
    else:
        head, tail, inner = 1.0 - fa, fa, size * 0.0
    left, right, extra = fa * 0.0, fa * 0.0, fa * 0.0
    if PADDING == "reflect":
        turn = 2.0 * pixels
        whole = tl.floor((after - first) / turn)
        lo = tl.minimum(tl.maximum(first - tl.floor(first / turn) * turn, 0.0), turn - 1.0)
        hi = lo + tl.minimum(tl.maximum(after - first - whole * turn, 0.0), turn - 1.0)
        head = tl.where((whole > 0.0) & (lo == hi), (fb - fa) / size, head)
        extra = whole / size
        last = tl.where(whole > 0.0, lo + turn - 1.0, hi)
    else:
        lo = tl.minimum(tl.maximum(first, -1.0), pixels * 1.0)
        hi = tl.minimum(tl.maximum(after, -1.0), pixels * 1.0)
        last = hi
        if PADDING == "border":
            if MODE == "area":
                left = (tl.minimum(b, 0.0) - tl.minimum(a, 0.0)) / size
                right = (tl.maximum(b, pixels * 1.0) - tl.maximum(a, pixels * 1.0)) / size
            else:
                left = tl.where(first < 0.0, head, 0.0) + tl.where(after < 0.0, tail, 0.0)
                right = tl.where(first >= pixels, head, 0.0) + tl.where(after >= pixels, tail, 0.0)
    return (
        lo.to(tl.int32), hi.to(tl.int32), last.to(tl.int32), head.to(tl.float32), tail.to(tl.float32),
        inner.to(tl.float32), left.to(tl.float32), right.to(tl.float32), extra.to(tl.float32),
    )  # fmt: skip


@triton.jit
def weight(v, pixels, lo, hi, last, head, tail, inner, left, right, extra, PADDING: tl.constexpr):
    w = tl.where(v == lo, head, tl.where(v == hi, tail, tl.where(v < hi, inner, 0.0)))
    if PADDING == "zeros":
        return tl.where((v >= 0) & (v < pixels) & (v <= last), w, 0.0)
    if PADDING == "border":
        w = tl.where(v < 0, left, tl.where(v >= pixels, right, w))
        return tl.where(v <= last, w, 0.0)
    return tl.where(v <= last, w + extra, 0.0)


@triton.jit
def shown(v, pixels, PADDING: tl.constexpr):
    """The pixel that is seen at v; -1: none."""
    if PADDING == "zeros":
        return tl.where((v >= 0) & (v < pixels), v, -1)
    if PADDING == "border":
        return tl.minimum(tl.maximum(v, 0), pixels - 1)
    v = tl.where(v >= 2 * pixels, v - 2 * pixels, v)
    return tl.where(v < pixels, v, 2 * pixels - 1 - v)


@triton.jit
def box_mean(plane_ptr, stride_y, stride_x, H, W, rows, columns, mask, PADDING: tl.constexpr, TAPS: tl.constexpr):
    """sum over y, x of wy wx I[y][x], for one cell a lane; rows and columns: its taps in each axis."""
    y_lo, y_hi, y_last, y_head, y_tail, y_inner, y_left, y_right, y_extra = rows
    x_lo, x_hi, x_last, x_head, x_tail, x_inner, x_left, x_right, x_extra = columns
    y_first = tl.maximum(y_lo, 0) if PADDING == "zeros" else y_lo
    x_first = tl.maximum(x_lo, 0) if PADDING == "zeros" else x_lo
    y_count = tl.max(tl.where(mask, y_last - y_first + 1, 0))
    x_count = tl.max(tl.where(mask, x_last - x_first + 1, 0))
    t = tl.arange(0, TAPS)[None, :]
    total = tl.zeros((mask.shape[0], TAPS), tl.float32)
    for i in range(y_count):
        y = y_first + i
        wy = weight(y, H, y_lo, y_hi, y_last, y_head, y_tail, y_inner, y_left, y_right, y_extra, PADDING)
        row = plane_ptr + shown(y, H, PADDING).to(tl.int64)[:, None] * stride_y
        line = tl.zeros((mask.shape[0], TAPS), tl.float32)
        for first in range(0, x_count, TAPS):
            x = x_first[:, None] + first + t
            wx = weight(
                x, W, x_lo[:, None], x_hi[:, None], x_last[:, None], x_head[:, None], x_tail[:, None],
                x_inner, x_left[:, None], x_right[:, None], x_extra[:, None], PADDING,
            )  # fmt: skip
            # What has no weight is not read: it may be NaN.
            seen = mask[:, None] & (wy[:, None] != 0.0) & (wx != 0.0)
            value = tl.load(row + shown(x, W, PADDING).to(tl.int64) * stride_x, mask=seen, other=0)
            line += value.to(tl.float32) * wx
        total += line * wy[:, None]
    return tl.sum(total, 1)


@triton.jit
def window_of(n, s, f):
    for _ in range(s):
        n = (tl.cast(f, tl.float64, bitcast=True) * n).to(tl.int32)
    return n


@triton.jit
def start_of(at, seen, pixels, cells, window, MODE: tl.constexpr):
    """The window's first pixel, in the compatible mode's own float32 arithmetic."""
    if MODE == "kevinzakka":
        start = tl.floor(0.5 * ((at + 1.0) * seen.to(tl.float32))) - (window // 2).to(tl.float32)
    elif MODE == "tf":
        start = at * pixels.to(tl.float32) * 0.5 + pixels.to(tl.float32) * 0.5 - cells.to(tl.float32) * 0.5
        start = tl.where(start < 0, -tl.floor(-start), tl.floor(start))
    else:
        half = (window - 1) // 2
        room = (pixels + 2 * half - window).to(tl.float32)
        start = tl.floor(tl.minimum(tl.maximum((at + 1.0) * 0.5 * room, 0.0), room)) - half.to(tl.float32)
    return tl.minimum(tl.maximum(start, -window.to(tl.float32)), pixels.to(tl.float32)).to(tl.int32)
