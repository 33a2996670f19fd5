"""Walking over time in Triton: how a kernel with one lane a column keeps the loads of many steps in flight.

A block of STEPS steps is one (STEPS, BLOCK) tile, loaded and stored by one operation. As BLOCK is the number of lanes
of the program, a lane holds a whole column of the tile, and taking the tile apart into its steps moves no data. (STEPS
loads of (BLOCK,) would be the same machine code, but Triton's compile time is cubic in the number of accesses.)
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def log2(n):
    return n.bit_length() - 1


@triton.jit
def columns(B, H, BLOCK: tl.constexpr):
    """The row b, the unit h and the flat index b * H + h of each lane, and which lanes have a column."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    h = (first % H).to(tl.int32) + lane
    b = first // H + h // H
    left = B.to(tl.int64) * H - first
    return b, h % H, first + lane, lane < tl.minimum(left, BLOCK).to(tl.int32)


@triton.jit
def walk(ptr, T, stride_t, BACKWARDS: tl.constexpr):
    """Where the first step taken lies, of each lane (BLOCK,), and how far on the next one is."""
    stride = stride_t.to(tl.int64)
    if BACKWARDS:
        ptr += (T - 1) * stride
        stride = -stride
    return ptr, stride


@triton.jit
def tile_of(ptr, stride, STEPS: tl.constexpr):
    """Pointers to STEPS steps from ptr on. (STEPS, BLOCK)"""
    pointers = ptr[None, :] + tl.arange(0, STEPS)[:, None] * stride
    # Not true from one row to the next, but its one effect is that columns, not steps, run along the lanes, where
    # Triton 3.6 would have it the other way round. As no alignment is known, nothing wider than an element comes of it.
    return tl.max_contiguous(pointers, (1, ptr.shape[0]))


@triton.jit
def load_steps(ptr, stride, first, end, mask, STEPS: tl.constexpr):
    """Steps first to first + STEPS, those before end; ptr is at step first. (STEPS, BLOCK)"""
    step = first + tl.arange(0, STEPS)[:, None]
    return tl.load(tile_of(ptr, stride, STEPS), mask=mask[None, :] & (step < end))


@triton.jit
def store_steps(ptr, stride, first, end, mask, tile):
    STEPS: tl.constexpr = tile.shape[0]
    step = first + tl.arange(0, STEPS)[:, None]
    tl.store(tile_of(ptr, stride, STEPS), tile, mask=mask[None, :] & (step < end))


@triton.jit
def unstack(tile):
    """The rows of a (STEPS, BLOCK) tile, a power of two, as a tuple."""
    STEPS: tl.constexpr = tile.shape[0]
    BLOCK: tl.constexpr = tile.shape[1]
    parts = (tile,)
    for _ in tl.static_range(log2(STEPS)):
        halves = ()
        for i in tl.static_range(len(parts)):
            pair = tl.reshape(parts[i], (2, parts[0].shape[0] // 2, BLOCK))
            low, high = tl.split(tl.permute(pair, (1, 2, 0)))
            halves += (low, high)
        parts = halves
    rows = ()
    for i in tl.static_range(STEPS):
        rows += (tl.reshape(parts[i], (BLOCK,)),)
    return rows


@triton.jit
def stack(rows):
    """The inverse of unstack."""
    BLOCK: tl.constexpr = rows[0].shape[0]
    STEPS: tl.constexpr = len(rows)
    parts = ()
    for i in tl.static_range(STEPS):
        parts += (tl.reshape(rows[i], (1, BLOCK)),)
    for _ in tl.static_range(log2(STEPS)):
        wholes = ()
        for i in tl.static_range(len(parts) // 2):
            pair = tl.permute(tl.join(parts[2 * i], parts[2 * i + 1]), (2, 0, 1))
            wholes += (tl.reshape(pair, (2 * parts[0].shape[0], BLOCK)),)
        parts = wholes
    return parts[0]
