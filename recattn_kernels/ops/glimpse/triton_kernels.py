"""The Triton kernels of glimpse. Positions are in float64, values in float32; nothing is fused that decides on a pixel.

k and f are the bits of two float64 numbers, the size of a cell of the first scale and the factor between scales: Triton
would pass them as float32."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from recattn_kernels.triton_launch import kernel


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


@kernel
def forward_kernel(
    image_ptr, loc_ptr, zoom_ptr, out_ptr, B, C, H, W, G, S, M, N, k, f,
    image_stride_b, image_stride_c, image_stride_y, image_stride_x, loc_stride_b, loc_stride_g, loc_stride_x,
    zoom_stride_b, zoom_stride_g,
    MODE: tl.constexpr, PADDING: tl.constexpr, BLOCK: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    # out[i][j] = sum over y of wy(i, y) * sum over x of wx(j, x) * I[y][x], M x N cells of scale s of glimpse (b, g)
    glimpse = tl.program_id(0).to(tl.int64)
    c = tl.program_id(2).to(tl.int64)
    s, g, b = (glimpse % S).to(tl.int32), glimpse // S % G, glimpse // S // G
    x, y, size, valid = place(
        loc_ptr, zoom_ptr, b, g, s, loc_stride_b, loc_stride_g, loc_stride_x, zoom_stride_b, zoom_stride_g, k, f
    )
    cell = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cell < M * N
    rows = taps(cell // N, M, H, centre_of(y, H, PADDING), size, MODE, PADDING)
    columns = taps(cell % N, N, W, centre_of(x, W, PADDING), size, MODE, PADDING)
    plane = image_ptr + b * image_stride_b + c * image_stride_c
    out = box_mean(
        plane, image_stride_y, image_stride_x, H, W, rows, columns, cell < tl.where(valid, M * N, 0), PADDING, TAPS
    )
    out = tl.where(valid, out, float("nan"))
    tl.store(out_ptr + (glimpse * C + c) * M * N + cell, out.to(out_ptr.dtype.element_ty), mask=mask)


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


@kernel
def whole_forward_kernel(
    image_ptr, loc_ptr, zoom_ptr, out_ptr, B, C, H, W, G, S, M, N, k, f,
    image_stride_b, image_stride_c, image_stride_y, image_stride_x, loc_stride_b, loc_stride_g, loc_stride_x,
    zoom_stride_b, zoom_stride_g,
    MODE: tl.constexpr, PADDING: tl.constexpr, BLOCK: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    # The compatible modes: sums of whole pixels, row by row, divided at the end.
    glimpse = tl.program_id(0).to(tl.int64)
    c = tl.program_id(2).to(tl.int64)
    s, g, b = (glimpse % S).to(tl.int32), glimpse // S % G, glimpse // S // G
    x, y, _, valid = place(
        loc_ptr, zoom_ptr, b, g, 0, loc_stride_b, loc_stride_g, loc_stride_x, zoom_stride_b, zoom_stride_g, k, f
    )
    tall, wide = window_of(M, s, f), window_of(N, s, f)
    down, across = tall // M, wide // N
    top = start_of(y, H, H, M, tall, MODE)
    left = start_of(x, H if MODE == "kevinzakka" else W, W, N, wide, MODE)
    cell = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cell < M * N
    count = tl.where(valid, M * N, 0)
    plane = image_ptr + b * image_stride_b + c * image_stride_c
    total = tl.zeros((BLOCK,), tl.float32)
    for t in range(down * across):
        py, px = top + cell // N * down + t // across, left + cell % N * across + t % across
        seen = (cell < count) & (py >= 0) & (py < H) & (px >= 0) & (px < W)
        at = plane + py.to(tl.int64) * image_stride_y + px.to(tl.int64) * image_stride_x
        total += tl.load(at, mask=seen, other=0).to(tl.float32)
    out = tl.div_rn(total, tl.zeros((BLOCK,), tl.float32) + (down * across).to(tl.float32))
    out = tl.where(valid, out, float("nan"))
    tl.store(out_ptr + (glimpse * C + c) * M * N + cell, out.to(out_ptr.dtype.element_ty), mask=mask)


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
