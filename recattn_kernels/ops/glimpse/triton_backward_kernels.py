"""The Triton kernels of glimpse's backward: the gradient of the image, and that of the location and the zoom."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from recattn_kernels.ops.glimpse.triton_windows import (
    box_mean,
    centre_of,
    ends,
    place,
    shown,
    start_of,
    taps,
    weight,
    window_of,
)
from recattn_kernels.triton_launch import kernel


@triton.jit
def before(edge, p, pixels, PADDING: tl.constexpr):
    """How much of what shows pixel p lies before the edge."""
    if PADDING == "reflect":
        turns = tl.floor(edge / (2.0 * pixels))
        edge = edge - turns * (2.0 * pixels)
        return 2.0 * turns + part(edge, p) + part(edge, 2 * pixels - 1 - p)
    r = part(edge, p)
    if PADDING == "border":
        r += tl.where((p == 0) & (edge < 0.0), edge, 0.0)
        r += tl.where((p == pixels - 1) & (edge >= pixels), edge - pixels, 0.0)
    return r


@triton.jit
def part(edge, p):
    pixel = tl.floor(edge)
    return tl.where(pixel > p, 1.0, tl.where(pixel == p, edge - pixel, 0.0))


@triton.jit
def seen_as(pixel, p, pixels, PADDING: tl.constexpr):
    """Whether pixel, which may lie outside, shows p."""
    if PADDING == "border":
        pixel = tl.minimum(tl.maximum(pixel, 0.0), pixels - 1.0)
    if PADDING == "reflect":
        pixel = pixel - tl.floor(pixel / (2.0 * pixels)) * (2.0 * pixels)
        pixel = tl.minimum(pixel, 2.0 * pixels - 1.0 - pixel)
    return pixel == p


@triton.jit
def weights(j, p, cells, pixels, centre, size, MODE: tl.constexpr, PADDING: tl.constexpr):
    """w(j, p) of cells j by pixels p, 0 beyond the last cell."""
    a, b = ends(j, cells, centre, size, MODE)
    first = tl.floor(a)
    if MODE == "area":
        w = (before(b, p, pixels, PADDING) - before(a, p, pixels, PADDING)) / size
        w = tl.where(first == tl.floor(b), tl.where(seen_as(first, p, pixels, PADDING), 1.0, 0.0), w)
    else:
        w = tl.where(seen_as(first, p, pixels, PADDING), 1.0 - (a - first), 0.0)
        w += tl.where(seen_as(first + 1.0, p, pixels, PADDING), a - first, 0.0)
    return tl.where(j < cells, w, 0.0).to(tl.float32)


@triton.jit
def over(first, pixels, centre, size, cells, reach):
    """The range of cells that may lie over pixels from `first` on."""
    start = centre - cells * 0.5 * size
    low = tl.floor((first - reach - start) / size) - 1.0
    high = tl.floor((first + pixels + reach - start) / size) + 2.0
    return (
        tl.minimum(tl.maximum(low, 0.0), cells * 1.0).to(tl.int32),
        tl.minimum(tl.maximum(high, 0.0), cells * 1.0).to(tl.int32),
    )


@kernel
def image_kernel(
    grad_out_ptr, loc_ptr, zoom_ptr, grad_image_ptr, B, C, H, W, G, S, M, N, k, f,
    loc_stride_b, loc_stride_g, loc_stride_x, zoom_stride_b, zoom_stride_g,
    MODE: tl.constexpr, PADDING: tl.constexpr, SMOOTH: tl.constexpr, PIXELS: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    # dI[y][x] = sum over g, s, i, j of wy(i, y) dout[i][j] wx(j, x): a tile of pixels gathers from the windows over it
    across = tl.cdiv(W, PIXELS)
    tiles = tl.cdiv(H, PIXELS) * across
    b, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    c = tl.program_id(1).to(tl.int64)
    top, left = tile // across * PIXELS, tile % across * PIXELS
    py, px = top + tl.arange(0, PIXELS), left + tl.arange(0, PIXELS)
    total = tl.zeros((PIXELS, PIXELS), tl.float32)
    for at in range(G * S):
        g, s = (at // S).to(tl.int64), at % S
        x, y, size, valid = place(
            loc_ptr, zoom_ptr, b, g, s, loc_stride_b, loc_stride_g, loc_stride_x, zoom_stride_b, zoom_stride_g, k, f
        )
        if SMOOTH:
            cx, cy = centre_of(x, W, PADDING), centre_of(y, H, PADDING)
            reach = 0.0 if MODE == "area" else 1.0
        else:
            # Cells of whole pixels: boxes around the window's middle, no larger than it.
            tall, wide = window_of(M, s, f), window_of(N, s, f)
            cy = start_of(y, H, H, M, tall, MODE).to(tl.float64) + tall * 0.5
            cx = start_of(x, H if MODE == "kevinzakka" else W, W, N, wide, MODE).to(tl.float64) + wide * 0.5
            size, reach = (tall // M).to(tl.float64), 0.0
        wide_size = size if SMOOTH else (wide // N).to(tl.float64)
        i_first, i_last, j_first, j_last = 0, M, 0, N
        if PADDING == "zeros":
            # Cells that may lie over the tile; none where the window misses it.
            i_first, i_last = over(top, PIXELS, cy, size, M, reach)
            j_first, j_last = over(left, PIXELS, cx, wide_size, N, reach)
        if valid & (i_first < i_last) & (j_first < j_last):
            base = grad_out_ptr + (((b * G + g) * S + s) * C + c) * M * N
            for i0 in range(i_first, i_last, CELLS):
                i = i0 + tl.arange(0, CELLS)
                line = tl.zeros((CELLS, PIXELS), tl.float32)
                for j0 in range(j_first, j_last, CELLS):
                    j = j0 + tl.arange(0, CELLS)
                    mask = (i < M)[:, None] & (j < N)[None, :]
                    dout = tl.load(base + i[:, None] * N + j[None, :], mask=mask, other=0).to(tl.float32)
                    wx = weights(j[:, None], px[None, :], N, W, cx, wide_size, "area" if not SMOOTH else MODE, PADDING)
                    line = tl.dot(dout, wx, line, input_precision="ieee")
                wy = weights(i[None, :], py[:, None], M, H, cy, size, "area" if not SMOOTH else MODE, PADDING)
                total = tl.dot(wy, line, total, input_precision="ieee")
    at = ((b * C + c) * H + py[:, None]) * W + px[None, :]
    tl.store(grad_image_ptr + at, total.to(grad_image_ptr.dtype.element_ty), mask=(py < H)[:, None] & (px < W)[None, :])


@triton.jit
def pixel_at(j, cells, pixels, centre, size, upper, MODE: tl.constexpr, PADDING: tl.constexpr):
    """The pixel under the lower or the upper edge of cells j; -1: none."""
    a, b = ends(j, cells, centre, size, MODE)
    v = tl.floor(b) if upper and MODE == "area" else tl.floor(a) + (1.0 if upper else 0.0)
    if PADDING == "reflect":
        v = v - tl.floor(v / (2.0 * pixels)) * (2.0 * pixels)
        v = tl.minimum(tl.maximum(v, 0.0), 2.0 * pixels - 1.0)
    else:
        v = tl.minimum(tl.maximum(v, -1.0), pixels * 1.0)
    return shown(v.to(tl.int32), pixels, PADDING)


@triton.jit
def edge_line(plane_ptr, fixed, stride_fixed, stride, pixels, along, mask, PADDING: tl.constexpr):
    """sum over t of w(t) I[t][fixed], for one cell a lane; 0 where fixed is -1. along: the taps of the other axis."""
    lo, hi, last, head, tail, inner, left, right, extra = along
    first = tl.maximum(lo, 0) if PADDING == "zeros" else lo
    mask = mask & (fixed >= 0)
    count = tl.max(tl.where(mask, last - first + 1, 0))
    at = plane_ptr + fixed.to(tl.int64) * stride_fixed
    total = tl.zeros(mask.shape, tl.float32)
    for t in range(count):
        v = first + t
        w = weight(v, pixels, lo, hi, last, head, tail, inner, left, right, extra, PADDING)
        value = tl.load(at + shown(v, pixels, PADDING).to(tl.int64) * stride, mask=mask & (w != 0.0), other=0)
        total += value.to(tl.float32) * w
    return total


@kernel
def point_kernel(
    grad_out_ptr, image_ptr, loc_ptr, zoom_ptr, parts_ptr, B, C, H, W, G, S, M, N, k, f,
    image_stride_b, image_stride_c, image_stride_y, image_stride_x, loc_stride_b, loc_stride_g, loc_stride_x,
    zoom_stride_b, zoom_stride_g,
    MODE: tl.constexpr, PADDING: tl.constexpr, ZOOM: tl.constexpr, BLOCK: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    # dc = sum of dout * slope * (E[upper] - E[lower]), E the lines of pixels under the cells' edges, slope 1/k or 1;
    # dk = sum of dout * slope * (m (E[upper] - E[lower]) + E[upper] - out), without the last two in bilinear mode
    glimpse = tl.program_id(0).to(tl.int64)
    s, g, b = (glimpse % S).to(tl.int32), glimpse // S % G, glimpse // S // G
    x, y, size, valid = place(
        loc_ptr, zoom_ptr, b, g, s, loc_stride_b, loc_stride_g, loc_stride_x, zoom_stride_b, zoom_stride_g, k, f
    )
    cx, cy = centre_of(x, W, PADDING), centre_of(y, H, PADDING)
    dx, dy, dk = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    blocks = tl.cdiv(M * N, BLOCK)
    for at in range(C * blocks):
        c = (at // blocks).to(tl.int64)
        cell = at % blocks * BLOCK + tl.arange(0, BLOCK)
        mask = cell < tl.where(valid, M * N, 0)
        i, j = cell // N, cell % N
        rows, columns = taps(i, M, H, cy, size, MODE, PADDING), taps(j, N, W, cx, size, MODE, PADDING)
        plane = image_ptr + b * image_stride_b + c * image_stride_c
        dout = tl.load(grad_out_ptr + (glimpse * C + c) * M * N + cell, mask=mask, other=0).to(tl.float32)
        x_upper = pixel_at(j, N, W, cx, size, True, MODE, PADDING)
        x_lower = pixel_at(j, N, W, cx, size, False, MODE, PADDING)
        y_upper = pixel_at(i, M, H, cy, size, True, MODE, PADDING)
        y_lower = pixel_at(i, M, H, cy, size, False, MODE, PADDING)
        right = edge_line(plane, x_upper, image_stride_x, image_stride_y, H, rows, mask, PADDING)
        across = right - edge_line(plane, x_lower, image_stride_x, image_stride_y, H, rows, mask, PADDING)
        below = edge_line(plane, y_upper, image_stride_y, image_stride_x, W, columns, mask, PADDING)
        down = below - edge_line(plane, y_lower, image_stride_y, image_stride_x, W, columns, mask, PADDING)
        dx += (dout * across).to(tl.float64)
        dy += (dout * down).to(tl.float64)
        if ZOOM:
            middle = 0.0 if MODE == "area" else 0.5
            growth = (j + (middle - N * 0.5)) * across + (i + (middle - M * 0.5)) * down
            if MODE == "area":
                out = box_mean(plane, image_stride_y, image_stride_x, H, W, rows, columns, mask, PADDING, TAPS)
                growth += (right - out) + (below - out)
            dk += (dout * growth).to(tl.float64)
    slope = 1.0 / size if MODE == "area" else size * 0.0 + 1.0
    step = tl.cast(k, tl.float64, bitcast=True)
    for _ in range(s):
        step = step * tl.cast(f, tl.float64, bitcast=True)
    to = parts_ptr + glimpse * 3
    tl.store(to, (tl.sum(dx) * slope * (W * 0.5)).to(tl.float32))
    tl.store(to + 1, (tl.sum(dy) * slope * (H * 0.5)).to(tl.float32))
    tl.store(to + 2, (tl.sum(dk) * slope * step).to(tl.float32))
