"""The Triton kernels of glimpse's forward: one for the modes of exact boxes and taps, one for those of whole pixels."""

# mypy: ignore-errors

from __future__ import annotations

import triton.language as tl

from recattn_kernels.ops.glimpse.triton_windows import box_mean, centre_of, place, start_of, taps, window_of
from recattn_kernels.triton_launch import kernel


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
